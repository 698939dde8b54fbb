"""Quantizers to real integers, and the tensor they make.

The integers are for storing; what search multiplies is the fake-quantized
`numerics.py`. Scales are rounded to float16, the type they are stored in,
before any code is computed, so stored scale and codes agree.

Inside, weights are [in, out] and every input channel (column of the [out, in]
matrix) names its group; groups are rows of a [groups, out] table of scales.
That one layout covers per-channel scales, groups with a ragged end and ranges
of different widths, in one compiled program whatever the borders are.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Float16, Int, Int8

from toga_jax import config

Leaf = Any

# Smallest and largest positive float16; scales stay between them. Below the
# smallest, a group's weights are under 2^-17 even at 8 bits and round to zero.
MIN_SCALE, MAX_SCALE = 2.0**-24, 65504.0

CLIP_STEPS = 20
# Where the clip search stops, as a share of the largest magnitude, per bit
# width (index 0 and 1 unused). The best Gaussian step is 0.3 of the largest of
# 500 weights at 2 bits, 0.5 at 3 and 0.7 at 4; outliers need room below that.
_CLIP_FLOOR = (1, 1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@struct.dataclass
class QWeight:
  """Integers with scales: `w[n, k] ~ (q - zero)[n, k] * scale[n, g]`.

  Here `g = k // group_size`, or 0 for `group_size` 0, and `zero` [n, g] is 0
  where it is None. Codes are those of `packing.pack`: -2^(b-1) .. 2^(b-1) - 1
  and, at one bit, the sign -1 or +1. Zeros are codes too, so `pack` stores
  both, and a symmetric weight has the unsigned zero point 2^(b-1) of GPTQ.
  A scale may be negative; see `find_scales`.
  """

  q: Leaf  # int8 [N, K]
  scale: Leaf  # float16 [N, G]
  zero: Leaf = None  # int8 [N, G]
  bits: int = struct.field(pytree_node=False, default=8)
  group_size: int = struct.field(pytree_node=False, default=0)


def num_groups(k: int, group_size: int) -> int:
  """How many scales `k` input channels have; the last group may be ragged."""
  return -(-k // group_size) if group_size and k else min(k, 1)


def group_of_channel(k: int, group_size: int) -> Int[np.ndarray, ' k']:
  """The group of each of `k` input channels."""
  return np.arange(k, dtype=np.int32) // (group_size or max(k, 1))


def quantize_weight(
  w: Float[Array | np.ndarray, 'N K'],
  bits: int,
  group_size: int = 0,
  *,
  symmetric: bool = True,
  clip_search: bool = True,
  signed_scales: bool = True,
  power: float = 2.0,
  importance: Float[Array | np.ndarray, ' K'] | None = None,
) -> QWeight:
  """Rounds a weight to the nearest codes, without error compensation.

  Args:
    w: weight, output channels first.
    bits: 1 to 8.
    group_size: input channels per scale; 0 is one scale per output channel.
    symmetric: no zero points.
    clip_search: see `find_scales`, as `signed_scales` and `power`.
    importance: weight of each input channel's error in the search, at least
      0; the diagonal of a Hessian, say. Default: all alike.

  Returns:
    The quantized weight. NaN in `w` gives NaN scales for its groups: traced
    code cannot raise, so whoever stores scales checks that they are finite.

  Raises:
    ValueError: `bits` is not 1..8, or 1 and asymmetric.
  """
  check_bits(bits, symmetric)
  k = w.shape[1]
  if importance is None:
    importance = np.ones(k, np.float32)
  q, scale, zero = _quantize_weight(
    w,
    bits,
    symmetric,
    importance,
    group_size=group_size,
    clip_search=clip_search,
    signed_scales=signed_scales,
    power=power,
  )
  return QWeight(
    q=q,
    scale=scale,
    zero=None if symmetric else zero,
    bits=bits,
    group_size=group_size,
  )


@functools.partial(
  jax.jit,
  static_argnames=('group_size', 'clip_search', 'signed_scales', 'power'),
)
def _quantize_weight(
  w: Array,
  bits: Array,
  symmetric: Array,
  importance: Array,
  *,
  group_size: int,
  **search: Any,
) -> tuple[Array, Array, Array]:
  """Codes [N, K], scales and zeros [N, G]."""
  k = w.shape[1]
  groups = num_groups(k, group_size)
  group = jnp.asarray(group_of_channel(k, group_size))
  wt = w.T.astype(jnp.float32)  # [K, N]
  scale, zero = find_scales(
    wt,
    group,
    jnp.full(groups, bits),
    jnp.full(groups, symmetric),
    importance,
    **search,
  )
  q = encode(wt, as_float(scale)[group], as_float(zero)[group], bits)
  return q.astype(jnp.int8).T, scale.T, zero.T


def dequantize(
  weight: QWeight, dtype: jnp.dtype = jnp.float32
) -> Float[Array, 'N K']:
  """The weight that the codes stand for."""
  group = group_of_channel(weight.q.shape[1], weight.group_size)
  q = as_float(weight.q)
  if weight.zero is not None:
    q = q - as_float(weight.zero)[:, group]
  return (q * as_float(weight.scale)[:, group]).astype(dtype)


def check_bits(bits: int, symmetric: bool) -> None:
  """Raises ValueError for a width that no quantizer here has."""
  if bits not in range(1, 9):
    raise ValueError(f'{bits=}: expected 1..8')
  if bits == 1 and not symmetric:
    raise ValueError(
      'one-bit weights are sign times scale and have no asymmetric form; '
      'use symmetric=True or at least 2 bits'
    )


def as_float(x: Array | np.ndarray) -> Float[Array, '...']:
  """`x` in float32, in which all arithmetic here is done."""
  return jnp.asarray(x, jnp.float32)


def encode(
  w: Float[Array, '*#shape'],
  scale: Float[Array, '*#shape'],
  zero: Float[Array, '*#shape'],
  bits: Int[Array, '*#shape'] | int,
) -> Float[Array, '*shape']:
  """Eq. (1)'s integers, `clamp(round(w / s) + z, -2^(b-1), 2^(b-1) - 1)`.

  At one bit, the sign, with sign(0) = +1.
  """
  half = _half(bits)
  code = jnp.clip(jnp.round(w / scale) + zero, -half, half - 1)
  return jnp.where(jnp.asarray(bits) == 1, jnp.where(w >= 0, 1.0, -1.0), code)


def find_scales(
  w: Float[Array, 'K N'],
  group: Int[Array, ' K'],
  bits: Int[Array, ' G'],
  symmetric: Bool[Array, ' G'],
  importance: Float[Array, ' K'],
  *,
  clip_search: bool = True,
  signed_scales: bool = True,
  power: float = 2.0,
) -> tuple[Float16[Array, 'G N'], Int8[Array, 'G N']]:
  """Scales and zeros for groups of input channels.

  Without the search, nothing is clipped: `s = max|w| / (2^(b-1) - 1)`, or
  `(max - min) / (2^b - 1)` with zero points, 0 being always representable.
  The search tries `CLIP_STEPS` shrunken scales from that one down, in even
  steps, and keeps the first with the least `sum_k importance * |w - Q(w)|^p`.

  With `signed_scales` the symmetric search also tries each scale's negative.
  The code -2^(b-1) has no positive counterpart; a negative scale hands this
  extra level to the positive side where that fits the group better, as
  llama.cpp's Q4_0 does. Eq. (1) and every GEMM hold for either sign.

  At one bit the scale is the mean magnitude weighted by importance, which
  minimises the squared error: d/ds sum h (|w| - s)^2 = 0.

  Args:
    w: float32, input channels first; zero for padding.
    group: the group of each input channel; need not be sorted.
    bits: per group; `OFF_BITS` gets scale 1.
    symmetric: per group, whether its zero is fixed at 0.
    importance: at least 0, and 0 for channels that do not count.

  Returns:
    Scales, whose magnitude lies between the least and the largest positive
    float16, and zeros as codes. All-zero groups get scale 1; of one bit, scale
    0, as their codes cannot be 0.
  """
  groups = bits.shape[0]
  member = jax.nn.one_hot(group, groups, axis=0, dtype=jnp.float32)  # [G, K]
  top = jax.ops.segment_max(w, group, groups)  # [G, N]
  bottom = -jax.ops.segment_max(-w, group, groups)
  # Groups without members hold -inf.
  top, bottom = jnp.maximum(top, 0), jnp.minimum(bottom, 0)
  bits, symmetric = bits[:, None], symmetric[:, None]  # [G, 1]
  half = _half(bits)
  floor = jnp.asarray(_CLIP_FLOOR)[jnp.minimum(bits, 8)]
  signs = 2 if signed_scales else 1

  def candidate(shrink, sign):
    whole = jnp.where(
      symmetric,
      jnp.maximum(top, -bottom) / jnp.maximum(half - 1, 1),
      (top - bottom) / (2 * half - 1),
    )
    scale = _storable(shrink * whole)
    zero = jnp.clip(jnp.round(-shrink * bottom / scale), 0, 2 * half - 1) - half
    return (
      jnp.where(symmetric, sign * scale, scale),
      jnp.where(symmetric, 0, zero),
    )

  def group_sum(x):  # [K, N] -> [G, N]
    # A matrix product, several times faster on CPUs than a segment sum.
    weights = member * importance
    return jax.lax.dot(weights, x, precision=jax.lax.Precision.HIGHEST)

  def error(scale, zero):
    each, origin = scale[group], zero[group]  # [K, N]
    q = encode(w, each, origin, bits[group])
    gap = jnp.abs((q - origin) * each - w)
    return group_sum(gap * gap if power == 2 else gap**power)

  def step(i, best):
    shrink = 1 - (1 - floor) * (i // signs) / (CLIP_STEPS - 1)
    sign = 1 - 2 * (i % signs)
    trial = candidate(shrink, sign)
    trial = (error(*trial), *trial)
    better = trial[0] < best[0]
    return tuple(
      jnp.where(better, new, old) for new, old in zip(trial, best, strict=True)
    )

  scale, zero = candidate(1.0, 1)
  if clip_search:
    start = (jnp.full_like(scale, jnp.inf), scale, zero)
    _, scale, zero = jax.lax.fori_loop(0, CLIP_STEPS * signs, step, start)
  total = jnp.sum(member * importance, axis=1, keepdims=True)
  mean = group_sum(jnp.abs(w)) / jnp.maximum(total, 1e-30)
  scale = jnp.where(bits == 1, jnp.minimum(mean, MAX_SCALE), scale)
  scale = jnp.where(bits == config.OFF_BITS, 1, scale)
  return scale.astype(jnp.float16), zero.astype(jnp.int8)


def _half(bits: Int[Array, '...'] | int) -> Float[Array, '...']:
  """2^(bits-1) in float32; `bits` may be traced (and exp2 is not exact)."""
  return jnp.left_shift(1, jnp.asarray(bits) - 1).astype(jnp.float32)


def _storable(scale: Float[Array, '...']) -> Float[Array, '...']:
  """The scale as float16 will hold it, 1 for 0, never 0 nor infinite."""
  scale = jnp.where(scale == 0, 1, scale)
  scale = jnp.clip(scale, MIN_SCALE, MAX_SCALE)
  return scale.astype(jnp.float16).astype(jnp.float32)
