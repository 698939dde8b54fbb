"""Packed weights as pytrees: codes in int32 words, scales, static sizes.

What `packing` does to codes, done to a whole linear. A linear's inputs lie in
ranges `[low | high]`; each range has its own words and scales.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from toga_jax.quant import packing, qtensor

Leaf = Any


@struct.dataclass
class PackedRange:
  """A `qtensor.QWeight` as it is stored: W = packed_words(k, bits).

  Zero points are packed along the outputs, like GPTQ's `qzeros`: along the few
  groups they would be mostly padding.
  """

  words: Leaf  # int32 [N, W]
  scale: Leaf  # float16 [N, G]
  zero: Leaf = None  # int32 [G, packed_words(N, bits)]
  bits: int = struct.field(pytree_node=False, default=8)
  k: int = struct.field(pytree_node=False, default=0)
  group_size: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class PackedLinear:
  """`y = x_0 @ W_0^T + x_1 @ W_1^T`, x cut along its channels into ranges.

  A range is a `PackedRange`, or a float array [N, K] where it has 16 bits.
  Ranges without channels are left out.
  """

  parts: tuple[Leaf, ...]

  @property
  def outputs(self) -> int:
    """N, the number of output channels."""
    return output_channels(self.parts[0])


def channels(part: Leaf) -> int:
  """K of a range: how many input channels it reads."""
  return part.k if isinstance(part, PackedRange) else part.shape[1]


def output_channels(part: Leaf) -> int:
  """N of a range."""
  return (part.words if isinstance(part, PackedRange) else part).shape[0]


def pack(weight: qtensor.QWeight) -> PackedRange:
  """Packs codes and zero points; scales stay as they are."""
  zero = weight.zero
  return PackedRange(
    words=packing.pack(weight.q, weight.bits),
    scale=weight.scale,
    zero=None if zero is None else packing.pack(zero.T, weight.bits),
    bits=weight.bits,
    k=weight.q.shape[1],
    group_size=weight.group_size,
  )


def unpack(part: PackedRange) -> qtensor.QWeight:
  """The codes, scales and zero points that `pack` was given."""
  zero = part.zero
  if zero is not None:
    zero = packing.unpack(zero, part.bits, part.words.shape[0]).T
  return qtensor.QWeight(
    q=packing.unpack(part.words, part.bits, part.k),
    scale=part.scale,
    zero=zero,
    bits=part.bits,
    group_size=part.group_size,
  )


def dequantize(
  part: Leaf, dtype: Any = jnp.float32
) -> Float[Array | np.ndarray, 'N K']:
  """The weights of a range: `(q - zero) * scale` in float32, then cast.

  NumPy in, NumPy out, and the same bits as on a device.
  """
  if not isinstance(part, PackedRange):
    return part.astype(dtype)
  weight = unpack(part)
  return _scaled(weight.q, weight.scale, weight.zero, part).astype(dtype)


def take_rows(
  part: Leaf, ids: Int[Array, '*n'], dtype: Any
) -> Float[Array, '*n K']:
  """Some rows of `dequantize(part)`; only these are unpacked."""
  if not isinstance(part, PackedRange):
    return jnp.take(part, ids, axis=0).astype(dtype)
  flat = ids.reshape(-1)
  zero = part.zero
  if zero is not None:
    zero = packing.unpack(zero, part.bits, part.words.shape[0]).T[flat]
  q = packing.unpack(part.words[flat], part.bits, part.k)
  rows = _scaled(q, part.scale[flat], zero, part)
  return rows.reshape(*ids.shape, part.k).astype(dtype)


def _scaled(
  q: Leaf, scale: Leaf, zero: Leaf | None, part: PackedRange
) -> Float[Array | np.ndarray, 'n K']:
  """(q - zero) * scale, group by group; no gather, which CPUs are slow at."""
  xp = np if isinstance(q, np.ndarray) else jnp
  n, k = q.shape
  groups = scale.shape[1]
  size = part.group_size or k
  wide = xp.pad(q.astype(np.float32), ((0, 0), (0, groups * size - k)))
  wide = wide.reshape(n, groups, size)
  if zero is not None:
    wide = wide - zero.astype(np.float32)[..., None]
  wide = wide * scale.astype(np.float32)[..., None]
  return wide.reshape(n, groups * size)[:, :k]
