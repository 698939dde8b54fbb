"""Chunked cross-entropy against the plain one, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax.model import llama, loss


def _plain(hidden, embed, targets, weight):
  logp = jax.nn.log_softmax(hidden @ embed.T)
  picked = jnp.take_along_axis(logp, targets[:, None], 1)[:, 0]
  return -jnp.sum(picked * weight)


@pytest.mark.parametrize('count', [1, 255, 256, 300, 513])
def test_chunks_equal_the_plain_sum_and_its_gradient(count):
  rng = np.random.default_rng(count)
  hidden = jnp.asarray(rng.normal(size=(count, 12)), jnp.float32)
  embed = jnp.asarray(rng.normal(size=(29, 12)), jnp.float32)
  targets = jnp.asarray(rng.integers(0, 29, count))
  weight = jnp.asarray(rng.random(count), jnp.float32)
  plain, slope = jax.value_and_grad(_plain)(hidden, embed, targets, weight)
  chunked = loss.token_losses_sum(hidden, embed, targets, weight)
  value, grad = jax.value_and_grad(
    lambda h: 3 * loss.token_losses_sum(h, embed, targets, weight)
  )(hidden)
  assert float(chunked) == pytest.approx(float(plain), rel=1e-5)
  assert float(value) == pytest.approx(3 * float(plain), rel=1e-5)
  np.testing.assert_allclose(grad, 3 * slope, atol=1e-4)


def test_no_array_of_tokens_times_vocabulary_exists():
  t, v = 1024, 5000
  shapes = jax.ShapeDtypeStruct((t, 12), jnp.float32)
  step = jax.make_jaxpr(jax.grad(loss.token_losses_sum))(
    shapes,
    jax.ShapeDtypeStruct((v, 12), jnp.float32),
    jax.ShapeDtypeStruct((t,), jnp.int32),
    jax.ShapeDtypeStruct((t,), jnp.float32),
  )
  sizes = [
    int(np.prod(var.aval.shape))
    for eqn in step.jaxpr.eqns
    for var in eqn.outvars
  ]
  assert max(sizes) < t * v / 3


def test_window_losses_ignore_padding(cfg, weights):
  tokens = tiny.tokens(0, 2, 9)
  lengths = jnp.asarray([9, 5])
  sums, counts = loss.window_losses(weights, tokens, lengths, None, cfg=cfg)
  np.testing.assert_array_equal(counts, [8, 4])
  logp = jax.nn.log_softmax(llama.logits(weights, cfg, tokens))
  for i, length in enumerate([9, 5]):
    expected = -sum(logp[i, t, tokens[i, t + 1]] for t in range(length - 1))
    assert float(sums[i]) == pytest.approx(float(expected), rel=1e-5)


def test_mean_loss_is_the_mean_over_predicted_tokens(cfg, weights):
  tokens = tiny.tokens(1, 2, 9)
  sums, counts = loss.window_losses(
    weights, tokens, jnp.asarray([9, 9]), None, cfg=cfg
  )
  mean = loss.mean_loss(weights, cfg, tokens)
  expected = float(sums.sum() / counts.sum())
  assert float(mean) == pytest.approx(expected, rel=1e-5)
