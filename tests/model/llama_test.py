"""Laws of the masked model. Parity with transformers is in parity_test.py."""

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny
from toga_jax import budget, config
from toga_jax.model import linear, llama

QUANT = config.QuantConfig(
  low_bits=4, high_bits=8, act_low_bits=4, act_high_bits=8
)


def _masks(cfg, keep=1.0, salient=0.0, seed=0):
  """Random masks with the given shares of ones."""
  rng = np.random.default_rng(seed)

  def draw(groups, share):
    widths = budget.group_widths(cfg)
    return {
      g: jnp.asarray(rng.random((cfg.num_layers, widths[g])) < share, float)
      for g in groups
    }

  kept = draw([g for g in budget.GROUPS if g != 'attn_mid'], keep)
  return linear.ChannelMasks(
    keep=kept, salient=draw(budget.INPUT_GROUPS, salient)
  )


def test_all_ones_masks_at_sixteen_bits_are_the_dense_model(cfg, weights):
  tokens = tiny.tokens(0, 2, 11)
  dense = llama.logits(weights, cfg, tokens)
  masked = llama.logits(weights, cfg, tokens, _masks(cfg), llama.FULL_PRECISION)
  np.testing.assert_array_equal(dense, masked)


def test_eight_bits_everywhere_is_close_to_dense(cfg, weights):
  tokens = tiny.tokens(0, 2, 11)
  eight = config.QuantConfig(
    low_bits=8, high_bits=8, act_low_bits=8, act_high_bits=8
  )
  dense = llama.logits(weights, cfg, tokens)
  masked = llama.logits(weights, cfg, tokens, _masks(cfg), eight)
  error = np.linalg.norm(masked - dense) / np.linalg.norm(dense)
  assert 0 < error < 0.05


def test_masked_model_is_the_model_with_its_channels_cut(cfg, weights):
  """Zeroed rows and columns of the weights do what the masks do."""
  tokens = tiny.tokens(0, 2, 11)
  masks = _masks(cfg, keep=0.7)
  masked = llama.logits(weights, cfg, tokens, masks, llama.FULL_PRECISION)
  keep = {g: np.asarray(m) for g, m in masks.keep.items()}
  w = weights.layers
  cut = w.replace(
    q=w.q * keep['attn_in'][:, :, None],
    k=w.k * keep['attn_in'][:, :, None],
    v=w.v * keep['attn_in'][:, :, None],
    o=w.o * keep['attn_out'][:, None, :],
    gate=w.gate * keep['mlp_in'][:, :, None],
    up=w.up * keep['mlp_in'][:, :, None] * keep['mlp_mid'][:, None, :],
    down=w.down * keep['mlp_out'][:, None, :],
  )
  expected = llama.logits(weights.replace(layers=cut), cfg, tokens)
  np.testing.assert_allclose(masked, expected, atol=1e-4)


def test_salient_mask_of_a_pruned_channel_has_no_effect(cfg, weights):
  tokens = tiny.tokens(0, 2, 11)
  masks = _masks(cfg, keep=0.7, salient=0.3)
  flipped = {
    g: jnp.where(masks.keep[g] > 0, m, 1 - m) if g in masks.keep else m
    for g, m in masks.salient.items()
  }
  one = llama.logits(weights, cfg, tokens, masks, QUANT)
  other = llama.logits(
    weights, cfg, tokens, masks.replace(salient=flipped), QUANT
  )
  np.testing.assert_array_equal(one, other)


def test_later_tokens_do_not_change_earlier_logits(cfg, weights):
  tokens = tiny.tokens(0, 1, 9)
  changed = tokens.at[0, -1].set((tokens[0, -1] + 1) % cfg.vocab_size)
  one = llama.logits(weights, cfg, tokens)
  other = llama.logits(weights, cfg, changed)
  np.testing.assert_allclose(one[:, :-1], other[:, :-1], atol=1e-5)
  assert np.abs(one[:, -1] - other[:, -1]).max() > 1e-3


def test_linen_front_door_is_the_pure_function(cfg, weights):
  tokens = tiny.tokens(0, 1, 9)
  model = llama.Llama(cfg)
  fresh = jax.eval_shape(model.init, jax.random.key(0), tokens)
  shapes = jax.tree.map(jnp.shape, fresh['params']['weights'])
  assert shapes == jax.tree.map(jnp.shape, weights)
  out = model.apply({'params': {'weights': weights}}, tokens)
  np.testing.assert_array_equal(out, llama.logits(weights, cfg, tokens))
