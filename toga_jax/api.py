"""The verbs as Python functions; the command-line verbs are thin over these.

model = api.load('demo')
tokens = api.encode(model, 'demo', 'train')
spec = api.search_masks(model, tokens, quant, search, workdir)
api.perplexity(model, held_out, evaluation, spec).perplexity
"""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from toga_jax import budget, config, metrics
from toga_jax import spec as spec_lib
from toga_jax.ckpt import load as load_lib
from toga_jax.data import batches, text, tokenizer
from toga_jax.evals import perplexity as perplexity_lib
from toga_jax.masks import baselines, calibration, harden, prior, space, trainer
from toga_jax.model import linear, params

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
  """The bits a search sees: pruning alone is learned at 16."""
  return quant.unquantized() if search.kind == 'prune' else quant


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
) -> perplexity_lib.Perplexity:
  """Perplexity of the dense model, or of a spec by fake quantization.

  Raises:
    UserError: the spec is another model's, or the text is too short.
  """
  if spec is None:
    return perplexity_lib.measure(
      model.weights, model.cfg, tokens, how, what=what
    )
  spec.check_model(model.fingerprint)
  return perplexity_lib.measure(
    model.weights, model.cfg, tokens, how, masks_of(spec), spec.quant, what
  )
