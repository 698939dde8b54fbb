import numpy as np

from toga_jax import config
from toga_jax.quant import ranges as column_ranges

RANGES = ((0, 5, 3, 2, False), (5, 5, 4), (5, 9, 8))


def test_groups_are_numbered_range_by_range():
  ranges = column_ranges.checked(RANGES, 9)
  assert [r.size for r in ranges] == [5, 0, 4]
  assert [r.groups for r in ranges] == [3, 0, 1]
  groups = column_ranges.number_groups(ranges)
  assert groups.group.tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 3]
  off = config.OFF_BITS  # unused groups, at least one of them
  assert groups.bits.tolist() == [3, 3, 3, 8, off, off, off, off]
  assert groups.symmetric.tolist() == [False] * 3 + [True] * 5


def test_split_cuts_columns_and_scales():
  ranges = column_ranges.checked(RANGES, 9)
  q = np.arange(18, dtype=np.int8).reshape(2, 9)
  scale = np.arange(16, dtype=np.float16).reshape(2, 8)
  zero = np.arange(16, dtype=np.int8).reshape(2, 8)
  low, empty, high = column_ranges.split(ranges, q, scale, zero)
  assert low.q.tolist() == [[0, 1, 2, 3, 4], [9, 10, 11, 12, 13]]
  assert low.scale.tolist() == low.zero.tolist() == [[0, 1, 2], [8, 9, 10]]
  assert (low.bits, low.group_size) == (3, 2)
  assert empty.q.shape == (2, 0)
  assert high.q.tolist() == [[5, 6, 7, 8], [14, 15, 16, 17]]
  assert high.scale.tolist() == [[3], [11]]
  assert high.zero is None
