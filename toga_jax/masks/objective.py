"""The loss of the search: eq. (7), cross-entropy plus the budget term (6)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from toga_jax import budget, config
from toga_jax.masks import relax, space
from toga_jax.model import loss, params


def distance(
  value: Float[Array, ''], target: float, over_weight: float = 1.0
) -> Float[Array, '']:
  """R of eq. (6): log(max(b, B) / min(b, B)), 0 at the target.

  `over_weight` multiplies the over-budget side; 1 is the equation.
  """
  log_ratio = jnp.log(jnp.maximum(value, 1e-6) / target)
  return jnp.where(log_ratio > 0, over_weight, 1.0) * jnp.abs(log_ratio)


def search_loss(
  logits: space.Tree,
  weights: params.LlamaParams,
  tokens: Int[Array, 'B T'],
  key: Key[Array, ''],
  noise_scale: Float[Array, ''],
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> tuple[Float[Array, ''], dict[str, Array]]:
  """Eq. (7) for one batch; one mask sample feeds the loss and the budget.

  Returns:
    (loss, {'ce', 'budget', 'sparsity'}).
  """
  samples = relax.sample(logits, key, noise_scale, search.temperature)
  masks = space.to_masks(cfg, samples)
  kept, salient = space.counts(cfg, masks)
  share = budget.linear_budget(cfg, quant, kept, salient)
  pruned = budget.sparsity(cfg, kept)
  ce = loss.mean_loss(weights, cfg, tokens, masks, quant)
  penalty = distance(share, search.budget, search.over_budget_weight)
  if search.sparsity is not None:
    penalty += distance(
      1 - pruned, 1 - search.sparsity, search.over_budget_weight
    )
  total = ce + search.budget_weight * penalty
  return total, {'ce': ce, 'budget': share, 'sparsity': pruned}
