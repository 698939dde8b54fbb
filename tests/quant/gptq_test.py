import jax
import numpy as np
import pytest

from toga_jax.quant import gptq, packing, qtensor


def correlated(seed, tokens, cols):
  """Inputs of a linear: correlated columns of different size."""
  rng = np.random.default_rng(seed)
  mix = np.eye(cols) + 0.3 * rng.standard_normal((cols, cols))
  size = np.exp(rng.standard_normal(cols))
  x = rng.standard_normal((tokens, cols)) @ mix * size
  return x.astype(np.float32)


def hessian_of(x):
  return (2 / len(x) * x.T.astype(np.float64) @ x).astype(np.float32)


def weight(seed, rows, cols):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((rows, cols)) * 0.05).astype(np.float32)


def output_error(x, w, dense):
  """Mean over tokens of the squared error, summed over outputs."""
  gap = x.astype(np.float64) @ (w - np.asarray(dense)).T.astype(np.float64)
  return np.mean(np.sum(gap**2, axis=1))


def reference(w, h, ranges, damping, act_order):
  """GPTQ as the paper tells it: one column, then an explicit update of H^-1.

  float64, plain loops; scales cover the largest weight. Returns codes and the
  rounded matrix.
  """
  w, h = w.astype(np.float64), h.astype(np.float64)
  cols = len(h)
  dead = np.diag(h) == 0
  w[:, dead] = 0
  damp = damping * np.diag(h)[~dead].mean()
  h[dead, dead] = 1

  scale, zero = np.ones_like(w), np.zeros_like(w)
  bits_of = np.zeros(cols, int)
  order = []
  for start, stop, bits, group_size, symmetric in ranges:
    bits_of[start:stop] = bits
    inside = list(range(start, stop))
    if act_order:
      inside.sort(key=lambda j: -h[j, j] if not dead[j] else 0)
    order += inside
    group_size = group_size or max(stop - start, 1)
    for first in range(start, stop, group_size):
      last = min(first + group_size, stop)
      for r in range(len(w)):
        x = w[r, first:last]
        if bits == 16:
          continue
        if bits == 1:
          alive = ~dead[first:last]
          weights = np.diag(h)[first:last] * alive
          s = np.sum(np.abs(x) * weights) / np.sum(weights)
        elif symmetric:
          s = np.abs(x).max() / (2 ** (bits - 1) - 1)
        else:
          s = (max(x.max(), 0) - min(x.min(), 0)) / (2**bits - 1)
        s = np.float64(np.float16(s)) or 1.0
        scale[r, first:last] = s
        if not symmetric:
          zero[r, first:last] = np.round(-min(x.min(), 0) / s) - 2 ** (bits - 1)

  inverse = np.linalg.inv(h + damp * np.eye(cols))
  codes, dense = np.zeros_like(w), np.zeros_like(w)
  for j in order:
    v, s, z, bits = w[:, j].copy(), scale[:, j], zero[:, j], bits_of[j]
    if bits == 16:
      dense[:, j] = v
    elif bits == 1:
      codes[:, j] = np.where(v >= 0, 1, -1)
      dense[:, j] = codes[:, j] * s
    else:
      half = 2 ** (bits - 1)
      codes[:, j] = np.clip(np.round(v / s) + z, -half, half - 1)
      dense[:, j] = (codes[:, j] - z) * s
    error = (v - dense[:, j]) / inverse[j, j]
    for k in range(cols):
      w[:, k] -= error * inverse[j, k]
    inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    inverse[j, j] = np.inf  # this column is done
    inverse[j, :j] = inverse[j, j + 1 :] = 0
    inverse[:j, j] = inverse[j + 1 :, j] = 0
  return codes, dense


CASES = {
  'one range': [(0, 40, 4, 0, True)],
  'ragged groups of two widths': [(0, 29, 3, 8, True), (29, 40, 6, 8, True)],
  'per channel and grouped': [(0, 24, 2, 0, True), (24, 40, 8, 12, True)],
  'asymmetric': [(0, 24, 3, 10, False), (24, 40, 5, 0, True)],
  'signs, an empty range': [
    (0, 30, 1, 0, True),
    (30, 30, 4, 0, True),
    (30, 40, 4, 0, True),
  ],
  'high range not quantized': [(0, 30, 2, 0, True), (30, 40, 16, 0, True)],
  'more than a block': [(0, 100, 3, 32, True), (100, 150, 4, 0, True)],
}


