"""Which decisions a search makes, and how they become channel masks.

A decision tree is `{'keep': {group: [L, n]}, 'salient': {group: [L, n]}}`: the
same tree for logits, samples and priors. n is the group's width, except for
`keep` of attn_mid, where one decision drops a whole kv group of heads.
"""

import jax.numpy as jnp
from jaxtyping import Array

from toga_jax import budget, config
from toga_jax.model import linear

Tree = dict[str, dict[str, Array]]


def decisions(
  cfg: config.ModelConfig, search: config.SearchConfig
) -> dict[str, dict[str, int]]:
  """Decisions per layer of each group, by what is decided.

  Args:
    cfg: the model's shape.
    search: `kind` says what is learned; `prune_heads` adds whole kv groups.

  Returns:
    {'keep': {group: n}, 'salient': {group: n}}, groups in network order.
  """
  widths = budget.group_widths(cfg)
  keep, salient = {}, {}
  if search.kind in ('prune', 'joint'):
    keep = {g: n for g, n in widths.items() if g != 'attn_mid'}
    if search.prune_heads:
      keep['attn_mid'] = cfg.num_kv_heads
  if search.kind in ('quant', 'joint'):
    salient = {g: widths[g] for g in budget.INPUT_GROUPS}
  return {
    'keep': {g: keep[g] for g in budget.GROUPS if g in keep},
    'salient': salient,
  }


def to_masks(cfg: config.ModelConfig, samples: Tree) -> linear.ChannelMasks:
  """Channel masks [L, width] from a tree of binary decisions."""
  keep = dict(samples['keep'])
  if 'attn_mid' in keep:
    per_group = cfg.q_size // cfg.num_kv_heads
    keep['attn_mid'] = jnp.repeat(keep['attn_mid'], per_group, axis=-1)
  return linear.ChannelMasks(keep=keep, salient=dict(samples['salient']))


def counts(
  cfg: config.ModelConfig, masks: linear.ChannelMasks
) -> tuple[dict[str, Array], dict[str, Array]]:
  """(kept, salient) channels per group and layer [L], for `budget`.

  A pruned channel's salient decision has no effect, so it is not counted.
  """
  full = budget.group_widths(cfg)
  layers = jnp.ones(cfg.num_layers)
  kept = {
    g: jnp.sum(masks.keep[g], -1) if g in masks.keep else layers * full[g]
    for g in budget.GROUPS
  }
  salient = {
    g: jnp.sum(masks.salient[g] * masks.keep.get(g, 1.0), -1)
    if g in masks.salient
    else layers * 0
    for g in budget.INPUT_GROUPS
  }
  return kept, salient
