"""Laws of surgery: what is cut, moved and packed is the model it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config
from toga_jax import spec as spec_lib
from toga_jax.model import linear, llama, params
from toga_jax.quant import packed
from toga_jax.surgery import assemble, calibrate, reorder

OFF = config.QuantConfig(low_bits=16, high_bits=16)
MIXED = config.QuantConfig(
  low_bits=4, high_bits=8, act_low_bits=4, act_high_bits=8
)
HOW = config.CompressConfig(windows=6, seq_len=16)


@pytest.fixture(scope='module')
def cfg():
  return tiny.config(num_layers=2)


@pytest.fixture(scope='module')
def weights(cfg):
  return tiny.weights(cfg)


def spec_of(cfg, quant, seed=3, *, prune=True, mixed=True):
  keep, salient = tiny.decision(cfg, seed, heads=True)
  if not mixed:
    salient = {g: np.zeros_like(m) for g, m in salient.items()}
  if not prune:
    keep = {g: np.ones_like(m) for g, m in keep.items()}
  return spec_lib.CompressionSpec(
    cfg=cfg,
    quant=quant,
    keep=keep,
    salient=salient,
    fingerprint='0' * 64,
    made_by={'rule': 'test'},
  )


def settings_of(spec, how=HOW, stored=np.float32, compute=np.float32):
  return assemble.Settings(
    quant=spec.quant, how=how, stored=stored, compute=compute
  )


def windows_of(how=HOW):
  return np.asarray(tiny.tokens(9, how.windows, how.seq_len))


def packed_model(weights, spec, settings, finished=lambda i: None):
  embed = assemble.embedding(weights.embed, settings)
  blocks = assemble.blocks(
    weights, embed, spec, windows_of(settings.how), settings, finished
  )
  head = weights.head
  model = params.LlamaParams(
    embed=embed,
    layers=tuple(blocks),
    final_norm=weights.final_norm,
    head=None if head is None else assemble.embedding(head, settings),
  )
  return jax.tree.map(jnp.asarray, model)


def on_host(tree):
  return jax.tree.map(np.asarray, tree)


def masks_of(spec):
  def floats(masks):
    return {g: jnp.asarray(m, jnp.float32) for g, m in masks.items()}

  return linear.ChannelMasks(
    keep=floats(spec.keep), salient=floats(spec.salient)
  )


def integers_as_dense(model, spec, reordered=True):
  """The packed model's weights as dense ones, pruned channels 0."""
  cfg = spec.cfg
  layers = []
  for i, block in enumerate(model.layers):
    orders = reorder.block_orders(spec, i, reordered)
    fields = {}
    for name in params.layer_shapes(cfg):
      w = getattr(block.weights, name)
      if name in budget.LINEARS:
        w = jax.tree.map(np.asarray, w)
        w = assemble.restored(cfg, name, w, orders)
      fields[name] = np.asarray(w)
    layers.append(params.LayerParams(**fields))
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
  return model.replace(layers=stacked)


VARIANTS = {
  'llama': {},
  'untied': {'tie_embeddings': False},
  'qwen3': {'qk_norm': True, 'architecture': 'Qwen3ForCausalLM'},
}


@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize('reordered', [True, False])
def test_pruned_and_reordered_logits_are_the_masked_ones(changes, reordered):
  cfg = tiny.config(**changes)
  weights = tiny.weights(cfg)
  spec = spec_of(cfg, OFF)
  how = dataclasses.replace(HOW, reorder=reordered)
  model = packed_model(weights, spec, settings_of(spec, how))
  tokens = tiny.tokens(1, 2, 11)

  logits = llama.logits(model, cfg, tokens)

  masked = llama.logits(weights, cfg, tokens, masks_of(spec), OFF)
  np.testing.assert_allclose(logits, masked, atol=1e-4)
  widths = [b.weights.q.outputs for b in model.layers]
  assert widths == spec.kept_counts()['attn_mid'].tolist()


def test_biases_of_pruned_heads_go_with_them():
  cfg = tiny.config(attention_bias=True, architecture='Qwen2ForCausalLM')
  spec = spec_of(cfg, OFF)
  weights = tiny.weights(cfg)
  model = packed_model(weights, spec, settings_of(spec))
  tokens = tiny.tokens(1, 2, 11)
  masked = llama.logits(weights, cfg, tokens, masks_of(spec), OFF)
  logits = llama.logits(model, cfg, tokens)
  np.testing.assert_allclose(logits, masked, atol=1e-4)


