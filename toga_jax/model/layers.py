"""Pieces of a block: normalisation, rotary embedding, attention.

Dimension letters as in model/llama.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from toga_jax import config


def rms_norm(
  x: Float[Array, '... C'], scale: Float[Array, ' C'], eps: float
) -> Float[Array, '... C']:
  """x / rms(x) * scale; the statistics in float32."""
  wide = x.astype(jnp.float32)
  inverse = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
  return (wide * inverse).astype(x.dtype) * scale


def rope_frequencies(cfg: config.ModelConfig) -> Float[np.ndarray, ' H2']:
  """Angle per position of each of the head's H/2 pairs, in radians.

  Llama 3's scaling leaves short wavelengths alone, divides long ones by the
  factor, and blends in between (Llama 3.1 model card).
  """
  pairs = np.arange(0, cfg.head_dim, 2, dtype=np.float64) / cfg.head_dim
  frequency = cfg.rope_theta**-pairs
  scaling = cfg.rope_scaling
  if scaling is None:
    return frequency.astype(np.float32)
  if scaling.kind == 'linear':
    return (frequency / scaling.factor).astype(np.float32)
  turns = scaling.original_max_positions * frequency / (2 * np.pi)
  low, high = scaling.low_freq_factor, scaling.high_freq_factor
  blend = np.clip((turns - low) / (high - low), 0, 1)
  frequency = frequency * (blend + (1 - blend) / scaling.factor)
  return frequency.astype(np.float32)


def rope(
  x: Float[Array, 'B T N H'],
  positions: Int[Array, 'B T'],
  frequencies: Float[np.ndarray, ' H2'],
) -> Float[Array, 'B T N H']:
  """Rotates channel pairs (i, i + H/2) of every head by their position."""
  angle = positions[..., None, None].astype(jnp.float32) * frequencies
  cos, sin = jnp.cos(angle), jnp.sin(angle)  # [B, T, 1, H/2]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return turned.astype(x.dtype)


def causal_attention(
  q: Float[Array, 'B T N H'],
  k: Float[Array, 'B T K H'],
  v: Float[Array, 'B T K H'],
) -> Float[Array, 'B T N H']:
  """Softmax attention over earlier tokens, grouped-query, scale H^-0.5."""
  return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def round_cache(
  x: Float[Array, 'B T K H'], bits: int
) -> Float[Array, 'B T K H']:
  """Keys or values as a cache of few bits gives them back.

  Asymmetric, one scale and zero point per head and token, zero representable
  (Atom, section 4.4, rounds K before RoPE, and so does this model). Gradients
  pass as if nothing were rounded.

  Args:
    x: keys before RoPE, or values.
    bits: 1 to 8; 16 is off.
  """
  if bits == config.OFF_BITS:
    return x
  wide = x.astype(jnp.float32)
  top = jnp.maximum(jnp.max(wide, axis=-1, keepdims=True), 0)
  bottom = jnp.minimum(jnp.min(wide, axis=-1, keepdims=True), 0)
  steps = 2**bits - 1
  scale = jnp.maximum((top - bottom) / steps, 1e-12)
  zero = jnp.round(-bottom / scale)
  code = jnp.clip(jnp.round(wide / scale) + zero, 0, steps)
  rounded = ((code - zero) * scale).astype(x.dtype)
  return x + jax.lax.stop_gradient(rounded - x)
