"""How large each channel is on calibration text, in the dense model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from toga_jax import config
from toga_jax.model import llama, params

Stats = dict[str, np.ndarray]  # group -> [L, width]


@functools.partial(jax.jit, static_argnames='cfg')
def _mean_squares(
  weights: params.LlamaParams,
  tokens: Int[jax.Array, 'B T'],
  *,
  cfg: config.ModelConfig,
) -> dict[str, Float[jax.Array, 'L C']]:
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

  def step(x, w):
    seen = {}

    def tap(group, activation):
      wide = activation.astype(jnp.float32)
      seen[group] = jnp.mean(wide * wide, axis=(0, 1))

    x = llama.block(x, w, None, positions, cfg, llama.FULL_PRECISION, tap)
    return x, seen

  x = jnp.take(weights.embed, tokens, axis=0)
  return jax.lax.scan(step, x, weights.layers)[1]


def activation_rms(
  weights: params.LlamaParams,
  cfg: config.ModelConfig,
  windows: Int[np.ndarray, 'W T'],
) -> Stats:
  """RMS of every channel of the six groups over the calibration windows.

  Args:
    weights: the dense model.
    cfg: its shape.
    windows: token windows; one at a time goes through the model.

  Returns:
    group -> [L, width] float32.
  """
  total = None
  for window in windows:
    squares = _mean_squares(weights, jnp.asarray(window[None]), cfg=cfg)
    total = squares if total is None else jax.tree.map(jnp.add, total, squares)
  return {g: np.sqrt(np.asarray(x) / len(windows)) for g, x in total.items()}
