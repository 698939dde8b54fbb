"""The order of channels in a packed block: kept ones, [low | high].

Within a range channels keep their order, so that groups of scales cover the
same channels here and in the masked model.

  group     its order is
  attn_in   a gather of the normalised residual stream
  attn_mid  a gather of the concatenated heads that are left. It cannot fold
            into v: [low | high] interleaves heads, and the query heads of a kv
            group, which share a value, may disagree on who is salient.
  mlp_in    a gather, as attn_in
  mlp_mid   folded into the outputs of gate and up, and the inputs of down
  *_out     ascending, whatever is kept; no linear reads them

Without reordering (an ablation) no channel moves. A GEMM still needs ranges
that are contiguous, so the precise range is then the last of the kept channels,
as many as there are salient ones, whichever they are: the layout without the
knowledge of who needs it. Leaving the salient channels where they are and
scattering the precision would give the numbers of the reordered model (but for
the members of groups), and no kernel could run it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from toga_jax import budget
from toga_jax import spec as spec_lib


class Order(NamedTuple):
  """A group's kept channels as they lie in a packed block."""

  channels: Int[np.ndarray, ' kept']  # numbers in the dense model
  low: int  # how many of them are in the low range, which comes first

  @property
  def high(self) -> int:
    """How many are in the high range."""
    return len(self.channels) - self.low


Orders = dict[str, Order]  # group -> its order, all six


def order(
  keep: Bool[np.ndarray, ' C'],
  salient: Bool[np.ndarray, ' C'],
  reorder: bool = True,
) -> Order:
  """[low | high] of one group, ascending within each.

  Args:
    keep: the channels that are not pruned.
    salient: the kept channels with more bits.
    reorder: False leaves the kept channels in place; see above.
  """
  low = np.flatnonzero(keep & ~salient)
  high = np.flatnonzero(keep & salient)
  channels = np.concatenate([low, high]) if reorder else np.flatnonzero(keep)
  return Order(channels, len(low))


def block_orders(
  spec: spec_lib.CompressionSpec, layer: int, reorder: bool = True
) -> Orders:
  """The orders of all six groups of a block."""
  orders = {}
  for group in budget.GROUPS:
    keep = spec.keep[group][layer]
    salient = np.zeros_like(keep)
    if group in spec.salient:
      salient = spec.salient[group][layer]
    orders[group] = order(keep, salient, reorder)
  return orders


def index(
  wanted: Int[np.ndarray, ' n'], arriving: Int[np.ndarray, ' m']
) -> Int[np.ndarray, ' n'] | None:
  """Where each wanted channel is among those arriving, which are ascending.

  Returns:
    int32, or None when the wanted channels are the arriving ones in their
    order.
  """
  if np.array_equal(wanted, arriving):
    return None
  return np.searchsorted(arriving, wanted).astype(np.int32)
