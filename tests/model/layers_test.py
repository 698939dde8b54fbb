"""Norm, rotary embedding and attention against NumPy loops and literals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax import config
from toga_jax.model import layers


def test_rms_norm_literal():
  x = jnp.asarray([[3.0, 4.0]])
  y = layers.rms_norm(x, jnp.asarray([1.0, 2.0]), 0.0)
  rms = np.sqrt(12.5)
  np.testing.assert_allclose(y, [[3 / rms, 8 / rms]], rtol=1e-6)


def test_rope_turns_pairs_half_a_head_apart():
  x = np.random.default_rng(0).normal(size=(1, 3, 2, 4)).astype(np.float32)
  positions = np.asarray([[0, 1, 5]])
  frequencies = np.asarray([1.0, 0.1], np.float32)
  y = layers.rope(jnp.asarray(x), jnp.asarray(positions), frequencies)
  for t, position in enumerate(positions[0]):
    for n in range(2):
      for i in range(2):
        turn = np.exp(1j * position * frequencies[i])
        pair = (x[0, t, n, i] + 1j * x[0, t, n, i + 2]) * turn
        assert y[0, t, n, i] == pytest.approx(pair.real, abs=1e-5)
        assert y[0, t, n, i + 2] == pytest.approx(pair.imag, abs=1e-5)


def test_llama3_scaling_leaves_short_waves_and_divides_long_ones():
  scaling = config.RopeScaling(
    kind='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
  )
  plain = tiny.config(head_dim=64, rope_theta=500000.0)
  scaled = tiny.config(head_dim=64, rope_theta=500000.0, rope_scaling=scaling)
  before = layers.rope_frequencies(plain)
  after = layers.rope_frequencies(scaled)
  wavelength = 2 * np.pi / before
  for f, g, wave in zip(before, after, wavelength, strict=True):
    if wave < 8192 / 4:
      assert g == f
    elif wave > 8192:
      assert g == pytest.approx(f / 8, rel=1e-6)
    else:
      share = (8192 / wave - 1) / 3
      blended = (1 - share) * f / 8 + share * f
      assert g == pytest.approx(blended, rel=1e-5)
  assert (wavelength > 8192).any()
  assert ((wavelength > 2048) & (wavelength < 8192)).any()


def test_linear_scaling_divides_every_frequency():
  scaling = config.RopeScaling(kind='linear', factor=4.0)
  before = layers.rope_frequencies(tiny.config())
  after = layers.rope_frequencies(tiny.config(rope_scaling=scaling))
  np.testing.assert_allclose(after, before / 4, rtol=1e-6)


def test_attention_is_causal_grouped_and_scaled_like_a_loop():
  rng = np.random.default_rng(0)
  b, t, n, k, h = 2, 5, 6, 2, 4
  q = rng.normal(size=(b, t, n, h)).astype(np.float32)
  keys = rng.normal(size=(b, t, k, h)).astype(np.float32)
  values = rng.normal(size=(b, t, k, h)).astype(np.float32)
  y = layers.causal_attention(*map(jnp.asarray, (q, keys, values)))
  for i in range(b):
    for head in range(n):
      shared = head // (n // k)
      for now in range(t):
        scores = keys[i, : now + 1, shared] @ q[i, now, head] / np.sqrt(h)
        share = np.exp(scores - scores.max())
        share /= share.sum()
        expected = share @ values[i, : now + 1, shared]
        np.testing.assert_allclose(y[i, now, head], expected, atol=1e-5)


def _cache_reference(row, bits):
  """Asymmetric rounding of one head of one token, by plain NumPy."""
  top, bottom = max(row.max(), 0), min(row.min(), 0)
  scale = (top - bottom) / (2**bits - 1)
  zero = np.round(-bottom / scale)
  code = np.clip(np.round(row / scale) + zero, 0, 2**bits - 1)
  return (code - zero) * scale


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_cache_is_rounded_per_head_and_token(bits):
  x = np.random.default_rng(0).standard_normal((2, 3, 5, 16))
  x = (x * np.exp(np.arange(5))[:, None] + 0.5).astype(np.float32)
  x[0, 0, 0] = np.abs(x[0, 0, 0])  # zero is representable all the same
  rounded = layers.round_cache(jnp.asarray(x), bits)
  expected = np.apply_along_axis(_cache_reference, -1, x, bits)
  np.testing.assert_allclose(rounded, expected, rtol=1e-4, atol=1e-5)


def test_cache_of_sixteen_bits_or_of_zeros_is_as_it_was():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 4)))
  assert layers.round_cache(x, 16) is x
  zeros = jnp.zeros((1, 2, 3, 4))
  np.testing.assert_array_equal(layers.round_cache(zeros, 4), zeros)


def test_gradients_pass_a_rounded_cache():
  x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 4)))
  slope = jax.grad(lambda x: jnp.sum(layers.round_cache(x, 2) * 3))(x)
  np.testing.assert_array_equal(slope, jnp.full_like(x, 3))
