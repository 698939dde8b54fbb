"""The perplexity protocol against a loop over windows."""

import jax
import numpy as np
import pytest

from tests import tiny
from toga_jax import config
from toga_jax.evals import perplexity
from toga_jax.model import llama


def _loop(weights, cfg, windows) -> float:
  """exp of the mean of -log p over tokens 1.. of every window."""
  losses = []
  for window in windows:
    logits = llama.logits(weights, cfg, jax.numpy.asarray(window[None]))
    logp = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
    losses += [-logp[t, window[t + 1]] for t in range(len(window) - 1)]
  return float(np.exp(np.mean(losses)))


@pytest.fixture(scope='module')
def text():
  return np.asarray(tiny.tokens(3, 59))


@pytest.mark.parametrize('batch_size', [1, 3, 8])
def test_non_overlapping_windows_tail_dropped(cfg, weights, text, batch_size):
  how = config.EvalConfig(seq_len=8, batch_size=batch_size)
  measured = perplexity.measure(weights, cfg, text, how)
  expected = _loop(weights, cfg, text[:56].reshape(7, 8))
  assert measured.perplexity == pytest.approx(expected, rel=1e-5)
  assert (measured.windows, measured.tokens) == (7, 7 * 7)


def test_tail_scores_the_last_shorter_window(cfg, weights, text):
  how = config.EvalConfig(seq_len=8, tail=True, batch_size=4)
  measured = perplexity.measure(weights, cfg, text, how)
  windows = [*text[:56].reshape(7, 8), text[56:]]
  assert measured.perplexity == pytest.approx(
    _loop(weights, cfg, windows), rel=1e-5
  )
  assert (measured.windows, measured.tokens) == (8, 7 * 7 + 2)


def test_max_windows_takes_the_first_ones(cfg, weights, text):
  how = config.EvalConfig(seq_len=8, max_windows=2)
  measured = perplexity.measure(weights, cfg, text, how)
  expected = _loop(weights, cfg, text[:16].reshape(2, 8))
  assert measured.perplexity == pytest.approx(expected, rel=1e-5)


def test_bos_takes_the_first_place_of_every_window(weights, text):
  cfg = tiny.config(bos_id=1)
  how = config.EvalConfig(seq_len=8, max_windows=2, bos=True)
  measured = perplexity.measure(weights, cfg, text, how)
  windows = np.insert(text[:14].reshape(2, 7), 0, 1, axis=1)
  expected = _loop(weights, cfg, windows)
  assert measured.perplexity == pytest.approx(expected, rel=1e-5)


def test_bos_without_a_bos_token_is_refused(cfg, weights, text):
  how = config.EvalConfig(seq_len=8, bos=True)
  with pytest.raises(config.UserError, match='no BOS'):
    perplexity.measure(weights, cfg, text, how)
