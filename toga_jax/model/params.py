"""The weights of a Llama-family model as one pytree, layers stacked.

Linear kernels are [in, out], so `y = x @ w`. A leaf may also hold a
`ShapeDtypeStruct`, a sharding or a packed weight: `Leaf = Any`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from toga_jax import config

Leaf = Any


@struct.dataclass
class LayerParams:
  """One block's weights, or all blocks' with a leading L."""

  attn_norm: Leaf  # [L, D]
  q: Leaf  # [L, D, N*H]
  k: Leaf  # [L, D, K*H]
  v: Leaf  # [L, D, K*H]
  o: Leaf  # [L, N*H, D]
  mlp_norm: Leaf  # [L, D]
  gate: Leaf  # [L, D, F]
  up: Leaf  # [L, D, F]
  down: Leaf  # [L, F, D]
  q_bias: Leaf = None  # [L, N*H]; Qwen2
  k_bias: Leaf = None  # [L, K*H]
  v_bias: Leaf = None  # [L, K*H]
  q_norm: Leaf = None  # [L, H]; Qwen3
  k_norm: Leaf = None  # [L, H]


@struct.dataclass
class PackedBlock:
  """One block after surgery; blocks differ in width, so they do not stack."""

  weights: LayerParams  # linears are quant.packed.PackedLinear
  channels: Leaf  # model.linear.PackedChannels


@struct.dataclass
class LlamaParams:
  """A whole model. `head` is None when it is tied to `embed`.

  Packed, `layers` is a tuple of `PackedBlock`s, and `embed` and `head` may be
  `quant.packed.PackedRange`s.
  """

  embed: Leaf  # [V, D]
  layers: Leaf  # LayerParams, or tuple[PackedBlock, ...]
  final_norm: Leaf  # [D]
  head: Leaf = None  # [V, D]

  @property
  def output_embed(self) -> Leaf:
    """The [V, D] matrix that turns the last hidden state into logits."""
    return self.embed if self.head is None else self.head


def layer_shapes(cfg: config.ModelConfig) -> dict[str, tuple[int, ...]]:
  """Shapes of one block's leaves, by field name of `LayerParams`."""
  d, f = cfg.hidden_size, cfg.intermediate_size
  q, kv, h = cfg.q_size, cfg.kv_size, cfg.head_dim
  shapes = {
    'attn_norm': (d,),
    'q': (d, q),
    'k': (d, kv),
    'v': (d, kv),
    'o': (q, d),
    'mlp_norm': (d,),
    'gate': (d, f),
    'up': (d, f),
    'down': (f, d),
  }
  if cfg.attention_bias:
    shapes |= {'q_bias': (q,), 'k_bias': (kv,), 'v_bias': (kv,)}
  if cfg.qk_norm:
    shapes |= {'q_norm': (h,), 'k_norm': (h,)}
  return shapes


def abstract_params(
  cfg: config.ModelConfig, dtype: jax.typing.DTypeLike = jnp.float32
) -> LlamaParams:
  """`LlamaParams` of ShapeDtypeStructs: the shape of a model, no memory."""

  def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  layers = {k: leaf(cfg.num_layers, *s) for k, s in layer_shapes(cfg).items()}
  v, d = cfg.vocab_size, cfg.hidden_size
  return LlamaParams(
    embed=leaf(v, d),
    layers=LayerParams(**layers),
    final_norm=leaf(d),
    head=None if cfg.tie_embeddings else leaf(v, d),
  )


def init_params(
  key: jax.Array,
  cfg: config.ModelConfig,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> LlamaParams:
  """Random weights of realistic scale, for tests and synthetic benches."""
  shapes = abstract_params(cfg, dtype)
  leaves, treedef = jax.tree.flatten_with_path(shapes)
  keys = jax.random.split(key, len(leaves))

  def draw(k: jax.Array, path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
    noise = jax.random.normal(k, leaf.shape, jnp.float32)
    if jax.tree_util.keystr(path).endswith('norm'):
      return (1 + 0.1 * noise).astype(dtype)
    fan_in = leaf.shape[-2] if len(leaf.shape) == 3 else cfg.hidden_size
    return (noise * fan_in**-0.5).astype(dtype)

  return jax.tree.unflatten(
    treedef, [draw(k, p, x) for k, (p, x) in zip(keys, leaves, strict=True)]
  )
