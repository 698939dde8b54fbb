import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config
from toga_jax.quant import packing

# What reads and writes what, written out again: linear -> (in, out) groups.
LINEARS = {
  'q': ('attn_in', 'attn_mid'),
  'k': ('attn_in', 'kv'),
  'v': ('attn_in', 'kv'),
  'o': ('attn_mid', 'attn_out'),
  'gate': ('mlp_in', 'mlp_mid'),
  'up': ('mlp_in', 'mlp_mid'),
  'down': ('mlp_mid', 'mlp_out'),
}
LLAMA2_7B = config.ModelConfig(
  vocab_size=32000,
  hidden_size=4096,
  intermediate_size=11008,
  num_layers=32,
  num_heads=32,
  num_kv_heads=32,
  head_dim=128,
)


def counts(masks):
  return {g: m.sum(-1) for g, m in masks.items()}


def full(cfg):
  return {
    g: np.full(cfg.num_layers, n) for g, n in budget.group_widths(cfg).items()
  }


def part(cfg, shares):
  """Counts of the input groups: a share of each group's width."""
  widths = budget.group_widths(cfg)
  return {
    g: np.full(cfg.num_layers, round(widths[g] * shares.get(g, 0)))
    for g in budget.INPUT_GROUPS
  }


def outputs(cfg, keep, layer):
  """Which outputs of each linear are kept; a kv head goes with its queries."""
  channels_per_group = cfg.num_heads // cfg.num_kv_heads * cfg.head_dim
  kv = [
    keep['attn_mid'][layer, j // cfg.head_dim * channels_per_group]
    for j in range(cfg.num_kv_heads * cfg.head_dim)
  ]
  named = {g: keep[g][layer] for g in budget.GROUPS} | {'kv': np.array(kv)}
  return {linear: named[target] for linear, (_, target) in LINEARS.items()}


def bits_of_every_weight(cfg, quant, keep, salient):
  """linear -> [L] bits, weight by weight."""
  bits = {linear: [0] * cfg.num_layers for linear in LINEARS}
  for layer in range(cfg.num_layers):
    written = outputs(cfg, keep, layer)
    for linear, (source, _) in LINEARS.items():
      for i, kept in enumerate(keep[source][layer]):
        width = quant.high_bits if salient[source][layer, i] else quant.low_bits
        for out in written[linear]:
          bits[linear][layer] += width if kept and out else 0
  return bits


@pytest.mark.parametrize('heads', [False, True])
def test_bits_are_those_of_a_count_over_every_weight(heads):
  cfg = tiny.config()
  quant = config.QuantConfig(low_bits=3, high_bits=7)
  keep, salient = tiny.decision(cfg, 1, heads=heads)
  expected = bits_of_every_weight(cfg, quant, keep, salient)

  bits = budget.value_bits(cfg, quant, counts(keep), counts(salient))
  share = budget.linear_budget(cfg, quant, counts(keep), counts(salient))

  assert {k: list(b) for k, b in bits.items()} == expected
  dense = 3 * (48 * (96 + 32 + 32) + 96 * 48 + 3 * 48 * 80)
  assert share == sum(map(sum, expected.values())) / (16 * dense)


@pytest.mark.parametrize('seed', range(4))
def test_the_traced_budget_is_the_exact_one(seed):
  cfg = tiny.config(num_heads=8, num_kv_heads=2, head_dim=10)
  quant = config.QuantConfig(low_bits=2, high_bits=8)
  keep, salient = tiny.decision(cfg, seed, heads=True)
  kept, more = counts(keep), counts(salient)

  @jax.jit
  def traced(kept, more):
    return (
      budget.linear_budget(cfg, quant, kept, more),
      budget.sparsity(cfg, kept),
    )

  share, pruned = traced(
    jax.tree.map(jnp.float32, kept), jax.tree.map(jnp.float32, more)
  )

  # Sums of some ten thousand integers: exact in float32 up to the division.
  np.testing.assert_allclose(
    share, budget.linear_budget(cfg, quant, kept, more), rtol=1e-6
  )
  np.testing.assert_allclose(pruned, budget.sparsity(cfg, kept), rtol=1e-5)


def test_the_traced_budget_of_a_7b_model_fits_its_numbers():
  quant = config.QuantConfig(low_bits=4, high_bits=8)
  kept = jax.tree.map(jnp.float32, full(LLAMA2_7B))
  more = jax.tree.map(jnp.float32, part(LLAMA2_7B, {}))

  share = jax.jit(
    lambda kept, more: budget.linear_budget(LLAMA2_7B, quant, kept, more)
  )(kept, more)

  np.testing.assert_allclose(share, 0.25, rtol=1e-6)


def test_four_bits_with_an_eighth_at_eight_is_the_papers_number():
  quant = config.QuantConfig(low_bits=4, high_bits=8)
  eighth = part(LLAMA2_7B, dict.fromkeys(budget.INPUT_GROUPS, 0.125))

  share = budget.linear_budget(LLAMA2_7B, quant, full(LLAMA2_7B), eighth)

  assert share == 0.28125


def test_55_percent_of_the_weights_at_three_bits_is_the_papers_number():
  cfg = tiny.config(hidden_size=100)
  quant = config.QuantConfig(low_bits=3, high_bits=3)
  # Every linear has one side in the residual stream.
  residual = ('attn_in', 'attn_out', 'mlp_in', 'mlp_out')
  kept = full(cfg) | {g: np.full(3, 55) for g in residual}

  assert budget.linear_budget(cfg, quant, kept, part(cfg, {})) == 0.103125
  np.testing.assert_allclose(budget.sparsity(cfg, kept), 0.45, rtol=1e-12)


def test_dense_weights_of_llama_2_7b():
  # 6,738,415,616 parameters less embeddings, head and norms.
  others = 2 * 32000 * 4096 + 65 * 4096
  assert 32 * budget.dense_weights(LLAMA2_7B) == 6738415616 - others


def test_dropping_a_kv_group_drops_its_query_heads_one_key_and_one_value():
  cfg = tiny.config()
  one_bit = config.QuantConfig(low_bits=1, high_bits=1)
  kept = full(cfg) | {'attn_mid': np.array([96, 48, 96])}

  bits = budget.value_bits(cfg, one_bit, kept, part(cfg, {}))

  assert list(bits['q']) == [48 * 96, 48 * 48, 48 * 96]
  assert list(bits['k']) == list(bits['v']) == [48 * 32, 48 * 16, 48 * 32]
  assert list(bits['o']) == [96 * 48, 48 * 48, 96 * 48]
  assert list(bits['gate']) == [48 * 80] * 3


def stored_arrays(cfg, quant, keep, salient):
  """Every array of the packed checkpoint: (linears' and indices, the rest)."""
  linears, others = [], []

  def add_rows(where, rows, channels, bits):
    rows = int(rows)
    if bits == 16:
      where.append(np.zeros((rows, channels), np.float16))
      return
    if not quant.symmetric and bits > 1:
      groups = math.ceil(channels / (quant.group_size or channels))
      where.append(packing.pack(np.zeros((groups, rows), np.int8), bits))
    codes = np.zeros((rows, channels), np.int8)
    where.append(packing.pack(codes - (bits == 1), bits))
    size = quant.group_size or channels
    where.append(np.zeros((rows, math.ceil(channels / size)), np.float16))

  for layer in range(cfg.num_layers):
    written = outputs(cfg, keep, layer)
    for linear, (source, _) in LINEARS.items():
      high = salient[source][layer].sum()
      low = keep[source][layer].sum() - high
      for channels, bits in ((low, quant.low_bits), (high, quant.high_bits)):
        if channels:
          add_rows(linears, written[linear].sum(), channels, bits)
    for group in ('attn_in', 'attn_mid', 'attn_out', 'mlp_in', 'mlp_out'):
      kept = keep[group][layer]
      more = salient[group][layer] if group in salient else ~kept
      mixed = (kept & more).any() and (kept & ~more).any()
      # Heads that are gone leave nothing to choose from.
      if mixed or (group != 'attn_mid' and not kept.all()):
        linears.append(np.flatnonzero(kept).astype(np.int32))
    others += [np.zeros(cfg.hidden_size, np.float16)] * 2  # norms
    if cfg.qk_norm:
      others += [np.zeros(cfg.head_dim, np.float16)] * 2
    if cfg.attention_bias:
      for linear in 'qkv':
        others.append(np.zeros(written[linear].sum(), np.float16))
  others.append(np.zeros(cfg.hidden_size, np.float16))
  for _ in range(1 if cfg.tie_embeddings else 2):
    add_rows(others, cfg.vocab_size, cfg.hidden_size, quant.embed_bits)
  return linears, others


def total(arrays):
  return sum(a.nbytes for a in arrays)


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {'tie_embeddings': False},
    {'attention_bias': True, 'architecture': 'Qwen2ForCausalLM'},
    {'qk_norm': True, 'architecture': 'Qwen3ForCausalLM'},
  ],
  ids=['tied', 'untied', 'biased', 'qk_norm'],
)
@pytest.mark.parametrize(
  'bits',
  [
    {'low_bits': 3, 'high_bits': 8},
    {'low_bits': 4, 'high_bits': 8, 'group_size': 7},
    {'low_bits': 1, 'high_bits': 16, 'embed_bits': 5, 'group_size': 32},
    {'low_bits': 16, 'high_bits': 16, 'embed_bits': 8},
    {'low_bits': 1, 'high_bits': 5, 'embed_bits': 4, 'symmetric': False},
    {'low_bits': 4, 'high_bits': 4, 'group_size': 9, 'symmetric': False},
  ],
  ids=lambda b: '-'.join(str(v) for v in b.values()),
)
def test_exact_size_is_the_bytes_of_the_arrays(bits, changes):
  cfg = tiny.config(**changes)
  quant = config.QuantConfig(**bits)
  keep, salient = tiny.decision(cfg, 5, heads=True)
  keep['mlp_out'][1] = True  # one group whole: needs no index
  linears, others = stored_arrays(cfg, quant, keep, salient)

  size = budget.exact_size(cfg, quant, counts(keep), counts(salient))

  assert size.linear_bytes == total(linears)
  assert size.total_bytes == total(linears) + total(others)
  dense = cfg.num_layers * budget.dense_weights(cfg)
  assert size.bits_per_weight == 8 * total(linears) / dense


