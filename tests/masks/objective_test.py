import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config
from toga_jax.masks import objective, relax, space
from toga_jax.model import loss

QUANT = config.QuantConfig(low_bits=3, high_bits=8)
SEARCH = config.SearchConfig(
  kind='joint',
  budget=0.15,
  sparsity=0.4,
  over_budget_weight=2.0,
  prune_heads=True,
)


def distance(value, *args):
  return float(objective.distance(jnp.float32(value), *args))


@pytest.mark.parametrize(
  ('value', 'target', 'expected'),
  [
    (0.25, 0.25, 0.0),
    (0.5, 0.25, 0.6931472),
    (0.125, 0.25, 0.6931472),
    (0.5, 0.05, 2.3025851),
    (0.28, 0.28125, 0.0044544),
  ],
)
def test_distance_is_the_log_of_the_ratio(value, target, expected):
  np.testing.assert_allclose(
    distance(value, target), expected, rtol=1e-4, atol=1e-7
  )
  # R(b, B) = R(B, b)
  np.testing.assert_allclose(
    distance(target, value), expected, rtol=1e-4, atol=1e-7
  )


def test_only_the_over_budget_side_weighs_more():
  np.testing.assert_allclose(distance(0.5, 0.25, 3.0), 3 * np.log(2), rtol=1e-6)
  np.testing.assert_allclose(distance(0.125, 0.25, 3.0), np.log(2), rtol=1e-6)


def test_an_empty_model_is_far_away_but_not_infinitely():
  np.testing.assert_allclose(distance(0.0, 0.1), np.log(1e5), rtol=1e-5)


@pytest.mark.parametrize('weight', [1.0, 3.0])
def test_the_slope_of_the_distance_points_to_the_target(weight):
  slope = jax.grad(lambda b: objective.distance(b, 0.25, weight))

  np.testing.assert_allclose(slope(jnp.float32(0.5)), weight / 0.5, rtol=1e-6)
  np.testing.assert_allclose(slope(jnp.float32(0.1)), -1 / 0.1, rtol=1e-6)


@pytest.fixture(scope='module')
def logits(cfg):
  rng = np.random.default_rng(0)

  def draw(n):
    values = rng.standard_normal((cfg.num_layers, n)) + 0.4
    return jnp.asarray(values, jnp.float32)

  return jax.tree.map(draw, space.decisions(cfg, SEARCH))


@pytest.fixture(scope='module')
def tokens():
  return tiny.tokens(2, 2, 9)


@pytest.fixture(scope='module')
def search_loss(cfg, weights, tokens):
  """(loss, parts, d loss / d logits, d ce / d logits), compiled once."""

  @jax.jit
  def compiled(weights, logits, key, noise):
    def of(logits):
      total, parts = objective.search_loss(
        logits,
        weights,
        tokens,
        key,
        noise,
        cfg=cfg,
        quant=QUANT,
        search=SEARCH,
      )
      return jnp.stack([total, parts['ce']]), parts

    (total, _), pull, parts = jax.vjp(of, logits, has_aux=True)
    (slopes,) = jax.vmap(pull)(jnp.eye(2))
    return (
      total,
      parts,
      jax.tree.map(lambda x: x[0], slopes),
      jax.tree.map(lambda x: x[1], slopes),
    )

  return functools.partial(compiled, weights)


def shares(cfg, samples):
  """Exact (budget, kept share) of NumPy decisions, channel by channel."""
  keep = {
    g: samples['keep'].get(g, np.ones((3, n)))
    for g, n in budget.group_widths(cfg).items()
  }
  keep['attn_mid'] = np.repeat(keep['attn_mid'], 48, axis=-1)
  kept = {g: m.sum(-1) for g, m in keep.items()}
  more = {g: (m * keep[g]).sum(-1) for g, m in samples['salient'].items()}
  share = budget.linear_budget(cfg, QUANT, kept, more)
  return share, 1 - budget.sparsity(cfg, kept)


