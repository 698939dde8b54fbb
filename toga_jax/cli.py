"""Runs a verb: flags in, one JSON line out, a user's mistake in one line."""

import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from toga_jax import config, flags, metrics

USER_MISTAKE = 2


def run(
  verb: Callable[[config.Settings], dict[str, Any]],
  doc: str,
  argv: Sequence[str] | None = None,
) -> int:
  """Runs a verb and returns its exit code.

  Args:
    verb: does the work; its result is printed as one line of JSON on stdout.
    doc: the verb's module docstring, shown by --help.
    argv: program name and flags; sys.argv by default.

  Returns:
    0 done; 1 the run failed (non-finite numbers); 2 the user can mend it:
    bad input, no permission, full disk; 130 interrupted.
  """
  try:
    if not flags.parse(sys.argv if argv is None else argv):
      print(f'{doc.strip()}\n\n{flags.help_text()}')
      return 0
    result = verb(flags.settings())
  except config.UserError as e:
    metrics.say(f'error: {e}')
    return USER_MISTAKE
  except FloatingPointError as e:
    metrics.say(f'error: stopped, {e}; try a lower --learning_rate')
    return 1
  except OSError as e:
    if e.errno not in _USER_ERRNOS:
      raise
    metrics.say(f'error: {e.strerror}: {e.filename or "while writing"}')
    return USER_MISTAKE
  except KeyboardInterrupt:
    metrics.say('interrupted; the same command resumes')
    return 130
  print(json.dumps(result), flush=True)
  return 0


_USER_ERRNOS = (
  errno.ENOSPC,
  errno.EDQUOT,
  errno.EACCES,
  errno.EPERM,
  errno.EROFS,
  errno.ENOTDIR,
  errno.EISDIR,
)


def main(verb: Callable[[config.Settings], dict[str, Any]], doc: str) -> None:
  """`run` as a program: exits with its code."""
  code = run(verb, doc)
  sys.stdout.flush()
  sys.stderr.flush()
  if code == USER_MISTAKE:
    # Threads of a library must not hold up, or talk over, a refusal.
    os._exit(code)
  sys.exit(code)