def test_a_permutation_alone_leaves_logits_unchanged(cfg, weights):
  spec = spec_of(cfg, OFF, prune=False)
  model = packed_model(weights, spec, settings_of(spec))
  tokens = tiny.tokens(1, 2, 11)
  logits = llama.logits(model, cfg, tokens)
  dense = llama.logits(weights, cfg, tokens)
  np.testing.assert_allclose(logits, dense, atol=1e-4)
  channels = model.layers[0].channels
  assert channels.read['attn_mid'].index is not None
  assert channels.read['mlp_mid'].index is None  # folded
  assert channels.write == {'attn_out': None, 'mlp_out': None}


QUANTS = {
  'mixed': MIXED,
  'groups': dataclasses.replace(MIXED, group_size=7),
  'zeros': config.QuantConfig(
    low_bits=2, high_bits=4, group_size=16, symmetric=False
  ),
  'one bit': config.QuantConfig(low_bits=1, high_bits=4),
  'half 16': config.QuantConfig(low_bits=3, high_bits=16, embed_bits=4),
  'cache': dataclasses.replace(MIXED, kv_bits=4, embed_bits=8),
}


@pytest.mark.parametrize(
  ('name', 'reordered'), [*((n, True) for n in QUANTS), ('groups', False)]
)
def test_packed_blocks_are_the_fake_quantized_ones_of_the_same_integers(
  cfg, weights, name, reordered
):
  quant = QUANTS[name]
  spec = spec_of(cfg, quant)
  how = dataclasses.replace(HOW, reorder=reordered)
  model = packed_model(weights, spec, settings_of(spec, how))
  dense = integers_as_dense(model, spec, reordered)
  acts = dataclasses.replace(quant, low_bits=16, high_bits=16)
  x = linear.embedded(model.embed, tiny.tokens(1, 2, 11), np.dtype('float32'))
  positions = jnp.broadcast_to(jnp.arange(11), (2, 11))
  run = jax.jit(llama.block, static_argnums=(4, 5))
  for i, block in enumerate(model.layers):
    masks = calibrate.masks_of(cfg, reorder.block_orders(spec, i, reordered))
    w = jax.tree.map(lambda a, i=i: a[i], dense.layers)
    expected = run(x, w, masks, positions, cfg, acts)
    got = llama.run_packed_block(x, block, cfg=cfg, quant=quant)
    gap = np.abs(np.asarray(got) - np.asarray(expected))
    if quant.acts_on:
      # An activation on the border of two codes may round either way.
      assert np.median(gap) < 1e-5
      assert np.linalg.norm(gap) < 0.02 * np.linalg.norm(expected)
    else:
      assert gap.max() < 1e-4
    x = expected


def test_without_reordering_the_last_kept_channels_are_precise(cfg, weights):
  spec = spec_of(cfg, MIXED)
  how = dataclasses.replace(HOW, reorder=False)
  model = packed_model(weights, spec, settings_of(spec, how))
  for i, block in enumerate(model.layers):
    kept = np.flatnonzero(spec.keep['mlp_in'][i])
    gather = block.channels.read['mlp_in']
    np.testing.assert_array_equal(gather.index, kept)
    assert gather.high == spec.salient['mlp_in'][i].sum()
    bits = [p.bits for p in block.weights.up.parts]
    assert bits == [4, 8]


def test_eight_bits_are_close_to_dense(cfg, weights):
  quant = config.QuantConfig(
    low_bits=8, high_bits=8, act_low_bits=8, act_high_bits=8, embed_bits=8
  )
  spec = spec_of(cfg, quant, prune=False)
  model = packed_model(weights, spec, settings_of(spec))
  tokens = tiny.tokens(1, 2, 11)
  dense = llama.logits(weights, cfg, tokens)
  logits = llama.logits(model, cfg, tokens, quant=quant)
  error = np.linalg.norm(logits - dense) / np.linalg.norm(dense)
  assert 0 < error < 0.05


def relative_error(weights, spec, how):
  """Of the last hidden states against the dense model's."""
  model = packed_model(weights, spec, settings_of(spec, how))
  tokens = tiny.tokens(4, 8, 16)
  dense = llama.hidden_states(weights, spec.cfg, tokens)
  hidden = llama.hidden_states(model, spec.cfg, tokens, quant=spec.quant)
  return np.linalg.norm(hidden - dense) / np.linalg.norm(dense)


def test_gptq_beats_rounding_to_nearest_through_the_model(cfg, weights):
  quant = config.QuantConfig(low_bits=3, high_bits=3)
  spec = spec_of(cfg, quant, prune=False)
  how = config.CompressConfig(windows=32, seq_len=16)
  nearest = dataclasses.replace(how, gptq=False)
  assert relative_error(weights, spec, how) < 0.95 * relative_error(
    weights, spec, nearest
  )


