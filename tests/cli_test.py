import errno
import json

import pytest
from absl import flags as absl_flags
from absl.testing import flagsaver

from toga_jax import cli, config, flags, search

DOC = """Does nothing.

  python -m toga_jax.nothing
"""
# Flags that change no search's outcome; every other one identifies a run.
NO_RESULT = (
  'workdir overwrite eval_data checkpoint_every subject max_eval_windows '
  'eval_seq_len eval_batch_size bos tail bench kv_bits embed_bits symmetric '
  'spec gptq reorder clip_search act_order damping gptq_windows gptq_seq_len '
  'drift_windows'
).split()


def names():
  """Every flag that toga_jax defines."""
  defined = absl_flags.FLAGS.flags_by_module_dict()[flags.__name__]
  return [flag.name for flag in defined]


@pytest.fixture(autouse=True)
def fresh_flags():
  """absl's flags are global: puts back what a test sets."""
  with flagsaver.flagsaver():
    yield


@pytest.fixture
def run(capsys):
  """Runs a verb: (exit code, lines of stdout, lines of stderr)."""

  def run(*argv, verb=lambda settings: {}):
    code = cli.run(verb, DOC, ['program', *argv])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()

  return run


def parsed(*argv):
  assert flags.parse(['program', *argv])
  return flags.settings()


def must_not_run(settings):
  raise AssertionError('the verb ran')


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--stepz=3', "Unknown command line flag 'stepz'. Did you mean: steps"),
    (
      '--search=all',
      '--search=all: value should be one of <quant|prune|joint>',
    ),
    ('--steps=many', '--steps=many: invalid literal for int()'),
    ('--budget=half', '--budget=half: could not convert string to float'),
    ('--overwrite=maybe', '--overwrite=maybe: '),
    ('--steps', 'Missing value for flag --steps'),
    ('--low_bits=0', '--low_bits=0: expected 1..8, or 16 for off'),
    ('--act_low_bits=9', '--act_low_bits=9: expected 1..8, or 16 for off'),
    ('--kv_bits=12', '--kv_bits=12: expected 1..8, or 16 for off'),
    ('--low_bits=8 --high_bits=4', '--low_bits=8 is above --high_bits=4'),
    ('--act_high_bits=8', '--act_low_bits=16 is above --act_high_bits=8'),
    ('--group_size=-1', '--group_size=-1: expected 0 or more'),
    ('--budget=0', '--budget=0.0: expected a number above 0'),
    ('--budget=-0.1', '--budget=-0.1: expected a number above 0'),
    ('--budget=1.1', '--budget=1.1: expected a share of the 16-bit linears'),
    ('--budget=nan', '--budget=nan: expected a number above 0'),
    ('--sparsity=half --search=joint', '--sparsity=half: expected a number'),
    ('--sparsity=0.5', '--sparsity contradicts --search=quant'),
    ('--sparsity=1 --search=prune', '--sparsity=1.0: expected 0 <= s < 1'),
    ('--steps=0', '--steps=0: expected a number above 0'),
    ('--seq_len=1', '--seq_len=1: expected at least 2'),
    ('--noise_fade=7', '--noise_fade=7.0: expected 0..1'),
    ('--eval_seq_len=1', '--eval_seq_len=1: expected at least 2'),
    ('--eval_batch_size=0', '--eval_batch_size >= 1'),
    ('stray', "'stray' is not a flag; flags begin with --"),
    ('--steps=3 stray --steps=4', "'stray' is not a flag"),
    ('steps=3', "'steps=3' is not a flag"),
    ('--flagfile=no/such.cfg', 'no/such.cfg'),
  ],
)
def test_a_bad_flag_is_one_line_and_exit_code_2(run, argv, message):
  code, out, err = run(*argv.split(), verb=must_not_run)

  assert code == 2
  assert out == []
  assert len(err) == 1
  assert err[0].startswith('error: ')
  assert message in err[0]


def test_a_flagfile_that_is_no_text_is_one_line(run, tmp_path):
  path = tmp_path / 'model.gguf'
  path.write_bytes(b'GGUF\xff\xfe')

  code, out, err = run(f'--flagfile={path}', verb=must_not_run)

  assert (code, out) == (2, [])
  assert len(err) == 1
  assert 'the flagfile is not a text file' in err[0]


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    ('--budget=0.2', '--budget=0.2 is outside what --search=quant'),
    (
      '--search=joint --sparsity=0.5 --budget=0.3',
      '--sparsity=0.5 leaves 0.500 of the weights',
    ),
    (
      '--search=prune --sparsity=0.5 --budget=0.3',
      '--sparsity=0.5 with --search=prune means --budget=0.5',
    ),
    (
      '--search=joint --salient=activation',
      '--salient=activation is a rule for --search=quant',
    ),
    ('--low_bits=16 --high_bits=16', '--low_bits=16 is off'),
  ],
)
def test_search_refuses_a_contradiction_before_it_loads_a_model(
  run, argv, message
):
  code, out, err = run(
    '--model=/no/such/model', *argv.split(), verb=search.main
  )

  assert (code, out) == (2, [])
  assert len(err) == 1
  assert message in err[0]


@pytest.mark.parametrize('flag', ['--help', '-h', '-help', '--helpfull'])
def test_help_lists_every_flag_and_runs_nothing(run, flag):
  code, out, err = run('--stepz=3', flag, verb=must_not_run)

  assert (code, err) == (0, [])
  assert out[0] == 'Does nothing.'
  listed = [s.split()[0] for s in out if s.startswith('  --')]
  assert sorted(listed) == sorted(f'--{name}' for name in names())
  assert len(listed) > 30
  assert any('{quant,prune,joint}' in s for s in out)
  assert any("(default: 'runs/demo')" in s for s in out)


