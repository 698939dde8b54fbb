"""The verbs as Python functions; the command-line verbs are thin over these.

model = api.load('demo')
tokens = api.encode(model, 'demo', 'train')
spec = api.search_masks(model, tokens, quant, search, workdir)
api.perplexity(model, held_out, evaluation, spec).perplexity
"""

import dataclasses
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np

from toga_jax import budget, config, metrics
from toga_jax import spec as spec_lib
from toga_jax.ckpt import load as load_lib
from toga_jax.ckpt import store
from toga_jax.data import batches, text, tokenizer
from toga_jax.evals import drift as drift_lib
from toga_jax.evals import perplexity as perplexity_lib
from toga_jax.masks import baselines, calibration, harden, prior, space, trainer
from toga_jax.model import linear, llama, params
from toga_jax.surgery import assemble, prune

# Windows of the validation text that a search checks itself on, before and
# after hardening.
CHECK_WINDOWS = 8


@dataclasses.dataclass(frozen=True)
class Model:
  """A dense model with what belongs to it."""

  weights: params.LlamaParams
  cfg: config.ModelConfig
  tokenizer: tokenizer.Tokenizer
  fingerprint: str


def _dtype(name: str) -> jnp.dtype:
  if name == 'auto':
    name = 'float32' if jax.default_backend() == 'cpu' else 'bfloat16'
  return jnp.dtype(name)


def load(model: str, dtype: str = 'auto') -> Model:
  """Loads a model by path, Hub id or the name `demo`.

  Args:
    model: as for `--model`.
    dtype: 'float32', 'bfloat16', or 'auto': float32 on CPU, else bfloat16.

  Raises:
    UserError: anything wrong with the files, in one line.
  """
  source = load_lib.open_checkpoint(model)
  words = source.tokenizer()
  load_lib.check_vocab(words, source.config)
  return Model(
    weights=load_lib.load_params(source, _dtype(dtype)),
    cfg=source.config,
    tokenizer=words,
    fingerprint=source.fingerprint(),
  )


def encode(model: Model, data: str, split: text.Split) -> np.ndarray:
  """The tokens of a text named as for `--data`: [n] int32.

  Raises:
    UserError: the text is missing or empty, or the Hub is out of reach.
  """
  return model.tokenizer.encode(text.load_text(data, split))


def statistics(
  model: Model, tokens: np.ndarray, search: config.SearchConfig
) -> calibration.Stats:
  """RMS activation of every channel on `search.calibration_windows` windows."""
  windows = batches.calibration_windows(
    tokens,
    seed=search.seed,
    count=search.calibration_windows,
    seq_len=search.seq_len,
  )
  return calibration.activation_rms(model.weights, model.cfg, windows)


def search_quant(
  quant: config.QuantConfig, search: config.SearchConfig
) -> config.QuantConfig:
  """The bits a search sees: pruning alone is learned at 16.

  Cache and embeddings are rounded by compress, whatever the search found.
  """
  if search.kind == 'prune':
    quant = quant.unquantized()
  return dataclasses.replace(quant, kv_bits=config.OFF_BITS)


