"""How a block reads an activation and multiplies it with weights.

The only place that knows what a weight is: a dense array, plain or seen
through channel masks and fake quantization (DESIGN 2), or a packed one.

  channels         weight         read                  project     prune
  None             dense          as it is              x @ w       as it is
  ChannelMasks     dense          zeroed, rounded       x @ Q(w)    zeroed
  PackedChannels   PackedLinear   gathered, rounded     by range    scattered
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from toga_jax import config
from toga_jax.quant import numerics, packed

Leaf = Any


@struct.dataclass
class ChannelMasks:
  """Binary decisions per channel, of one block or stacked [L, ...].

  Keys are group names of `budget.GROUPS`; a missing key means all kept (in
  `keep`) or none salient (in `salient`). Values are 0 or 1, floating point so
  that gradients pass.
  """

  keep: dict[str, Array] = struct.field(default_factory=dict)
  salient: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Gather:
  """Which channels an input group reads, in the order [low | high].

  `index` is None where the activation arrives in that order already: nothing
  was moved or cut, or the order is folded into the weights that produce it.
  """

  index: Leaf  # int32 [kept] into the activation, or None
  low: int = struct.field(pytree_node=False)  # channels of the low range
  high: int = struct.field(pytree_node=False)  # of the high one


@struct.dataclass
class PackedChannels:
  """What `ChannelMasks` became when a block was cut and packed.

  `write` holds where the outputs of o and down go in the residual stream; None
  where they are whole.
  """

  read: dict[str, Gather]  # input group -> what its linears see
  write: dict[str, Leaf]  # attn_out, mlp_out -> int32 [kept] or None
  width: int = struct.field(pytree_node=False)  # D, of the residual stream


Channels = ChannelMasks | PackedChannels | None


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
  x: Float[Array, 'B T C'], masks: Channels, group: str
) -> Float[Array, 'B T D']:
  """x with the group's dropped channels zero; eq. (3) at full width."""
  if isinstance(masks, PackedChannels):
    index = masks.write[group]
    if index is None:
      return x
    wide = jnp.zeros((*x.shape[:-1], masks.width), x.dtype)
    return wide.at[..., index].set(x, unique_indices=True)
  if masks is None or group not in masks.keep:
    return x
  return x * masks.keep[group].astype(x.dtype)


def read(
  x: Float[Array, 'B T C'],
  masks: Channels,
  group: str,
  quant: config.QuantConfig,
) -> Float[Array, 'B T K']:
  """What the linears of an input group see: x pruned, then rounded per token.

  Rounding before the cut is the same as after it: the scales look at kept
  channels only.
  """
  if masks is None:
    return x
  if isinstance(masks, PackedChannels):
    gather = masks.read[group]
    if gather.index is not None:
      x = x[..., gather.index]
    if not quant.acts_on:
      return x
    return numerics.fake_quant(
      x,
      jnp.asarray(np.arange(x.shape[-1]) >= gather.low, jnp.float32),
      jnp.ones(x.shape[-1]),
      low_bits=quant.act_low_bits,
      high_bits=quant.act_high_bits,
      group_size=quant.group_size,
      axis=-1,
    )
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
  w: Leaf,
  masks: Channels,
  group: str,
  quant: config.QuantConfig,
) -> Float[Array, 'B T O']:
  """`x @ Q(w)` for an x that `read` returned for the same group.

  Args:
    x: [B, T, I].
    w: dense [I, O], or packed.
    masks: what `read` was given.
    group: the input group of the linear.
    quant: bit widths of a masked model; a packed weight has its own.
  """
  if isinstance(w, packed.PackedLinear):
    return _project_packed(x, w)
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


def _project_packed(
  x: Float[Array, 'B T K'], w: packed.PackedLinear
) -> Float[Array, 'B T N']:
  """Range by range, each dequantized for the time of its product."""
  total, start = 0, 0
  for part in w.parts:
    stop = start + packed.channels(part)
    dense = packed.dequantize(part, x.dtype)
    total = total + jnp.einsum('BTK,NK->BTN', x[..., start:stop], dense)
    start = stop
  return total


@functools.partial(jax.jit, static_argnames='dtype')
def embedded(
  embed: Leaf, tokens: Int[Array, 'B T'], dtype: Any
) -> Float[Array, 'B T D']:
  """The rows of a dense or packed embedding [V, D]."""
  return packed.take_rows(embed, tokens, dtype)


def dense_rows(embed: Leaf, dtype: Any) -> Float[Array, 'V D']:
  """A dense or packed embedding as one array, for the time of a product."""
  return packed.dequantize(embed, dtype)
