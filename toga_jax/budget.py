"""From widths to bits and bytes: one formula for loss and report.

Every function is plain arithmetic on whatever it is given: traced JAX values
inside the loss, NumPy integers in hardening and reports. No jax here.

A block has six groups of channels. Linears that read the same activation share
its group; `kept` and `salient` map a group to how many of its channels are kept
and how many of those are salient (more bits), per layer.

  group     width  read by      written by
  attn_in   D      q k v
  attn_mid  N*H    o            q; k and v through their kv groups
  attn_out  D                   o
  mlp_in    D      gate up
  mlp_mid   F      down         gate up
  mlp_out   D                   down
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from toga_jax import config

Count = Any  # int, NumPy or traced array; scalar or [L]
Widths = Mapping[str, Count]  # group -> channels

GROUPS = ('attn_in', 'attn_mid', 'attn_out', 'mlp_in', 'mlp_mid', 'mlp_out')
INPUT_GROUPS = ('attn_in', 'attn_mid', 'mlp_in', 'mlp_mid')

# linear -> (group of its inputs, group of its outputs)
LINEARS: Mapping[str, tuple[str, str]] = {
  'q': ('attn_in', 'attn_mid'),
  'k': ('attn_in', 'attn_mid'),
  'v': ('attn_in', 'attn_mid'),
  'o': ('attn_mid', 'attn_out'),
  'gate': ('mlp_in', 'mlp_mid'),
  'up': ('mlp_in', 'mlp_mid'),
  'down': ('mlp_mid', 'mlp_out'),
}

SCALE_BYTES = 2  # float16
INDEX_BYTES = 4  # int32
WORD_BITS = 32  # packed weights come in int32 words
FLOAT_BYTES = 2  # what is not quantized is stored in 16 bits


def group_widths(cfg: config.ModelConfig) -> dict[str, int]:
  """Channels of each group in the dense model."""
  d = cfg.hidden_size
  return {
    'attn_in': d,
    'attn_mid': cfg.q_size,
    'attn_out': d,
    'mlp_in': d,
    'mlp_mid': cfg.intermediate_size,
    'mlp_out': d,
  }


def output_width(cfg: config.ModelConfig, linear: str, kept: Widths) -> Count:
  """Output channels of a linear; k and v lose whole kv groups with attn_mid."""
  width = kept[LINEARS[linear][1]]
  if linear in ('k', 'v'):
    return width * cfg.num_kv_heads / cfg.num_heads
  return width


def value_bits(
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  kept: Widths,
  salient: Widths,
) -> dict[str, Count]:
  """Bits of the kept weights of each linear: the B(S) of eq. (6), unnormalised.

  Args:
    cfg: the model's shape.
    quant: bit widths of the two ranges.
    kept: kept channels of each of the six groups, scalar or [L].
    salient: kept and salient channels of each input group.

  Returns:
    linear -> bits, scalar or [L] as given.
  """
  low, high = quant.low_bits, quant.high_bits
  bits = {}
  for linear, (source, _) in LINEARS.items():
    per_output = low * kept[source] + (high - low) * salient[source]
    bits[linear] = per_output * output_width(cfg, linear, kept)
  return bits


def dense_weights(cfg: config.ModelConfig) -> int:
  """Weights in the linear layers of one dense block."""
  widths = group_widths(cfg)
  return sum(
    int(widths[source] * output_width(cfg, linear, widths))
    for linear, (source, _) in LINEARS.items()
  )


def linear_budget(
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  kept: Widths,
  salient: Widths,
) -> Count:
  """B(S): bits of kept linear weights / (16 x all linear weights), 0..1.

  `kept` and `salient` hold [L] counts. The same function serves the loss (soft
  counts) and the report (exact counts).
  """
  bits = value_bits(cfg, quant, kept, salient)
  total = sum(b.sum() for b in bits.values())
  # A float: JAX refuses Python ints past 2^31, which 0.14B weights reach.
  return total / float(16 * cfg.num_layers * dense_weights(cfg))


def sparsity(cfg: config.ModelConfig, kept: Widths) -> Count:
  """Pruned share of the linear weights, 0..1."""
  one_bit = config.QuantConfig(low_bits=1, high_bits=1)
  none = {group: 0 for group in INPUT_GROUPS}
  return 1 - 16 * linear_budget(cfg, one_bit, kept, none)


def budget_range(
  kind: str, quant: config.QuantConfig, salient: str = 'learned'
) -> tuple[float, float]:
  """Lowest and highest `linear_budget` a kind of search can be asked for.

  Pruning has no sharp lower end (one multiple stays everywhere); 0 stands for
  it here and hardening says when a target is too small.
  """
  low, high = quant.low_bits / 16, quant.high_bits / 16
  if kind == 'quant':
    return low, low if salient == 'none' else high
  return 0.0, 1.0 if kind == 'prune' else high


def check_target(
  search: config.SearchConfig, quant: config.QuantConfig
) -> None:
  """Raises UserError for a budget that the bits and the sparsity rule out."""
  if search.kind != 'prune' and not quant.weights_on:
    raise config.UserError(
      f'--search={search.kind} needs quantized weights; --low_bits=16 is off'
    )
  if search.salient != 'learned' and search.kind != 'quant':
    raise config.UserError(
      f'--salient={search.salient} is a rule for --search=quant; '
      f'--search={search.kind} learns'
    )
  low, high = budget_range(search.kind, quant, search.salient)
  if search.salient != 'none' and not low <= search.budget <= high:
    raise config.UserError(
      f'--budget={search.budget} is outside what --search={search.kind} with '
      f'{quant.low_bits}/{quant.high_bits} bits can reach: {low} to {high}'
    )
  if search.sparsity is None:
    return
  kept = 1 - search.sparsity
  if search.kind == 'prune' and not math.isclose(search.budget, kept):
    raise config.UserError(
      f'--sparsity={search.sparsity} with --search=prune means '
      f'--budget={kept:.6g}; --budget={search.budget} contradicts it'
    )
  if search.kind == 'joint':
    least, most = kept * quant.low_bits / 16, kept * high
    if not least <= search.budget <= most:
      raise config.UserError(
        f'--sparsity={search.sparsity} leaves {kept:.3f} of the weights: at '
        f'{quant.low_bits}/{quant.high_bits} bits that is {least:.4f} to '
        f'{most:.4f}, which does not hold --budget={search.budget}'
      )


def average_act_bits(
  quant: config.QuantConfig, kept: Widths, salient: Widths
) -> float:
  """Activation bits, averaged over the channels that linears read."""
  channels = sum(kept[g].sum() for g in INPUT_GROUPS)
  high = sum(salient[g].sum() for g in INPUT_GROUPS)
  low, more = quant.act_low_bits, quant.act_high_bits - quant.act_low_bits
  return float(low + more * high / channels)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
  """Exact size of a compressed model, in the three numbers of every report."""

  linear_budget: float  # value bits / (16 x all linear weights)
  bits_per_weight: float  # all stored bits of linears / all linear weights
  average_bits: float  # value bits / kept weights
  sparsity: float  # pruned share of linear weights
  linear_bytes: int  # values, scales and indices of the linears
  total_bytes: int  # everything the packed checkpoint stores


def exact_size(
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  kept: Widths,
  salient: Widths,
) -> Size:
  """Counts what the packed layout of DESIGN 4 stores, to the byte.

  Args:
    cfg: the model's shape.
    quant: bit widths, group size, bits of the embeddings.
    kept: [L] integers per group.
    salient: [L] integers per input group.
  """
  widths = group_widths(cfg)
  layers = range(cfg.num_layers)
  linear_bytes = sum(
    _block_linear_bytes(
      cfg,
      quant,
      {g: int(kept[g][i]) for g in GROUPS},
      {g: int(salient[g][i]) for g in INPUT_GROUPS},
      widths,
    )
    for i in layers
  )
  bits = sum(
    int(b.sum()) for b in value_bits(cfg, quant, kept, salient).values()
  )
  all_weights = cfg.num_layers * dense_weights(cfg)
  share = linear_budget(cfg, quant, kept, salient)
  pruned = float(sparsity(cfg, kept))
  return Size(
    linear_budget=float(share),
    bits_per_weight=8 * linear_bytes / all_weights,
    average_bits=bits / ((1 - pruned) * all_weights),
    sparsity=pruned,
    linear_bytes=linear_bytes,
    total_bytes=linear_bytes + _other_bytes(cfg, quant, kept),
  )


def _block_linear_bytes(
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  kept: Mapping[str, int],
  salient: Mapping[str, int],
  widths: Mapping[str, int],
) -> int:
  """Bytes of one block's linears with the indices that feed them."""
  total = 0
  for linear, (source, _) in LINEARS.items():
    outputs = round(output_width(cfg, linear, kept))
    high = salient[source]
    for channels, bits in (
      (kept[source] - high, quant.low_bits),
      (high, quant.high_bits),
    ):
      total += _range_bytes(outputs, channels, bits, quant)
  for group in GROUPS:
    permuted = group in INPUT_GROUPS and 0 < salient[group] < kept[group]
    pruned = kept[group] < widths[group]
    # mlp_mid folds into gate, up and down. Heads that are pruned are not
    # computed, so attn_mid needs an index only where it is permuted.
    if group == 'attn_mid':
      pruned = False
    if group != 'mlp_mid' and (permuted or pruned):
      total += INDEX_BYTES * kept[group]
  return total


