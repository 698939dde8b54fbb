import dataclasses

import pytest

from toga_jax import config
from toga_jax.ckpt import names
from toga_jax.model import params


def test_every_field_of_the_parameter_tree_has_names():
  layer = {f.name for f in dataclasses.fields(params.LayerParams)}
  model = {f.name for f in dataclasses.fields(params.LlamaParams)}
  assert set(names.LAYER) == layer
  assert set(names.MODEL) == model - {'layers'}


def test_hf_shapes_of_a_llama_model(raw_config, table):
  cfg = config.ModelConfig.from_hf(raw_config)
  assert names.hf_shapes(cfg) == {n: s for n, (s, _) in table().items()}


@pytest.mark.parametrize(
  ('architecture', 'kwargs'),
  [
    ('Qwen2ForCausalLM', {'biases': True}),
    ('Qwen3ForCausalLM', {'qk_norms': True}),
  ],
)
def test_hf_shapes_of_qwen_models(raw_config, table, architecture, kwargs):
  cfg = config.ModelConfig.from_hf(
    raw_config | {'architectures': [architecture]}
  )
  shapes = {n: s for n, (s, _) in table(**kwargs).items()}
  assert names.hf_shapes(cfg) == shapes


def test_a_tied_model_has_no_head(raw_config):
  raw = raw_config | {'tie_word_embeddings': True}
  assert 'lm_head.weight' not in names.hf_shapes(
    config.ModelConfig.from_hf(raw)
  )


def test_gguf_names_map_to_hf_names(table):
  for hf_name, (_, gguf_name) in table(biases=True, qk_norms=True).items():
    assert names.from_gguf(gguf_name)[1] == hf_name
  assert names.from_gguf('blk.12.ffn_down.weight') == (
    'down',
    'model.layers.12.mlp.down_proj.weight',
  )


def test_unknown_gguf_names_map_to_none():
  assert names.from_gguf('blk.0.ffn_gate_exps.weight') is None
  assert names.from_gguf('rope_freqs.weight') is None
  assert names.from_gguf('blk.{i}.ffn_up.weight') is None
