import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax.quant import packing, qtensor


def weight(seed, rows, cols):
  """Gaussian, with a few outliers, rows of different size."""
  rng = np.random.default_rng(seed)
  w = rng.standard_normal((rows, cols)) * (1 + np.arange(rows))[:, None]
  w[:, ::7] *= 3
  return w.astype(np.float32) * 0.05


def squared_error(w, **kwargs):
  quantized = qtensor.quantize_weight(w, **kwargs)
  return float(np.sum((np.asarray(qtensor.dequantize(quantized)) - w) ** 2))


def test_symmetric_codes_and_scale_literally():
  w = np.array([[7.0, -3.6, 0.4, -7.0], [0.0, 14.0, 1.1, -2.9]], np.float32)
  quantized = qtensor.quantize_weight(w, 4, clip_search=False)
  assert quantized.q.tolist() == [[7, -4, 0, -7], [0, 7, 1, -1]]
  assert quantized.scale.tolist() == [[1.0], [2.0]]
  assert quantized.zero is None
  assert quantized.q.dtype == jnp.int8
  assert quantized.scale.dtype == jnp.float16
  assert qtensor.dequantize(quantized).tolist() == [
    [7.0, -4.0, 0.0, -7.0],
    [0.0, 14.0, 2.0, -2.0],
  ]


def test_asymmetric_codes_scale_and_zero_literally():
  # From -1 to 14 in 15 steps: codes u = w + 1, stored as u - 8.
  w = np.array([[-1.0, 14.0, 0.0, 5.2]], np.float32)
  quantized = qtensor.quantize_weight(w, 4, symmetric=False, clip_search=False)
  assert quantized.scale.tolist() == [[1.0]]
  assert quantized.zero.tolist() == [[1 - 8]]
  assert quantized.q.tolist() == [[-8, 7, -7, -2]]
  assert qtensor.dequantize(quantized).tolist() == [[-1.0, 14.0, 0.0, 5.0]]


def test_one_bit_is_sign_times_mean_magnitude():
  w = np.array([[1.0, -2.0, 0.0, 5.0, -0.5, 0.5]], np.float32)
  quantized = qtensor.quantize_weight(w, 1, group_size=4)
  assert quantized.q.tolist() == [[1, -1, 1, 1, -1, 1]]
  assert quantized.scale.tolist() == [[2.0, 0.5]]


def brute_force(w, bits, group_size, signed, power, importance):
  """Scale and codes of every group by plain loops over the same grid."""
  half, floor = 2 ** (bits - 1), qtensor._CLIP_FLOOR[bits]
  scales, codes = [], []
  for row in w:
    for start in range(0, len(row), group_size):
      x = row[start : start + group_size]
      h = importance[start : start + group_size]
      best = (np.inf,)
      for step in range(qtensor.CLIP_STEPS):
        shrink = 1 - (1 - floor) * step / (qtensor.CLIP_STEPS - 1)
        for sign in (1, -1) if signed else (1,):
          scale = sign * np.float16(shrink * np.abs(x).max() / (half - 1))
          q = np.clip(np.round(x / np.float64(scale)), -half, half - 1)
          error = np.sum(h * np.abs(q * np.float64(scale) - x) ** power)
          # Candidates that tie in float32 may fall either way.
          if error < best[0] * (1 - 1e-6):
            best = (error, scale, q)
      scales.append(best[1])
      codes.append(best[2])
  return np.array(scales).reshape(len(w), -1), np.concatenate(codes)


@pytest.mark.parametrize(
  ('bits', 'signed', 'power', 'weighted'),
  [
    (2, False, 2.0, False),
    (3, True, 2.0, True),
    (4, True, 2.4, False),
    (6, False, 2.0, True),
  ],
)
def test_search_equals_brute_force(bits, signed, power, weighted):
  w = weight(0, 3, 29)  # groups of 12, 12 and 5
  importance = np.linspace(0.5, 3, 29).astype(np.float32)
  if not weighted:
    importance = np.ones_like(importance)
  quantized = qtensor.quantize_weight(
    w, bits, 12, signed_scales=signed, power=power, importance=importance
  )
  scales, codes = brute_force(w, bits, 12, signed, power, importance)
  np.testing.assert_array_equal(quantized.scale, scales)
  np.testing.assert_array_equal(np.ravel(quantized.q), codes)


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('bits', [2, 3, 4])
def test_search_lowers_the_error(bits, symmetric):
  kwargs = {'bits': bits, 'group_size': 12, 'symmetric': symmetric}
  w = weight(1, 3, 29)
  plain = squared_error(w, clip_search=False, **kwargs)
  assert squared_error(w, **kwargs) < plain
  if symmetric:
    unsigned = squared_error(w, signed_scales=False, **kwargs)
    assert squared_error(w, **kwargs) < unsigned < plain


def test_a_negative_scale_gives_the_positive_side_the_extra_level():
  w = np.array([[-1.0, 0.0, 1.0, 2.0]], np.float32)  # needs -1 .. 2
  quantized = qtensor.quantize_weight(w, 2)
  assert float(quantized.scale[0, 0]) < 0
  # The grid of shrink factors passes 1/2 at a distance of under 1 %.
  assert squared_error(w, bits=2) < 0.01 * np.sum(w**2)
  assert squared_error(w, bits=2, signed_scales=False) > 0.1 * np.sum(w**2)


