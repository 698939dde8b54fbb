"""Decisions by rule: what a learned one has to beat."""

import numpy as np

from toga_jax import budget, config
from toga_jax.masks import calibration, harden


def no_salient(cfg: config.ModelConfig) -> dict[str, np.ndarray]:
  """Uniform low bits: no salient channel anywhere."""
  widths = budget.group_widths(cfg)
  return {
    g: np.zeros((cfg.num_layers, widths[g]), bool) for g in budget.INPUT_GROUPS
  }


def keep_all(cfg: config.ModelConfig) -> dict[str, np.ndarray]:
  """Nothing pruned."""
  return {
    g: np.ones((cfg.num_layers, n), bool)
    for g, n in budget.group_widths(cfg).items()
  }


def salient_share(
  quant: config.QuantConfig, target: float, kept_share: float = 1.0
) -> float:
  """Share of salient channels that brings the kept weights to the budget."""
  if quant.high_bits == quant.low_bits:
    return 0.0
  bits = 16 * target / kept_share
  return (bits - quant.low_bits) / (quant.high_bits - quant.low_bits)


def activation_rule(
  stats: calibration.Stats,
  keep: dict[str, np.ndarray],
  share: float,
  multiple: int,
) -> dict[str, np.ndarray]:
  """Atom's rule: the same share of salient channels in every layer.

  The channels with the largest activations on calibration text are salient
  (Atom, section 4.1); counts are rounded down to `multiple`, so the budget is
  met from below.

  Args:
    stats: RMS activation per input group [L, width].
    keep: kept channels per group [L, width].
    share: salient share of the kept channels, 0..1.
    multiple: what the counts are multiples of.
  """
  masks = {}
  for group in budget.INPUT_GROUPS:
    size = np.where(keep[group], stats[group], -1.0)
    wanted = keep[group].sum(-1) * share + 1e-6  # 0.125 * 576 is 72, not 71.99
    counts = (wanted // multiple * multiple).astype(int)
    masks[group] = harden.top(size, counts)
  return masks
