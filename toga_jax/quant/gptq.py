"""GPTQ for one linear: round column by column, make up for each error.

GPTQ (arXiv 2210.17323, algorithm 1) rounds columns (input channels) one after
the other and lets those still to come make up for each error, so that the
layer's output changes least. This is that algorithm without the inverse of H,
in the form of Babai's nearest plane (arXiv 2507.18553). Let `H = R R^T` with R
upper triangular; it is the Cholesky factor of H with rows and columns reversed,
reversed again. A row w rounded to q costs

  1/2 (w - q) H (w - q)^T = 1/2 sum_j (R_jj (v_j - q_j))^2,
  v_j = w_j + sum_{i<j} (w_i - q_i) R_ij / R_jj

and v_j depends on earlier columns only: round v_j to get q_j. GPTQ's updated
weight is the same v_j. With `U = R^-1`, that is U^T U = H^-1, it reads

  v_k = w_k - sum_{j<k} (v_j - q_j) U_jk / U_jj

and v - q = (w - q) R D with D = diag(1/R_jj) turns one into the other: it says
(v - q) D^-1 U = w - q, whose column k is v_k - q_k + sum_{j<k} (v_j - q_j)
U_jk / U_jj = w_k - q_k. One Cholesky serves all linears that read one input.

Wilful departures from the paper's code. Bit widths differ per column range.
Scales are static: computed beforehand from the original weights, so columns
may be rounded in any order without touching the group they are stored in.
Within each range that order is by falling H_jj, but a range is finished before
the next begins: low precision first, so that the precise columns absorb its
errors. Clipping is searched with errors weighted by H_jj.

Shapes are padded, columns to `BLOCK` and rows to tiles, and everything that
differs between layers of one model (borders, widths, order) is traced. A model
with different borders in every layer compiles a handful of programs.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from toga_jax import config
from toga_jax.quant import qtensor
from toga_jax.quant import ranges as column_ranges

Leaf = Any

BLOCK = 128
# Loops nest: blocks, then panels, then columns. Errors leave a panel or a block
# in one matrix product; only within a panel do they go column by column.
_PANELS = (BLOCK, 16, 1)
# Rows are independent. On CPUs a tile of them should stay in the L2 cache; on
# accelerators the loop over columns is bound by latency, so tiles are tall.
_ROW_TILE = {'cpu': 256}
_TALL_ROW_TILE = 4096

MAX_DAMPING = 1.0
_LEAST_DAMPING = 1e-3  # where escalation starts from 0


@struct.dataclass
class Factor:
  """What GPTQ needs to know about a linear's input; from `prepare`.

  Arrays are in the order of rounding and padded to C, a multiple of `BLOCK`.
  """

  spread: Leaf  # float32 [C, C]; R_ij / R_jj for i < j, else 0
  curvature: Leaf  # float32 [C]; R_jj^2, 0 for padding and dead columns
  importance: Leaf  # float32 [C]; H_jj / mean, 0 for padding, dead columns
  order: Leaf  # int32 [C]; which column is rounded j-th; padding: cols
  group: Leaf  # int32 [C]; the row of the table of scales
  bits: Leaf  # int32 [G]; per group; padding: 16
  symmetric: Leaf  # bool [G]
  ranges: tuple[column_ranges.Range, ...] = struct.field(pytree_node=False)
  damping: float = struct.field(pytree_node=False)  # the one that worked

  @property
  def cols(self) -> int:
    """The number of columns without padding."""
    return self.ranges[-1].stop


@struct.dataclass
class Quantized:
  """A rounded linear, on the host."""

  parts: tuple[qtensor.QWeight | None, ...]  # per range; None at 16 bits
  dense: Leaf  # float32 [rows, cols]: what the parts stand for
  loss: float  # mean squared error of the output, with the damped H
  damping: float


def prepare(
  h: Float[Array | np.ndarray, 'cols cols'],
  ranges: Sequence[column_ranges.Range | tuple],
  *,
  act_order: bool = True,
  damping: float = 0.01,
  name: str = 'H',
) -> Factor:
  """Factorizes a Hessian for `quantize`.

  Damping is a share of the mean of H's diagonal (over live columns), added to
  the diagonal. Where the factorization fails it is raised tenfold, up to
  `MAX_DAMPING`. Columns with H_jj = 0 never saw an input: they are dead, their
  weights count as 0 and get H_jj = 1.

  Args:
    h: symmetric, float32; see `hessian.py`.
    ranges: `ranges.Range`s, or tuples of their fields, covering the columns
      in order.
    act_order: round columns of a range by falling H_jj instead of as they lie.
    damping: where to start.
    name: what to call H in errors.

  Raises:
    ValueError: the ranges do not cover the columns, a width is not 1..8 or
      16, H holds NaN or infinity, or no damping makes it positive definite.
  """
  h = np.asarray(h, np.float32)
  cols = h.shape[0]
  ranges = column_ranges.checked(ranges, cols)
  diagonal = np.diagonal(h)
  if not (np.isfinite(diagonal) & (diagonal >= 0)).all():
    raise ValueError(
      f'{name} has values on its diagonal that are not finite and >= 0; look '
      'for NaN or infinity in the calibration activations'
    )
  live = diagonal > 0
  mean = float(diagonal[live].mean()) if live.any() else 1.0

  pad = -cols % BLOCK
  groups = column_ranges.number_groups(ranges)
  range_of = np.repeat(np.arange(len(ranges)), [r.size for r in ranges])
  # Stable, so that equal columns keep their order.
  order = np.lexsort((-diagonal if act_order else np.arange(cols), range_of))
  arranged = _arrange_hessian(
    h, np.pad(order, (0, pad), constant_values=cols).astype(np.int32)
  )

  while True:
    spread, curvature, ok = _factorize(arranged, damping * mean)
    if ok:
      break
    higher = max(10 * damping, _LEAST_DAMPING)
    if higher > MAX_DAMPING:
      raise ValueError(
        f'{name} has no Cholesky factor, even with damping {damping:g} of its '
        'mean diagonal: it holds NaN or is not a sum of x^T x'
      )
    damping = higher

  alive = np.pad(live[order], (0, pad))
  return Factor(
    spread=spread,
    curvature=jnp.where(alive, curvature, 0),
    importance=np.pad(diagonal[order] / mean, (0, pad)),
    order=np.pad(order, (0, pad), constant_values=cols).astype(np.int32),
    group=np.pad(
      groups.group[order], (0, pad), constant_values=len(groups.bits) - 1
    ),
    bits=groups.bits,
    symmetric=groups.symmetric,
    ranges=ranges,
    damping=damping,
  )


def quantize(
  w: Float[Array | np.ndarray, 'rows cols'],
  factor: Factor,
  *,
  clip_search: bool = True,
  signed_scales: bool = True,
  name: str = 'weight',
) -> Quantized:
  """Rounds one linear, or several that read the same input, rows stacked.

  Args:
    w: weight, outputs first. Arithmetic is float32.
    factor: of the input's Hessian.
    clip_search: see `qtensor.find_scales`, as `signed_scales`.
    name: what to call the weight in errors.

  Returns:
    Integers and scales per range (NumPy, ready for `packing.pack`), the
    matrix they stand for, and the loss. A range of 16 bits has no integers; its
    columns in `dense` are the weights after they absorbed the errors of the
    ranges before.

  Raises:
    ValueError: `w` has other columns than H, or holds NaN.
  """
  rows, cols = w.shape
  if cols != factor.cols:
    raise ValueError(f'{name} has {cols} columns, its Hessian {factor.cols}')
  height = _ROW_TILE.get(jax.default_backend(), _TALL_ROW_TILE)
  arrays = factor.replace(ranges=(), damping=0.0)  # not part of the cache key
  tiles = [
    _quantize_tile(
      tile, arrays, clip_search=clip_search, signed_scales=signed_scales
    )
    for tile in _arrange_weight(
      np.asarray(w), factor.order, factor.importance, height
    )
  ]
  if not all(t.finite for t in tiles):
    raise ValueError(f'{name} holds NaN or infinity')

  def joined(tables):  # each [*, height] -> [rows, *]
    table = np.concatenate([np.asarray(t) for t in tables], axis=1)
    return table[:, :rows].T

  position = np.argsort(factor.order[:cols])
  q = joined([t.q for t in tiles])[:, position]
  scale = joined([t.scale for t in tiles])
  zero = joined([t.zero for t in tiles])
  return Quantized(
    parts=column_ranges.split(factor.ranges, q, scale, zero),
    dense=joined([t.dense for t in tiles])[:, position],
    loss=float(sum(np.float64(t.loss) for t in tiles)),
    damping=factor.damping,
  )


class _Tile(NamedTuple):
  """A rounded tile of rows, transposed, columns in the order of rounding."""

  q: Leaf  # int8 [C, R]
  scale: Leaf  # float16 [G, R]
  zero: Leaf  # int8 [G, R]
  dense: Leaf  # float32 [C, R]
  loss: Leaf  # float32 []
  finite: Leaf  # bool []


@functools.partial(jax.jit, static_argnames=('clip_search', 'signed_scales'))
def _quantize_tile(
  w: Float[Array, 'C R'], factor: Factor, **search: bool
) -> _Tile:
  """Scales first, then all columns."""
  scale, zero = qtensor.find_scales(
    w,
    factor.group,
    factor.bits,
    factor.symmetric,
    factor.importance,
    **search,
  )
  columns = _Columns(
    w=w,
    scale=qtensor.as_float(scale)[factor.group],
    zero=qtensor.as_float(zero)[factor.group],
    bits=factor.bits[factor.group][:, None],
  )
  adjusted, q, _ = _round_panel(w, factor.spread, columns, _PANELS)
  dense = columns.decode(adjusted, q)
  return _Tile(
    q=q,
    scale=scale,
    zero=zero,
    dense=dense,
    loss=0.5 * jnp.sum(factor.curvature[:, None] * (adjusted - dense) ** 2),
    finite=jnp.isfinite(dense).all(),
  )


class _Columns(NamedTuple):
  """Some columns and their quantizers."""

  w: Leaf  # float32 [n, R]; the original weights
  scale: Leaf  # float32 [n, R]
  zero: Leaf  # float32 [n, R]
  bits: Leaf  # int32 [n, 1]

  def encode(self, w: Array) -> Array:
    """int8 [n, R]; 0 at 16 bits, which have no codes."""
    q = qtensor.encode(w, self.scale, self.zero, self.bits)
    return jnp.where(self.bits == config.OFF_BITS, 0, q).astype(jnp.int8)

  def decode(self, w: Array, q: Array) -> Array:
    """float32 [n, R]: what the codes stand for; at 16 bits, `w` itself."""
    value = (q.astype(jnp.float32) - self.zero) * self.scale
    return jnp.where(self.bits == config.OFF_BITS, w, value)


def _round_panel(
  w: Float[Array, 'n R'],
  spread: Float[Array, 'n n'],
  columns: _Columns,
  sizes: tuple[int, ...],
) -> tuple[Array, Array, Array]:
  """Rounds n columns one after the other.

  Args:
    w: the weights, adjusted for what columns before these ones moved.
    spread: `Factor.spread` for these columns.
    columns: their original weights and quantizers.
    sizes: how many columns to take at a time, then how many of those; () means
      that n is 1.

  Returns:
    The weights as they were when they were rounded, and their codes; and how
    far each column moved in all, original less rounded.
  """
  if not sizes:
    q = columns.encode(w)
    return w, q, columns.w - columns.decode(w, q)
  size, inner = sizes[0], sizes[1:]

  def step(i, carry):
    w, q, moved = carry
    cut = functools.partial(
      jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size
    )
    put = functools.partial(
      jax.lax.dynamic_update_slice_in_dim, start_index=i * size, axis=0
    )
    rows = cut(spread)  # [size, n]; zero up to the diagonal
    _, q_new, m_new = _round_panel(
      cut(w), cut(rows, axis=1), jax.tree.map(cut, columns), inner
    )
    if size == 1:
      w = w + rows.T * m_new
    else:
      w = w + jax.lax.dot(rows.T, m_new, precision=jax.lax.Precision.HIGHEST)
    # The product reaches the block's own columns too, and leaves in them what
    # they were when they were rounded.
    return w, put(q, q_new), put(moved, m_new)

  start = (w, jnp.zeros(w.shape, jnp.int8), jnp.zeros_like(w))
  return jax.lax.fori_loop(0, w.shape[0] // size, step, start)


def _arrange_hessian(h: np.ndarray, order: np.ndarray) -> np.ndarray:
  """H in the order of rounding, with 1 on empty places of the diagonal.

  On the host, like everything that puts columns in order: widths differ from
  layer to layer, and a compiled gather would be one program for each.
  """
  size, cols = len(order), len(h)
  arranged = np.zeros((size, size), np.float32)
  arranged[:cols, :cols] = h[np.ix_(order[:cols], order[:cols])]
  empty = np.flatnonzero(np.diagonal(arranged) == 0)
  arranged[empty, empty] = 1
  return arranged


@jax.jit
def _factorize(h: Array, added: Array) -> tuple[Array, Array, Array]:
  """`Factor.spread` and R_jj^2; and whether they exist (are no NaN)."""
  eye = jnp.eye(h.shape[0], dtype=h.dtype)
  # cholesky does not raise where there is no factor: it returns NaN.
  r = jnp.linalg.cholesky((h + added * eye)[::-1, ::-1])[::-1, ::-1]
  pivots = jnp.diagonal(r)
  spread = jnp.triu(r, 1) / pivots
  return spread, pivots**2, jnp.isfinite(spread).all()


def _arrange_weight(
  w: np.ndarray, order: np.ndarray, importance: np.ndarray, height: int
) -> list[Float[np.ndarray, 'C R']]:
  """`w` transposed, in the order of rounding, cut into tiles of its rows."""
  rows, cols = w.shape
  arranged = np.zeros((len(order), rows + -rows % height), np.float32)
  arranged[:cols, :rows] = w.T[order[:cols]]
  arranged[importance <= 0] = 0  # dead columns
  return np.split(arranged, arranged.shape[1] // height, axis=1)
