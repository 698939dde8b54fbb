import contextlib
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl.testing import flagsaver

from toga_jax import config, flags, workdir

FLAGS = (('steps', '400'), ('low_bits', '4'), ('sparsity', ''))
MODEL = 'f' * 64


def settings(folder, *, overwrite=False, **changes):
  return config.Settings(
    model='demo',
    data='demo',
    eval_data='demo',
    workdir=str(folder),
    quant=config.QuantConfig(),
    search=config.SearchConfig(),
    evaluation=config.EvalConfig(),
    overwrite=overwrite,
    result_flags=tuple((dict(FLAGS) | changes).items()),
    flagfile='--steps=400\n',
  )


def enter(folder, fingerprint=MODEL, **changes):
  """Opens and leaves the folder."""
  with workdir.opened(settings(folder, **changes), fingerprint) as path:
    return path


def names(folder):
  return sorted(p.name for p in folder.iterdir())


def test_a_new_folder_says_whose_it_is(tmp_path):
  folder = tmp_path / 'runs' / 'a'

  assert enter(folder) == folder

  assert (folder / 'run.cfg').read_text() == '--steps=400\n'
  assert json.loads((folder / 'identity.json').read_text()) == {
    '--steps': '400',
    '--low_bits': '4',
    '--sparsity': '',
    'model fingerprint': MODEL,
  }
  versions = json.loads((folder / 'versions.json').read_text())
  assert versions['jax'] == importlib.metadata.version('jax')
  assert versions['python'].split('.')[0] == '3'
  assert names(folder) == '.lock identity.json run.cfg versions.json'.split()


def test_versions_name_the_commit_or_say_unknown(tmp_path, monkeypatch):
  source = pathlib.Path(workdir.__file__).parent
  git = subprocess.run(
    ['git', '-C', source, 'rev-parse', 'HEAD'], capture_output=True, text=True
  )
  path = enter(tmp_path) / 'versions.json'
  expected = git.stdout.strip() or 'unknown'
  assert json.loads(path.read_text())['commit'] == expected

  monkeypatch.setenv('PATH', str(tmp_path))  # no git there
  enter(tmp_path)
  assert json.loads(path.read_text())['commit'] == 'unknown'


def test_the_same_flags_resume(tmp_path):
  state = enter(tmp_path) / 'state'
  state.write_text('half done')

  enter(tmp_path)

  assert state.read_text() == 'half done'


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'steps': '500'}, '--steps was 400, now 500. '),
    (
      {'steps': '500', 'low_bits': '3'},
      '--steps was 400, now 500; --low_bits was 4, now 3. ',
    ),
    ({'new_flag': 'x'}, '--new_flag was not set, now x. '),
    (
      {'fingerprint': 'e' * 64},
      f'model fingerprint was {"f" * 64}, now {"e" * 64}. ',
    ),
  ],
  ids='one two new model'.split(),
)
def test_another_run_is_refused_by_what_differs(tmp_path, changes, message):
  enter(tmp_path)
  before = (tmp_path / 'identity.json').read_bytes()

  with pytest.raises(config.UserError) as raised:
    enter(tmp_path, **changes)

  assert str(raised.value) == (
    f'{tmp_path} holds another run: {message}Use another --workdir, or '
    '--overwrite to start over'
  )
  assert (tmp_path / 'identity.json').read_bytes() == before


def test_overwrite_clears_a_run(tmp_path):
  folder, outside = tmp_path / 'run', tmp_path / 'outside'
  enter(folder)
  (folder / 'state' / '50').mkdir(parents=True)
  (folder / 'state' / '50' / 'data').write_text('x')
  (folder / 'spec.json').write_text('{}')
  outside.mkdir()
  (outside / 'kept').write_text('mine')
  (folder / 'link').symlink_to(outside)

  enter(folder, steps='500', overwrite=True)

  assert names(folder) == '.lock identity.json run.cfg versions.json'.split()
  assert json.loads((folder / 'identity.json').read_text())['--steps'] == '500'
  assert (outside / 'kept').read_text() == 'mine'


def test_overwrite_leaves_a_folder_that_holds_no_run(tmp_path):
  (tmp_path / 'thesis.tex').write_text('years of work')

  with pytest.raises(config.UserError, match='holds files but no run'):
    enter(tmp_path, overwrite=True)

  assert (tmp_path / 'thesis.tex').read_text() == 'years of work'
  assert names(tmp_path) == ['.lock', 'thesis.tex']


