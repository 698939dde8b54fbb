"""How a block reads an activation and multiplies it with weights.

The only place that knows what a weight is. Here: dense arrays, plain or seen
through channel masks and fake quantization (DESIGN 2).
"""

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from toga_jax import config
from toga_jax.quant import numerics


@struct.dataclass
class ChannelMasks:
  """Binary decisions per channel, of one block or stacked [L, ...].

  Keys are group names of `budget.GROUPS`; a missing key means all kept (in
  `keep`) or none salient (in `salient`). Values are 0 or 1, floating point so
  that gradients pass.
  """

  keep: dict[str, Array] = struct.field(default_factory=dict)
  salient: dict[str, Array] = struct.field(default_factory=dict)


def _range_masks(
  masks: ChannelMasks, group: str, width: int
) -> tuple[Array, Array]:
  """(salient, keep) of a group as [C] arrays."""
  keep = masks.keep.get(group)
  salient = masks.salient.get(group)
  return (
    jnp.zeros(width) if salient is None else salient,
    jnp.ones(width) if keep is None else keep,
  )


def prune(
  x: Float[Array, 'B T C'], masks: ChannelMasks | None, group: str
) -> Float[Array, 'B T C']:
  """x with the group's dropped channels zeroed; eq. (3) at full width."""
  if masks is None or group not in masks.keep:
    return x
  return x * masks.keep[group].astype(x.dtype)


def read(
  x: Float[Array, 'B T C'],
  masks: ChannelMasks | None,
  group: str,
  quant: config.QuantConfig,
) -> Float[Array, 'B T C']:
  """What the linears of an input group see: x pruned, then rounded per token.

  Rounding before the cut is the same as after it: the scales look at kept
  channels only.
  """
  if masks is None:
    return x
  if quant.acts_on:
    salient, keep = _range_masks(masks, group, x.shape[-1])
    x = numerics.fake_quant(
      x,
      salient,
      keep,
      low_bits=quant.act_low_bits,
      high_bits=quant.act_high_bits,
      group_size=quant.group_size,
      axis=-1,
    )
  return prune(x, masks, group)


def project(
  x: Float[Array, 'B T I'],
  w: Float[Array, 'I O'],
  masks: ChannelMasks | None,
  group: str,
  quant: config.QuantConfig,
) -> Float[Array, 'B T O']:
  """`x @ Q(w)` for an x that `read` returned for the same group."""
  if masks is not None and quant.weights_on:
    salient, keep = _range_masks(masks, group, w.shape[0])
    w = numerics.fake_quant(
      w,
      salient,
      keep,
      low_bits=quant.low_bits,
      high_bits=quant.high_bits,
      group_size=quant.group_size,
      axis=0,
    )
  return x @ w