@pytest.mark.parametrize('act_order', [False, True])
@pytest.mark.parametrize('case', CASES)
def test_equals_gptq_with_an_explicit_inverse(case, act_order):
  ranges = CASES[case]
  cols = ranges[-1][1]
  h = hessian_of(correlated(0, 3 * cols, cols))
  for dead in (3, cols - 2):
    h[dead] = h[:, dead] = 0
  w = weight(1, 5, cols)
  factor = gptq.prepare(h, ranges, act_order=act_order)
  result = gptq.quantize(w, factor, clip_search=False)

  codes, dense = reference(w, h, ranges, 0.01, act_order)
  for (start, stop, bits, group_size, symmetric), part in zip(
    ranges, result.parts, strict=True
  ):
    if bits == 16:
      assert part is None
      continue
    assert (part.zero is None) == symmetric
    assert part.scale.shape == (5, qtensor.num_groups(stop - start, group_size))
    np.testing.assert_array_equal(part.q, codes[:, start:stop])
  # float32 against float64, on weights of 0.05.
  np.testing.assert_allclose(result.dense, dense, atol=2e-6)


def test_parts_stand_for_dense_and_can_be_packed():
  ranges = [(0, 24, 3, 10, False), (24, 40, 5)]
  h = hessian_of(correlated(2, 90, 40))
  result = gptq.quantize(weight(3, 5, 40), gptq.prepare(h, ranges))
  parts = [np.asarray(qtensor.dequantize(part)) for part in result.parts]
  np.testing.assert_array_equal(result.dense, np.concatenate(parts, axis=1))
  for part in result.parts:
    assert part.q.dtype == np.int8
    assert part.scale.dtype == np.float16
    words = packing.pack(part.q, part.bits)
    unpacked = packing.unpack(words, part.bits, part.q.shape[1])
    np.testing.assert_array_equal(unpacked, part.q)


def test_diagonal_hessian_is_rounding_to_nearest():
  diagonal = np.random.default_rng(4).uniform(0.1, 4, 40).astype(np.float32)
  ranges = [(0, 29, 3, 8), (29, 40, 6, 8)]
  w = weight(5, 5, 40)
  result = gptq.quantize(w, gptq.prepare(np.diag(diagonal), ranges))
  for (start, stop, bits, group_size), part in zip(
    ranges, result.parts, strict=True
  ):
    nearest = qtensor.quantize_weight(
      w[:, start:stop], bits, group_size, importance=diagonal[start:stop]
    )
    np.testing.assert_array_equal(part.q, nearest.q)
    np.testing.assert_array_equal(part.scale, nearest.scale)


@pytest.mark.parametrize(
  ('bits', 'share'), [(1, 0.8), (2, 0.5), (3, 0.5), (4, 0.5)]
)
def test_beats_rounding_to_nearest_on_output_error(bits, share):
  x = correlated(6, 400, 96)
  w = weight(7, 32, 96)
  h = hessian_of(x)
  result = gptq.quantize(w, gptq.prepare(h, [(0, 96, bits)]))
  nearest = qtensor.quantize_weight(w, bits, importance=np.diagonal(h))
  error = output_error(x, w, result.dense)
  assert error < share * output_error(x, w, qtensor.dequantize(nearest))


def test_precise_columns_absorb_the_errors_of_the_others():
  x = correlated(8, 400, 96)
  w = weight(9, 32, 96)
  factor = gptq.prepare(hessian_of(x), [(0, 80, 3), (80, 96, 16)])
  result = gptq.quantize(w, factor)
  dense = np.array(result.dense)
  absorbed = output_error(x, w, dense)
  dense[:, 80:] = w[:, 80:]
  assert absorbed < 0.9 * output_error(x, w, dense)


def test_loss_is_the_output_error():
  x = correlated(10, 200, 40)
  w = weight(11, 5, 40)
  ranges = [(0, 29, 3, 8), (29, 40, 6, 8)]
  # So little damping that the damped H is H.
  result = gptq.quantize(w, gptq.prepare(hessian_of(x), ranges, damping=1e-6))
  expected = output_error(x, w, result.dense)
  np.testing.assert_allclose(result.loss, expected, rtol=1e-3)


def test_search_and_signed_scales_lower_the_loss():
  h = hessian_of(correlated(12, 400, 96))
  w = weight(13, 32, 96)
  factor = gptq.prepare(h, [(0, 96, 3)])
  plain = gptq.quantize(w, factor, clip_search=False).loss
  unsigned = gptq.quantize(w, factor, signed_scales=False).loss
  assert gptq.quantize(w, factor).loss < unsigned < 0.8 * plain


