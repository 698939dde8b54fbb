"""Fake quantization of two precision ranges, with gradients for the masks.

Eq. (8) of TOGA, `Q_h(W) * M + Q_l(W) * (1 - M)`, for weights (channels along
axis 0 of [in, out]) and for activations (channels along the last axis) alike:
one function, told which axis holds the channels. Scales of a range come from
the channels of that range only; that is the point of taking outliers out.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from toga_jax import config

TINY = 1e-12  # keeps 0/0 out of scales of all-zero channels


def qmax(bits: int) -> int:
  """Largest integer of a symmetric `bits`-bit code: 2^(b-1) - 1, at least 1."""
  return max(2 ** (bits - 1) - 1, 1)


def round_to_grid(
  x: Float[Array, '...'], scale: Float[Array, '...'], bits: int
) -> Float[Array, '...']:
  """Eq. (1): `clamp(round(x / s), -2^(b-1), 2^(b-1) - 1) * s`.

  One bit has no zero: sign(x) * s, with s the mean magnitude.
  """
  if bits == config.OFF_BITS:
    return x
  if bits == 1:
    return jnp.where(x >= 0, scale, -scale)
  top = qmax(bits)
  return jnp.clip(jnp.round(x / scale), -top - 1, top) * scale


def _along(v: Array, ndim: int, axis: int) -> Array:
  """Reshapes [C] to broadcast along `axis` of an array with `ndim` axes."""
  shape = [1] * ndim
  shape[axis] = -1
  return v.reshape(shape)


def _statistic(a: Array, members: Array, bits: int, axis: int) -> Array:
  """Scale of `members` of |x| `a`: max / qmax, or the mean for one bit."""
  inside = jnp.where(members, a, 0)
  if bits == 1:
    count = jnp.maximum(jnp.sum(members, axis=axis, keepdims=True), 1)
    return jnp.sum(inside, axis=axis, keepdims=True) / count
  return jnp.max(inside, axis=axis, keepdims=True) / qmax(bits)


def _range_scale(
  a: Array, keep: Array, members: Array, bits: int, group_size: int, axis: int
) -> Array:
  """Scale per channel of one range, broadcastable against `a`.

  Args:
    a: magnitudes |x|.
    keep: [C] bool, the channels that are not pruned.
    members: [C] bool, the kept channels in this range.
    bits: width of the range.
    group_size: channels a scale covers, counted along the range's members in
      ascending order (the packed order); 0 = the whole range.
    axis: the channel axis of `a`.

  Returns:
    For every channel, the scale it has in this range, or would have if it
    joined. A range without members takes the scale of all kept channels.
  """
  whole = _statistic(
    a,
    _along(jnp.where(jnp.any(members), members, keep), a.ndim, axis),
    bits,
    axis,
  )
  channels = a.shape[axis]
  if not 0 < group_size < channels:
    return jnp.maximum(whole, TINY)
  slot = jnp.cumsum(members) - members  # members before this channel
  groups = -(-channels // group_size)
  # Gather the range into padded slots [groups * group_size], reduce, and hand
  # each channel the scale of the group its slot lies in.
  source = jnp.full(groups * group_size, channels, jnp.int32)
  source = source.at[jnp.where(members, slot, groups * group_size)].set(
    jnp.arange(channels, dtype=jnp.int32), mode='drop'
  )
  padded = jnp.take(a, source, axis=axis, mode='fill', fill_value=0)
  axis = axis % a.ndim
  shape = (*a.shape[:axis], groups, group_size, *a.shape[axis + 1 :])
  filled = _along((source < channels), a.ndim, axis).reshape(
    *[1] * axis, groups, group_size, *[1] * (a.ndim - axis - 1)
  )
  scale = _statistic(padded.reshape(shape), filled, bits, axis + 1)
  scale = jnp.squeeze(scale, axis + 1)
  last = jnp.maximum((jnp.sum(members) - 1) // group_size, 0)
  scale = jnp.take(scale, jnp.minimum(slot // group_size, last), axis=axis)
  return jnp.maximum(jnp.where(jnp.any(members), scale, whole), TINY)


def _scales(
  x: Array, salient: Array, keep: Array, how: tuple[int, int, int, int]
) -> tuple[Array, Array, Array]:
  """(salient mask, low scale, high scale), all broadcastable against x."""
  low_bits, high_bits, group_size, axis = how
  a, high, kept = jnp.abs(x), salient > 0.5, keep > 0.5
  low_scale = _range_scale(a, kept, kept & ~high, low_bits, group_size, axis)
  high_scale = _range_scale(a, kept, kept & high, high_bits, group_size, axis)
  return _along(high, x.ndim, axis), low_scale, high_scale


def _select(
  x: Array, high: Array, low_scale: Array, high_scale: Array, bits: tuple
) -> Array:
  """Q_h where `high`, Q_l elsewhere, with one rounding where that is enough."""
  low_bits, high_bits = bits
  if min(bits) > 1 and max(bits) < config.OFF_BITS:
    # The mask is binary, so choose the grid, not between two rounded arrays.
    top = jnp.where(high, float(qmax(high_bits)), float(qmax(low_bits)))
    scale = jnp.where(high, high_scale, low_scale)
    return jnp.clip(jnp.round(x / scale), -top - 1, top) * scale
  return jnp.where(
    high,
    round_to_grid(x, high_scale, high_bits),
    round_to_grid(x, low_scale, low_bits),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fake_quant(
  x: Array, salient: Array, keep: Array, how: tuple[int, int, int, int]
) -> Array:
  return _select(x, *_scales(x, salient, keep, how), how[:2])


def _fake_quant_fwd(x, salient, keep, how):
  scales = _scales(x, salient, keep, how)
  y = _select(x, *scales, how[:2])
  return y, (x, y, salient, scales)


def _fake_quant_bwd(how, residuals, g):
  x, y, salient, (high, low_scale, high_scale) = residuals
  # Q_h - Q_l, one of which is y already; its sign belongs to the channel.
  other = _select(x, ~high, low_scale, high_scale, how[:2])
  others = tuple(i for i in range(x.ndim) if i != how[3] % x.ndim)
  gain = jnp.sum(g * (y - other), axis=others)
  sign = jnp.where(salient > 0.5, 1.0, -1.0)
  return g, (sign * gain).astype(salient.dtype), None


_fake_quant.defvjp(_fake_quant_fwd, _fake_quant_bwd)


def fake_quant(
  x: Float[Array, '...'],
  salient: Float[Array, ' C'],
  keep: Float[Array, ' C'],
  *,
  low_bits: int,
  high_bits: int,
  group_size: int = 0,
  axis: int,
) -> Float[Array, '...']:
  """Rounds x to two grids: high bits where salient, low bits elsewhere.

  Gradients are straight-through: to x as if nothing were rounded, to `salient`
  as `sum g * (Q_h(x) - Q_l(x))`, which is the derivative of eq. (8), whichever
  range the channel is in now. `keep` gets none here: it only says which
  channels the scales look at.

  Args:
    x: weights [in, out] with axis=0, or activations [..., C] with axis=-1.
    salient: 1 = more bits.
    keep: 1 = not pruned.
    low_bits: 1..8 or 16 (off).
    high_bits: 1..8 or 16 (off).
    group_size: channels of a range that share a scale; 0 = all of them.
    axis: which axis of x holds the channels.

  Returns:
    x rounded, same shape and dtype; scales are float32.
  """
  if low_bits == high_bits == config.OFF_BITS:
    return x
  how = (low_bits, high_bits, group_size, axis)
  y = _fake_quant(x.astype(jnp.float32), salient, keep, how)
  return y.astype(x.dtype)