def test_overwrite_accepts_an_empty_or_absent_folder(tmp_path):
  enter(tmp_path, overwrite=True)
  enter(tmp_path / 'new', overwrite=True)

  assert (tmp_path / 'identity.json').exists()
  assert (tmp_path / 'new' / 'identity.json').exists()


def test_an_overwrite_cut_short_leaves_a_run_that_is_not_mixed_up(
  tmp_path, monkeypatch
):
  (enter(tmp_path) / 'state').mkdir()

  def interrupted(path):
    raise KeyboardInterrupt

  with monkeypatch.context() as patched:
    patched.setattr(shutil, 'rmtree', interrupted)
    with pytest.raises(KeyboardInterrupt):
      enter(tmp_path, steps='500', overwrite=True)

  # The state is still the run's of 400 steps, and the folder knows it.
  assert (tmp_path / 'state').exists()
  with pytest.raises(config.UserError, match='--steps was 400, now 500'):
    enter(tmp_path, steps='500')
  enter(tmp_path, steps='500', overwrite=True)
  assert not (tmp_path / 'state').exists()


@contextlib.contextmanager
def other_process(folder):
  """A process that holds the folder's lock."""
  script = (
    'import fcntl, sys; f = open(sys.argv[1], "w"); '
    'fcntl.flock(f, fcntl.LOCK_EX); print("held", flush=True); '
    'sys.stdin.read()'
  )
  process = subprocess.Popen(
    [sys.executable, '-c', script, folder / '.lock'],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    assert process.stdout.readline() == 'held\n'
    yield process


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path):
  enter(tmp_path)
  (tmp_path / 'spec.json').write_text('{}')

  with other_process(tmp_path) as process:
    with pytest.raises(config.UserError, match='in use by another process'):
      enter(tmp_path, overwrite=True)
    process.kill()

  assert (tmp_path / 'spec.json').exists()
  assert enter(tmp_path) == tmp_path


def test_the_lock_is_held_inside_and_released_after_a_failure(tmp_path):
  def fail_inside():
    with workdir.opened(settings(tmp_path), MODEL):
      with pytest.raises(config.UserError, match='in use by another process'):
        enter(tmp_path)
      raise RuntimeError('the search failed')

  with pytest.raises(RuntimeError, match='the search failed'):
    fail_inside()

  assert enter(tmp_path) == tmp_path


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
  (tmp_path / 'file').write_text('x')

  for path in (tmp_path / 'file', tmp_path / 'file' / 'run'):
    with pytest.raises(config.UserError) as raised:
      enter(path)
    assert str(raised.value).startswith(f'--workdir={path} cannot be written: ')

  assert (tmp_path / 'file').read_text() == 'x'


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
  # A mode of 0555 does not stop root, so the refusal is played.
  def denied(*args, **kwargs):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(pathlib.Path, 'open', denied)
  with pytest.raises(config.UserError) as raised:
    enter(tmp_path)

  assert str(raised.value) == (
    f'--workdir={tmp_path} cannot be written: Permission denied'
  )


def test_run_cfg_is_a_flagfile_that_gives_the_same_settings(tmp_path):
  argv = (
    f'x --workdir={tmp_path} --search=joint --budget=0.2 --sparsity=0.5 '
    '--bos --eval_data= --learning_rate=3e-4 --overwrite'
  ).split()
  with flagsaver.flagsaver():
    assert flags.parse(argv)
    ours = flags.settings()
    with workdir.opened(ours, MODEL):
      pass
  with flagsaver.flagsaver():
    assert flags.parse(['x', f'--flagfile={tmp_path / "run.cfg"}'])
    theirs = flags.settings()

  assert theirs.search == ours.search
  assert theirs.quant == ours.quant
  assert theirs.evaluation == ours.evaluation
  assert theirs.eval_data == ''
  assert theirs.result_flags == ours.result_flags
  assert theirs.flagfile == ours.flagfile
  # A run's own flagfile resumes it; it must not delete it.
  assert (ours.overwrite, theirs.overwrite) == (True, False)


def test_read_json_gives_a_default_for_what_is_not_there(tmp_path):
  path = tmp_path / 'rows.json'

  assert workdir.read_json(path, {'rows': 0}) == {'rows': 0}
  path.write_text('{"rows": 2}')
  assert workdir.read_json(path, {}) == {'rows': 2}
