"""Windows of one long string of tokens: to train on, to score, to calibrate.

NumPy only. Every choice is a function of the seed and a counter, never of what
was drawn before, so that a resumed run needs no replay.
"""

import dataclasses

import numpy as np
from jaxtyping import Int, Int32

from toga_jax import config

# First word of the random stream, so that no two uses share one.
_TRAIN_STREAM, _CALIBRATION_STREAM = 1, 2


@dataclasses.dataclass(frozen=True)
class Windows:
  """Token windows of one string. `1 <= lengths <= T`."""

  tokens: Int32[np.ndarray, 'W T']  # padded with zeros on the right
  lengths: Int32[np.ndarray, ' W']  # how many tokens of a window count


def sample_batch(
  tokens: Int[np.ndarray, ' n'],
  *,
  seed: int,
  step: int,
  batch_size: int,
  seq_len: int,
) -> Int32[np.ndarray, 'B T']:
  """The training batch of one step, a function of (seed, step) alone.

  An epoch is a shuffled list of windows that do not overlap and that together
  cover the text, but for less than two windows at its ends: each epoch cuts the
  text at other places. Row b of step s is window `s * batch_size + b` of the
  endless list of epochs.

  Args:
    tokens: the text.
    seed: 0 or more.
    step: 0 or more.
    batch_size: B.
    seq_len: T.

  Raises:
    UserError: the text has fewer than `seq_len` tokens, or seed < 0.
  """
  _check(tokens, seq_len)
  assert batch_size > 0, batch_size
  assert step >= 0, step
  # One window less than fit, so that any phase 0..T-1 leaves room for them all.
  per_epoch = max(1, (tokens.size + 1) // seq_len - 1)
  drawn = step * batch_size + np.arange(batch_size)
  epochs, places = np.divmod(drawn, per_epoch)
  starts = np.empty(batch_size, np.int64)
  for epoch in np.unique(epochs):
    order = _shuffled_starts(
      tokens.size, seq_len, per_epoch, key=(_TRAIN_STREAM, seed, int(epoch))
    )
    starts[epochs == epoch] = order[places[epochs == epoch]]
  return _gather(tokens, starts, seq_len)


def calibration_windows(
  tokens: Int[np.ndarray, ' n'], *, seed: int, count: int, seq_len: int
) -> Int32[np.ndarray, 'W T']:
  """`count` random windows that do not overlap, a function of the seed alone.

  A larger count extends a smaller one: the first windows are the same.

  Raises:
    UserError: the text has fewer than `count * seq_len` tokens, or seed < 0.
  """
  assert count > 0, count
  _check(tokens, seq_len)
  available = tokens.size // seq_len
  if count > available:
    raise config.UserError(
      f'the text has {tokens.size} tokens, {available} windows of {seq_len}; '
      f'{count} were asked for: give a longer text, or fewer or shorter windows'
    )
  starts = _shuffled_starts(
    tokens.size, seq_len, available, key=(_CALIBRATION_STREAM, seed)
  )
  return _gather(tokens, starts[:count], seq_len)


def eval_windows(
  tokens: Int[np.ndarray, ' n'],
  *,
  seq_len: int,
  max_windows: int = 0,
  bos_id: int | None = None,
  tail: bool = False,
) -> Windows:
  """The text cut into windows in order, none overlapping: GPTQ's protocol.

  Args:
    tokens: the text.
    seq_len: T.
    max_windows: keep only so many; 0 keeps all.
    bos_id: put in front of each window, which then holds T - 1 tokens of text.
    tail: keep the shorter window at the end, if it predicts anything (two
      tokens or more, BOS included). GPTQ drops it.

  Raises:
    UserError: the text gives no window.
  """
  assert max_windows >= 0, max_windows
  prefix = 0 if bos_id is None else 1
  stride = seq_len - prefix
  assert stride > 0, seq_len
  size = tokens.size
  lengths = [stride] * (size // stride)
  if tail and size % stride + prefix >= 2:
    lengths.append(size % stride)
  if max_windows:
    lengths = lengths[:max_windows]
  if not lengths:
    need = 2 - prefix if tail else stride
    raise config.UserError(
      f'the text has {size} tokens, fewer than the {need} of one window: give '
      'a longer text' + ('' if tail else ', or shorter windows')
    )
  windows = np.zeros((len(lengths), seq_len), np.int32)
  windows[:, :prefix] = bos_id or 0
  for i, length in enumerate(lengths):
    start = i * stride
    windows[i, prefix : prefix + length] = tokens[start : start + length]
  return Windows(windows, np.array(lengths, np.int32) + np.int32(prefix))


def _check(tokens: np.ndarray, seq_len: int) -> None:
  assert tokens.ndim == 1, tokens.shape
  assert seq_len > 0, seq_len
  if tokens.size < seq_len:
    raise config.UserError(
      f'the text has {tokens.size} tokens, fewer than one window of {seq_len}: '
      'give a longer text, or shorter windows'
    )


def _shuffled_starts(
  size: int, seq_len: int, count: int, *, key: tuple[int, ...]
) -> Int[np.ndarray, ' count']:
  """Where `count` adjacent windows start, shuffled; their phase is random too.

  Only raw words of the bit generator are used: NumPy keeps those the same from
  version to version, and does not promise it for `permutation`.
  """
  assert count * seq_len <= size, (count, seq_len, size)
  if min(key) < 0:
    raise config.UserError(f'--seed={key[1]}: expected 0 or more')
  seed = np.random.SeedSequence(key)
  words = np.random.Philox(seed).random_raw(count + 1)
  phases = min(seq_len, size - count * seq_len + 1)
  phase = int(words[0] % np.uint64(phases))
  return phase + np.argsort(words[1:], kind='stable') * seq_len


def _gather(
  tokens: np.ndarray, starts: np.ndarray, seq_len: int
) -> Int32[np.ndarray, 'B T']:
  return tokens[starts[:, None] + np.arange(seq_len)].astype(np.int32)