def rule_spec(
  model: Model,
  stats: calibration.Stats | None,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> spec_lib.CompressionSpec:
  """A spec nothing was trained for: nothing pruned, salient by rule.

  Args:
    model: the model it is for.
    stats: activation sizes; None makes nobody salient.
    quant: bit widths.
    search: budget and channel_multiple.
  """
  keep = baselines.keep_all(model.cfg)
  if stats is None:
    salient, rule = baselines.no_salient(model.cfg), 'none'
  else:
    budget.check_target(search, quant)
    harden.check_multiple(model.cfg, search.channel_multiple)
    share = baselines.salient_share(quant, search.budget)
    salient = baselines.activation_rule(
      stats, keep, share, search.channel_multiple
    )
    rule = 'activation'
  return spec_lib.CompressionSpec(
    cfg=model.cfg,
    quant=quant,
    keep=keep,
    salient=salient,
    fingerprint=model.fingerprint,
    made_by={'rule': rule},
  )


def search_masks(
  model: Model,
  tokens: np.ndarray,
  quant: config.QuantConfig,
  search: config.SearchConfig,
  workdir: pathlib.Path,
  check_tokens: np.ndarray | None = None,
) -> spec_lib.CompressionSpec:
  """Learns which channels to keep and which are salient.

  Args:
    model: the dense model; its weights stay as they are.
    tokens: training text.
    quant: bit widths.
    search: settings.
    workdir: holds checkpoints and metrics; a second call resumes.
    check_tokens: text to measure the decision on before and after hardening;
      None skips that.

  Returns:
    The hardened decision, budget met from below.

  Raises:
    UserError: the text is too short, or the budget cannot be met.
    FloatingPointError: the loss is not finite.
  """
  budget.check_target(search, quant)
  harden.check_multiple(model.cfg, search.channel_multiple)
  quant = search_quant(quant, search)
  stats = None
  if search.start == 'warm':
    metrics.say('search: measuring activations for the warm start')
    stats = statistics(model, tokens, search)
  start = prior.make(stats, cfg=model.cfg, quant=quant, search=search)
  logits = trainer.train(
    model.weights,
    start,
    tokens,
    workdir,
    cfg=model.cfg,
    quant=quant,
    search=search,
  )
  keep, salient, threshold = harden.harden(
    jax.tree.map(np.asarray, logits),
    cfg=model.cfg,
    quant=quant,
    search=search,
  )
  spec = spec_lib.CompressionSpec(
    cfg=model.cfg,
    quant=quant,
    keep=keep,
    salient=salient,
    fingerprint=model.fingerprint,
    made_by={'rule': 'learned', **dataclasses.asdict(search)},
  )
  _say_hardening(model, logits, spec, threshold, search, check_tokens)
  return spec


def _say_hardening(
  model: Model,
  logits: space.Tree,
  spec: spec_lib.CompressionSpec,
  threshold: float,
  search: config.SearchConfig,
  tokens: np.ndarray | None,
) -> None:
  """Shows budget, and perplexity where there is text, around hardening."""
  soft = trainer.deterministic_masks(model.cfg, logits, search)
  kept, salient = space.counts(model.cfg, soft)
  share = budget.linear_budget(model.cfg, spec.quant, kept, salient)
  before = [f'budget {float(share):.5f}']
  after = [f'budget {spec.size().linear_budget:.5f}']
  if tokens is not None:
    how = config.EvalConfig(max_windows=CHECK_WINDOWS, seq_len=search.seq_len)
    for line, masks in ((before, soft), (after, masks_of(spec))):
      measured = perplexity_lib.measure(
        model.weights, model.cfg, tokens, how, masks, spec.quant, 'check'
      )
      line.append(f'perplexity {measured.perplexity:.3f}')
  metrics.say(f'before hardening: {", ".join(before)}')
  metrics.say(
    f'after hardening: {", ".join(after)} (target {search.budget}, threshold '
    f'moved by {threshold:+.4f})'
  )


def masks_of(spec: spec_lib.CompressionSpec) -> linear.ChannelMasks:
  """A spec's decision as the masks the forward pass takes."""

  def as_floats(masks: spec_lib.Masks) -> dict[str, jax.Array]:
    return {g: jnp.asarray(m, jnp.float32) for g, m in masks.items()}

  return linear.ChannelMasks(
    keep=as_floats(spec.keep), salient=as_floats(spec.salient)
  )


def perplexity(
  model: Model,
  tokens: np.ndarray,
  how: config.EvalConfig,
  spec: spec_lib.CompressionSpec | None = None,
  what: str = 'evaluate',
  kv_bits: int = config.OFF_BITS,
) -> perplexity_lib.Perplexity:
  """Perplexity of the dense model, or of a spec by fake quantization.

  Args:
    model: the dense model.
    tokens: the text.
    how: the protocol.
    spec: a decision to see the model through; None for the dense model.
    what: name shown with the progress.
    kv_bits: of the key-value cache, either way.

  Raises:
    UserError: the spec is another model's, or the text is too short.
  """
  masks, quant = None, llama.FULL_PRECISION
  if spec is not None:
    spec.check_model(model.fingerprint)
    masks, quant = masks_of(spec), spec.quant
  quant = dataclasses.replace(quant, kv_bits=kv_bits)
  return perplexity_lib.measure(
    model.weights, model.cfg, tokens, how, masks, quant, what
  )


@dataclasses.dataclass(frozen=True)
class Packed:
  """A packed model, on the device, with its manifest."""

  weights: params.LlamaParams
  manifest: store.Manifest


def compressed_spec(
  spec: spec_lib.CompressionSpec, quant: config.QuantConfig
) -> spec_lib.CompressionSpec:
  """The decision with the bits that are compress's own to choose.

  Widths and group size are what the decision was made for; cache, embeddings
  and zero points are not part of it.
  """
  names = ('kv_bits', 'embed_bits', 'symmetric')
  own = {name: getattr(quant, name) for name in names}
  return dataclasses.replace(spec, quant=dataclasses.replace(spec.quant, **own))


def compress_model(
  model: Model,
  tokens: np.ndarray | None,
  spec: spec_lib.CompressionSpec,
  how: config.CompressConfig,
  target: pathlib.Path,
  *,
  data: str = '',
  overwrite: bool = False,
) -> store.Manifest:
  """Applies a decision for good: cuts, reorders, rounds and packs the model.

  Args:
    model: the dense model.
    tokens: calibration text; may be None when no weight is quantized.
    spec: the decision, with all bits.
    how: options and calibration windows.
    target: the folder to write; `target.partial` holds finished blocks, and a
      second call resumes behind them.
    data: the calibration text's name, part of what the result depends on.
    overwrite: replace another packed model in `target`.

  Raises:
    UserError: the spec is another model's or cannot be packed; the text is too
      short; the disk is full; `target` holds another packed model; a weight or
      an activation is not finite.
  """
  spec.check_model(model.fingerprint)
  prune.check(spec)
  identity = _packed_identity(model, spec, how, data)
  if target.exists() and not overwrite:
    manifest = store.read_manifest(target)
    _refuse_other(target, manifest.identity, identity)
    metrics.say(f'{target} is there already; nothing to compress')
    return manifest
  windows = None
  if spec.quant.weights_on:
    assert tokens is not None
    windows = batches.calibration_windows(
      tokens, seed=how.seed, count=how.windows, seq_len=how.seq_len
    )
  folder = store.partial_folder(target, identity)
  store.check_room(folder, spec.size().total_bytes)
  settings = assemble.Settings(quant=spec.quant, how=how)
  embed = _save_embeddings(model, settings, folder)

  def finished(layer: int) -> params.PackedBlock | None:
    return _finished_part(folder, store.block_name(layer))

  count = model.cfg.num_layers
  progress = metrics.Progress('compress: block', count)
  made = assemble.blocks(
    model.weights, embed, spec, windows, settings, finished
  )
  for layer, block in enumerate(made):
    if not (folder / store.block_name(layer)).exists():
      store.save_part(folder, store.block_name(layer), block)
    progress.update(layer + 1, f'peak {metrics.peak_bytes() / 1e9:.2f} GB')
  return store.finish(folder, target, spec, identity)


def _save_embeddings(
  model: Model, settings: assemble.Settings, folder: pathlib.Path
) -> params.Leaf:
  """Rounds and stores what is outside the blocks; returns the embedding."""
  part = _finished_part(folder, store.EMBEDDINGS)
  if part is None:
    weights = model.weights
    part = {'embed': assemble.embedding(weights.embed, settings)}
    if weights.head is not None:
      part['head'] = assemble.embedding(weights.head, settings)
    norm = np.asarray(weights.final_norm)
    part['final_norm'] = norm.astype(settings.stored)
    store.save_part(folder, store.EMBEDDINGS, part)
  return jax.tree.map(jnp.asarray, part['embed'])


def _finished_part(folder: pathlib.Path, name: str):
  """A part that an earlier run finished, or None; a damaged one is redone."""
  if not (folder / name).exists():
    return None
  try:
    part = store.load_part(folder, name)
  except config.UserError as e:
    metrics.say(f'{name} is made again: {e}')
    shutil.rmtree(folder / name)
    return None
  metrics.say(f'compress: {name} is there already')
  return part


def _packed_identity(
  model: Model,
  spec: spec_lib.CompressionSpec,
  how: config.CompressConfig,
  data: str,
) -> dict[str, object]:
  """What the bits of a packed model depend on, as JSON gives it back."""
  return {
    'model': model.fingerprint,
    'spec': spec.digest(),
    **{f'--{k}': v for k, v in dataclasses.asdict(spec.quant).items()},
    **{f'--{k}': v for k, v in dataclasses.asdict(how).items()},
    '--data': data,
    'dtype': str(model.weights.final_norm.dtype),
  }


def _refuse_other(target: pathlib.Path, before: dict, now: dict) -> None:
  """Raises UserError when `target` was made otherwise."""
  changed = [
    f'{name} was {before.get(name, "not set")}, now {value}'
    for name, value in now.items()
    if before.get(name) != value
  ]
  if changed:
    raise config.UserError(
      f'{target} holds another packed model: {"; ".join(changed)}. Use another '
      '--workdir, or --overwrite to replace it'
    )


def load_packed(folder: pathlib.Path, dtype: str = 'auto') -> Packed:
  """Loads what `compress_model` wrote, every file checked.

  Args:
    folder: `workdir/packed`.
    dtype: of the arithmetic, as for `load`.

  Raises:
    UserError: it is not there, or a file is missing, cut short or damaged.
  """
  weights, manifest = store.load(folder)
  arithmetic = _dtype(dtype)

  def place(a: np.ndarray) -> jax.Array:
    # Scales stay in float16, the type they are stored in.
    return jnp.asarray(a, arithmetic if a.dtype == jnp.bfloat16 else None)

  return Packed(weights=jax.tree.map(place, weights), manifest=manifest)


def packed_perplexity(
  packed: Packed,
  tokens: np.ndarray,
  how: config.EvalConfig,
  kv_bits: int,
  what: str = 'packed',
) -> perplexity_lib.Perplexity:
  """Perplexity of a packed model.

  Raises:
    UserError: the text is too short.
  """
  manifest = packed.manifest
  quant = dataclasses.replace(manifest.quant, kv_bits=kv_bits)
  before = llama.packed_programs()
  result = perplexity_lib.measure(
    packed.weights, manifest.cfg, tokens, how, None, quant, what
  )
  metrics.say(
    f'{what}: {manifest.cfg.num_layers} blocks, '
    f'{llama.packed_programs() - before} compiled programs'
  )
  return result


def drift(
  model: Model,
  packed: Packed,
  tokens: np.ndarray,
  how: config.EvalConfig,
  kv_bits: int,
) -> drift_lib.Drift:
  """How far a packed model is from the dense one on `how.max_windows` windows.

  Raises:
    UserError: the packed model is another model's.
  """
  if packed.manifest.fingerprint != model.fingerprint:
    raise config.UserError('the packed model was made from another model')
  quant = dataclasses.replace(packed.manifest.quant, kv_bits=kv_bits)
  return drift_lib.measure(
    model.weights, packed.weights, model.cfg, tokens, how, quant
  )
