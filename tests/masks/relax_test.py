import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax.masks import relax


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def random(seed, *shape, scale=2.0):
  noise = np.random.default_rng(seed).standard_normal(shape)
  return (scale * noise).astype(np.float32)


@pytest.mark.parametrize('temperature', [0.4, 1.0, 3.0])
def test_decisions_are_exactly_zero_or_one(temperature):
  logits = np.concatenate(
    [random(0, 5000, scale=s) for s in (1e-3, 1.0, 30.0)] + [[0.0, 88, -88]]
  ).astype(np.float32)

  def binarize(x):
    return relax.binarize(x, 0.0, temperature)

  # Compiled too: nothing may reassociate the straight-through sum.
  for run in (binarize, jax.jit(binarize)):
    hard = run(jnp.asarray(logits))
    np.testing.assert_array_equal(hard, (logits > 0).astype(np.float32))


@pytest.mark.parametrize('temperature', [0.4, 1.0])
def test_the_slope_is_the_sigmoids_for_dropped_and_kept_alike(temperature):
  logits, noise = random(1, 40), random(2, 40)
  weight = random(3, 40)

  def weighted(x):
    return jnp.sum(weight * relax.binarize(x, jnp.asarray(noise), temperature))

  slope = jax.grad(weighted)(jnp.asarray(logits))

  soft = sigmoid((logits + noise).astype(np.float64) / temperature)
  expected = weight * soft * (1 - soft) / temperature
  dropped = logits + noise < 0
  assert 10 < dropped.sum() < 30
  assert np.all(np.abs(slope[dropped]) > 0)
  # Where the sigmoid nears 1, 1 - soft is known to 6e-8 in float32.
  np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-6)


def tree(*groups, value=0.0, size=1000):
  return {
    'keep': {g: jnp.full((3, size), value) for g in groups},
    'salient': {},
  }


def test_without_a_key_the_sign_decides():
  logits = {
    'keep': {'mlp_in': jnp.asarray(random(4, 3, 48))},
    'salient': {'mlp_mid': jnp.asarray(random(5, 3, 80))},
  }

  without_key = relax.sample(logits, None, 1.0, 0.4)
  without_noise = relax.sample(logits, jax.random.key(0), 0.0, 0.4)

  for samples in (without_key, without_noise):
    jax.tree.map(
      lambda s, x: np.testing.assert_array_equal(s, x > 0), samples, logits
    )


def test_the_key_decides_the_sample():
  logits = tree('attn_in', 'mlp_in')

  one = relax.sample(logits, jax.random.key(0), 1.0, 0.4)
  same = relax.sample(logits, jax.random.key(0), 1.0, 0.4)
  other = relax.sample(logits, jax.random.key(1), 1.0, 0.4)

  jax.tree.map(np.testing.assert_array_equal, one, same)
  # Half of 3000 fair coins agree; so do those of two groups, and two layers.
  attn, mlp = one['keep']['attn_in'], one['keep']['mlp_in']
  for a, b in (
    (attn, other['keep']['attn_in']),
    (attn, mlp),
    (attn[0], attn[1]),
  ):
    assert 0.4 < np.mean(a == b) < 0.6


@pytest.mark.parametrize('scale', [1.0, 0.5, 0.25])
@pytest.mark.parametrize('logit', [-1.5, 0.0, 0.7, 2.0])
def test_a_decision_is_kept_as_often_as_logistic_noise_says(logit, scale):
  size = 50_000
  logits = tree('mlp_mid', value=logit, size=size)

  samples = relax.sample(logits, jax.random.key(7), scale, 0.4)

  expected = sigmoid(logit / scale)  # P(logit + scale * logistic > 0)
  deviation = np.sqrt(expected * (1 - expected) / (3 * size))
  share = np.mean(samples['keep']['mlp_mid'])
  assert abs(share - expected) < 4 * deviation + 1e-7


@pytest.mark.parametrize(
  ('fade', 'step', 'expected'),
  [
    (0.7, 0, 1.0),
    (0.7, 35, 0.5),
    (0.7, 70, 0.0),
    (0.7, 99, 0.0),
    (1.0, 25, 0.75),
    (1.0, 99, 0.01),
    (0.0, 0, 0.0),
    (0.0, 50, 0.0),
  ],
)
def test_noise_fades_to_zero(fade, step, expected):
  plain = relax.noise_scale(step, 100, fade)
  traced = jax.jit(lambda s: relax.noise_scale(s, 100, fade))(jnp.int32(step))

  np.testing.assert_allclose(plain, expected, atol=1e-6)
  np.testing.assert_allclose(traced, expected, atol=1e-6)
