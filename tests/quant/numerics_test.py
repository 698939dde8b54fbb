"""Fake quantization against NumPy loops, and its gradients against eq. (8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax.quant import numerics


def _loop(x, salient, keep, low_bits, high_bits, group_size):
  """One row at a time, one group at a time; x [R, C], channels last."""
  out = np.array(x, np.float32)
  channels = np.arange(x.shape[1])
  for members, bits in (
    (channels[keep & ~salient], low_bits),
    (channels[keep & salient], high_bits),
  ):
    size = group_size or max(len(members), 1)
    for start in range(0, len(members), size):
      group = members[start : start + size]
      for r in range(x.shape[0]):
        values = x[r, group].astype(np.float32)
        if bits == 16:
          continue
        if bits == 1:
          scale = np.float32(np.abs(values).mean())
          out[r, group] = np.where(values >= 0, scale, -scale)
          continue
        top = 2 ** (bits - 1) - 1
        scale = np.float32(np.abs(values).max()) / np.float32(top)
        codes = np.clip(np.round(values / scale), -top - 1, top)
        out[r, group] = codes * scale
  return out


def _case(seed=0, rows=5, channels=37):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(rows, channels)).astype(np.float32)
  x[:, 3] *= 30  # an outlier channel
  salient = rng.random(channels) < 0.3
  salient[3] = True
  keep = rng.random(channels) < 0.8
  return x, salient, keep


@pytest.mark.parametrize('group_size', [0, 4, 16, 64])
@pytest.mark.parametrize('bits', [(4, 8), (2, 3), (1, 4), (3, 16), (8, 8)])
def test_rounds_kept_channels_like_a_loop_over_groups(bits, group_size):
  x, salient, keep = _case()
  expected = _loop(x, salient, keep, *bits, group_size)
  how = {'low_bits': bits[0], 'high_bits': bits[1], 'group_size': group_size}
  masks = jnp.asarray(salient, jnp.float32), jnp.asarray(keep, jnp.float32)
  last = jax.jit(lambda x: numerics.fake_quant(x, *masks, axis=-1, **how))(x)
  first = numerics.fake_quant(jnp.asarray(x.T), *masks, axis=0, **how).T
  # Division in another order may land on the other side of a tie: no ties here.
  np.testing.assert_allclose(last[:, keep], expected[:, keep], rtol=1e-6)
  np.testing.assert_allclose(first[:, keep], expected[:, keep], rtol=1e-6)


def test_outlier_in_the_high_range_leaves_the_low_scale_alone():
  x, salient, keep = _case()
  low = salient & False
  apart = _loop(x, salient, keep, 4, 8, 0)
  together = _loop(x, low, keep, 4, 8, 0)
  others = keep & ~salient
  assert np.abs(apart - x)[:, others].mean() < (
    np.abs(together - x)[:, others].mean() / 3
  )
  got = numerics.fake_quant(
    jnp.asarray(x),
    jnp.asarray(low, jnp.float32),
    jnp.asarray(keep, jnp.float32),
    low_bits=4,
    high_bits=8,
    axis=-1,
  )
  np.testing.assert_allclose(got[:, keep], together[:, keep], rtol=1e-6)


def test_sixteen_bits_is_the_identity():
  x, salient, keep = _case()
  masks = jnp.asarray(salient, jnp.float32), jnp.asarray(keep, jnp.float32)
  y = numerics.fake_quant(
    jnp.asarray(x), *masks, low_bits=16, high_bits=16, axis=-1
  )
  np.testing.assert_array_equal(y, x)


@pytest.mark.parametrize('group_size', [0, 4])
@pytest.mark.parametrize('axis', [0, -1])
def test_mask_gradient_is_the_derivative_of_equation_8(axis, group_size):
  x, salient, keep = _case()
  g = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
  kept = jnp.asarray(keep, jnp.float32)

  def loss(x, m):
    y = numerics.fake_quant(
      x if axis == -1 else x.T,
      m,
      kept,
      low_bits=3,
      high_bits=6,
      group_size=group_size,
      axis=axis,
    )
    return jnp.sum((y if axis == -1 else y.T) * g)

  m = jnp.asarray(salient, jnp.float32)
  dx, dm = jax.grad(loss, argnums=(0, 1))(jnp.asarray(x), m)
  np.testing.assert_array_equal(dx, g)  # straight-through
  # Flip channel by channel with the scales of the unflipped mask.
  high, low_scale, high_scale = numerics._scales(
    jnp.asarray(x), m, kept, (3, 6, group_size, -1)
  )
  del high
  q_low = numerics.round_to_grid(jnp.asarray(x), low_scale, 3)
  q_high = numerics.round_to_grid(jnp.asarray(x), high_scale, 6)
  expected = np.sum(g * (np.asarray(q_high) - np.asarray(q_low)), axis=0)
  np.testing.assert_allclose(dm, expected, rtol=1e-4, atol=1e-4)


def test_empty_range_borrows_the_scale_of_the_kept_channels():
  x, _, keep = _case()
  _, _, high_scale = numerics._scales(
    jnp.asarray(x),
    jnp.zeros(x.shape[1]),
    jnp.asarray(keep, jnp.float32),
    (4, 8, 0, -1),
  )
  expected = np.abs(x[:, keep]).max(1) / 127
  np.testing.assert_allclose(np.ravel(high_scale), expected, rtol=1e-6)


def test_zero_channels_stay_zero_and_finite():
  y = numerics.fake_quant(
    jnp.zeros((3, 5)),
    jnp.zeros(5),
    jnp.ones(5),
    low_bits=4,
    high_bits=8,
    axis=-1,
  )
  np.testing.assert_array_equal(y, np.zeros((3, 5)))
