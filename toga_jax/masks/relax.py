"""Binary decisions with gradients: hard concrete, straight-through."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from toga_jax.masks import space


def binarize(
  logits: Float[Array, '...'],
  noise: Float[Array, '...'] | float,
  temperature: float,
) -> Float[Array, '...']:
  """1 where `logits + noise > 0`, else 0; the slope is the sigmoid's.

  Straight-through in both directions: a dropped channel gets the gradient of
  `sigmoid((logits + noise) / temperature)` just as a kept one does.
  """
  soft = jax.nn.sigmoid((logits + noise) / temperature)
  hard = (logits + noise > 0).astype(soft.dtype)
  return soft + jax.lax.stop_gradient(hard - soft)


def sample(
  logits: space.Tree,
  key: Key[Array, ''] | None,
  noise_scale: Float[Array, ''] | float,
  temperature: float,
) -> space.Tree:
  """Decisions drawn from logits with logistic noise (Gumbel difference).

  Args:
    logits: decision tree; above 0 means keep, or salient.
    key: None draws no noise: evaluation and hardening.
    noise_scale: 1 is the Gumbel-sigmoid of DISP-LLM; the search lets it fade to
      0, so that what is trained is what is kept.
    temperature: of the sigmoid that gives the gradient.
  """
  leaves, treedef = jax.tree.flatten(logits)
  if key is None:
    return jax.tree.map(lambda x: binarize(x, 0.0, temperature), logits)
  keys = jax.random.split(key, len(leaves))
  drawn = [
    binarize(x, noise_scale * jax.random.logistic(k, x.shape), temperature)
    for k, x in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(treedef, drawn)


def noise_scale(step: Array | int, steps: int, fade: float) -> Float[Array, '']:
  """1 at the first step, falling linearly to 0 after `fade * steps` steps.

  A `fade` of 0 means no noise at all, at the first step neither.
  """
  if fade == 0:
    return jnp.zeros(())
  return jnp.clip(1 - step / (fade * steps), 0.0, 1.0)
