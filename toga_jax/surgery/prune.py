"""Cuts a block's weights down to the kept channels; eq. (3).

`F_prune(W, P_in, P_out) = P_in^T W P_out`, the P being columns of a permutation
matrix: here they also put the inputs in the order of `reorder`.
"""

import numpy as np
from jaxtyping import Float, Int, Shaped

from toga_jax import budget, config
from toga_jax import spec as spec_lib
from toga_jax.model import params
from toga_jax.surgery import reorder


def check(spec: spec_lib.CompressionSpec) -> None:
  """Raises UserError for a decision that no packed block can hold."""
  cfg = spec.cfg
  heads = spec.keep['attn_mid'].reshape(cfg.num_layers, cfg.num_kv_heads, -1)
  torn = np.flatnonzero((heads.any(-1) & ~heads.all(-1)).any(-1))
  if torn.size:
    raise config.UserError(
      f'spec: block {torn[0]} keeps a part of a kv group in attn_mid; heads go '
      f'in groups of {heads.shape[-1]} channels'
    )
  for group, count in spec.kept_counts().items():
    empty = np.flatnonzero(count == 0)
    if empty.size:
      raise config.UserError(
        f'spec: block {empty[0]} keeps no channel of {group}; at least one '
        'must stay'
      )


def kv_channels(
  cfg: config.ModelConfig, orders: reorder.Orders
) -> Int[np.ndarray, ' n']:
  """The outputs of k and v that belong to kept kv groups, ascending."""
  per_group = cfg.q_size // cfg.num_kv_heads
  groups = np.unique(orders['attn_mid'].channels // per_group)
  return (groups[:, None] * cfg.head_dim + np.arange(cfg.head_dim)).reshape(-1)


def ends(
  cfg: config.ModelConfig, linear: str, orders: reorder.Orders
) -> tuple[Int[np.ndarray, ' K'], Int[np.ndarray, ' N']]:
  """(inputs, outputs) of a packed linear as numbers of the dense model's.

  q, k and v keep the order of their outputs: RoPE pairs channels of a head.
  gate and up take the order in which down reads.
  """
  source, target = budget.LINEARS[linear]
  if linear in ('k', 'v'):
    outputs = kv_channels(cfg, orders)
  elif target == 'mlp_mid':
    outputs = orders[target].channels
  else:
    outputs = np.sort(orders[target].channels)
  return orders[source].channels, outputs


def cut(
  w: Float[np.ndarray, 'I O'],
  inputs: Int[np.ndarray, ' K'],
  outputs: Int[np.ndarray, ' N'],
) -> Float[np.ndarray, 'N K']:
  """The weight that is left, outputs first as packed weights have them."""
  return w[np.ix_(inputs, outputs)].T


def restore(
  cut_weight: Shaped[np.ndarray, 'N K'],
  inputs: Int[np.ndarray, ' K'],
  outputs: Int[np.ndarray, ' N'],
  shape: tuple[int, int],
) -> Shaped[np.ndarray, 'I O']:
  """Undoes `cut` at full width; what was pruned is 0."""
  w = np.zeros(shape, cut_weight.dtype)
  w[np.ix_(inputs, outputs)] = cut_weight.T
  return w


def bias_outputs(
  cfg: config.ModelConfig, name: str, orders: reorder.Orders
) -> Int[np.ndarray, ' N']:
  """The kept entries of `q_bias`, `k_bias` or `v_bias`."""
  return ends(cfg, name.removesuffix('_bias'), orders)[1]


def unpruned_fields(cfg: config.ModelConfig) -> list[str]:
  """Fields of `LayerParams` that stay whole: they act on full widths."""
  return [n for n in params.layer_shapes(cfg) if n.endswith('_norm')]
