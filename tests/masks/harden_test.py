import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config
from toga_jax.masks import harden, space

QUANT = config.QuantConfig(low_bits=3, high_bits=8)
OFF = config.QuantConfig(low_bits=16, high_bits=16)
SEARCHES = {
  'quant': {'kind': 'quant', 'budget': 0.28125},
  'prune': {'kind': 'prune', 'budget': 0.5},
  'joint': {'kind': 'joint', 'budget': 0.15},
  'joint_heads': {'kind': 'joint', 'budget': 0.15, 'prune_heads': True},
  'joint_sparse': {'kind': 'joint', 'budget': 0.18, 'sparsity': 0.4},
  'prune_sparse': {
    'kind': 'prune',
    'budget': 0.7,
    'sparsity': 0.3,
    'prune_heads': True,
  },
}


@pytest.fixture(params=SEARCHES)
def search(request):
  return config.SearchConfig(**SEARCHES[request.param])


def bits_of(search):
  return OFF if search.kind == 'prune' else QUANT


def random_logits(cfg, search, seed):
  rng = np.random.default_rng(seed)
  return {
    decision: {
      group: rng.normal(rng.normal(), 1.5, (cfg.num_layers, n))
      for group, n in groups.items()
    }
    for decision, groups in space.decisions(cfg, search).items()
  }


def run(cfg, search, logits):
  return harden.harden(logits, cfg=cfg, quant=bits_of(search), search=search)


def count(masks):
  return {g: m.sum(-1) for g, m in masks.items()}


def share(cfg, search, keep, salient):
  return budget.linear_budget(cfg, bits_of(search), count(keep), count(salient))