@pytest.mark.parametrize('bits', range(1, 9))
def test_ragged_groups_equal_their_slices(bits):
  w = weight(2, 5, 20)
  whole = qtensor.quantize_weight(w, bits, 8)
  assert whole.scale.shape == (5, 3)
  for group, start in enumerate((0, 8, 16)):
    part = qtensor.quantize_weight(w[:, start : start + 8], bits)
    np.testing.assert_array_equal(whole.scale[:, group], part.scale[:, 0])
    np.testing.assert_array_equal(whole.q[:, start : start + 8], part.q)


@pytest.mark.parametrize(
  ('bits', 'symmetric'),
  [*((b, True) for b in range(1, 9)), *((b, False) for b in range(2, 9))],
)
def test_error_is_within_half_a_step_without_clipping(bits, symmetric):
  w = weight(3, 3, 40)
  quantized = qtensor.quantize_weight(
    w, bits, symmetric=symmetric, clip_search=False
  )
  scale = np.asarray(quantized.scale, np.float32)
  gap = np.abs(np.asarray(qtensor.dequantize(quantized)) - w)
  if bits == 1:
    assert (np.sign(quantized.q) == np.where(w >= 0, 1, -1)).all()
    np.testing.assert_allclose(scale[:, 0], np.abs(w).mean(axis=1), rtol=2**-11)
  else:
    # Rounding the zero point shifts both ends by up to half a step more, and
    # float16 scales are good to 2^-11 of the largest weight.
    steps = 0.5 if symmetric else 1.0
    slack = np.abs(w).max(axis=1, keepdims=True) * 2**-10
    assert (gap <= steps * scale + slack).all()


def test_codes_agree_with_the_stored_scale():
  w = weight(4, 3, 40)
  quantized = qtensor.quantize_weight(w, 8, clip_search=False)
  stored = np.asarray(quantized.scale).astype(np.float64)
  expected = np.clip(np.round(w / stored), -128, 127)
  np.testing.assert_array_equal(quantized.q, expected)


def test_all_zero_groups():
  w = np.zeros((2, 6), np.float32)
  w[1, 4] = 1
  for bits in (2, 4, 8):
    quantized = qtensor.quantize_weight(w, bits, 3)
    assert np.asarray(quantized.scale)[0].tolist() == [1, 1]
    assert not np.any(quantized.q[0])
  one_bit = qtensor.quantize_weight(w, 1, 3)
  assert not np.any(qtensor.dequantize(one_bit)[0])


@pytest.mark.parametrize('symmetric', [True, False])
@pytest.mark.parametrize('size', [1e-30, 1e-9, 1e-6, 1e6, 1e9, 1e30])
def test_scales_survive_float16(size, symmetric):
  w = np.array([[-1.0, 0.3, 0.7]], np.float32) * np.float32(size)
  for bits in (1, 2, 8):
    if bits > 1 or symmetric:
      quantized = qtensor.quantize_weight(w, bits, symmetric=symmetric)
      scale = np.asarray(quantized.scale)
      assert np.isfinite(scale).all()
      assert bits == 1 or (scale != 0).all()
      gap = np.asarray(qtensor.dequantize(quantized)) - w
      assert np.abs(gap).max() <= np.abs(w).max() + 2.0**-24


def test_nan_shows_in_its_own_groups_scale():
  w = weight(5, 2, 6)
  w[1, 5] = np.nan
  scale = np.asarray(qtensor.quantize_weight(w, 4, 3).scale)
  assert np.isnan(scale).tolist() == [[False, False], [False, True]]


def test_search_ignores_channels_of_no_importance():
  w = np.random.default_rng(6).uniform(-0.5, 0.5, (3, 20)).astype(np.float32)
  w[:, 4] = 1  # an outlier that decides the scale, where it counts
  importance = np.ones(20, np.float32)
  importance[4] = 0
  rest = np.arange(20) != 4

  def error(**kwargs):
    quantized = qtensor.quantize_weight(w, 4, **kwargs)
    gap = np.asarray(qtensor.dequantize(quantized)) - w
    return np.sum(gap[:, rest] ** 2)

  assert error(importance=importance) < 0.5 * error()


@pytest.mark.parametrize('bits', range(1, 9))
def test_codes_and_zeros_can_be_packed(bits):
  w = weight(7, 3, 29)
  quantized = qtensor.quantize_weight(w, bits, 12, symmetric=bits == 1)
  q = np.asarray(quantized.q)
  words = packing.pack(q, bits)
  np.testing.assert_array_equal(packing.unpack(words, bits, 29), q)
  if quantized.zero is not None:
    zero = np.asarray(quantized.zero)
    packing.pack(zero, bits)  # raises if it does not fit
    assert zero.shape == (3, 3)


def test_no_channels_have_no_scales():
  quantized = qtensor.quantize_weight(np.zeros((3, 0), np.float32), 4)
  assert quantized.scale.shape == (3, 0)
  assert qtensor.dequantize(quantized).shape == (3, 0)


def test_refuses_widths_without_a_quantizer():
  w = weight(8, 2, 4)
  for bits in (0, 9, 16):
    with pytest.raises(ValueError, match=r'expected 1\.\.8'):
      qtensor.quantize_weight(w, bits)
  with pytest.raises(ValueError, match='no asymmetric form'):
    qtensor.quantize_weight(w, 1, symmetric=False)
