import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax.quant import packed, packing, qtensor


def quantized(bits, group_size, symmetric):
  w = np.random.default_rng(bits).standard_normal((6, 29)).astype(np.float32)
  weight = qtensor.quantize_weight(w, bits, group_size, symmetric=symmetric)
  return jax.tree.map(np.asarray, weight)


CASES = [
  *((b, g, True) for b in range(1, 9) for g in (0, 8)),
  *((b, 8, False) for b in range(2, 9)),
]


@pytest.mark.parametrize(('bits', 'group_size', 'symmetric'), CASES)
def test_packing_a_weight_loses_nothing(bits, group_size, symmetric):
  weight = quantized(bits, group_size, symmetric)
  part = packed.pack(weight)
  again = packed.unpack(part)
  np.testing.assert_array_equal(again.q, weight.q)
  np.testing.assert_array_equal(again.scale, weight.scale)
  if not symmetric:
    np.testing.assert_array_equal(again.zero, weight.zero)
    assert part.zero.shape == (4, packing.packed_words(6, bits))
  expected = np.asarray(qtensor.dequantize(weight))
  np.testing.assert_array_equal(packed.dequantize(part), expected)
  on_device = packed.dequantize(jax.tree.map(jnp.asarray, part))
  np.testing.assert_array_equal(on_device, expected)


@pytest.mark.parametrize(('bits', 'group_size', 'symmetric'), CASES[::3])
def test_rows_are_those_of_the_whole(bits, group_size, symmetric):
  part = packed.pack(quantized(bits, group_size, symmetric))
  ids = jnp.asarray([[5, 0, 2], [2, 2, 1]])
  whole = packed.dequantize(part)
  part = jax.tree.map(jnp.asarray, part)
  rows = packed.take_rows(part, ids, np.dtype('float32'))
  np.testing.assert_array_equal(rows, np.asarray(whole)[np.asarray(ids)])


def test_sizes_are_those_of_the_weight():
  part = packed.pack(quantized(3, 8, True))
  assert (packed.channels(part), packed.output_channels(part)) == (29, 6)
  dense = np.zeros((5, 7), np.float32)
  assert (packed.channels(dense), packed.output_channels(dense)) == (7, 5)
  assert packed.PackedLinear((part, dense)).outputs == 6
