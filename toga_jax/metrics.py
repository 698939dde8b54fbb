"""What a run says: JSON lines to a file, one readable line to stderr."""

import json
import math
import pathlib
import re
import resource
import sys
import time
from collections.abc import Mapping

SECONDS_BETWEEN_LINES = 5.0


def say(text: str) -> None:
  """One line to stderr, at once; stdout is for results."""
  print(text, file=sys.stderr, flush=True)


def peak_bytes() -> int:
  """Peak resident memory of this process so far."""
  status = pathlib.Path('/proc/self/status')
  # On Linux ru_maxrss begins with what the parent had when it started us.
  peak = status.exists() and re.search(r'VmHWM:\s+(\d+)', status.read_text())
  if peak:
    return int(peak[1]) * 1024
  scale = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def check_finite(values: Mapping[str, float], step: int) -> None:
  """Raises FloatingPointError naming the quantity and the step."""
  for name, value in values.items():
    if not math.isfinite(value):
      raise FloatingPointError(f'step {step}: {name} is {value}')


def duration(seconds: float) -> str:
  """'1:05' or '2:01:05'."""
  minutes, s = divmod(round(seconds), 60)
  hours, m = divmod(minutes, 60)
  return f'{hours}:{m:02}:{s:02}' if hours else f'{m}:{s:02}'


class JsonLines:
  """Appends one JSON object per line; a resumed run drops what it redoes."""

  def __init__(self, path: pathlib.Path, first_step: int = 0):
    """Keeps the lines of steps below `first_step`, whole ones only."""
    kept = []
    if path.exists():
      for line in path.read_text().splitlines():
        try:
          if json.loads(line)['step'] < first_step:
            kept.append(line + '\n')
        except json.JSONDecodeError:
          break  # the line a crash cut short
    partial = path.with_name(path.name + '.tmp')
    partial.write_text(''.join(kept))
    partial.replace(path)
    self._file = path.open('a', buffering=1)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Adds a line."""
    self._file.write(json.dumps({'step': step, **values}) + '\n')

  def close(self) -> None:
    """Flushes and closes the file."""
    self._file.close()


class Progress:
  """Rate and ETA of a counted job, one line every few seconds."""

  def __init__(self, what: str, total: int, first: int = 0, tokens: int = 0):
    """`tokens` is how many one count stands for; 0 leaves tokens/s out."""
    self._what, self._total, self._first = what, total, first
    self._tokens = tokens
    self._start = self._printed = time.monotonic()
    self._timed_from = first  # moved past the first count: it compiles

  def update(self, done: int, text: str = '') -> None:
    """Reports that `done` of `total` counts are finished."""
    now = time.monotonic()
    if self._timed_from == self._first and done > self._first:
      first_count = now - self._start
      self._start, self._timed_from = now, done
      say(f'{self._what}: first step after {first_count:.1f} s')
    due = now - self._printed >= SECONDS_BETWEEN_LINES
    if not due and done < self._total:
      return
    self._printed = now
    parts = [f'{self._what} {done}/{self._total}', text]
    counted = done - self._timed_from
    if counted > 0:
      rate = counted / max(now - self._start, 1e-9)
      if self._tokens:
        parts.append(f'{rate * self._tokens:,.0f} tok/s')
      parts.append(f'ETA {duration((self._total - done) / rate)}')
    say('  '.join(p for p in parts if p))
