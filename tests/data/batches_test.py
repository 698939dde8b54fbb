import dataclasses

import numpy as np
import pytest

from toga_jax import config
from toga_jax.data import batches


def text(size):
  # A token is its own position, so that a window shows where it was cut.
  return np.arange(size, dtype=np.int32)


def sample(tokens, *, seed=0, step=0, batch_size=2, seq_len=5):
  return batches.sample_batch(
    tokens, seed=seed, step=step, batch_size=batch_size, seq_len=seq_len
  )


def epoch_of(tokens, *, seed=0, epoch=0, seq_len=5):
  per_epoch = max(1, (tokens.size + 1) // seq_len - 1)
  return sample(
    tokens, seed=seed, step=epoch, batch_size=per_epoch, seq_len=seq_len
  )


# Training batches.


@pytest.mark.parametrize('size', [5, 6, 8, 9, 10, 14, 61, 64])
@pytest.mark.parametrize('epoch', [0, 1, 7])
def test_an_epoch_sees_each_window_once_and_skips_only_the_ends(size, epoch):
  tokens = text(size)

  seen = epoch_of(tokens, epoch=epoch)

  flat = np.sort(seen.ravel())
  np.testing.assert_array_equal(flat, flat[0] + np.arange(flat.size))
  assert size - flat.size < 2 * 5


def test_windows_are_slices_of_the_text():
  seen = epoch_of(text(64))

  assert seen.dtype == np.int32
  assert seen.shape == (12, 5)
  np.testing.assert_array_equal(
    seen - seen[:, :1], np.tile(np.arange(5), (12, 1))
  )


def test_windows_come_in_random_order():
  starts = epoch_of(text(505), epoch=0)[:, 0]

  assert sorted(starts) != list(starts)
  assert abs(np.corrcoef(starts, np.arange(100))[0, 1]) < 0.3


def test_epochs_cut_the_text_at_every_place():
  phases = [epoch_of(text(64), epoch=e).min() for e in range(60)]

  assert set(phases) == {0, 1, 2, 3, 4}


def test_epochs_differ_in_order():
  first, second = (epoch_of(text(505), epoch=e)[:, 0] // 5 for e in (0, 1))

  assert (first != second).mean() > 0.9


def test_a_step_depends_on_seed_and_step_alone():
  straight = [sample(text(64), seed=3, step=k) for k in range(30)]

  resumed = [sample(text(64), seed=3, step=k) for k in reversed(range(30))]

  np.testing.assert_array_equal(straight, resumed[::-1])


def test_seeds_give_different_batches():
  runs = [
    np.concatenate([sample(text(640), seed=s, step=k) for k in range(8)])
    for s in range(4)
  ]

  for i in range(4):
    for j in range(i):
      assert (runs[i][:, 0] != runs[j][:, 0]).mean() > 0.8


@pytest.mark.parametrize('batch_size', [1, 3, 5, 40])
def test_batch_size_only_groups_the_same_windows(batch_size):
  one_by_one = [sample(text(64), step=k, batch_size=1)[0] for k in range(120)]

  grouped = np.concatenate(
    [
      sample(text(64), step=k, batch_size=batch_size)
      for k in range(120 // batch_size)
    ]
  )

  np.testing.assert_array_equal(grouped, one_by_one)


def test_the_stream_is_pinned():
  # A run resumed under another version of NumPy must go on with its epoch.
  batch = sample(text(64), seed=7, step=11, batch_size=3)

  assert batch[:, 0].tolist() == [44, 34, 24]


def test_a_text_of_one_window_is_that_window():
  np.testing.assert_array_equal(sample(text(5), step=9), [[0, 1, 2, 3, 4]] * 2)


def test_too_short_a_text_says_how_many_tokens_it_has():
  with pytest.raises(config.UserError, match=r'has 4 tokens.* window of 5'):
    sample(text(4))


def test_a_negative_seed_is_refused():
  with pytest.raises(config.UserError, match='--seed=-1: expected 0 or more'):
    sample(text(9), seed=-1)


# Windows to score.


def test_eval_windows_follow_the_text_and_drop_the_tail():
  got = batches.eval_windows(text(11), seq_len=4)

  np.testing.assert_array_equal(got.tokens, [[0, 1, 2, 3], [4, 5, 6, 7]])
  np.testing.assert_array_equal(got.lengths, [4, 4])
  assert got.tokens.dtype == got.lengths.dtype == np.int32


def test_the_tail_is_padded_and_counted():
  got = batches.eval_windows(text(11) + 1, seq_len=4, tail=True)

  np.testing.assert_array_equal(
    got.tokens, [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 0]]
  )
  np.testing.assert_array_equal(got.lengths, [4, 4, 3])


def test_bos_opens_each_window_and_takes_a_place():
  got = batches.eval_windows(text(8), seq_len=4, bos_id=77, tail=True)

  np.testing.assert_array_equal(
    got.tokens, [[77, 0, 1, 2], [77, 3, 4, 5], [77, 6, 7, 0]]
  )
  np.testing.assert_array_equal(got.lengths, [4, 4, 3])


@pytest.mark.parametrize('bos_id', [None, 77, 0])
@pytest.mark.parametrize('size', [2, 3, 7, 12, 13, 23])
def test_with_the_tail_every_token_is_there_once(size, bos_id):
  got = batches.eval_windows(text(size), seq_len=4, bos_id=bos_id, tail=True)

  prefix = bos_id is not None
  kept = [
    row[prefix:length]
    for row, length in zip(got.tokens, got.lengths, strict=True)
  ]
  # A last token that stands alone predicts nothing and is left out.
  alone = bos_id is None and size % 4 == 1
  np.testing.assert_array_equal(np.concatenate(kept), np.arange(size - alone))


def test_a_text_that_divides_evenly_has_no_tail():
  got = batches.eval_windows(text(8), seq_len=4, tail=True)

  np.testing.assert_array_equal(got.lengths, [4, 4])


def test_max_windows_keeps_the_first():
  some = batches.eval_windows(text(11), seq_len=4, max_windows=2, tail=True)
  more = batches.eval_windows(text(30), seq_len=4, max_windows=99)

  np.testing.assert_array_equal(some.tokens, [[0, 1, 2, 3], [4, 5, 6, 7]])
  np.testing.assert_array_equal(some.lengths, [4, 4])
  assert more.tokens.shape == (7, 4)


def test_without_a_tail_a_short_text_is_refused():
  with pytest.raises(config.UserError, match='has 3 tokens, fewer than the 4'):
    batches.eval_windows(text(3), seq_len=4)
  with pytest.raises(config.UserError, match='has 2 tokens, fewer than the 3'):
    batches.eval_windows(text(2), seq_len=4, bos_id=1)


def test_with_a_tail_a_short_text_is_one_window():
  got = batches.eval_windows(text(3), seq_len=9, tail=True)

  np.testing.assert_array_equal(got.lengths, [3])
  with pytest.raises(config.UserError, match='has 1 tokens'):
    batches.eval_windows(text(1), seq_len=9, tail=True)


def test_windows_cannot_be_reassigned():
  got = batches.eval_windows(text(8), seq_len=4)

  with pytest.raises(dataclasses.FrozenInstanceError):
    got.lengths = got.lengths * 2


# Windows to calibrate on.


@pytest.mark.parametrize('size', [60, 61, 64])
def test_calibration_windows_do_not_overlap(size):
  got = batches.calibration_windows(text(size), seed=1, count=12, seq_len=5)

  assert got.shape == (12, 5)
  flat = np.sort(got.ravel())
  np.testing.assert_array_equal(flat, flat[0] + np.arange(60))


def test_calibration_windows_depend_on_the_seed_alone():
  def starts(seed, count):
    return batches.calibration_windows(
      text(640), seed=seed, count=count, seq_len=5
    )[:, 0].tolist()

  assert starts(4, 20) == starts(4, 20)
  assert starts(4, 20) == starts(4, 50)[:20]
  assert starts(4, 20) != starts(5, 20)


def test_calibration_does_not_repeat_the_first_batches():
  calibration = batches.calibration_windows(
    text(640), seed=0, count=100, seq_len=5
  )

  trained = sample(text(640), seed=0, batch_size=100)

  assert (calibration[:, 0] // 5 == trained[:, 0] // 5).mean() < 0.1


def test_calibration_says_how_many_windows_there_are():
  with pytest.raises(config.UserError, match='14 tokens, 2 windows of 5; 3'):
    batches.calibration_windows(text(14), seed=0, count=3, seq_len=5)
  with pytest.raises(config.UserError, match='has 4 tokens'):
    batches.calibration_windows(text(4), seed=0, count=1, seq_len=5)
