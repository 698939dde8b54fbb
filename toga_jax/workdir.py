"""A run's folder: whose it is, what may resume it, one writer at a time."""

import contextlib
import fcntl
import importlib.metadata
import json
import pathlib
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

from toga_jax import config, spec

_PACKAGES = 'jax jaxlib flax optax orbax-checkpoint numpy'.split()
_IDENTITY = 'identity.json'


def _versions() -> dict[str, str]:
  """Versions of what a result depends on, and the commit when there is one."""
  versions = {'python': platform.python_version()}
  for name in ('toga_jax', *_PACKAGES):
    try:
      versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      versions[name] = 'not installed'
  source = pathlib.Path(__file__).parent
  versions['commit'] = 'unknown'
  if shutil.which('git'):
    git = subprocess.run(
      ['git', '-C', source, 'rev-parse', 'HEAD'],
      capture_output=True,
      text=True,
      check=False,
    )
    versions['commit'] = git.stdout.strip() or 'unknown'
  return versions


def _refuse_changes(folder: pathlib.Path, identity: Mapping[str, str]) -> None:
  """Raises UserError when the folder was started with other values."""
  path = folder / _IDENTITY
  if not path.exists():
    return
  before = json.loads(path.read_text())
  changed = [
    f'{name} was {before.get(name, "not set")}, now {value}'
    for name, value in identity.items()
    if before.get(name) != value
  ]
  if changed:
    raise config.UserError(
      f'{folder} holds another run: {"; ".join(changed)}. Use another '
      '--workdir, or --overwrite to start over'
    )


@contextlib.contextmanager
def opened(
  settings: config.Settings, fingerprint: str
) -> Iterator[pathlib.Path]:
  """The run folder, created or resumed, locked while the context lasts.

  Args:
    settings: workdir, overwrite, and the flags a result depends on.
    fingerprint: of the model.

  Yields:
    The folder; it holds run.cfg, versions.json and identity.json.

  Raises:
    UserError: it holds another run (names the flag), cannot be written, or
      another process is at work in it.
  """
  folder = pathlib.Path(settings.workdir)
  identity = {f'--{name}': value for name, value in settings.result_flags}
  identity['model fingerprint'] = fingerprint
  try:
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / '.lock').open('w')
  except OSError as e:
    raise config.UserError(
      f'--workdir={folder} cannot be written: {e.strerror}'
    ) from e
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
      raise config.UserError(
        f'{folder} is in use by another process; use another --workdir'
      ) from e
    if settings.overwrite:
      _clear(folder)
    _refuse_changes(folder, identity)
    for name, text in (
      ('run.cfg', settings.flagfile),
      ('versions.json', json.dumps(_versions(), indent=1) + '\n'),
      (_IDENTITY, json.dumps(identity, indent=1) + '\n'),
    ):
      spec.write_atomically(folder / name, text.encode())
    yield folder


def _clear(folder: pathlib.Path) -> None:
  """Deletes a run's files, and only in a folder that holds a run."""
  inside = [p for p in folder.iterdir() if p.name != '.lock']
  if inside and not (folder / _IDENTITY).exists():
    raise config.UserError(
      f'--overwrite: {folder} holds files but no run; it is left as it is'
    )
  # The identity goes last: cut short, the folder is still a run's.
  for path in sorted(inside, key=lambda p: p.name == _IDENTITY):
    if path.is_dir() and not path.is_symlink():
      shutil.rmtree(path)
    else:
      path.unlink()


def read_json(path: pathlib.Path, default: Any) -> Any:
  """Parsed JSON, or `default` when there is no such file."""
  return json.loads(path.read_text()) if path.exists() else default