def penalty(value, target):
  ratio = np.log(value / target)
  return 2 * ratio if ratio > 0 else -ratio


@pytest.mark.parametrize('seed', range(3))
def test_the_loss_is_ce_and_two_distances_of_the_budget(
  cfg, logits, search_loss, seed
):
  key, noise = jax.random.key(seed), jnp.float32(0.8)

  total, parts, _, _ = search_loss(logits, key, noise)

  samples = relax.sample(logits, key, noise, SEARCH.temperature)
  share, kept = shares(cfg, jax.tree.map(np.asarray, samples))
  np.testing.assert_allclose(parts['budget'], share, rtol=1e-6)
  np.testing.assert_allclose(parts['sparsity'], 1 - kept, rtol=1e-5)
  distances = penalty(share, 0.15) + penalty(kept, 0.6)
  np.testing.assert_allclose(total, parts['ce'] + 16 * distances, rtol=1e-5)


def test_one_sample_feeds_the_loss_and_the_budget(
  cfg, weights, tokens, logits, search_loss
):
  key, noise = jax.random.key(5), jnp.float32(0.8)
  samples = relax.sample(logits, key, noise, SEARCH.temperature)
  certain = jax.tree.map(lambda m: 4 * m - 2, samples)

  total, parts, _, _ = search_loss(logits, key, noise)
  same, same_parts, _, _ = search_loss(certain, key, jnp.float32(0))

  assert float(total) == float(same)
  assert float(parts['ce']) == float(same_parts['ce'])
  masks = space.to_masks(cfg, samples)
  mean_loss = jax.jit(loss.mean_loss, static_argnums=(1, 4))
  ce = mean_loss(weights, cfg, tokens, masks, QUANT)
  # Compiled otherwise; a value on a rounding tie may fall to the other side.
  np.testing.assert_allclose(parts['ce'], ce, rtol=1e-4)


def test_samples_differ_from_key_to_key(logits, search_loss):
  keys = [jax.random.key(k) for k in range(3)]

  values = [search_loss(logits, key, jnp.float32(1))[1] for key in keys]

  assert len({float(v['budget']) for v in values}) == 3
  assert len({float(v['ce']) for v in values}) == 3


def test_both_terms_reach_every_logit_through_the_same_slope(
  cfg, logits, search_loss
):
  key, no_noise = jax.random.key(0), jnp.float32(0)

  total, _, both, ce_only = search_loss(logits, key, no_noise)

  assert np.isfinite(total)
  samples = jax.tree.map(lambda x: np.asarray(x > 0, float), logits)
  share, kept = shares(cfg, samples)
  # d penalty / d share, d penalty / d kept share.
  slopes = [
    (2 if value > target else -1) / value
    for value, target in ((share, 0.15), (kept, 0.6))
  ]
  rng = np.random.default_rng(0)
  for decision, groups in logits.items():
    for group, x in groups.items():
      # Cross-entropy: dropped channels and kept ones alike.
      reached = np.abs(np.asarray(ce_only[decision][group])) > 0
      if decision == 'keep':
        assert reached.all()
      else:  # the salient decision of a pruned channel has no effect
        own = samples['keep'].get(group)
        own = np.repeat(own, x.shape[1] // own.shape[1], axis=-1)
        np.testing.assert_array_equal(reached, own > 0)
      # Budget: linear in each decision, so its slope is a difference.
      term = np.asarray(both[decision][group] - ce_only[decision][group])
      for _ in range(4):
        place = rng.integers(x.shape[0]), rng.integers(x.shape[1])
        ends = []
        for value in (1.0, 0.0):
          changed = jax.tree.map(np.copy, samples)
          changed[decision][group][place] = value
          ends.append(shares(cfg, changed))
        gain = np.dot(slopes, np.subtract(*ends))
        soft = 1 / (1 + np.exp(-float(x[place]) / SEARCH.temperature))
        slope = soft * (1 - soft) / SEARCH.temperature
        np.testing.assert_allclose(
          term[place], 16 * gain * slope, rtol=1e-3, atol=1e-6
        )
