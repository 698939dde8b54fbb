"""The logits a search starts from: the paper's cold start, or a warm one.

A warm start ranks channels by the size of their activations, as the rules it
has to beat do, and puts the zero of the logits where the budget is met. The
hypernetwork's own output, near zero at first, is added to it.
"""

import jax.numpy as jnp
import numpy as np

from toga_jax import config
from toga_jax.masks import calibration, harden, space

SALIENT_SCALE = 1.5  # logits per standard deviation of log activation size


def make(
  stats: calibration.Stats | None,
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> space.Tree:
  """The prior as `search.start` asks for.

  Args:
    stats: RMS activation per group; needed for a warm start only.
    cfg: the model's shape.
    quant: bit widths the budget counts with.
    search: start, budget and what is decided.

  Raises:
    UserError: the budget cannot be met.
  """
  if search.start == 'cold':
    return _cold(cfg, search)
  return _warm(stats, cfg=cfg, quant=quant, search=search)


def _cold(cfg: config.ModelConfig, search: config.SearchConfig) -> space.Tree:
  """One logit for every decision: all kept, all salient (DISP-LLM)."""
  return {
    decision: {
      group: jnp.full((cfg.num_layers, n), search.offset)
      for group, n in groups.items()
    }
    for decision, groups in space.decisions(cfg, search).items()
  }


def _z_scores(size: np.ndarray) -> np.ndarray:
  """Standardised log sizes within each layer's group; [L, n] -> [L, n]."""
  logs = np.log(np.maximum(size, 1e-12))
  mean, deviation = logs.mean(-1, keepdims=True), logs.std(-1, keepdims=True)
  return (logs - mean) / np.maximum(deviation, 1e-6)


def _warm(
  stats: calibration.Stats,
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> space.Tree:
  tree = {'keep': {}, 'salient': {}}
  for decision, groups in space.decisions(cfg, search).items():
    for group, n in groups.items():
      size = stats[group]
      if size.shape[-1] != n:  # kv groups of heads: RMS over their channels
        parts = size.reshape(cfg.num_layers, n, -1)
        size = np.sqrt((parts**2).mean(-1))
      scores = _z_scores(size)
      if decision == 'salient':
        tree[decision][group] = SALIENT_SCALE * scores
      else:
        tree[decision][group] = search.offset + scores
  settings = {'cfg': cfg, 'quant': quant, 'search': search}
  _, _, threshold = harden.harden(tree, **settings)
  thresholds = {'keep': threshold, 'salient': threshold}
  if search.sparsity is not None:  # the keep logits have one of their own
    keep_only = {'keep': tree['keep'], 'salient': {}}
    _, _, thresholds['keep'] = harden.harden(keep_only, **settings)
  return {
    decision: {
      group: jnp.asarray(x - thresholds[decision], jnp.float32)
      for group, x in groups.items()
    }
    for decision, groups in tree.items()
  }
