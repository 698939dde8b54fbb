"""Puts a packed model together, one block at a time.

  weights + spec + windows -> cut -> order -> Hessian -> GPTQ -> pack

A block is a function of the weights, the decision and the blocks before it, so
a run that was cut short replays the finished blocks and goes on to the same
bits.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from toga_jax import budget, config, metrics
from toga_jax import spec as spec_lib
from toga_jax.model import linear, params
from toga_jax.quant import gptq, packed, qtensor, ranges
from toga_jax.surgery import calibrate, prune, reorder

# What is not quantized is stored in 16 bits.
STORED_DTYPE = jnp.bfloat16
# Rows of an embedding that are quantized at a time.
_EMBED_ROWS = 4096

# Calibration step -> linears that read there, in the rows of one matrix.
_READERS: Mapping[str, tuple[str, ...]] = {
  'attn_in': ('q', 'k', 'v'),
  'attn_mid': ('o',),
  'mlp_in': ('gate', 'up'),
  'mlp_mid': ('down',),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What is the same for all blocks."""

  quant: config.QuantConfig
  how: config.CompressConfig
  stored: jax.typing.DTypeLike = STORED_DTYPE
  compute: jax.typing.DTypeLike = calibrate.COMPUTE_DTYPE


def embedding(table: params.Leaf, settings: Settings) -> packed.Leaf:
  """An embedding or head [V, D] as it is stored: packed rows, or 16 bits.

  Raises:
    UserError: a weight is NaN or infinite.
  """
  bits = settings.quant.embed_bits
  if bits == config.OFF_BITS:
    return np.asarray(table.astype(settings.stored))
  parts = [
    qtensor.quantize_weight(
      table[start : start + _EMBED_ROWS],
      bits,
      settings.quant.group_size,
      symmetric=_symmetric(settings.quant, bits),
      clip_search=settings.how.clip_search,
    )
    for start in range(0, table.shape[0], _EMBED_ROWS)
  ]
  whole = jax.tree.map(
    lambda *x: np.concatenate([np.asarray(a) for a in x]), *parts
  )
  if not np.isfinite(whole.scale.astype(np.float32)).all():
    raise config.UserError('the embedding holds NaN or infinity')
  return packed.pack(whole)


def blocks(
  weights: params.LlamaParams,
  embed: packed.Leaf,
  spec: spec_lib.CompressionSpec,
  windows: Int[np.ndarray, 'W T'] | None,
  settings: Settings,
  finished: Callable[[int], params.PackedBlock | None] = lambda layer: None,
) -> Iterator[params.PackedBlock]:
  """The packed blocks in order, each calibrated behind those before it.

  Args:
    weights: the dense model, any float type.
    embed: the embedding as it will be stored.
    spec: the decision; `settings.quant` has the bits.
    windows: calibration tokens; None only when no weight is quantized.
    settings: bits and options.
    finished: gives the blocks that an earlier run made, or None.

  Yields:
    Blocks of NumPy arrays, finished ones included.

  Raises:
    UserError: the decision tears a kv group or empties a group; weights or
      activations are not finite.
  """
  prune.check(spec)
  cfg = spec.cfg
  calibration = None
  if settings.quant.weights_on:
    calibration = calibrate.Calibration(
      embed, windows, cfg=cfg, quant=settings.quant, dtype=settings.compute
    )
  replaying = True
  for i in range(cfg.num_layers):
    block = finished(i) if replaying else None
    replaying = block is not None
    layer = jax.tree.map(lambda a, i=i: np.asarray(a[i]), weights.layers)
    worker = _Block(i, layer, spec, settings)
    yield worker.run(calibration, block)