def largest_step(cfg, search):
  """Most that one multiple, or kv group, of one group changes the budget."""
  full = {g: np.full(3, n) for g, n in budget.group_widths(cfg).items()}
  more = {g: full[g] for g in budget.INPUT_GROUPS}
  whole = budget.linear_budget(cfg, bits_of(search), full, more)
  steps = []
  for group in budget.GROUPS:
    size = search.channel_multiple
    if group == 'attn_mid' and search.prune_heads:
      size = max(size, cfg.q_size // cfg.num_kv_heads)
    fewer, less = full[group].copy(), dict(more)
    fewer[0] -= size
    if group in less:
      less[group] = np.minimum(less[group], fewer)
    smaller = budget.linear_budget(
      cfg, bits_of(search), full | {group: fewer}, less
    )
    steps.append(whole - smaller)
  return max(steps)


# Laws, over many random logits.


@pytest.mark.parametrize('seed', range(8))
def test_the_budget_is_met_from_below_and_closely(cfg, search, seed):
  keep, salient, _ = run(cfg, search, random_logits(cfg, search, seed))

  gap = search.budget - share(cfg, search, keep, salient)
  assert -1e-12 <= gap < largest_step(cfg, search)
  if search.sparsity is not None:
    pruned = budget.sparsity(cfg, count(keep))
    step = 16 / bits_of(search).high_bits * largest_step(cfg, search)
    assert -1e-12 <= pruned - search.sparsity < step


@pytest.mark.parametrize('multiple', [2, 8, 16])
def test_widths_and_boundaries_are_multiples(cfg, search, multiple):
  changed = {'channel_multiple': multiple}
  search = config.SearchConfig(**vars(search) | changed)
  for seed in range(3):
    keep, salient, _ = run(cfg, search, random_logits(cfg, search, seed))

    assert keep.keys() == set(budget.GROUPS)
    assert salient.keys() == set(budget.INPUT_GROUPS)
    for group, mask in keep.items():
      kept = mask.sum(-1)
      assert mask.dtype == bool
      assert mask.shape == (3, budget.group_widths(cfg)[group])
      assert np.all(kept % multiple == 0)
      assert np.all(kept >= multiple)
    for group, mask in salient.items():
      assert np.all(mask.sum(-1) % multiple == 0)
      assert not np.any(mask & ~keep[group])


def test_who_is_chosen_has_the_largest_logits(cfg, search):
  logits = random_logits(cfg, search, 4)

  keep, salient, _ = run(cfg, search, logits)

  def check(scores, chosen, among):
    for layer in range(3):
      inside = scores[layer][chosen[layer]]
      outside = scores[layer][~chosen[layer] & among[layer]]
      if inside.size and outside.size:
        assert inside.min() >= outside.max()

  for group, scores in logits['keep'].items():
    width = keep[group].shape[1] // scores.shape[1]
    spread = np.repeat(scores, width, axis=-1)
    check(spread, keep[group], np.ones_like(keep[group]))
    assert np.all(keep[group].reshape(3, -1, width).sum(-1) % width == 0)
  for group, scores in logits['salient'].items():
    check(scores, salient[group], keep[group])


def test_what_is_not_decided_is_kept_and_not_salient(cfg):
  prune = config.SearchConfig(**SEARCHES['prune'])
  keep, salient, _ = run(cfg, prune, random_logits(cfg, prune, 0))
  assert keep['attn_mid'].all()
  assert not any(m.any() for m in salient.values())

  quant = config.SearchConfig(**SEARCHES['quant'])
  keep, salient, _ = run(cfg, quant, random_logits(cfg, quant, 0))
  assert all(m.all() for m in keep.values())


def test_hardening_again_changes_nothing(cfg, search):
  logits = random_logits(cfg, search, 5)
  keep, salient, threshold = run(cfg, search, logits)
  if search.sparsity is not None and search.kind == 'joint':
    only_keep = {'keep': logits['keep'], 'salient': {}}
    cut = run(cfg, search, only_keep)[2]
  else:
    cut = threshold
  moved = {
    'keep': {g: x - cut for g, x in logits['keep'].items()},
    'salient': {g: x - threshold for g, x in logits['salient'].items()},
  }

  keep_again, salient_again, zero = run(cfg, search, moved)

  assert abs(zero) < 1e-9
  for group in keep:
    np.testing.assert_array_equal(keep_again[group], keep[group])
  for group in salient:
    np.testing.assert_array_equal(salient_again[group], salient[group])


def test_a_threshold_moves_all_logits_alike(cfg, search):
  logits = random_logits(cfg, search, 6)
  shifted = {
    d: {g: x + 2.5 for g, x in groups.items()} for d, groups in logits.items()
  }

  keep, salient, threshold = run(cfg, search, logits)
  keep_2, salient_2, threshold_2 = run(cfg, search, shifted)

  np.testing.assert_allclose(threshold_2 - threshold, 2.5, atol=1e-9)
  for one, two in ((keep, keep_2), (salient, salient_2)):
    for group in one:
      np.testing.assert_array_equal(one[group], two[group])


# An oracle: every threshold there is, in plain loops.


def rounded(number, multiple, least, most):
  """The multiple nearest to a number, the upper one of two."""
  candidates = range(least, most + 1, multiple)
  return min(candidates, key=lambda c: (abs(c - number), -c))


def chosen(scores, number):
  """The places of the largest scores."""
  order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
  return set(order[:number])


def decide(cfg, search, logits, threshold):
  """Masks at a threshold, channel by channel."""
  multiple = search.channel_multiple
  keep, salient = {}, {}
  for group, width in budget.group_widths(cfg).items():
    keep[group] = np.ones((3, width), bool)
    if group in logits['keep']:
      for layer, scores in enumerate(logits['keep'][group]):
        channels = width // len(scores)
        step = max(1, multiple // channels)
        wanted = sum(s > threshold for s in scores)
        n = rounded(wanted, step, step, len(scores))
        places = chosen(list(scores), n)
        for c in range(width):
          keep[group][layer, c] = c // channels in places
  for group in budget.INPUT_GROUPS:
    salient[group] = np.zeros_like(keep[group])
    if group in logits['salient']:
      for layer, scores in enumerate(logits['salient'][group]):
        kept = np.flatnonzero(keep[group][layer])
        inside = [scores[c] for c in kept]
        wanted = sum(s > threshold for s in inside)
        n = rounded(wanted, multiple, 0, len(kept))
        for place in chosen(inside, n):
          salient[group][layer, kept[place]] = True
  return keep, salient


@pytest.mark.parametrize('name', ['quant', 'prune', 'joint', 'joint_heads'])
def test_no_lower_threshold_meets_the_budget(cfg, name):
  search = config.SearchConfig(**SEARCHES[name])
  logits = random_logits(cfg, search, 7)

  keep, salient, threshold = run(cfg, search, logits)

  scores = np.concatenate(
    [x.ravel() for groups in logits.values() for x in groups.values()]
  )
  scores = np.sort(scores)
  place = np.abs(scores - threshold).argmin()
  # The threshold is a logit, the first one that is dropped ...
  np.testing.assert_allclose(threshold, scores[place], atol=1e-9)
  at = decide(cfg, search, logits, scores[place] + 1e-9)
  for ours, theirs in zip((keep, salient), at, strict=True):
    for group in ours:
      np.testing.assert_array_equal(ours[group], theirs[group])
  # ... and below it the budget is not met, nor at any lower one.
  for lower in scores[place::-37]:
    masks = decide(cfg, search, logits, lower - 1e-9)
    assert share(cfg, search, *masks) > search.budget


def test_without_multiples_the_largest_logits_win(cfg):
  search = config.SearchConfig(kind='quant', budget=0.25, channel_multiple=1)
  logits = random_logits(cfg, search, 8)
  outputs = {'attn_in': 160, 'attn_mid': 48, 'mlp_in': 160, 'mlp_mid': 48}
  ranked = sorted(
    (
      (float(scores[layer, c]), group, layer, c)
      for group, scores in logits['salient'].items()
      for layer in range(3)
      for c in range(scores.shape[1])
    ),
    reverse=True,
  )
  dense = 3 * budget.dense_weights(cfg)
  expected = {g: np.zeros_like(x, bool) for g, x in logits['salient'].items()}
  bits = 3 * dense
  for _, group, layer, c in ranked:  # greedily, until the next is too much
    bits += 5 * outputs[group]
    if bits > 16 * dense * 0.25:
      break
    expected[group][layer, c] = True

  _, salient, _ = run(cfg, search, logits)

  for group, mask in expected.items():
    np.testing.assert_array_equal(salient[group], mask)


@pytest.mark.parametrize('target', [1.0, 0.999999])
def test_a_prune_budget_of_everything_keeps_everything(cfg, target):
  search = config.SearchConfig(kind='prune', budget=target)
  keep, _, _ = run(cfg, search, random_logits(cfg, search, 9))

  dropped = sum((~m).sum() for m in keep.values())
  assert (dropped == 0) == (target == 1.0)
  assert dropped <= 8


def test_kv_groups_are_dropped_until_the_width_is_a_multiple():
  # A kv group is 48 channels wide.
  cfg = tiny.config(
    hidden_size=64,
    intermediate_size=96,
    num_heads=8,
    num_kv_heads=4,
    head_dim=24,
  )
  search = config.SearchConfig(
    kind='prune', budget=0.4, prune_heads=True, channel_multiple=32
  )

  for seed in range(6):
    keep, _, _ = run(cfg, search, random_logits(cfg, search, seed))
    assert set(keep['attn_mid'].sum(-1)) <= {96, 192}


# Pieces.


@pytest.mark.parametrize(
  ('counts', 'multiple', 'least', 'most', 'expected'),
  [
    ([0, 3, 4, 11, 12, 80], 8, 8, 80, [8, 8, 8, 8, 16, 80]),
    ([0, 3, 4, 11, 12, 80], 8, 0, 72, [0, 0, 8, 8, 16, 72]),
    ([0, 1, 2, 3, 4], 5, 0, 5, [0, 0, 0, 5, 5]),
    ([0, 1, 7], 1, 1, 7, [1, 1, 7]),
    ([20, 20], 8, 0, [16, 24], [16, 24]),
  ],
)
def test_counts_round_to_the_nearest_multiple(
  counts, multiple, least, most, expected
):
  most = np.array(most) if isinstance(most, list) else most

  rounded = harden.round_counts(np.array(counts), multiple, least, most)

  np.testing.assert_array_equal(rounded, expected)


def test_top_takes_the_largest_and_of_equals_the_first():
  scores = np.array([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [4, 3, 2, 1]])

  np.testing.assert_array_equal(
    harden.top(scores, np.array([2, 3, 0])),
    [[0, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 0]],
  )
  np.testing.assert_array_equal(
    harden.top(scores, np.array([1, 0, 4])),
    [[0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
  )


# What cannot be done.


def test_a_multiple_that_divides_no_width_is_refused(cfg):
  with pytest.raises(config.UserError) as raised:
    harden.check_multiple(cfg, 32)

  assert str(raised.value) == (
    '--channel_multiple=32 does not divide the widths [48, 80, 96]; use 16 or '
    'a divisor of it'
  )
  assert harden.check_multiple(cfg, 16) is None


def test_a_budget_below_the_smallest_model_names_the_smallest(cfg):
  search = config.SearchConfig(kind='joint', budget=0.001)
  # One multiple of 8 is left of every group but attn_mid, at 3 bits.
  weights = 8 * 160 + 96 * 8 + 3 * 8 * 8
  expected = weights * 3 / (16 * budget.dense_weights(cfg))

  with pytest.raises(config.UserError) as raised:
    run(cfg, search, random_logits(cfg, search, 0))

  assert str(raised.value) == (
    '--budget=0.001 cannot be met: the smallest here, with '
    f'--channel_multiple=8, is {expected:.5f}'
  )


def test_a_sparsity_above_the_largest_names_the_largest(cfg):
  search = config.SearchConfig(kind='joint', budget=0.001, sparsity=0.99)
  weights = 8 * 160 + 96 * 8 + 3 * 8 * 8
  expected = 1 - weights / budget.dense_weights(cfg)

  with pytest.raises(config.UserError) as raised:
    run(cfg, search, random_logits(cfg, search, 0))

  assert str(raised.value) == (
    '--sparsity=0.99 cannot be met: the largest here, with '
    f'--channel_multiple=8, is {expected:.5f}'
  )


def test_a_sparsity_that_leaves_too_much_for_the_budget_is_refused(cfg):
  search = config.SearchConfig(kind='joint', budget=0.05, sparsity=0.4)

  with pytest.raises(config.UserError, match=r'--budget=0\.05 cannot be met'):
    run(cfg, search, random_logits(cfg, search, 0))