def test_a_result_is_one_line_of_json(run):
  result = {'spec': 'runs/a "b"\n/spec.json', 'steps': 3, 'rows': [{'x': 0.5}]}

  code, out, err = run(verb=lambda settings: result)

  assert (code, err) == (0, [])
  assert len(out) == 1
  assert json.loads(out[0]) == result


def test_a_verb_gets_the_settings(run):
  seen = []

  def verb(settings):
    seen.append(settings)
    return {}

  assert run('--steps=7', '--search=prune', '--bos', verb=verb)[0] == 0

  (settings,) = seen
  assert settings.search.steps == 7
  assert settings.search.kind == 'prune'
  assert settings.evaluation.bos is True


@pytest.mark.parametrize(
  ('error', 'code', 'line'),
  [
    (config.UserError('no such model'), 2, 'error: no such model'),
    (
      OSError(errno.ENOSPC, 'No space left on device', 'runs/a/spec.json.tmp'),
      2,
      'error: No space left on device: runs/a/spec.json.tmp',
    ),
    (
      OSError(errno.ENOSPC, 'No space left on device'),
      2,
      'error: No space left on device: while writing',
    ),
    (
      PermissionError(errno.EACCES, 'Permission denied', 'runs'),
      2,
      'error: Permission denied: runs',
    ),
    (
      FloatingPointError('step 3: loss is nan'),
      1,
      'error: stopped, step 3: loss is nan; try a lower --learning_rate',
    ),
    (KeyboardInterrupt(), 130, 'interrupted; the same command resumes'),
  ],
  ids='user full_disk full_disk_no_name denied nan interrupt'.split(),
)
def test_a_failure_is_one_line_and_its_exit_code(run, error, code, line):
  def verb(settings):
    raise error

  assert run(verb=verb) == (code, [], [line])


@pytest.mark.parametrize(
  'error', [ValueError('a bug'), OSError(errno.EIO, 'I/O error'), KeyError('x')]
)
def test_a_bug_keeps_its_traceback(run, error):
  def verb(settings):
    raise error

  with pytest.raises(type(error)) as raised:
    run(verb=verb)

  assert raised.value is error


def test_the_defaults_are_those_of_the_dataclasses():
  settings = parsed()

  assert settings.search == config.SearchConfig()
  assert settings.quant == config.QuantConfig()
  assert settings.evaluation == config.EvalConfig()
  assert (settings.dtype, settings.subject) == ('auto', '')
  assert (settings.overwrite, settings.bench) == (False, 'search')


def test_every_number_arrives_where_it_belongs():
  numbers = {
    'steps': 3,
    'seq_len': 4,
    'batch_size': 5,
    'seed': 6,
    'channel_multiple': 7,
    'calibration_windows': 8,
    'checkpoint_every': 9,
    'learning_rate': 0.01,
    'weight_decay': 0.02,
    'budget_weight': 0.03,
    'over_budget_weight': 0.04,
    'temperature': 0.05,
    'offset': 0.06,
    'noise_fade': 0.07,
    'budget': 0.08,
    'sparsity': 0.09,
    'prune_heads': True,
  }
  bits = {
    'low_bits': 1,
    'high_bits': 2,
    'act_low_bits': 3,
    'act_high_bits': 4,
    'kv_bits': 5,
    'embed_bits': 6,
    'group_size': 7,
  }
  given = [f'--{name}={value}' for name, value in (numbers | bits).items()]

  settings = parsed(
    '--search=joint',
    '--salient=none',
    '--start=cold',
    *given,
    '--max_eval_windows=2',
    '--eval_seq_len=3',
    '--eval_batch_size=4',
    '--tail',
  )

  assert settings.search == config.SearchConfig(
    kind='joint', salient='none', start='cold', **numbers
  )
  assert settings.quant == config.QuantConfig(**bits)
  assert settings.evaluation == config.EvalConfig(
    max_windows=2, seq_len=3, batch_size=4, tail=True
  )


def test_an_empty_sparsity_is_none_and_zero_is_zero():
  assert parsed('--search=joint').search.sparsity is None
  assert parsed('--search=joint', '--sparsity=0').search.sparsity == 0.0


def test_what_follows_a_flagfile_overrides_it(tmp_path):
  base, cfg = tmp_path / 'base.cfg', tmp_path / 'x.cfg'
  base.write_text('# base\n--steps=5\n--seed=5\n--bos\n')
  cfg.write_text(f'--flagfile={base}\n--seed=6\n--low_bits=3\n')

  settings = parsed(f'--flagfile={cfg}', '--low_bits=2', '--nobos')

  assert settings.search.steps == 5
  assert settings.search.seed == 6
  assert settings.quant.low_bits == 2
  assert settings.evaluation.bos is False


def test_each_flag_identifies_a_run_or_is_known_not_to():
  identity = [name for name, _ in parsed().result_flags]

  assert sorted(identity + NO_RESULT) == sorted(names())


def test_the_same_number_written_otherwise_is_the_same_run():
  one = parsed('--learning_rate=1e-3', '--budget=.3').result_flags
  two = parsed('--learning_rate=0.001', '--budget=0.30').result_flags

  assert dict(one)['learning_rate'] == '0.001'
  assert one == two
