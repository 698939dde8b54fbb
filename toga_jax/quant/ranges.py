"""Column ranges: which input channels of a linear have how many bits.

A linear's input channels lie in order of precision, `[low | high]`. Each range
has its own bit width and its own scales, in groups that never cross its ends.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float16, Int8, Int32

from toga_jax import config
from toga_jax.quant import qtensor

# Tables of scales are padded to this many groups: shapes that are the same for
# many linears compile once.
_GROUPS_MULTIPLE = 4


class Range(NamedTuple):
  """Consecutive columns of one bit width; 16 bits stay as they are.

  Groups of `group_size` columns (0: all of the range) share a scale; they
  start where the range starts, and the last one may be ragged.
  """

  start: int
  stop: int
  bits: int
  group_size: int = 0
  symmetric: bool = True

  @property
  def size(self) -> int:
    """The number of columns."""
    return self.stop - self.start

  @property
  def groups(self) -> int:
    """The number of scales per row."""
    return qtensor.num_groups(self.size, self.group_size)


class Groups(NamedTuple):
  """The groups of all ranges of a linear, in one numbering.

  At least one unused group of 16 bits comes last, for padding columns.
  """

  group: Int32[np.ndarray, ' cols']  # of each column
  bits: Int32[np.ndarray, ' G']  # of each group
  symmetric: Bool[np.ndarray, ' G']


def checked(ranges: Sequence[Range | tuple], cols: int) -> tuple[Range, ...]:
  """The ranges as `Range`s.

  Raises:
    ValueError: they do not cover columns 0..cols in order and without gaps (an
      empty range is none), or a width is not 1..8 or 16.
  """
  ranges = tuple(Range(*r) for r in ranges)
  starts = [0, *(r.stop for r in ranges)]
  if (
    cols < 1
    or starts[-1] != cols
    or any(r.start != s or r.size < 0 for r, s in zip(ranges, starts, strict=0))
  ):
    raise ValueError(
      f'ranges {[(r.start, r.stop) for r in ranges]} must cover columns '
      f'0..{cols} in order and without gaps'
    )
  for r in ranges:
    if r.bits != config.OFF_BITS:
      qtensor.check_bits(r.bits, r.symmetric)
  return ranges


def number_groups(ranges: tuple[Range, ...]) -> Groups:
  """Numbers the groups of all ranges, range by range."""
  used = sum(r.groups for r in ranges)
  group = np.zeros(ranges[-1].stop, np.int32)
  bits = np.full(
    (used // _GROUPS_MULTIPLE + 1) * _GROUPS_MULTIPLE, config.OFF_BITS, np.int32
  )
  symmetric = np.ones(bits.shape, bool)
  first = 0
  for r in ranges:
    mine = slice(first, first + r.groups)
    group[r.start : r.stop] = (
      qtensor.group_of_channel(r.size, r.group_size) + first
    )
    bits[mine] = r.bits
    symmetric[mine] = r.symmetric
    first = mine.stop
  return Groups(group, bits, symmetric)


def split(
  ranges: tuple[Range, ...],
  q: Int8[np.ndarray, 'rows cols'],
  scale: Float16[np.ndarray, 'rows G'],
  zero: Int8[np.ndarray, 'rows G'],
) -> tuple[qtensor.QWeight | None, ...]:
  """The integers and scales of each range; None for one of 16 bits."""
  parts = []
  first = 0
  for r in ranges:
    mine = slice(first, first + r.groups)
    first = mine.stop
    if r.bits == config.OFF_BITS:
      parts.append(None)
      continue
    parts.append(
      qtensor.QWeight(
        q=np.ascontiguousarray(q[:, r.start : r.stop]),
        scale=np.ascontiguousarray(scale[:, mine]),
        zero=None if r.symmetric else np.ascontiguousarray(zero[:, mine]),
        bits=r.bits,
        group_size=r.group_size,
      )
    )
  return tuple(parts)