class _Block:
  """One block on its way from dense to packed."""

  def __init__(
    self,
    number: int,
    dense: params.LayerParams,
    spec: spec_lib.CompressionSpec,
    settings: Settings,
  ):
    self._number, self._dense = number, dense
    self._cfg, self._settings = spec.cfg, settings
    reordered = settings.how.reorder
    self._orders = reorder.block_orders(spec, number, reordered)

  def run(
    self,
    calibration: calibrate.Calibration | None,
    done: params.PackedBlock | None,
  ) -> params.PackedBlock:
    """Rounds the linears step by step; `done` gives them already rounded.

    Leaves the calibration behind the block.
    """
    kept = self._kept_whole()
    linears: dict[str, packed.PackedLinear] = {}
    restored: dict[str, jax.Array] = {}
    masks = None
    if calibration is not None:
      masks = calibrate.masks_of(self._cfg, self._orders)
    for step, readers in _READERS.items():
      if calibration is not None:
        # What acts before this step; a step is compiled for these leaves.
        before = self._full_width(kept, restored)
        calibration.step(step, before, masks)
        restored = {}
      if done is not None:
        made = {name: getattr(done.weights, name) for name in readers}
      elif calibration is None:
        made = {name: self._cut_only(name) for name in readers}
      else:
        made = self._rounded(step, calibration.hessian())
      linears |= made
      if calibration is not None:
        restored = {n: self._restored(n, w) for n, w in made.items()}
    if calibration is not None:
      calibration.leave(self._full_width(kept, restored), masks)
    return params.PackedBlock(
      weights=params.LayerParams(**kept, **linears), channels=self._channels()
    )

  def _kept_whole(self) -> dict[str, np.ndarray]:
    """Norms, and the biases of kept heads, as they are stored."""
    fields = {}
    for name in prune.unpruned_fields(self._cfg):
      fields[name] = getattr(self._dense, name)
    if self._cfg.attention_bias:
      for name in ('q_bias', 'k_bias', 'v_bias'):
        outputs = prune.bias_outputs(self._cfg, name, self._orders)
        fields[name] = getattr(self._dense, name)[outputs]
    return {n: a.astype(self._settings.stored) for n, a in fields.items()}

  def _full_width(
    self, kept: dict[str, np.ndarray], restored: dict[str, jax.Array]
  ) -> params.LayerParams:
    """Weights for a calibration step: pruned biases are 0, others None."""
    compute = self._settings.compute
    fields = dict.fromkeys(budget.LINEARS) | restored
    for name, array in kept.items():
      if name.endswith('_bias'):
        wide = np.zeros(getattr(self._dense, name).shape, array.dtype)
        outputs = prune.bias_outputs(self._cfg, name, self._orders)
        wide[outputs] = array
        array = wide
      fields[name] = jnp.asarray(array, compute)
    return params.LayerParams(**fields)

  def _ranges(self, group: str) -> list[ranges.Range]:
    """The column ranges of the linears that read a group."""
    quant = self._settings.quant
    order = self._orders[group]
    borders = (0, order.low, len(order.channels))
    found = []
    for bits, start, stop in zip(
      (quant.low_bits, quant.high_bits), borders, borders[1:], strict=False
    ):
      if start < stop:
        found.append(
          ranges.Range(
            start, stop, bits, quant.group_size, _symmetric(quant, bits)
          )
        )
    return found

  def _cut_only(self, name: str) -> packed.PackedLinear:
    """A linear of 16 bits: nothing to round."""
    dense = prune.cut(
      getattr(self._dense, name), *prune.ends(self._cfg, name, self._orders)
    )
    dense = dense.astype(self._settings.stored)
    group = budget.LINEARS[name][0]
    parts = [dense[:, r.start : r.stop] for r in self._ranges(group)]
    return packed.PackedLinear(tuple(np.ascontiguousarray(p) for p in parts))

  def _rounded(
    self, group: str, h: np.ndarray
  ) -> dict[str, packed.PackedLinear]:
    """The linears that read a group, rounded together: they share H."""
    how = self._settings.how
    readers = _READERS[group]
    where = f'block {self._number}, {"/".join(readers)}'
    cuts = [
      prune.cut(
        getattr(self._dense, name), *prune.ends(self._cfg, name, self._orders)
      )
      for name in readers
    ]
    h = calibrate.kept_hessian(h, self._orders[group])
    if not how.gptq:
      # Without its off-diagonal nothing is made up for, and the scales, which
      # look at the diagonal only, are those of GPTQ.
      h = np.diag(np.diagonal(h))
    try:
      factor = gptq.prepare(
        h,
        self._ranges(group),
        act_order=how.act_order,
        damping=how.damping,
        name=f'{where}: the Hessian',
      )
      result = gptq.quantize(
        np.concatenate(cuts),
        factor,
        clip_search=how.clip_search,
        # A negative scale is a search result, too.
        signed_scales=how.clip_search,
        name=where,
      )
    except ValueError as e:
      raise config.UserError(str(e)) from e
    if factor.damping > how.damping:
      metrics.say(
        f'{where}: the Hessian is singular; damping raised from '
        f'{how.damping:g} to {factor.damping:g}'
      )
    stops = np.cumsum([len(c) for c in cuts])
    return {
      name: self._packed(result, factor.ranges, slice(stop - len(c), stop))
      for name, stop, c in zip(readers, stops, cuts, strict=True)
    }

  def _packed(
    self,
    result: gptq.Quantized,
    columns: tuple[ranges.Range, ...],
    rows: slice,
  ) -> packed.PackedLinear:
    """One linear's rows of a rounded stack."""
    parts = []
    for part, r in zip(result.parts, columns, strict=True):
      if part is None:
        dense = np.asarray(result.dense[rows, r.start : r.stop])
        parts.append(dense.astype(self._settings.stored))
      else:
        mine = jax.tree.map(lambda a: np.ascontiguousarray(a[rows]), part)
        parts.append(packed.pack(mine))
    return packed.PackedLinear(tuple(parts))

  def _restored(self, name: str, w: packed.PackedLinear) -> jax.Array:
    """The dense full-width weight [I, O] that a packed linear stands for."""
    return jnp.asarray(
      restored(self._cfg, name, w, self._orders), self._settings.compute
    )

  def _channels(self) -> linear.PackedChannels:
    """How the packed block reads and writes the activations around it."""
    read, write = {}, {}
    for group, width in budget.group_widths(self._cfg).items():
      order = self._orders[group]
      if group in ('attn_out', 'mlp_out'):
        write[group] = reorder.index(order.channels, np.arange(width))
        continue
      arriving = np.arange(width)
      if group == 'attn_mid':
        arriving = np.sort(order.channels)
      elif group == 'mlp_mid':
        arriving = order.channels
      read[group] = linear.Gather(
        index=reorder.index(order.channels, arriving),
        low=order.low,
        high=order.high,
      )
    return linear.PackedChannels(
      read=read, write=write, width=self._cfg.hidden_size
    )


def restored(
  cfg: config.ModelConfig,
  name: str,
  w: packed.PackedLinear,
  orders: reorder.Orders,
) -> np.ndarray:
  """The dense full-width float32 [I, O] that a packed linear stands for."""
  dense = np.concatenate(
    [packed.dequantize(p, np.float32) for p in w.parts], axis=1
  )
  shape = params.layer_shapes(cfg)[name]
  return prune.restore(dense, *prune.ends(cfg, name, orders), shape)


def _symmetric(quant: config.QuantConfig, bits: int) -> bool:
  """One bit, sign times scale, has no asymmetric form."""
  return quant.symmetric or bits == 1
