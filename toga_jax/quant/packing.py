"""The packed layout of few-bit integers: how codes lie in int32 words.

Every kernel, reference and export derives from what is written here. One
output row is one dense bitstream, least significant bit first: value k takes
the bits `k*b .. k*b + b - 1` of the row, and bit i of the row is bit `i % 32`
of word `i // 32`. Widths that do not divide 32 straddle words; the last word
is filled up with zeros.

         word 0                              word 1
  4 bit  k7 k6 k5 k4 k3 k2 k1 k0             k15 ...
  3 bit  k10(2 low bits) k9 ... k1 k0        ... k11 k10(1 high bit)

The stream repeats its alignment every `32 / gcd(b, 32)` values, which fill
`b / gcd(b, 32)` whole words; both directions work on such periods.

For every width this is the `weight_packed` of compressed-tensors (since its
change to dense 3, 5, 6 and 7 bits in 2026), and for 2, 3, 4 and 8 bits the
transpose of GPTQ's `qweight`.

A signed code q is stored as `u = q + 2^(b-1)`, that is
  b bits   q in -2^(b-1) .. 2^(b-1) - 1   u = q + 2^(b-1)
  1 bit    q in {-1, +1}                  u = (q + 1) / 2
One bit is the exception because its code is a sign, and weights of one bit
are sign times scale. The stored bit is the same as in compressed-tensors,
which reads it as q in {-1, 0}.
"""

import functools
import math
import operator
from types import ModuleType

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int8, Int32, UInt8

WORD_BITS = 32


def packed_words(k: int, bits: int) -> int:
  """The number of int32 words that `k` values of `bits` bits take."""
  _check_bits(bits)
  return -(-k * bits // WORD_BITS)


def pack(
  q: Int8[Array | np.ndarray, '*rows k'], bits: int
) -> Int32[Array | np.ndarray, '*rows words']:
  """Packs signed codes along their last axis.

  Args:
    q: codes; see the table at the top. NumPy in, NumPy out; jax in, jax out.
    bits: 1 to 8.

  Returns:
    Words, `packed_words(k, bits)` of them per row.

  Raises:
    ValueError: `bits` is not 1..8, or (NumPy only; traced values cannot be
      looked at) a code is outside its width.
  """
  _check_bits(bits)
  if bits == 1:
    if isinstance(q, np.ndarray) and not np.all(np.abs(q) == 1):
      raise ValueError('one-bit codes must be -1 or +1')
    return pack_unsigned((q > 0).astype(np.uint8), bits)
  # Through int16, as 127 + 128 leaves int8.
  u = q.astype(np.int16) + 2 ** (bits - 1)
  return pack_unsigned(_narrowed(u, bits), bits)


def unpack(
  words: Int32[Array | np.ndarray, '*rows words'], bits: int, k: int
) -> Int8[Array | np.ndarray, '*rows k']:
  """The signed codes that `pack` packed; `k` of them per row.

  Raises:
    ValueError: `bits` is not 1..8, or the words are not `k` values' worth.
  """
  u = unpack_unsigned(words, bits, k).astype(np.int16)
  q = 2 * u - 1 if bits == 1 else u - 2 ** (bits - 1)
  return q.astype(np.int8)


def pack_unsigned(
  u: UInt8[Array | np.ndarray, '*rows k'], bits: int
) -> Int32[Array | np.ndarray, '*rows words']:
  """Packs unsigned codes `0 .. 2^bits - 1` along their last axis.

  Raises:
    ValueError: as `pack`.
  """
  _check_bits(bits)
  u = _narrowed(u, bits)
  xp = _module(u)
  values, words = _period(bits)
  *rows, k = u.shape
  periods = -(-k // values)
  u = xp.pad(u, [(0, 0)] * len(rows) + [(0, periods * values - k)])
  u = u.reshape(*rows, periods, values)
  columns = [
    functools.reduce(
      operator.or_,
      (
        _shifted(u[..., j].astype(np.uint32), j * bits - w * WORD_BITS)
        for j in _values_of_word(w, bits)
      ),
    )
    for w in range(words)
  ]
  packed = xp.stack(columns, axis=-1).reshape(*rows, periods * words)
  # Copied, so that what is written to files is contiguous.
  return packed[..., : packed_words(k, bits)].copy().view(np.int32)


def unpack_unsigned(
  words: Int32[Array | np.ndarray, '*rows words'], bits: int, k: int
) -> UInt8[Array | np.ndarray, '*rows k']:
  """The unsigned codes that `pack_unsigned` packed; `k` of them per row.

  Raises:
    ValueError: `bits` is not 1..8, or the words are not `k` values' worth.
  """
  expected = packed_words(k, bits)
  *rows, count = words.shape
  if count != expected:
    raise ValueError(
      f'{k} values of {bits} bits take {expected} words per row, got {count}'
    )
  xp = _module(words)
  values, span = _period(bits)
  periods = -(-count // span)
  words = xp.pad(words, [(0, 0)] * len(rows) + [(0, periods * span - count)])
  words = words.view(np.uint32).reshape(*rows, periods, span)
  pieces = []
  for w in range(span):
    # Broadcast shifts, word by word: gathers are ten times slower on CPUs.
    first = -(-w * WORD_BITS // bits)
    stop = -(-(w + 1) * WORD_BITS // bits)
    shift = np.arange(first, stop, dtype=np.uint32) * bits - w * WORD_BITS
    u = words[..., w, None] >> shift
    if w + 1 < span:
      # The bits that spilled into the next word; those of a value that did
      # not spill land above its width and are masked off. In two steps, as a
      # shift by 32 - 0 is undefined.
      u = u | (words[..., w + 1, None] << 1 << (WORD_BITS - 1 - shift))
    pieces.append(u)
  u = xp.concatenate(pieces, axis=-1)
  u = (u & np.uint32(2**bits - 1)).astype(np.uint8)
  return u.reshape(*rows, periods * values)[..., :k]


def _check_bits(bits: int) -> None:
  if bits not in range(1, 9):
    raise ValueError(f'{bits=}: expected 1..8')


def _module(x: Array | np.ndarray) -> ModuleType:
  return np if isinstance(x, np.ndarray) else jnp


def _narrowed(u: Array | np.ndarray, bits: int) -> Array | np.ndarray:
  """`u` as uint8, after the check that only concrete NumPy values allow."""
  if isinstance(u, np.ndarray) and u.size:
    low, high = int(u.min()), int(u.max())
    if low < 0 or high >= 2**bits:
      raise ValueError(
        f'unsigned codes span {low}..{high}; {bits} bits hold '
        f'0..{2**bits - 1} (a signed code is stored plus 2^(bits-1))'
      )
  return u.astype(np.uint8)


def _period(bits: int) -> tuple[int, int]:
  """(values, words) after which the stream is word-aligned again."""
  common = math.gcd(bits, WORD_BITS)
  return WORD_BITS // common, bits // common


def _values_of_word(word: int, bits: int) -> range:
  """The values of a period that have bits in this word."""
  start, stop = word * WORD_BITS, (word + 1) * WORD_BITS
  return range(start // bits, -(-stop // bits))


def _shifted(u: Array | np.ndarray, by: int) -> Array | np.ndarray:
  """`u` moved up by `by` bits, or down when `by` is negative."""
  return u << np.uint32(by) if by >= 0 else u >> np.uint32(-by)
