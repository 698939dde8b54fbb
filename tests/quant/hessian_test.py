import jax.numpy as jnp
import numpy as np

from toga_jax.quant import hessian


def tokens(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_equals_two_over_n_times_the_sum_of_outer_products():
  x = tokens(0, 11, 5)
  moment = hessian.update(hessian.init(5), x)
  expected = np.zeros((5, 5))
  for row in x.astype(np.float64):
    expected += 2 / 11 * np.outer(row, row)
  # float32 sums of 11 terms.
  np.testing.assert_allclose(hessian.hessian(moment), expected, atol=1e-6)


def test_half_of_e_h_e_is_the_mean_squared_output_error():
  x, e = tokens(1, 30, 4), tokens(2, 4)
  h = hessian.hessian(hessian.update(hessian.init(4), x))
  np.testing.assert_allclose(e @ h @ e / 2, np.mean((x @ e) ** 2), rtol=1e-5)


def test_pieces_of_any_shape_add_up():
  x = tokens(3, 2, 9, 5)  # [B, T, cols]
  whole = hessian.update(hessian.init(5), x)
  pieces = hessian.init(5)
  for piece in (x[0], x[1, :4], x[1, 4:]):
    pieces = hessian.update(pieces, piece)
  assert int(whole.tokens) == int(pieces.tokens) == 18
  np.testing.assert_allclose(pieces.total, whole.total, rtol=1e-5, atol=1e-5)


def test_sums_half_precision_tokens_in_float32():
  x = jnp.ones((4099, 3), jnp.bfloat16)  # bfloat16 cannot hold 4099
  moment = hessian.update(hessian.init(3), x)
  assert moment.total.dtype == jnp.float32
  np.testing.assert_array_equal(moment.total, np.full((3, 3), 4099))
  np.testing.assert_array_equal(hessian.hessian(moment), np.full((3, 3), 2))


def test_update_reuses_the_buffers_of_the_old_moment():
  old = hessian.init(6)
  hessian.update(old, tokens(4, 7, 6))
  assert old.total.is_deleted()


def test_no_tokens_give_zeros():
  h = hessian.hessian(hessian.init(3))
  np.testing.assert_array_equal(h, np.zeros((3, 3)))
