"""The forward pass of a Llama-family model, pure functions over its weights.

Dimension letters, the same everywhere:
  B batch   T query tokens   S cache tokens   L layers    D residual
  N query heads   K kv heads   G = N // K   H head dim   F ffn   V vocab

One `block` serves the dense model, the masked model of the search and, with
packed leaves, the compressed one. Blocks of one shape are scanned over stacked
weights and rematerialised, so one block's fake-quantized weights exist at a
time. Packed blocks differ in width: they are a tuple, run one after the other
by one jitted function, compiled once per distinct shape.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from toga_jax import config
from toga_jax.model import layers, linear, params

FULL_PRECISION = config.QuantConfig(low_bits=16, high_bits=16)

# Sees the activation of each of a block's groups: tap(group, x[B, T, C]).
Tap = Callable[[str, Array], None]


def _no_tap(group: str, x: Array) -> None:
  del group, x


def attend(
  h: Float[Array, 'B T I'],
  w: params.LayerParams,
  masks: linear.Channels,
  positions: Int[Array, 'B T'],
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
) -> Float[Array, 'B T C']:
  """The concatenated heads, from what `read` returned for attn_in.

  A packed block may have fewer heads than `cfg` says: whole kv groups go.
  """
  b, t, _ = h.shape
  heads = {}
  for name in 'qkv':
    y = linear.project(h, getattr(w, name), masks, 'attn_in', quant)
    bias = getattr(w, f'{name}_bias')
    y = y if bias is None else y + bias
    heads[name] = y.reshape(b, t, -1, cfg.head_dim)
  q, k, v = heads['q'], heads['k'], heads['v']
  if w.q_norm is not None:
    q = layers.rms_norm(q, w.q_norm, cfg.rms_norm_eps)
    k = layers.rms_norm(k, w.k_norm, cfg.rms_norm_eps)
  k = layers.round_cache(k, quant.kv_bits)
  v = layers.round_cache(v, quant.kv_bits)
  frequencies = layers.rope_frequencies(cfg)
  q = layers.rope(q, positions, frequencies)
  k = layers.rope(k, positions, frequencies)
  return layers.causal_attention(q, k, v).reshape(b, t, -1)


def attention(
  x: Float[Array, 'B T D'],
  w: params.LayerParams,
  masks: linear.Channels,
  positions: Int[Array, 'B T'],
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  tap: Tap = _no_tap,
) -> Float[Array, 'B T D']:
  """What a block's attention adds to the residual stream."""
  h = layers.rms_norm(x, w.attn_norm, cfg.rms_norm_eps)
  tap('attn_in', h)
  h = linear.read(h, masks, 'attn_in', quant)
  mid = attend(h, w, masks, positions, cfg, quant)
  tap('attn_mid', mid)
  mid = linear.read(mid, masks, 'attn_mid', quant)
  out = linear.project(mid, w.o, masks, 'attn_mid', quant)
  tap('attn_out', out)
  return linear.prune(out, masks, 'attn_out')


def gated(
  h: Float[Array, 'B T I'],
  w: params.LayerParams,
  masks: linear.Channels,
  quant: config.QuantConfig,
) -> Float[Array, 'B T C']:
  """The inner activation, from what `read` returned for mlp_in."""
  gate = linear.project(h, w.gate, masks, 'mlp_in', quant)
  up = linear.project(h, w.up, masks, 'mlp_in', quant)
  return jax.nn.silu(gate) * up


def mlp(
  x: Float[Array, 'B T D'],
  w: params.LayerParams,
  masks: linear.Channels,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  tap: Tap = _no_tap,
) -> Float[Array, 'B T D']:
  """What a block's SwiGLU feed-forward adds to the residual stream."""
  h = layers.rms_norm(x, w.mlp_norm, cfg.rms_norm_eps)
  tap('mlp_in', h)
  h = linear.read(h, masks, 'mlp_in', quant)
  mid = gated(h, w, masks, quant)
  tap('mlp_mid', mid)
  mid = linear.read(mid, masks, 'mlp_mid', quant)
  out = linear.project(mid, w.down, masks, 'mlp_mid', quant)
  tap('mlp_out', out)
  return linear.prune(out, masks, 'mlp_out')