def _range_bytes(
  rows: int, channels: int, bits: int, quant: config.QuantConfig
) -> int:
  """Bytes of the values, scales and zero points of one precision range."""
  if not channels:
    return 0
  if bits == config.OFF_BITS:
    return FLOAT_BYTES * rows * channels
  size = quant.group_size
  groups = math.ceil(channels / size) if size else 1
  total = rows * (_word_bytes(channels * bits) + SCALE_BYTES * groups)
  if not quant.symmetric and bits > 1:  # one bit has no zero point
    total += groups * _word_bytes(rows * bits)
  return total


def _word_bytes(bits: int) -> int:
  """Bytes of whole int32 words that hold so many bits."""
  return math.ceil(bits / WORD_BITS) * WORD_BITS // 8


def _other_bytes(
  cfg: config.ModelConfig, quant: config.QuantConfig, kept: Widths
) -> int:
  """Bytes of embeddings (tied ones once), norms and biases."""
  embeddings = (1 if cfg.tie_embeddings else 2) * _range_bytes(
    cfg.vocab_size, cfg.hidden_size, quant.embed_bits, quant
  )
  per_block = 2 * cfg.hidden_size
  if cfg.qk_norm:
    per_block += 2 * cfg.head_dim
  floats = cfg.num_layers * per_block + cfg.hidden_size
  if cfg.attention_bias:  # of the heads that are kept
    floats += round(
      sum(output_width(cfg, linear, kept).sum() for linear in ('q', 'k', 'v'))
    )
  return embeddings + FLOAT_BYTES * floats
