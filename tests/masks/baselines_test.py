import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config
from toga_jax.masks import baselines

QUANT = config.QuantConfig(low_bits=4, high_bits=8)


def random_stats(cfg, seed=0):
  rng = np.random.default_rng(seed)
  return {
    g: np.exp(rng.standard_normal((cfg.num_layers, n))).astype(np.float32)
    for g, n in budget.group_widths(cfg).items()
  }


def share(cfg, keep, salient):
  return budget.linear_budget(
    cfg,
    QUANT,
    {g: m.sum(-1) for g, m in keep.items()},
    {g: m.sum(-1) for g, m in salient.items()},
  )


def test_uniform_bits_prune_nothing_and_favour_nobody(cfg):
  keep, salient = baselines.keep_all(cfg), baselines.no_salient(cfg)

  shapes = {g: (3, n) for g, n in budget.group_widths(cfg).items()}
  assert {g: m.shape for g, m in keep.items()} == shapes
  assert salient.keys() == set(budget.INPUT_GROUPS)
  assert all(salient[g].shape == shapes[g] for g in salient)
  assert all(m.dtype == bool and m.all() for m in keep.values())
  assert all(m.dtype == bool and not m.any() for m in salient.values())
  assert share(cfg, keep, salient) == 0.25


@pytest.mark.parametrize(
  ('low', 'high', 'target', 'kept', 'expected'),
  [
    (4, 8, 0.28125, 1.0, 0.125),
    (4, 8, 0.25, 1.0, 0.0),
    (4, 8, 0.5, 1.0, 1.0),
    (3, 8, 0.28125, 1.0, 0.3),
    (4, 8, 0.15, 0.5, 0.2),
    (4, 4, 0.25, 1.0, 0.0),
  ],
)
def test_salient_share_of_a_budget(low, high, target, kept, expected):
  quant = config.QuantConfig(low_bits=low, high_bits=high)

  found = baselines.salient_share(quant, target, kept)

  np.testing.assert_allclose(found, expected, atol=1e-12)


def test_every_layer_gets_the_same_share_of_its_largest_activations(cfg):
  stats = random_stats(cfg)
  stats['attn_in'][1] *= 100  # size matters within a layer only

  salient = baselines.activation_rule(
    stats, baselines.keep_all(cfg), 0.3, multiple=8
  )

  # 0.3 of 48, 96, 48, 80, down to a multiple of 8
  expected = {'attn_in': 8, 'attn_mid': 24, 'mlp_in': 8, 'mlp_mid': 24}
  assert salient.keys() == expected.keys()
  for group, number in expected.items():
    for layer in range(3):
      largest = np.argsort(stats[group][layer])[-number:]
      places = np.flatnonzero(salient[group][layer])
      assert sorted(largest) == list(places)


def test_pruned_channels_are_neither_counted_nor_chosen(cfg):
  keep, _ = tiny.decision(cfg, 0, heads=True)
  stats = random_stats(cfg)
  for group in budget.INPUT_GROUPS:  # the largest of all, but not there
    stats[group] = np.where(keep[group], stats[group], 1e6)

  salient = baselines.activation_rule(stats, keep, 0.25, multiple=2)

  for group, mask in salient.items():
    assert not np.any(mask & ~keep[group])
    kept = keep[group].sum(-1)
    np.testing.assert_array_equal(mask.sum(-1), kept // 8 * 2)


@pytest.mark.parametrize('multiple', [1, 4, 16])
@pytest.mark.parametrize('target', [0.25, 0.28125, 0.3, 0.37, 0.5])
def test_the_rule_meets_the_budget_from_below(cfg, target, multiple):
  keep = baselines.keep_all(cfg)

  salient = baselines.activation_rule(
    random_stats(cfg), keep, baselines.salient_share(QUANT, target), multiple
  )

  found = share(cfg, keep, salient)
  # Each of a group's widths loses less than one multiple.
  step = 4 * multiple * (160 + 48 + 160 + 48) / budget.dense_weights(cfg) / 16
  assert target - step < found <= target + 1e-12


def test_a_share_that_comes_out_even_is_not_rounded_away():
  # 0.07 * 100 is 7.000000000000001, 0.29 * 100 is 28.999999999999996.
  cfg = tiny.config(hidden_size=100)
  stats, keep = random_stats(cfg), baselines.keep_all(cfg)

  for share_of, number in ((0.07, 7), (0.29, 29), (0.57, 57)):
    salient = baselines.activation_rule(stats, keep, share_of, multiple=1)
    np.testing.assert_array_equal(salient['attn_in'].sum(-1), number)
