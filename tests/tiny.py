"""A Llama small enough for any test, as objects and as files."""

import json
import pathlib

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers

from toga_jax import budget
from toga_jax import config as config_lib
from toga_jax.ckpt import names
from toga_jax.model import params

WORDS = 'the of and a in to is was for on as by with he that at from his it an'


def config(**changes) -> config_lib.ModelConfig:
  """D=48, F=80, L=3, N=6, K=2, H=16, V=61; tied unless changed."""
  sizes = {
    'vocab_size': 61,
    'hidden_size': 48,
    'intermediate_size': 80,
    'num_layers': 3,
    'num_heads': 6,
    'num_kv_heads': 2,
    'head_dim': 16,
    'tie_embeddings': True,
  }
  return config_lib.ModelConfig(**(sizes | changes))


def weights(cfg: config_lib.ModelConfig, seed: int = 0) -> params.LlamaParams:
  """Random weights as `params.init_params` draws them, without a compiler."""
  rng = np.random.default_rng(seed)

  def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    noise = rng.standard_normal(leaf.shape, np.float32)
    if jax.tree_util.keystr(path).endswith('norm'):
      return jax.numpy.asarray(1 + 0.1 * noise)
    fan_in = leaf.shape[-2] if len(leaf.shape) == 3 else cfg.hidden_size
    return jax.numpy.asarray(noise * fan_in**-0.5)

  return jax.tree.map_with_path(draw, params.abstract_params(cfg))


def tokens(seed: int, *shape: int) -> jax.Array:
  """Random ids below 61, int32."""
  ids = np.random.default_rng(seed).integers(0, 61, shape, dtype=np.int32)
  return jax.numpy.asarray(ids)


def decision(
  cfg: config_lib.ModelConfig, seed: int, *, heads: bool = False
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
  """Random (keep, salient) masks [L, width] as a spec holds them.

  Salient channels are kept ones; `heads` also drops whole kv groups.
  """
  rng = np.random.default_rng(seed)
  keep, salient = {}, {}
  for group, width in budget.group_widths(cfg).items():
    keep[group] = rng.random((cfg.num_layers, width)) < 0.7
  groups = np.ones((cfg.num_layers, cfg.num_kv_heads), bool)
  if heads:
    groups = rng.random(groups.shape) < 0.5
    groups[:, 0] |= ~groups.any(-1)
  per_group = cfg.q_size // cfg.num_kv_heads
  keep['attn_mid'] = np.repeat(groups, per_group, axis=-1)
  for group in budget.INPUT_GROUPS:
    salient[group] = keep[group] & (rng.random(keep[group].shape) < 0.3)
  return keep, salient


def write_folder(
  folder: pathlib.Path,
  cfg: config_lib.ModelConfig | None = None,
  seed: int = 0,
) -> pathlib.Path:
  """Writes the model as a Hugging Face folder with a word tokenizer."""
  cfg = cfg or config()
  model = weights(cfg, seed)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for field in params.layer_shapes(cfg):
    name = names.LAYER[field]
    for i, tensor in enumerate(np.asarray(getattr(model.layers, field))):
      tensor = tensor.T if name.transposed else tensor
      tensors[name.hf.format(i=i)] = np.ascontiguousarray(tensor)
  for field in ('embed', 'final_norm', 'head'):
    if getattr(model, field) is not None:
      tensors[names.MODEL[field].hf] = np.asarray(getattr(model, field))
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  raw = {
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': cfg.vocab_size,
    'hidden_size': cfg.hidden_size,
    'intermediate_size': cfg.intermediate_size,
    'num_hidden_layers': cfg.num_layers,
    'num_attention_heads': cfg.num_heads,
    'num_key_value_heads': cfg.num_kv_heads,
    'head_dim': cfg.head_dim,
    'rms_norm_eps': cfg.rms_norm_eps,
    'rope_theta': cfg.rope_theta,
    'tie_word_embeddings': cfg.tie_embeddings,
    'eos_token_id': 1,
  }
  (folder / 'config.json').write_text(json.dumps(raw))
  vocab = {w: i for i, w in enumerate(['[UNK]', '</s>', *WORDS.split()])}
  words = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='[UNK]'))
  words.pre_tokenizer = pre_tokenizers.Whitespace()
  words.save(str(folder / 'tokenizer.json'))
  return folder


def write_text(path: pathlib.Path, words: int = 4000) -> pathlib.Path:
  """Writes random words with a repeating pattern, so there is what to learn."""
  rng = np.random.default_rng(7)
  vocabulary = WORDS.split()
  chosen = [vocabulary[i] for i in rng.integers(0, len(vocabulary), words)]
  path.write_text(' '.join(chosen))
  return path
