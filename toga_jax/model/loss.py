"""Next-token cross-entropy in chunks of tokens: [T, V] never exists at once."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from toga_jax import config
from toga_jax.model import linear, llama, params

CHUNK_TOKENS = 256


def _chunks(
  hidden: Array, targets: Array, weight: Array
) -> tuple[Array, Array, Array]:
  """Pads M tokens to whole chunks: [C, chunk, ...]; padding weighs nothing."""
  m = hidden.shape[0]
  size = min(CHUNK_TOKENS, m)
  pad = -m % size

  def split(a: Array) -> Array:
    padded = jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1))
    return padded.reshape(-1, size, *a.shape[1:])

  return split(hidden), split(targets), split(weight)


def _chunk_loss(
  hidden: Array, targets: Array, embed: Array
) -> tuple[Array, Array]:
  """(-log p of each target [M], logits [M, V]) of one chunk, float32."""
  logits = jnp.einsum(
    'MD,VD->MV', hidden, embed, preferred_element_type=jnp.float32
  )
  picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
  return jax.nn.logsumexp(logits, axis=-1) - picked, logits


@jax.custom_vjp
def token_losses_sum(
  hidden: Float[Array, 'M D'],
  embed: Float[Array, 'V D'],
  targets: Int[Array, ' M'],
  weight: Float[Array, ' M'],
) -> Float[Array, '']:
  """`sum_m weight[m] * -log p(targets[m])`, differentiable in `hidden` only.

  The gradient is computed in the same pass over the chunks as the loss, while
  a chunk's logits exist: two products with the embedding instead of the three
  that rematerialising them in the backward pass would take.
  """

  def step(total, chunk):
    h, y, w = chunk
    losses, _ = _chunk_loss(h, y, embed)
    return total + jnp.sum(losses * w), None

  total, _ = jax.lax.scan(step, 0.0, _chunks(hidden, targets, weight))
  return total


def _sum_fwd(hidden, embed, targets, weight):
  def step(total, chunk):
    h, y, w = chunk
    losses, logits = _chunk_loss(h, y, embed)
    slope = jax.nn.softmax(logits, axis=-1)
    slope = slope.at[jnp.arange(y.size), y].add(-1) * w[:, None]
    grad = jnp.einsum('MV,VD->MD', slope.astype(h.dtype), embed)
    return total + jnp.sum(losses * w), grad

  total, grads = jax.lax.scan(step, 0.0, _chunks(hidden, targets, weight))
  return total, grads.reshape(-1, hidden.shape[-1])[: hidden.shape[0]]


def _sum_bwd(grads, g):
  return (g * grads).astype(grads.dtype), None, None, None


token_losses_sum.defvjp(_sum_fwd, _sum_bwd)


def _next_token(
  hidden: Array, tokens: Array, lengths: Array | None
) -> tuple[Array, Array, Array]:
  """Flattens (hidden, target, weight) so that token t predicts t + 1."""
  b, t = tokens.shape
  weight = jnp.ones((b, t - 1))
  if lengths is not None:
    weight = (jnp.arange(1, t) < lengths[:, None]).astype(jnp.float32)
  return (
    hidden[:, :-1].reshape(b * (t - 1), -1),
    tokens[:, 1:].reshape(-1),
    weight,
  )


def mean_loss(
  weights: params.LlamaParams,
  cfg: config.ModelConfig,
  tokens: Int[Array, 'B T'],
  masks: linear.ChannelMasks | None = None,
  quant: config.QuantConfig = llama.FULL_PRECISION,
) -> Float[Array, '']:
  """Mean next-token loss in nats; gradients reach the masks, not weights."""
  hidden = llama.hidden_states(weights, cfg, tokens, masks, quant)
  return mean_of(hidden, weights, tokens)


def mean_of(
  hidden: Float[Array, 'B T D'],
  weights: params.LlamaParams,
  tokens: Int[Array, 'B T'],
) -> Float[Array, '']:
  """`mean_loss` from the last hidden states on."""
  h, y, w = _next_token(hidden, tokens, None)
  return token_losses_sum(h, weights.output_embed, y, w.reshape(-1)) / y.size


def window_losses(
  weights: params.LlamaParams,
  tokens: Int[Array, 'B T'],
  lengths: Int[Array, ' B'],
  masks: linear.ChannelMasks | None,
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig = llama.FULL_PRECISION,
) -> tuple[Float[Array, ' B'], Float[Array, ' B']]:
  """(sum of losses, number of predicted tokens) of each window.

  Tokens at or beyond a window's length are padding and do not count. Compiles
  what it calls; do not jit it: a packed model would become one program.
  """
  run = llama.hidden_states
  if not isinstance(weights.layers, tuple):
    run = _dense_hidden_states
  hidden = run(weights, cfg, tokens, masks, quant)
  return _losses_of(hidden, weights.output_embed, tokens, lengths)


_dense_hidden_states = jax.jit(
  llama.hidden_states, static_argnames=('cfg', 'quant')
)


@jax.jit
def _losses_of(
  hidden: Float[Array, 'B T D'],
  output_embed: params.Leaf,
  tokens: Int[Array, 'B T'],
  lengths: Int[Array, ' B'],
) -> tuple[Float[Array, ' B'], Float[Array, ' B']]:
  """`window_losses` from the last hidden states on."""
  embed = linear.dense_rows(output_embed, hidden.dtype)

  def one(hidden, tokens, length):
    h, y, w = _next_token(hidden[None], tokens[None], length[None])
    return token_losses_sum(h, embed, y, w.reshape(-1)), jnp.sum(w)

  return jax.lax.map(lambda a: one(*a), (hidden, tokens, lengths))
