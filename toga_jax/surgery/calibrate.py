"""Runs calibration windows through a block in four steps, measuring each input.

A block's linears are rounded in the order in which they act, and every Hessian
is taken behind all that was rounded before:

  step      with           gives the input of   and H of
  attn_in                  q k v                attn_in
  attn_mid  q k v          o                    attn_mid
  mlp_in    o              gate up              mlp_in
  mlp_mid   gate up        down                 mlp_mid
  leave     down           the next block

Weights are what the packed ones stand for, at full width, pruned channels 0;
activations pass through masks, at the widths of the dense model. So shapes
never change, and each step compiles once for all blocks of a model, whatever is
pruned. All windows go through a step before the next: each linear runs once per
token. The residual stream is float32; what linears read is `COMPUTE_DTYPE`, in
which the Hessian's products are exact.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from toga_jax import budget, config
from toga_jax.model import layers, linear, llama, params
from toga_jax.quant import hessian
from toga_jax.surgery import reorder

COMPUTE_DTYPE = jnp.bfloat16
# Tokens that go through a step at a time.
BATCH_TOKENS = 4096

STEPS = ('attn_in', 'attn_mid', 'mlp_in', 'mlp_mid')


class Calibration:
  """The activations of all windows, where the block's steps have brought them.

  Memory: the residual stream and one activation of every token; at most
  4 * D + 2 * max(D, F, N*H) bytes a token.
  """

  def __init__(
    self,
    embed: params.Leaf,
    windows: Int[np.ndarray, 'W T'],
    *,
    cfg: config.ModelConfig,
    quant: config.QuantConfig,
    dtype: jax.typing.DTypeLike = COMPUTE_DTYPE,
  ):
    """Embeds the windows.

    Args:
      embed: the embedding as it will be stored.
      windows: token ids.
      cfg: the model's shape.
      quant: bits of activations and cache; the weights come rounded.
      dtype: of activations and weights.
    """
    self._cfg = cfg
    self._quant = _activations_only(quant)
    self._dtype = jnp.dtype(dtype)
    size = _batch_size(*windows.shape)
    self._residual = [
      linear.embedded(embed, jnp.asarray(batch), jnp.dtype('float32'))
      for batch in windows.reshape(-1, size, windows.shape[1])
    ]
    self._inputs: list[Array] = []

  def step(
    self, name: str, w: params.LayerParams, masks: linear.ChannelMasks
  ) -> None:
    """Brings all windows to the input of the next linears.

    Args:
      name: one of `STEPS`, in their order.
      w: full-width weights of what acts before; others may be None.
      masks: of this block.
    """
    how = {'cfg': self._cfg, 'quant': self._quant, 'dtype': self._dtype}
    for i, x in enumerate(self._residual):
      if name == 'attn_in':
        self._inputs.append(_attn_in(x, w.attn_norm, masks, **how))
      elif name == 'attn_mid':
        self._inputs[i] = _attn_mid(self._inputs[i], w, masks, **how)
      elif name == 'mlp_in':
        self._residual[i], self._inputs[i] = _mlp_in(
          x, self._inputs[i], w, masks, **how
        )
      else:
        self._inputs[i] = _mlp_mid(self._inputs[i], w, masks, **how)

  def hessian(self) -> Float[np.ndarray, 'C C']:
    """H of the linears that read where the windows are, at full width."""
    moment = hessian.init(self._inputs[0].shape[-1])
    for x in self._inputs:
      moment = hessian.update(moment, x)
    return np.asarray(hessian.hessian(moment))

  def leave(self, w: params.LayerParams, masks: linear.ChannelMasks) -> None:
    """Brings all windows behind the block; `w` has all its weights."""
    for i, x in enumerate(self._residual):
      self._residual[i] = _leave(
        x, self._inputs[i], w, masks, quant=self._quant
      )
    self._inputs = []


def masks_of(
  cfg: config.ModelConfig, orders: reorder.Orders
) -> linear.ChannelMasks:
  """The masks of one block that its packed order stands for."""
  keep, salient = {}, {}
  for group, width in budget.group_widths(cfg).items():
    channels, low = orders[group]
    keep[group] = np.zeros(width, np.float32)
    keep[group][channels] = 1
    if group in budget.INPUT_GROUPS:
      salient[group] = np.zeros(width, np.float32)
      salient[group][channels[low:]] = 1
  return linear.ChannelMasks(
    keep=jax.tree.map(jnp.asarray, keep),
    salient=jax.tree.map(jnp.asarray, salient),
  )


def kept_hessian(
  h: Float[np.ndarray, 'C C'], order: reorder.Order
) -> Float[np.ndarray, 'K K']:
  """H of the kept channels in their packed order."""
  return h[np.ix_(order.channels, order.channels)]


def _activations_only(quant: config.QuantConfig) -> config.QuantConfig:
  off = quant.unquantized()
  names = ('act_low_bits', 'act_high_bits')
  return type(quant)(
    **(vars(off) | {name: getattr(quant, name) for name in names})
  )


def _batch_size(windows: int, seq_len: int) -> int:
  """The largest divisor of the number of windows within BATCH_TOKENS."""
  most = max(BATCH_TOKENS // seq_len, 1)
  return max(n for n in range(1, most + 1) if windows % n == 0)


_jit = functools.partial(jax.jit, static_argnames=('cfg', 'quant', 'dtype'))


@_jit
def _attn_in(x, norm, masks, *, cfg, quant, dtype):
  h = layers.rms_norm(x, norm.astype(x.dtype), cfg.rms_norm_eps)
  return linear.read(h.astype(dtype), masks, 'attn_in', quant)


@_jit
def _attn_mid(h, w, masks, *, cfg, quant, dtype):
  positions = jnp.broadcast_to(jnp.arange(h.shape[1]), h.shape[:2])
  mid = llama.attend(h, w, masks, positions, cfg, quant).astype(dtype)
  return linear.read(mid, masks, 'attn_mid', quant)


@_jit
def _mlp_in(x, mid, w, masks, *, cfg, quant, dtype):
  out = linear.project(mid, w.o, masks, 'attn_mid', quant)
  x = x + linear.prune(out, masks, 'attn_out').astype(x.dtype)
  h = layers.rms_norm(x, w.mlp_norm.astype(x.dtype), cfg.rms_norm_eps)
  return x, linear.read(h.astype(dtype), masks, 'mlp_in', quant)


@_jit
def _mlp_mid(h, w, masks, *, cfg, quant, dtype):
  del cfg
  mid = llama.gated(h, w, masks, quant).astype(dtype)
  return linear.read(mid, masks, 'mlp_mid', quant)


@functools.partial(jax.jit, static_argnames='quant')
def _leave(x, mid, w, masks, *, quant):
  out = linear.project(mid, w.down, masks, 'mlp_mid', quant)
  return x + linear.prune(out, masks, 'mlp_out').astype(x.dtype)


def compiled_programs(steps: Sequence = ()) -> int:
  """How many programs the steps have been compiled to so far."""
  steps = steps or (_attn_in, _attn_mid, _mlp_in, _mlp_mid, _leave)
  return sum(step._cache_size() for step in steps)
