"""The Hessian of a linear layer's output error, from calibration tokens.

A linear y = x W^T rounded to Q costs, per token, |x (W - Q)^T|^2. Averaged
over n tokens, one row w of W contributes

  E(q) = 1/n sum_t (x_t (w - q))^2 = (w - q)^T [1/n sum_t x_t x_t^T] (w - q)

and its Hessian in q is `H = 2/n sum_t x_t x_t^T`, the same for every row
(GPTQ, arXiv 2210.17323, section 3.1, with the paper's 2 and a mean over
tokens). GPTQ's choices do not depend on H's scale; the factor matters only
for reading the loss: `1/2 e^T H e` is the mean squared error of the output.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

Leaf = Any


@struct.dataclass
class Moment:
  """The running sum of x^T x over tokens, and how many there were."""

  total: Leaf  # float32 [cols, cols]
  tokens: Leaf  # int32 []


def init(cols: int) -> Moment:
  """The moment of no tokens."""
  return Moment(
    total=jnp.zeros((cols, cols), jnp.float32), tokens=jnp.zeros((), jnp.int32)
  )


@functools.partial(jax.jit, donate_argnums=0)
def update(moment: Moment, x: Float[Array, '*tokens cols']) -> Moment:
  """The moment with more tokens in it. The old one's buffers are reused.

  Args:
    moment: the sum so far; donated, so do not use it afterwards.
    x: inputs of the linear, any float type and any leading axes. Products are
      taken and summed in float32; those of bfloat16 are exact in it, and units
      made for them are several times faster.
  """
  x = x.reshape(-1, x.shape[-1])
  if x.dtype != jnp.bfloat16:
    x = x.astype(jnp.float32)
  added = jnp.einsum(
    'ti,tj->ij',
    x,
    x,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return Moment(total=moment.total + added, tokens=moment.tokens + x.shape[0])


def hessian(moment: Moment) -> Float[Array, 'cols cols']:
  """`2/n sum x^T x` in float32; zeros when there were no tokens."""
  return moment.total * (2 / jnp.maximum(moment.tokens, 1).astype(jnp.float32))
