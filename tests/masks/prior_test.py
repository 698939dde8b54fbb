import numpy as np
import pytest

from toga_jax import budget, config
from toga_jax.masks import harden, prior, space

QUANT = config.QuantConfig(low_bits=4, high_bits=8)
SEARCHES = {
  'quant': {'kind': 'quant', 'budget': 0.28125},
  'prune': {'kind': 'prune', 'budget': 0.5},
  'joint': {'kind': 'joint', 'budget': 0.15},
  'joint_heads': {'kind': 'joint', 'budget': 0.15, 'prune_heads': True},
  'joint_sparse': {'kind': 'joint', 'budget': 0.2, 'sparsity': 0.4},
}


def bits_of(search):
  return QUANT.unquantized() if search.kind == 'prune' else QUANT


def random_stats(cfg, seed=0):
  rng = np.random.default_rng(seed)
  return {
    g: np.exp(rng.standard_normal((cfg.num_layers, n))).astype(np.float32)
    for g, n in budget.group_widths(cfg).items()
  }


def make(cfg, search, stats):
  tree = prior.make(stats, cfg=cfg, quant=bits_of(search), search=search)
  return {
    d: {g: np.asarray(x) for g, x in groups.items()}
    for d, groups in tree.items()
  }


@pytest.fixture(params=SEARCHES)
def search(request):
  return config.SearchConfig(**SEARCHES[request.param])


def test_a_cold_start_is_one_number(cfg, search):
  cold = config.SearchConfig(**vars(search) | {'start': 'cold', 'offset': 2.5})

  tree = make(cfg, cold, None)

  decided = space.decisions(cfg, search)
  assert {d: {g: x.shape for g, x in t.items()} for d, t in tree.items()} == {
    d: {g: (3, n) for g, n in groups.items()} for d, groups in decided.items()
  }
  for groups in tree.values():
    for x in groups.values():
      np.testing.assert_array_equal(x, 2.5)


def test_zero_is_where_a_warm_start_meets_its_targets(cfg, search):
  tree = make(cfg, search, random_stats(cfg))

  # Hardening finds nothing to move, neither together nor for keep alone.
  how = {'cfg': cfg, 'quant': bits_of(search), 'search': search}
  keep, salient, threshold = harden.harden(tree, **how)
  assert abs(threshold) < 1e-5
  if search.sparsity is not None:
    _, _, cut = harden.harden({'keep': tree['keep'], 'salient': {}}, **how)
    assert abs(cut) < 1e-5

  # Without the multiples too, the signs alone are near the targets.
  kept = {g: m.sum(-1) for g, m in keep.items()}
  for group, x in tree['keep'].items():
    width = keep[group].shape[1] // x.shape[1]
    kept[group] = (x > 0).sum(-1) * width
    assert np.all(np.abs(kept[group] - keep[group].sum(-1)) <= max(width, 8))
  more = {g: m.sum(-1) for g, m in salient.items()}
  for group, x in tree['salient'].items():
    own = tree['keep'].get(group, np.ones((3, 1)))
    own = np.repeat(own > 0, x.shape[1] // own.shape[1], axis=-1)
    more[group] = ((x > 0) & own).sum(-1)
  share = budget.linear_budget(cfg, bits_of(search), kept, more)
  np.testing.assert_allclose(share, search.budget, rtol=0.1)
  if search.sparsity is not None:
    np.testing.assert_allclose(budget.sparsity(cfg, kept), 0.4, atol=0.04)


def test_a_warm_start_ranks_channels_by_size_within_their_layer(cfg, search):
  stats = random_stats(cfg)
  tree = make(cfg, search, stats)

  for groups in tree.values():
    for group, x in groups.items():
      size = stats[group].astype(float)
      if x.shape != size.shape:  # kv groups: RMS over their 48 channels
        size = np.array(
          [
            [np.sqrt(np.mean(row[k * 48 : k * 48 + 48] ** 2)) for k in range(2)]
            for row in size
          ]
        )
      np.testing.assert_array_equal(np.argsort(x), np.argsort(size))
      # All layers have the same spread, whatever their sizes.
      spread = 1.5 if groups is tree['salient'] else 1.0
      np.testing.assert_allclose(x.std(-1), spread, rtol=1e-4)


def test_a_layers_scale_does_not_matter(cfg, search):
  stats = random_stats(cfg)
  scaled = {
    g: x * np.array([[1], [1e3], [1e-3]], x.dtype) for g, x in stats.items()
  }

  one, two = make(cfg, search, stats), make(cfg, search, scaled)

  for decision, groups in one.items():
    for group, x in groups.items():
      np.testing.assert_allclose(two[decision][group], x, atol=1e-4)


def test_dead_and_equal_channels_give_finite_logits(cfg, search):
  stats = random_stats(cfg)
  for x in stats.values():
    x[0, :5] = 0  # never active
    x[1] = 1  # all alike

  tree = make(cfg, search, stats)

  for groups in tree.values():
    for group, x in groups.items():
      assert np.all(np.isfinite(x))
      if x.shape[1] > 2:
        assert x[0, :5].max() < x[0, 5:].min()
        assert np.ptp(x[1]) == 0, group


def test_a_budget_out_of_reach_is_refused(cfg):
  search = config.SearchConfig(kind='joint', budget=0.0001)

  with pytest.raises(config.UserError, match='cannot be met'):
    make(cfg, search, random_stats(cfg))
