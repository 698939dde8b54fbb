import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax.quant import packing

WIDTHS = range(1, 9)
LENGTHS = (1, 31, 33, 100)


def random_codes(bits, shape, seed=0):
  rng = np.random.default_rng(seed)
  if bits == 1:
    return rng.choice(np.array([-1, 1], np.int8), shape)
  half = 2 ** (bits - 1)
  q = rng.integers(-half, half, shape, dtype=np.int8)
  q.flat[0], q.flat[-1] = -half, half - 1  # both ends are always there
  return q


def stream_words(row, bits):
  """One row's words, by writing a single Python integer of all its bits."""
  stream = sum(int(u) << (k * bits) for k, u in enumerate(row))
  count = -(-len(row) * bits // 32)
  return [(stream >> (32 * i)) & 0xFFFFFFFF for i in range(count)]


@pytest.mark.parametrize('k', LENGTHS)
@pytest.mark.parametrize('bits', WIDTHS)
def test_unpack_inverts_pack(bits, k):
  q = random_codes(bits, (3, k))
  words = packing.pack(q, bits)
  assert isinstance(words, np.ndarray)
  assert words.dtype == np.int32
  assert words.shape == (3, packing.packed_words(k, bits))
  unpacked = packing.unpack(words, bits, k)
  assert unpacked.dtype == np.int8
  np.testing.assert_array_equal(unpacked, q)


@pytest.mark.parametrize('k', LENGTHS)
@pytest.mark.parametrize('bits', WIDTHS)
def test_words_are_the_dense_bitstream(bits, k):
  u = np.random.default_rng(1).integers(0, 2**bits, (3, k), dtype=np.uint8)
  words = packing.pack_unsigned(u, bits)
  expected = np.array([stream_words(row, bits) for row in u], np.uint32)
  np.testing.assert_array_equal(words.view(np.uint32), expected)
  np.testing.assert_array_equal(packing.unpack_unsigned(words, bits, k), u)


@pytest.mark.parametrize('bits', WIDTHS)
def test_jax_agrees_with_numpy_under_jit(bits):
  k = 45
  q = random_codes(bits, (2, 3, k))
  words = packing.pack(q, bits)
  pack = jax.jit(packing.pack, static_argnums=1)
  unpack = jax.jit(packing.unpack, static_argnums=(1, 2))
  packed = pack(jnp.asarray(q), bits)
  assert packed.dtype == jnp.int32
  np.testing.assert_array_equal(packed, words)
  unpacked = unpack(jnp.asarray(words), bits, k)
  assert unpacked.dtype == jnp.int8
  np.testing.assert_array_equal(unpacked, q)


# compressed_tensors 0.20.0, pack_to_int32(q, bits) of the 2 x 11 codes that
# `test_words_equal_compressed_tensors` builds.
COMPRESSED_TENSORS = {
  1: [[1462], [585]],
  2: [[3270068], [2920547]],
  3: [[-983001880, 0], [-1136393561, 0]],
  4: [[974728016, 909], [-1585409337, 2804]],
  5: [[-2087113568, 5053850], [1343015303, 6939860]],
  6: [[1497936192, 842911400, 1], [543499015, -1547375846, 1]],
  7: [[-1841118592, 1030138121, 5348], [52725255, -998980286, 5799]],
  8: [
    [302712064, 858399001, 5457981],
    [420613127, 976300064, 5918532],
  ],
}


@pytest.mark.parametrize('bits', WIDTHS)
def test_words_equal_compressed_tensors(bits):
  i, k = np.arange(2)[:, None], np.arange(11)[None]
  u = (7 * i + 5 * k + k * k // 3) % 2**bits
  q = 2 * u - 1 if bits == 1 else u - 2 ** (bits - 1)
  words = packing.pack(q.astype(np.int8), bits)
  assert words.tolist() == COMPRESSED_TENSORS[bits]


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_words_are_gptq_qweight_transposed(bits):
  k, n = 64, 5
  u = np.random.default_rng(2).integers(0, 2**bits, (n, k), dtype=np.uint8)
  per_word = 32 // bits
  qweight = np.zeros((k // per_word, n), np.uint32)
  for i in range(k):
    for j in range(n):
      qweight[i // per_word, j] |= int(u[j, i]) << (bits * (i % per_word))
  words = packing.pack_unsigned(u, bits)
  np.testing.assert_array_equal(words, qweight.view(np.int32).T)


def test_unused_bits_of_the_last_word_are_zero():
  u = np.full((1, 3), 127, np.uint8)
  assert packing.pack_unsigned(u, 7).tolist() == [[2**21 - 1]]


def test_one_bit_codes_are_signs():
  q = np.array([[1, -1, -1, 1]], np.int8)
  assert packing.pack(q, 1).tolist() == [[0b1001]]
  assert packing.unpack(np.array([[0b1001]], np.int32), 1, 4).tolist() == [
    [1, -1, -1, 1]
  ]


def test_no_values_take_no_words():
  words = packing.pack(np.zeros((2, 0), np.int8), 3)
  assert words.shape == (2, 0)
  assert packing.unpack(words, 3, 0).shape == (2, 0)


def test_refuses_codes_outside_the_width():
  with pytest.raises(ValueError, match=r'span -1\.\.15; 4 bits hold 0\.\.15'):
    packing.pack(np.array([[-9, 7]], np.int8), 4)
  with pytest.raises(ValueError, match=r'span 0\.\.16; 4 bits'):
    packing.pack_unsigned(np.array([[0, 16]], np.uint8), 4)
  with pytest.raises(ValueError, match='must be -1 or'):
    packing.pack(np.array([[1, 0]], np.int8), 1)


@pytest.mark.parametrize('bits', [0, 9, 16])
def test_refuses_other_widths(bits):
  with pytest.raises(ValueError, match=r'expected 1\.\.8'):
    packing.packed_words(8, bits)
  with pytest.raises(ValueError, match=r'expected 1\.\.8'):
    packing.pack_unsigned(np.zeros((1, 8), np.uint8), bits)


def test_refuses_words_of_another_length():
  words = np.zeros((2, 3), np.int32)
  with pytest.raises(ValueError, match='take 4 words per row, got 3'):
    packing.unpack(words, 3, 33)
