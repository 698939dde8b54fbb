"""How far a packed model has moved from the dense one, on the same windows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from toga_jax import config, metrics
from toga_jax.data import batches
from toga_jax.model import layers, linear, llama, params

CHUNK_TOKENS = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drift:
  """Distances from the dense model; all are 0 for the model itself but top1."""

  kl: float  # mean over tokens of KL(dense || packed), nats
  top1_agreement: float  # share of tokens with the same likeliest next token
  layer_error: list[float]  # |x_packed - x_dense| / |x_dense| after each block
  windows: int


def measure(
  dense: params.LlamaParams,
  packed: params.LlamaParams,
  cfg: config.ModelConfig,
  tokens: np.ndarray,
  how: config.EvalConfig,
  quant: config.QuantConfig,
) -> Drift:
  """Runs both models side by side, block by block.

  Args:
    dense: the original weights.
    packed: the packed ones.
    cfg: the model's shape.
    tokens: the text.
    how: `seq_len`, `max_windows`.
    quant: bits of the packed model's activations and cache.

  Raises:
    UserError: the text is shorter than a window.
  """
  windows = batches.eval_windows(
    tokens, seq_len=how.seq_len, max_windows=how.max_windows
  ).tokens
  progress = metrics.Progress('drift', len(windows), tokens=how.seq_len)
  squares = np.zeros((cfg.num_layers, 2))
  kl = same = 0.0
  for done, window in enumerate(windows, 1):
    batch = jnp.asarray(window[None])
    x = linear.embedded(dense.embed, batch, dense.final_norm.dtype)
    y = linear.embedded(packed.embed, batch, packed.final_norm.dtype)
    for i, packed_block in enumerate(packed.layers):
      x = _dense_block(x, dense.layers, jnp.asarray(i), cfg=cfg)
      y = llama.run_packed_block(y, packed_block, cfg=cfg, quant=quant)
      squares[i] += np.asarray(_squares(x, y), np.float64)
    window_kl, window_same = _compare(
      layers.rms_norm(x, dense.final_norm, cfg.rms_norm_eps)[0],
      layers.rms_norm(y, packed.final_norm, cfg.rms_norm_eps)[0],
      dense.output_embed,
      packed.output_embed,
    )
    kl, same = kl + float(window_kl), same + float(window_same)
    progress.update(done)
  count = windows.size
  return Drift(
    kl=kl / count,
    top1_agreement=same / count,
    layer_error=np.sqrt(squares[:, 0] / squares[:, 1]).tolist(),
    windows=len(windows),
  )


@functools.partial(jax.jit, static_argnames='cfg')
def _dense_block(
  x: Float[Array, 'B T D'],
  stacked: params.LayerParams,
  layer: Int[Array, ''],
  *,
  cfg: config.ModelConfig,
) -> Float[Array, 'B T D']:
  w = jax.tree.map(lambda a: a[layer], stacked)
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  return llama.block(x, w, None, positions, cfg, llama.FULL_PRECISION)


@jax.jit
def _squares(x: Array, y: Array) -> Float[Array, '2']:
  """(|y - x|^2, |x|^2) in float32."""
  x, y = x.astype(jnp.float32), y.astype(jnp.float32)
  return jnp.stack([jnp.sum((y - x) ** 2), jnp.sum(x**2)])


@jax.jit
def _compare(
  x: Float[Array, 'T D'],
  y: Float[Array, 'T D'],
  x_embed: params.Leaf,
  y_embed: params.Leaf,
) -> tuple[Float[Array, ''], Float[Array, '']]:
  """(summed KL(x || y), tokens with the same argmax), chunk by chunk."""
  tables = [linear.dense_rows(e, x.dtype) for e in (x_embed, y_embed)]
  size = min(CHUNK_TOKENS, len(x))
  pad = -len(x) % size
  chunks = [
    jnp.pad(h, ((0, pad), (0, 0))).reshape(-1, size, h.shape[-1])
    for h in (x, y)
  ]
  counts = (jnp.arange(len(x) + pad) < len(x)).reshape(-1, size)

  def one(chunk):
    *hidden, counted = chunk
    p, q = (
      jax.nn.log_softmax(
        jnp.einsum('TD,VD->TV', h, e, preferred_element_type=jnp.float32)
      )
      for h, e in zip(hidden, tables, strict=True)
    )
    divergence = jnp.sum(jnp.exp(p) * (p - q), axis=-1)
    same = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
    return jnp.sum(divergence * counted), jnp.sum(same * counted)

  divergence, same = jax.lax.map(one, (*chunks, counts))
  return jnp.sum(divergence), jnp.sum(same).astype(jnp.float32)
