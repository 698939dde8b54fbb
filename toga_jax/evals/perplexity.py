"""Perplexity over non-overlapping windows of one long string."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from toga_jax import config, metrics
from toga_jax.data import batches
from toga_jax.model import linear, llama, loss, params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
  """exp of the mean next-token loss, and over how much text."""

  perplexity: float
  windows: int
  tokens: int  # predicted tokens


def measure(
  weights: params.LlamaParams,
  cfg: config.ModelConfig,
  tokens: np.ndarray,
  how: config.EvalConfig,
  masks: linear.ChannelMasks | None = None,
  quant: config.QuantConfig = llama.FULL_PRECISION,
  what: str = 'evaluate',
) -> Perplexity:
  """Perplexity of a model, dense or seen through masks.

  GPTQ's protocol by default: the text is one string, windows do not overlap,
  each predicts its tokens from the second on, the tail is dropped.

  Args:
    weights: the dense weights.
    cfg: the model's shape.
    tokens: [n] int32, the whole text.
    how: windows, context length, BOS, tail.
    masks: decisions, or None for the dense model.
    quant: bit widths seen through the masks.
    what: name shown with the progress.

  Raises:
    UserError: the text is shorter than one window, or BOS is asked of a model
      that has none.
    FloatingPointError: the loss of a window is not finite.
  """
  if how.bos and cfg.bos_id is None:
    raise config.UserError('--bos: this model has no BOS token')
  windows = batches.eval_windows(
    tokens,
    seq_len=how.seq_len,
    max_windows=how.max_windows,
    bos_id=cfg.bos_id if how.bos else None,
    tail=how.tail,
  )
  count = len(windows.tokens)
  progress = metrics.Progress(what, count, tokens=how.seq_len)
  losses = predicted = 0.0
  size = min(how.batch_size, count)
  for start in range(0, count, size):
    # The last batch is filled with windows of length 0, which weigh nothing.
    missing = max(start + size - count, 0)
    batch = np.pad(windows.tokens[start : start + size], ((0, missing), (0, 0)))
    lengths = np.pad(windows.lengths[start : start + size], (0, missing))
    loss_sums, counts = loss.window_losses(
      weights,
      jnp.asarray(batch),
      jnp.asarray(lengths),
      masks,
      cfg=cfg,
      quant=quant,
    )
    losses += float(np.sum(np.asarray(loss_sums, np.float64)))
    predicted += float(np.sum(np.asarray(counts)))
    done = min(start + size, count)
    metrics.check_finite({f'{what}: loss': losses}, done)
    progress.update(done, f'perplexity {math.exp(losses / predicted):.3f}')
  return Perplexity(
    perplexity=math.exp(losses / predicted),
    windows=count,
    tokens=int(predicted),
  )