def test_one_factor_serves_all_rows_in_any_tiling(monkeypatch):
  w = weight(14, 11, 40)
  factor = gptq.prepare(hessian_of(correlated(15, 90, 40)), [(0, 40, 3, 16)])
  whole = gptq.quantize(w, factor)
  monkeypatch.setattr(gptq, '_ROW_TILE', {jax.default_backend(): 4})
  tiled = gptq.quantize(w, factor)
  np.testing.assert_array_equal(tiled.parts[0].q, whole.parts[0].q)
  np.testing.assert_array_equal(tiled.parts[0].scale, whole.parts[0].scale)
  np.testing.assert_array_equal(tiled.dense, whole.dense)
  np.testing.assert_allclose(tiled.loss, whole.loss, rtol=1e-5)


def test_other_borders_and_widths_compile_nothing():
  w = weight(16, 5, 40)
  h = hessian_of(correlated(17, 90, 40))
  gptq.quantize(w, gptq.prepare(h, [(0, 30, 3), (30, 40, 4)]))
  compiled = gptq._quantize_tile._cache_size()
  gptq.quantize(w, gptq.prepare(h, [(0, 10, 2), (10, 40, 8)]))
  gptq.quantize(w[:3, :25], gptq.prepare(h[:25, :25], [(0, 25, 1)]))
  assert gptq._quantize_tile._cache_size() == compiled


def test_singular_hessian_escalates_damping():
  x = correlated(18, 10, 40)  # rank 10
  w = weight(19, 5, 40)
  factor = gptq.prepare(hessian_of(x), [(0, 40, 4)], damping=0.0)
  result = gptq.quantize(w, factor)
  assert result.damping == factor.damping == 1e-3
  assert np.isfinite(result.dense).all()
  nearest = qtensor.quantize_weight(w, 4)
  error = output_error(x, w, result.dense)
  assert error < output_error(x, w, qtensor.dequantize(nearest))


def test_damping_rises_tenfold_until_there_is_a_factor():
  h = np.full((40, 40), 1.05, np.float32)  # least eigenvalue -0.05
  np.fill_diagonal(h, 1)
  factor = gptq.prepare(h, [(0, 40, 4)])
  np.testing.assert_allclose(factor.damping, 0.1)
  assert np.isfinite(gptq.quantize(weight(20, 5, 40), factor).dense).all()


def test_all_columns_dead():
  result = gptq.quantize(
    weight(21, 5, 40), gptq.prepare(np.zeros((40, 40)), [(0, 40, 4)])
  )
  assert not np.any(result.dense)
  assert result.loss == 0


def test_refuses_hessians_that_are_none():
  ranges = [(0, 40, 4)]
  h = hessian_of(correlated(22, 90, 40))
  h[7, 7] = np.nan
  with pytest.raises(ValueError, match='block 3 qkv has values on its diag'):
    gptq.prepare(h, ranges, name='block 3 qkv')
  h = hessian_of(correlated(22, 90, 40))
  h[7, 8] = h[8, 7] = np.nan
  with pytest.raises(ValueError, match='no Cholesky factor, even with damping'):
    gptq.prepare(h, ranges)
  h[7, 8] = h[8, 7] = 1e6
  with pytest.raises(ValueError, match=r'even with damping 1 of its mean'):
    gptq.prepare(h, ranges)


def test_refuses_weights_that_do_not_fit_or_hold_nan():
  h = hessian_of(correlated(23, 90, 40))
  for bits in (4, 16):
    factor = gptq.prepare(h, [(0, 40, bits)])
    w = weight(24, 5, 40)
    w[3, 17] = np.nan
    with pytest.raises(ValueError, match='up holds NaN'):
      gptq.quantize(w, factor, name='up')
  with pytest.raises(ValueError, match='weight has 39 columns, its Hessian 40'):
    gptq.quantize(w[:, :39], factor)


@pytest.mark.parametrize(
  'ranges',
  [
    [],
    [(0, 39, 4)],
    [(0, 41, 4)],
    [(0, 20, 4), (21, 40, 8)],
    [(0, 25, 4), (20, 40, 8)],
    [(20, 40, 8), (0, 20, 4)],
  ],
)
def test_refuses_ranges_that_do_not_cover_the_columns(ranges):
  with pytest.raises(ValueError, match=r'must cover columns 0\.\.40'):
    gptq.prepare(np.eye(40), ranges)


def test_refuses_unknown_widths():
  with pytest.raises(ValueError, match=r'bits=9: expected 1\.\.8'):
    gptq.prepare(np.eye(40), [(0, 40, 9)])
