"""From logits to the final decision: deterministic, budget met from below."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import numpy as np

from toga_jax import budget, config

Tree = Mapping[str, Mapping[str, np.ndarray]]

BISECTIONS = 60  # halvings of the threshold's range: float64 to its last bit


def check_multiple(cfg: config.ModelConfig, multiple: int) -> None:
  """Raises UserError unless `multiple` divides every width that is cut."""
  widths = budget.group_widths(cfg)
  if any(n % multiple for n in widths.values()):
    best = int(np.gcd.reduce(list(widths.values())))
    raise config.UserError(
      f'--channel_multiple={multiple} does not divide the widths '
      f'{sorted(set(widths.values()))}; use {best} or a divisor of it'
    )


def round_counts(
  counts: np.ndarray, multiple: int, least: int, most: np.ndarray | int
) -> np.ndarray:
  """Counts rounded to the nearest multiple, within [least, most]."""
  nearest = (counts + multiple // 2) // multiple * multiple
  return np.clip(nearest, least, most)


def top(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """[L, C] bool: the `counts[l]` largest of each row; ties: lower channel."""
  order = np.argsort(-scores, axis=-1, kind='stable')
  rank = np.argsort(order, axis=-1, kind='stable')
  return rank < counts[:, None]


@dataclasses.dataclass(frozen=True)
class _Decider:
  """Applies thresholds to one set of logits."""

  cfg: config.ModelConfig
  quant: config.QuantConfig
  multiple: int
  logits: Tree

  def keep(self, threshold: float) -> dict[str, np.ndarray]:
    """group -> [L, width] bool at a threshold on the keep logits."""
    masks = {}
    for group, width in budget.group_widths(self.cfg).items():
      scores = self.logits['keep'].get(group)
      if scores is None:
        masks[group] = np.ones((self.cfg.num_layers, width), bool)
        continue
      # One attn_mid decision is a kv group of heads, many channels wide.
      per_decision = width // scores.shape[-1]
      step = self.multiple // math.gcd(self.multiple, per_decision)
      counts = round_counts(
        (scores > threshold).sum(-1), step, step, scores.shape[-1]
      )
      masks[group] = np.repeat(top(scores, counts), per_decision, axis=-1)
    return masks

  def salient(
    self, keep: Mapping[str, np.ndarray], threshold: float
  ) -> dict[str, np.ndarray]:
    """input group -> [L, width] bool, subsets of `keep`."""
    masks = {}
    for group in budget.INPUT_GROUPS:
      scores = self.logits['salient'].get(group)
      if scores is None:
        masks[group] = np.zeros_like(keep[group])
        continue
      scores = np.where(keep[group], scores, -np.inf)
      counts = round_counts(
        (scores > threshold).sum(-1), self.multiple, 0, keep[group].sum(-1)
      )
      masks[group] = top(scores, counts)
    return masks

  def share(self, keep: Mapping, salient: Mapping) -> float:
    """The exact `linear_budget`."""
    return float(
      budget.linear_budget(
        self.cfg,
        self.quant,
        {g: m.sum(-1) for g, m in keep.items()},
        {g: m.sum(-1) for g, m in salient.items()},
      )
    )

  def kept_share(self, keep: Mapping) -> float:
    """1 - sparsity."""
    return 1 - float(
      budget.sparsity(self.cfg, {g: m.sum(-1) for g, m in keep.items()})
    )


def _lowest_threshold(
  value: Callable[[float], float], target: float, scores: list[np.ndarray]
) -> float:
  """Smallest threshold with `value(threshold) <= target`.

  `value` falls as the threshold rises. Returns the top of the scores' range
  when even that is above the target: the caller checks.
  """
  finite = np.concatenate([s.ravel() for s in scores])
  low, high = float(finite.min()) - 1, float(finite.max()) + 1
  if value(low) <= target:
    return low
  for _ in range(BISECTIONS):
    middle = (low + high) / 2
    if value(middle) <= target:
      high = middle
    else:
      low = middle
  return high


def harden(
  logits: Tree,
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], float]:
  """The decision the search stands for, on the budget and on the multiples.

  One threshold for all logits starts at 0 and moves until the budget is met
  from below; every kept width and every precision boundary is a multiple of
  `search.channel_multiple`, at least one multiple is kept everywhere. With a
  fixed sparsity the keep logits get a threshold of their own first.

  Args:
    logits: decision tree of NumPy arrays [L, n].
    cfg: the model's shape.
    quant: bit widths the budget counts with.
    search: budget, sparsity, channel_multiple.

  Returns:
    (keep, salient, threshold): masks [L, width] bool, and how far the last
    threshold had to move from 0.

  Raises:
    UserError: no threshold meets the budget or the sparsity (says the nearest
      that can be had).
  """
  check_multiple(cfg, search.channel_multiple)
  decide = _Decider(cfg, quant, search.channel_multiple, logits)
  kept_scores = list(logits['keep'].values())
  salient_scores = list(logits['salient'].values())
  fixed = None
  if search.sparsity is not None:
    cut = _lowest_threshold(
      lambda t: decide.kept_share(decide.keep(t)),
      1 - search.sparsity,
      kept_scores,
    )
    fixed = decide.keep(cut)
    if decide.kept_share(fixed) > 1 - search.sparsity:
      raise config.UserError(
        f'--sparsity={search.sparsity} cannot be met: the largest here, with '
        f'--channel_multiple={search.channel_multiple}, is '
        f'{1 - decide.kept_share(fixed):.5f}'
      )
    if not salient_scores:
      return fixed, decide.salient(fixed, cut), cut

  def masks(threshold: float) -> tuple[dict, dict]:
    keep = fixed if fixed is not None else decide.keep(threshold)
    return keep, decide.salient(keep, threshold)

  scores = salient_scores + ([] if fixed is not None else kept_scores)
  threshold = _lowest_threshold(
    lambda t: decide.share(*masks(t)), search.budget, scores
  )
  keep, salient = masks(threshold)
  if decide.share(keep, salient) > search.budget:
    raise config.UserError(
      f'--budget={search.budget} cannot be met: the smallest here, with '
      f'--channel_multiple={search.channel_multiple}, is '
      f'{decide.share(keep, salient):.5f}'
    )
  return keep, salient, threshold