@pytest.mark.parametrize('all_salient', [False, True])
def test_one_precision_and_nothing_pruned_needs_no_index(all_salient):
  cfg = tiny.config()
  quant = config.QuantConfig(low_bits=4, high_bits=8)
  share = float(all_salient)
  salient = part(cfg, dict.fromkeys(budget.INPUT_GROUPS, share))

  size = budget.exact_size(cfg, quant, full(cfg), salient)

  bits = 8 if all_salient else 4
  # Inputs are multiples of 8, so the words have no padding at 4 or 8 bits.
  scales = 96 + 32 + 32 + 48 + 80 + 80 + 48
  weights = budget.dense_weights(cfg)
  assert size.linear_bytes == 3 * (weights * bits // 8 + 2 * scales)
  assert size.average_bits == bits
  assert size.sparsity == 0


def test_shares_of_a_size_are_those_of_the_weights():
  cfg = tiny.config()
  quant = config.QuantConfig(low_bits=3, high_bits=8)
  keep, salient = tiny.decision(cfg, 2, heads=True)
  one = config.QuantConfig(low_bits=1, high_bits=1)
  weights = bits_of_every_weight(cfg, one, keep, salient)
  kept = sum(map(sum, weights.values()))
  bits = sum(map(sum, bits_of_every_weight(cfg, quant, keep, salient).values()))
  dense = 3 * budget.dense_weights(cfg)

  size = budget.exact_size(cfg, quant, counts(keep), counts(salient))

  np.testing.assert_allclose(size.sparsity, 1 - kept / dense, rtol=1e-12)
  np.testing.assert_allclose(size.average_bits, bits / kept, rtol=1e-12)
  assert size.linear_budget == bits / (16 * dense)


def test_activation_bits_are_averaged_over_the_channels_that_are_read():
  cfg = tiny.config()
  quant = config.QuantConfig(act_low_bits=4, act_high_bits=8)
  keep, salient = tiny.decision(cfg, 3, heads=True)
  bits = [
    8 if salient[group][layer, c] else 4
    for group in budget.INPUT_GROUPS
    for layer in range(3)
    for c in np.flatnonzero(keep[group][layer])
  ]

  found = budget.average_act_bits(quant, counts(keep), counts(salient))

  np.testing.assert_allclose(found, np.mean(bits), rtol=1e-12)
  assert 4 < found < 8


@pytest.mark.parametrize(
  ('kind', 'salient', 'expected'),
  [
    ('quant', 'learned', (3 / 16, 0.5)),
    ('quant', 'none', (3 / 16, 3 / 16)),
    ('joint', 'learned', (0, 0.5)),
    ('prune', 'learned', (0, 1)),
  ],
)
def test_what_budgets_a_search_can_reach(kind, salient, expected):
  quant = config.QuantConfig(low_bits=3, high_bits=8)

  assert budget.budget_range(kind, quant, salient) == expected


BITS = {'low_bits': 4, 'high_bits': 8}


@pytest.mark.parametrize(
  ('search', 'bits', 'message'),
  [
    (
      {'budget': 0.2},
      BITS,
      '--budget=0.2 is outside what --search=quant with 4/8 bits can reach: '
      '0.25 to 0.5',
    ),
    (
      {'kind': 'joint', 'budget': 0.6},
      BITS,
      '--budget=0.6 is outside what --search=joint with 4/8 bits can reach: '
      '0.0 to 0.5',
    ),
    (
      {'kind': 'joint'},
      {'low_bits': 16, 'high_bits': 16},
      '--search=joint needs quantized weights; --low_bits=16 is off',
    ),
    (
      {'kind': 'prune', 'salient': 'activation'},
      BITS,
      '--salient=activation is a rule for --search=quant; --search=prune '
      'learns',
    ),
    (
      {'kind': 'joint', 'budget': 0.3, 'sparsity': 0.5},
      BITS,
      '--sparsity=0.5 leaves 0.500 of the weights: at 4/8 bits that is 0.1250 '
      'to 0.2500, which does not hold --budget=0.3',
    ),
    (
      {'kind': 'joint', 'budget': 0.1, 'sparsity': 0.5},
      BITS,
      '--sparsity=0.5 leaves 0.500 of the weights: at 4/8 bits that is 0.1250 '
      'to 0.2500, which does not hold --budget=0.1',
    ),
    (
      {'kind': 'prune', 'budget': 0.3, 'sparsity': 0.4},
      BITS,
      '--sparsity=0.4 with --search=prune means --budget=0.6; --budget=0.3 '
      'contradicts it',
    ),
  ],
  ids='below above unquantized rule sparse sparser prune'.split(),
)
def test_a_target_out_of_reach_is_refused(search, bits, message):
  search = config.SearchConfig(**search)

  with pytest.raises(config.UserError) as raised:
    budget.check_target(search, config.QuantConfig(**bits))

  assert str(raised.value) == message


@pytest.mark.parametrize(
  'search',
  [
    {'budget': 0.25},
    {'budget': 0.5},
    {'budget': 0.9, 'salient': 'none'},  # nothing is searched: it has no target
    {'budget': 0.3, 'salient': 'activation'},
    {'kind': 'joint', 'budget': 0.01},
    {'kind': 'joint', 'budget': 0.2, 'sparsity': 0.5},
    {'kind': 'prune', 'budget': 0.7, 'sparsity': 0.3},
  ],
)
def test_a_target_within_reach_is_accepted(search):
  search = config.SearchConfig(**search)

  assert budget.check_target(search, config.QuantConfig(**BITS)) is None
  low, high = budget.budget_range(search.kind, config.QuantConfig(**BITS))
  assert low <= search.budget <= high or search.salient == 'none'


def test_an_unquantized_prune_search_is_accepted():
  search = config.SearchConfig(kind='prune', budget=1.0)
  quant = dataclasses.replace(config.QuantConfig(), low_bits=16, high_bits=16)

  assert budget.check_target(search, quant) is None