def block(
  x: Float[Array, 'B T D'],
  w: params.LayerParams,
  masks: linear.Channels,
  positions: Int[Array, 'B T'],
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  tap: Tap = _no_tap,
) -> Float[Array, 'B T D']:
  """One transformer block, residual connections included."""
  x = x + attention(x, w, masks, positions, cfg, quant, tap)
  return x + mlp(x, w, masks, cfg, quant, tap)


def hidden_states(
  weights: params.LlamaParams,
  cfg: config.ModelConfig,
  tokens: Int[Array, 'B T'],
  masks: linear.ChannelMasks | None = None,
  quant: config.QuantConfig = FULL_PRECISION,
) -> Float[Array, 'B T D']:
  """The normalised last hidden states.

  Args:
    weights: layers stacked [L, ...], or a tuple of packed blocks.
    cfg: the model's shape.
    tokens: ids below V.
    masks: None for the dense or the packed model, else decisions stacked
      [L, ...].
    quant: bit widths. Of a dense model only `kv_bits` has an effect, of a
      packed one that and the activations'.
  """
  dtype = weights.final_norm.dtype
  x = linear.embedded(weights.embed, tokens, dtype)
  return run_blocks(weights, cfg, x, masks, quant)


def run_blocks(
  weights: params.LlamaParams,
  cfg: config.ModelConfig,
  x: Float[Array, 'B T D'],
  masks: linear.ChannelMasks | None = None,
  quant: config.QuantConfig = FULL_PRECISION,
) -> Float[Array, 'B T D']:
  """`hidden_states` from embedded tokens on."""
  if isinstance(weights.layers, tuple):
    for packed_block in weights.layers:
      x = run_packed_block(x, packed_block, cfg=cfg, quant=quant)
    return layers.rms_norm(x, weights.final_norm, cfg.rms_norm_eps)
  positions = _positions(x)

  @jax.checkpoint
  def step(x, layer):
    w, layer_masks = layer
    return block(x, w, layer_masks, positions, cfg, quant), None

  x, _ = jax.lax.scan(step, x, (weights.layers, masks))
  return layers.rms_norm(x, weights.final_norm, cfg.rms_norm_eps)


def _positions(x: Float[Array, 'B T D']) -> Int[Array, 'B T']:
  return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


@functools.partial(jax.jit, static_argnames=('cfg', 'quant'))
def run_packed_block(
  x: Float[Array, 'B T D'],
  packed_block: params.PackedBlock,
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
) -> Float[Array, 'B T D']:
  """`block` for one packed block, compiled once per shape of block and x."""
  return block(
    x,
    packed_block.weights,
    packed_block.channels,
    _positions(x),
    cfg,
    quant,
  )


def packed_programs() -> int:
  """How many programs `run_packed_block` has been compiled to so far."""
  return run_packed_block._cache_size()


def logits(
  weights: params.LlamaParams,
  cfg: config.ModelConfig,
  tokens: Int[Array, 'B T'],
  masks: linear.ChannelMasks | None = None,
  quant: config.QuantConfig = FULL_PRECISION,
) -> Float[Array, 'B T V']:
  """All logits in float32; for short inputs and tests, not for losses."""
  hidden = hidden_states(weights, cfg, tokens, masks, quant)
  return jnp.einsum(
    'BTD,VD->BTV',
    hidden,
    linear.dense_rows(weights.output_embed, hidden.dtype),
    preferred_element_type=jnp.float32,
  )


class Llama(nn.Module):
  """Linen front door: `init` / `apply` around the pure functions above.

  The whole weight tree is one Linen parameter, so `apply({'params':
  {'weights': loaded}}, tokens)` runs a loaded model.
  """

  cfg: config.ModelConfig
  quant: config.QuantConfig = FULL_PRECISION

  @nn.compact
  def __call__(
    self,
    tokens: Int[Array, 'B T'],
    masks: linear.ChannelMasks | None = None,
  ) -> Float[Array, 'B T V']:
    """Logits in float32."""
    init = functools.partial(params.init_params, cfg=self.cfg)
    weights = self.param('weights', init)
    return logits(weights, self.cfg, tokens, masks, self.quant)
