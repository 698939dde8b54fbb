"""The verbs as a user runs them: programs, folders, crashes, mistakes."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from tests import tiny
from toga_jax.ckpt import store

STEPS = 12


@pytest.fixture(scope='module')
def files(tmp_path_factory) -> pathlib.Path:
  """A folder with a model and a text; its name has a space."""
  folder = tmp_path_factory.mktemp('my files')
  tiny.write_folder(folder / 'model')
  tiny.write_text(folder / 'text.txt')
  return folder


def _flags(files: pathlib.Path, workdir: pathlib.Path, *extra: str):
  return [
    f'--model={files / "model"}',
    f'--data={files / "text.txt"}',
    f'--eval_data={files / "text.txt"}',
    f'--workdir={workdir}',
    '--seq_len=32',
    '--eval_seq_len=32',
    '--max_eval_windows=6',
    '--eval_batch_size=4',
    f'--steps={STEPS}',
    '--checkpoint_every=3',
    '--channel_multiple=4',
    '--calibration_windows=4',
    '--act_low_bits=4',
    '--act_high_bits=8',
    *extra,
  ]


def _run(verb: str, flags: list[str]) -> subprocess.CompletedProcess:
  return subprocess.run(
    [sys.executable, '-m', verb, *flags],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    timeout=300,
  )


def _artefacts(workdir: pathlib.Path) -> tuple[bytes, bytes]:
  return (
    (workdir / 'spec.json').read_bytes(),
    (workdir / 'masks.npz').read_bytes(),
  )


def _error(run: subprocess.CompletedProcess) -> str:
  """The one line of a refusal; checks that it is one, and the exit code."""
  assert run.returncode == 2, run.stderr
  lines = [x for x in run.stderr.splitlines() if x.startswith('error: ')]
  assert len(lines) == 1, run.stderr
  assert 'Traceback' not in run.stderr
  assert run.stdout == ''
  return lines[0]


@pytest.fixture(scope='module')
def finished(files, tmp_path_factory) -> pathlib.Path:
  """The workdir of a run of the whole pipeline."""
  workdir = tmp_path_factory.mktemp('runs') / 'whole'
  run = _run('toga_jax', _flags(files, workdir))
  assert run.returncode == 0, run.stderr
  (workdir / 'stdout.txt').write_text(run.stdout)
  return workdir


def test_pipeline_prints_one_line_of_json_with_the_four_rows(finished):
  (line,) = (finished / 'stdout.txt').read_text().splitlines()
  rows = {r['name']: r for r in json.loads(line)['rows']}
  assert list(rows) == ['dense', 'uniform W4A4', 'activation rule', 'learned']
  assert rows['dense']['linear_budget'] == 1
  assert rows['uniform W4A4']['linear_budget'] == 0.25
  assert 0.27 < rows['learned']['linear_budget'] <= 0.28125
  assert all(r['windows'] == 6 and r['perplexity'] > 1 for r in rows.values())


def test_metrics_hold_every_step_once(finished):
  lines = (finished / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == list(range(STEPS))


def test_killed_search_ends_with_the_spec_of_an_uninterrupted_one(
  files, finished, tmp_path
):
  workdir = tmp_path / 'killed'
  flags = _flags(files, workdir)
  victim = subprocess.Popen(
    [sys.executable, '-m', 'toga_jax.search', *flags],
    stderr=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  metrics = workdir / 'metrics.jsonl'
  deadline = time.monotonic() + 240
  # Checkpoints are written behind the steps' back: kill when the first is
  # whole, whatever the search is doing by then.
  while not any(p.name.isdigit() for p in workdir.glob('state/*')):
    assert victim.poll() is None, 'ended before it could be killed'
    assert time.monotonic() < deadline
    time.sleep(0.002)
  victim.send_signal(signal.SIGKILL)
  victim.wait()
  assert not (workdir / 'spec.json').exists()
  again = _run('toga_jax.search', flags)
  assert again.returncode == 0, again.stderr
  assert 'resuming at step' in again.stderr
  assert _artefacts(workdir) == _artefacts(finished)
  lines = metrics.read_text().splitlines()
  assert [json.loads(x)['step'] for x in lines] == list(range(STEPS))
  straight = (finished / 'metrics.jsonl').read_text().splitlines()
  assert lines == straight


def test_finished_search_is_not_run_again(files, finished):
  before = _artefacts(finished)
  run = _run('toga_jax.search', _flags(files, finished))
  assert run.returncode == 0, run.stderr
  assert 'nothing to search' in run.stderr
  assert json.loads(run.stdout)['steps'] == STEPS
  assert _artefacts(finished) == before


def test_evaluate_measures_what_the_pipeline_measured(files, finished):
  run = _run('toga_jax.evaluate', _flags(files, finished))
  assert run.returncode == 0, run.stderr
  measured = json.loads(run.stdout)
  rows = json.loads((finished / 'stdout.txt').read_text())['rows']
  assert measured['name'] == 'masked'
  assert measured['perplexity'] == pytest.approx(rows[-1]['perplexity'])
  assert json.loads((finished / 'eval.json').read_text()) == measured


@pytest.mark.parametrize(
  ('change', 'says'),
  [
    ('--seed=1', '--seed was 0, now 1'),
    ('--low_bits=3', '--low_bits was 4, now 3'),
  ],
)
def test_changed_flag_is_refused_on_resume(files, finished, change, says):
  before = _artefacts(finished)
  error = _error(_run('toga_jax.search', _flags(files, finished, change)))
  assert says in error
  assert _artefacts(finished) == before


COMPRESS = ('--gptq_windows=8', '--gptq_seq_len=32', '--drift_windows=2')


@pytest.fixture(scope='module')
def searched(finished, tmp_path_factory) -> pathlib.Path:
  """A copy of the finished run, to compress in."""
  folder = tmp_path_factory.mktemp('compressed') / 'run'
  return pathlib.Path(shutil.copytree(finished, folder))


def _packed_arrays(workdir: pathlib.Path) -> list[bytes]:
  """All arrays of a packed model; its files also hold times of writing."""
  weights, _ = store.load(workdir / 'packed')
  return [np.asarray(a).tobytes() for a in jax.tree.leaves(weights)]


def test_compress_then_evaluate_measures_what_was_written(files, searched):
  flags = _flags(files, searched, *COMPRESS)
  run = _run('toga_jax.compress', flags)
  assert run.returncode == 0, run.stderr
  made = json.loads(run.stdout)
  assert made['packed'] == str(searched / 'packed')
  assert made['linear_budget'] <= 0.28125
  on_disk = sum(
    p.stat().st_size for p in (searched / 'packed').rglob('*') if p.is_file()
  )
  manifest = (searched / 'packed' / 'manifest.json').stat().st_size
  assert made['disk_bytes'] == on_disk - manifest

  run = _run('toga_jax.evaluate', flags)
  assert run.returncode == 0, run.stderr
  measured = json.loads(run.stdout)
  assert measured['name'] == 'packed'
  for key in ('linear_budget', 'bits_per_weight', 'total_bytes', 'disk_bytes'):
    assert measured[key] == made[key]
  assert 4 < measured['act_bits'] < 8
  assert measured['kv_bits'] == 16
  assert measured['drift']['windows'] == 2
  masked = json.loads((searched / 'rows.json').read_text())['rows']['learned']
  # GPTQ or nearest, a random model's perplexity stays about where it was.
  assert measured['perplexity'] == pytest.approx(masked['perplexity'], rel=0.2)
  assert '3 blocks' in run.stderr
  assert 'compiled programs' in run.stderr

  run = _run('toga_jax.evaluate', [*flags, '--kv_bits=2'])
  assert json.loads(run.stdout)['kv_bits'] == 2
  assert json.loads(run.stdout)['perplexity'] != measured['perplexity']


def test_killed_compress_resumes_at_its_block(files, searched, tmp_path):
  if not (searched / 'packed').exists():
    pytest.skip('needs the packed model of the test above')
  workdir = tmp_path / 'killed'
  shutil.copytree(
    searched, workdir, ignore=shutil.ignore_patterns('packed', '.lock')
  )
  flags = _flags(files, workdir, *COMPRESS)
  victim = subprocess.Popen(
    [sys.executable, '-m', 'toga_jax.compress', *flags],
    stderr=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  deadline = time.monotonic() + 240
  while not (workdir / 'packed.partial' / 'block_000').exists():
    assert victim.poll() is None, 'ended before it could be killed'
    assert time.monotonic() < deadline
    time.sleep(0.002)
  victim.send_signal(signal.SIGKILL)
  victim.wait()
  assert not (workdir / 'packed').exists()
  again = _run('toga_jax.compress', flags)
  assert again.returncode == 0, again.stderr
  assert 'block_000 is there already' in again.stderr
  assert _packed_arrays(workdir) == _packed_arrays(searched)


def test_compress_without_a_spec_is_refused(files, tmp_path):
  error = _error(_run('toga_jax.compress', _flags(files, tmp_path / 'no')))
  assert 'run the search first' in error
  assert not (tmp_path / 'no').exists()


def test_text_shorter_than_a_window_is_refused(files, tmp_path):
  short = tmp_path / 'short.txt'
  short.write_text('the of and')
  flags = _flags(files, tmp_path / 'run', f'--data={short}')
  assert '3 tokens' in _error(_run('toga_jax.search', flags))


def test_full_disk_is_one_line(files):
  if not pathlib.Path('/dev/full').exists():
    pytest.skip('no /dev/full here')
  run = subprocess.run(
    [
      sys.executable,
      '-c',
      'import sys\n'
      'from toga_jax import cli\n'
      'def verb(settings):\n'
      '  with open("/dev/full", "w") as f:\n'
      '    f.write("x" * 100000)\n'
      'cli.main(verb, "doc")\n',
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert 'No space left on device' in _error(run)
