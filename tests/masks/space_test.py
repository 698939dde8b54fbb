import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config
from toga_jax.masks import space
from toga_jax.model import linear, llama

FREE = {
  'attn_in': 48,
  'attn_out': 48,
  'mlp_in': 48,
  'mlp_mid': 80,
  'mlp_out': 48,
}
READ = {'attn_in': 48, 'attn_mid': 96, 'mlp_in': 48, 'mlp_mid': 80}


@pytest.mark.parametrize(
  ('search', 'keep', 'salient'),
  [
    ({'kind': 'quant'}, {}, READ),
    ({'kind': 'prune'}, FREE, {}),
    ({'kind': 'joint'}, FREE, READ),
    ({'kind': 'prune', 'prune_heads': True}, FREE | {'attn_mid': 2}, {}),
    ({'kind': 'joint', 'prune_heads': True}, FREE | {'attn_mid': 2}, READ),
    ({'kind': 'quant', 'prune_heads': True}, {}, READ),
  ],
  ids='quant prune joint prune_heads joint_heads quant_heads'.split(),
)
def test_what_each_search_decides(cfg, search, keep, salient):
  decided = space.decisions(cfg, config.SearchConfig(**search))

  assert decided == {'keep': keep, 'salient': salient}
  for groups in decided.values():  # network order: the hypernetwork's
    assert list(groups) == [g for g in budget.GROUPS if g in groups]


def test_one_decision_drops_a_kv_head_with_its_query_heads(cfg):
  groups = np.array([[1, 0], [0, 1], [1, 1]], np.float32)
  expected = np.zeros((3, 96), np.float32)
  queries = cfg.num_heads // cfg.num_kv_heads  # G
  for layer in range(3):
    for k in range(cfg.num_kv_heads):
      for g in range(queries):
        for h in range(cfg.head_dim):
          n = k * queries + g
          expected[layer, n * cfg.head_dim + h] = groups[layer, k]
  tree = {'keep': {'attn_mid': jnp.asarray(groups)}, 'salient': {}}

  masks = space.to_masks(cfg, tree)

  np.testing.assert_array_equal(masks.keep['attn_mid'], expected)


def test_a_dropped_kv_group_is_the_one_whose_weights_have_no_effect(
  cfg, weights
):
  tokens = tiny.tokens(0, 1, 7)
  keep = {'attn_mid': jnp.asarray([[1.0, 0.0]] * cfg.num_layers)}
  masks = space.to_masks(cfg, {'keep': keep, 'salient': {}})
  layers = weights.layers

  logits = jax.jit(llama.logits, static_argnums=1)

  def run(**changes):
    changed = weights.replace(layers=layers.replace(**changes))
    return logits(changed, cfg, tokens, masks)

  size = cfg.head_dim
  plain = run()
  dropped = run(
    q=layers.q.at[..., 3 * size :].add(1),
    k=layers.k.at[..., size:].add(1),
    v=layers.v.at[..., size:].add(1),
    o=layers.o.at[:, 3 * size :].add(1),
  )
  np.testing.assert_array_equal(plain, dropped)
  for kept in (
    run(v=layers.v.at[..., :size].add(1)),
    run(q=layers.q.at[..., 2 * size : 3 * size].add(1)),
  ):
    assert np.abs(plain - kept).max() > 1e-2


def test_other_decisions_are_the_masks_themselves(cfg):
  rng = np.random.default_rng(0)
  tree = {
    'keep': {'mlp_mid': jnp.asarray(rng.random((3, 80)))},
    'salient': {'attn_mid': jnp.asarray(rng.random((3, 96)))},
  }

  masks = space.to_masks(cfg, tree)

  assert masks.keep.keys() == {'mlp_mid'}
  assert masks.salient.keys() == {'attn_mid'}
  np.testing.assert_array_equal(masks.keep['mlp_mid'], tree['keep']['mlp_mid'])
  np.testing.assert_array_equal(
    masks.salient['attn_mid'], tree['salient']['attn_mid']
  )


@pytest.mark.parametrize('seed', range(3))
def test_counts_are_those_of_the_masks(cfg, seed):
  keep, salient = tiny.decision(cfg, seed, heads=True)
  # Salient or not, a pruned channel does not count.
  everywhere = {g: np.ones_like(m) for g, m in salient.items()}
  for more in (salient, everywhere):
    masks = linear.ChannelMasks(
      keep=jax.tree.map(jnp.float32, keep),
      salient=jax.tree.map(jnp.float32, more),
    )
    kept, high = jax.jit(space.counts, static_argnums=0)(cfg, masks)
    for group in budget.GROUPS:
      expected = [sum(row) for row in keep[group].tolist()]
      np.testing.assert_array_equal(kept[group], expected)
    for group in budget.INPUT_GROUPS:
      both = keep[group] & more[group]
      np.testing.assert_array_equal(high[group], both.sum(-1))


def test_what_is_not_decided_is_kept_and_not_salient(cfg):
  kept, salient = space.counts(cfg, linear.ChannelMasks())

  for group, width in budget.group_widths(cfg).items():
    np.testing.assert_array_equal(kept[group], [width] * 3)
  for group in budget.INPUT_GROUPS:
    np.testing.assert_array_equal(salient[group], [0] * 3)
