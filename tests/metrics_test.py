import json
import math
import subprocess
import sys

import pytest

from toga_jax import metrics


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, steps, first_step=0, loss=0.5):
  log = metrics.JsonLines(path, first_step)
  for step in steps:
    log.write(step, {'loss': loss + step})
  return log


def test_a_line_per_step_is_there_at_once(tmp_path):
  path = tmp_path / 'metrics.jsonl'

  log = write(path, range(2))

  # Not closed yet: a crash loses no finished line.
  assert lines(path) == [{'step': 0, 'loss': 0.5}, {'step': 1, 'loss': 1.5}]
  log.close()


def test_a_resumed_run_drops_the_steps_it_redoes(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  write(path, range(5)).close()

  write(path, [3], first_step=3, loss=100.5).close()

  assert [line['step'] for line in lines(path)] == [0, 1, 2, 3]
  assert [line['loss'] for line in lines(path)] == [0.5, 1.5, 2.5, 103.5]


def test_a_run_from_the_start_keeps_no_line(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  write(path, range(5)).close()

  write(path, []).close()

  assert path.read_text() == ''


@pytest.mark.parametrize('half', ['{"step": 2, "lo', '\x00\x00\x00', '{'])
def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path, half):
  path = tmp_path / 'metrics.jsonl'
  write(path, range(2)).close()
  with path.open('a') as f:
    f.write(half)

  write(path, [2], first_step=9).close()

  assert [line['step'] for line in lines(path)] == [0, 1, 2]
  assert [p.name for p in tmp_path.iterdir()] == ['metrics.jsonl']


@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_with_its_step(value):
  with pytest.raises(FloatingPointError) as raised:
    metrics.check_finite({'ce': 1.0, 'grad_norm': value}, 17)

  assert str(raised.value) == f'step 17: grad_norm is {value}'


def test_finite_values_pass():
  assert metrics.check_finite({'ce': 1e30, 'budget': 0.0}, 3) is None


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [
    (0.0, '0:00'),
    (0.4, '0:00'),
    (59.6, '1:00'),
    (65.0, '1:05'),
    (3599.4, '59:59'),
    (3600.0, '1:00:00'),
    (7265.0, '2:01:05'),
    (90061.0, '25:01:01'),
  ],
)
def test_duration(seconds, text):
  assert metrics.duration(seconds) == text


def test_say_writes_one_line_to_stderr_only(capsys):
  metrics.say('hello')

  assert capsys.readouterr() == ('', 'hello\n')


def test_peak_memory_grows_with_what_is_used():
  script = (
    'from toga_jax import metrics; before = metrics.peak_bytes(); '
    "used = b'x' * 2**26; print(metrics.peak_bytes() - before)"
  )

  done = subprocess.run(
    [sys.executable, '-c', script], capture_output=True, text=True, check=True
  )

  assert 2**26 * 0.9 < int(done.stdout) < 2**26 * 1.2


@pytest.fixture
def clock(monkeypatch):
  """Seconds that pass only when a test says so."""
  time = [1000.0]
  monkeypatch.setattr(metrics.time, 'monotonic', lambda: time[0])
  return time


def test_the_rate_leaves_the_first_step_out(clock, capsys):
  progress = metrics.Progress('search', 100, tokens=512)
  clock[0] += 60  # compiles
  progress.update(1, 'ce 3.0')
  clock[0] += 10
  progress.update(11, 'ce 2.0')

  assert capsys.readouterr().err.splitlines() == [
    'search: first step after 60.0 s',
    'search 1/100  ce 3.0',
    'search 11/100  ce 2.0  512 tok/s  ETA 1:29',
  ]


def test_a_resumed_job_times_only_what_it_does_itself(clock, capsys):
  progress = metrics.Progress('search', 100, first=90)
  clock[0] += 6
  progress.update(91)
  clock[0] += 12
  progress.update(94)

  assert capsys.readouterr().err.splitlines() == [
    'search: first step after 6.0 s',
    'search 91/100',
    'search 94/100  ETA 0:24',
  ]


def test_lines_come_every_few_seconds_and_at_the_end(clock, capsys):
  progress = metrics.Progress('evaluate', 40)
  for done in range(1, 41):
    clock[0] += 1
    progress.update(done)

  said = [s.split()[1] for s in capsys.readouterr().err.splitlines()]
  numbers = [s for s in said if '/' in s]
  assert numbers == [f'{n}/40' for n in (5, 10, 15, 20, 25, 30, 35, 40)]
