"""Reading and projecting through masks."""

import jax.numpy as jnp
import numpy as np

from toga_jax import config
from toga_jax.model import linear

QUANT = config.QuantConfig(
  low_bits=4, high_bits=8, act_low_bits=4, act_high_bits=8
)


def _data():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 3, 20)), jnp.float32)
  w = jnp.asarray(rng.normal(size=(20, 7)), jnp.float32)
  keep = jnp.asarray(rng.random(20) < 0.7, jnp.float32)
  salient = jnp.asarray(rng.random(20) < 0.3, jnp.float32)
  return x, w, keep, salient


def test_no_masks_is_a_plain_product():
  x, w, _, _ = _data()
  read = linear.read(x, None, 'attn_in', QUANT)
  y = linear.project(read, w, None, 'attn_in', QUANT)
  np.testing.assert_array_equal(y, x @ w)


def test_masking_at_full_width_equals_cutting_the_channels_out():
  x, w, keep, salient = _data()
  masks = linear.ChannelMasks(keep={'g': keep}, salient={'g': salient})
  full = linear.project(linear.read(x, masks, 'g', QUANT), w, masks, 'g', QUANT)
  kept = np.flatnonzero(keep)
  cut_masks = linear.ChannelMasks(salient={'g': salient[kept]})
  cut = linear.project(
    linear.read(x[..., kept], cut_masks, 'g', QUANT),
    w[kept],
    cut_masks,
    'g',
    QUANT,
  )
  np.testing.assert_allclose(full, cut, atol=1e-5)


def test_order_of_channels_within_a_range_does_not_matter():
  x, w, _, salient = _data()
  order = np.argsort(np.asarray(salient), kind='stable')  # [low | high]
  results = []
  for permutation in (np.arange(20), order):
    masks = linear.ChannelMasks(salient={'g': salient[permutation]})
    read = linear.read(x[..., permutation], masks, 'g', QUANT)
    results.append(linear.project(read, w[permutation], masks, 'g', QUANT))
  np.testing.assert_allclose(results[0], results[1], atol=1e-5)


def test_prune_zeroes_dropped_channels_only():
  x, _, keep, _ = _data()
  masks = linear.ChannelMasks(keep={'attn_out': keep})
  pruned = linear.prune(x, masks, 'attn_out')
  np.testing.assert_array_equal(pruned, x * keep)
  np.testing.assert_array_equal(linear.prune(x, masks, 'mlp_out'), x)