def test_without_gptq_codes_are_the_nearest_to_the_weights(cfg, weights):
  quant = config.QuantConfig(low_bits=4, high_bits=4)
  spec = spec_of(cfg, quant, prune=False, mixed=False)
  how = dataclasses.replace(HOW, gptq=False, clip_search=False)
  model = packed_model(weights, spec, settings_of(spec, how))
  (part,) = model.layers[1].weights.o.parts
  w = np.asarray(weights.layers.o[1]).T
  part = on_host(part)
  scale = part.scale.astype(np.float32)
  top = np.abs(w).max(axis=1, keepdims=True)
  np.testing.assert_allclose(scale, top / 7, rtol=2**-10)
  expected = np.clip(np.round(w / scale), -8, 7)
  np.testing.assert_array_equal(packed.unpack(part).q, expected)


def leaves(model):
  return [np.asarray(a).tobytes() for a in jax.tree.leaves(model)]


def test_finished_blocks_are_replayed_to_the_same_integers(cfg, weights):
  spec = spec_of(cfg, dataclasses.replace(MIXED, kv_bits=8))
  settings = settings_of(
    spec, stored=jnp.bfloat16, compute=calibrate.COMPUTE_DTYPE
  )
  whole = packed_model(weights, spec, settings)
  resumed = packed_model(
    weights,
    spec,
    settings,
    lambda i: on_host(whole.layers[i]) if i < 2 else None,
  )
  assert leaves(resumed) == leaves(whole)
  assert jax.tree.structure(resumed) == jax.tree.structure(whole)


def test_hessians_come_from_compressed_predecessors(cfg, weights):
  """Spoiling block 0 changes what block 1 is rounded for."""
  quant = config.QuantConfig(low_bits=2, high_bits=2)
  spec = spec_of(cfg, quant, prune=False)
  settings = settings_of(spec)
  model = packed_model(weights, spec, settings)
  first = on_host(model.layers[0])
  silent = packed.PackedLinear(
    tuple(
      p.replace(scale=np.zeros_like(p.scale)) for p in first.weights.o.parts
    )
  )
  spoiled = first.replace(weights=first.weights.replace(o=silent))
  other = packed_model(
    weights, spec, settings, lambda i: spoiled if i == 0 else None
  )
  assert leaves(other.layers[1].weights.q) != leaves(model.layers[1].weights.q)


def test_calibration_compiles_once_for_all_blocks(cfg, weights):
  spec = spec_of(cfg, MIXED, seed=11)
  before = calibrate.compiled_programs()
  packed_model(weights, spec, settings_of(spec))
  assert calibrate.compiled_programs() - before <= 5


def test_bytes_of_the_arrays_are_the_counted_ones(cfg, weights):
  for name, quant in QUANTS.items():
    spec = spec_of(cfg, quant)
    settings = settings_of(spec, stored=jnp.bfloat16)
    model = packed_model(weights, spec, settings)
    model = model.replace(final_norm=model.final_norm.astype(jnp.bfloat16))
    total = sum(a.nbytes for a in jax.tree.leaves(model))
    assert total == spec.size().total_bytes, name


def test_a_torn_kv_group_is_refused(cfg, weights):
  spec = spec_of(cfg, OFF)
  keep = {g: m.copy() for g, m in spec.keep.items()}
  keep['attn_mid'][1] = True
  keep['attn_mid'][1, 5] = False
  salient = {g: m & keep[g] for g, m in spec.salient.items()}
  spec = dataclasses.replace(spec, keep=keep, salient=salient)
  with pytest.raises(config.UserError, match='block 1 keeps a part of a kv'):
    packed_model(weights, spec, settings_of(spec))


def test_an_empty_group_is_refused(cfg, weights):
  spec = spec_of(cfg, OFF)
  keep = {g: m.copy() for g, m in spec.keep.items()}
  keep['mlp_out'][1] = False
  spec = dataclasses.replace(spec, keep=keep)
  with pytest.raises(config.UserError, match='block 1 keeps no channel of mlp'):
    packed_model(weights, spec, settings_of(spec))


def test_weights_that_are_not_finite_are_refused_by_name(cfg, weights):
  bad = weights.layers.replace(up=weights.layers.up.at[1, 3, 4].set(jnp.nan))
  spec = spec_of(cfg, MIXED, prune=False)
  with pytest.raises(config.UserError, match='block 1, gate/up'):
    packed_model(weights.replace(layers=bad), spec, settings_of(spec))


def test_a_singular_hessian_is_damped_and_said(cfg, weights, capsys):
  quant = config.QuantConfig(low_bits=4, high_bits=4)
  spec = spec_of(cfg, quant, prune=False)
  how = config.CompressConfig(windows=1, seq_len=5, damping=0.0)
  model = packed_model(weights, spec, settings_of(spec, how))
  assert 'the Hessian is singular; damping raised from 0' in (
    capsys.readouterr().err
  )
  tokens = tiny.tokens(1, 1, 5)
  assert np.isfinite(llama.logits(model, cfg, tokens, quant=quant)).all()
