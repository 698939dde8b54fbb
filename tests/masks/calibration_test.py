import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax import budget
from toga_jax.masks import calibration


def rms_norm(x, scale, eps):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps) * scale


def rope(x, theta):
  """x [T, H], one head: pairs (i, i + H/2) turned by position."""
  half = x.shape[1] // 2
  out = np.zeros_like(x)
  for t in range(x.shape[0]):
    for i in range(half):
      angle = t * theta ** (-2 * i / x.shape[1])
      a, b = x[t, i], x[t, i + half]
      out[t, i] = a * np.cos(angle) - b * np.sin(angle)
      out[t, i + half] = b * np.cos(angle) + a * np.sin(angle)
  return out


def attention(q, k, v):
  """[T, H] each, one head."""
  scores = q @ k.T / np.sqrt(q.shape[1])
  scores[np.triu_indices(len(q), 1)] = -np.inf
  p = np.exp(scores - scores.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True) @ v


def activations(cfg, weights, window):
  """group -> [L, T, width] of one window, in float64 loops over heads."""
  seen = {group: [] for group in budget.GROUPS}
  x = np.asarray(weights.embed, np.float64)[window]
  size, queries = cfg.head_dim, cfg.num_heads // cfg.num_kv_heads
  for layer in range(cfg.num_layers):
    w = {
      name: np.asarray(getattr(weights.layers, name), np.float64)[layer]
      for name in 'attn_norm q k v o mlp_norm gate up down'.split()
    }
    h = rms_norm(x, w['attn_norm'], cfg.rms_norm_eps)
    seen['attn_in'].append(h)
    heads = []
    for n in range(cfg.num_heads):
      own = slice(n * size, n * size + size)
      k = n // queries
      shared = slice(k * size, k * size + size)
      heads.append(
        attention(
          rope(h @ w['q'][:, own], cfg.rope_theta),
          rope(h @ w['k'][:, shared], cfg.rope_theta),
          h @ w['v'][:, shared],
        )
      )
    mid = np.concatenate(heads, -1)
    seen['attn_mid'].append(mid)
    seen['attn_out'].append(mid @ w['o'])
    x = x + seen['attn_out'][-1]
    h = rms_norm(x, w['mlp_norm'], cfg.rms_norm_eps)
    seen['mlp_in'].append(h)
    gate = h @ w['gate']
    mid = gate / (1 + np.exp(-gate)) * (h @ w['up'])
    seen['mlp_mid'].append(mid)
    seen['mlp_out'].append(mid @ w['down'])
    x = x + seen['mlp_out'][-1]
  return {group: np.array(found) for group, found in seen.items()}


@pytest.fixture(scope='module')
def windows():
  return np.asarray(tiny.tokens(1, 3, 7))


@pytest.fixture(scope='module')
def stats(cfg, weights, windows):
  return calibration.activation_rms(weights, cfg, windows)


@pytest.mark.parametrize('group', budget.GROUPS)
def test_sizes_are_those_of_a_numpy_forward(
  cfg, weights, windows, stats, group
):
  squares = [activations(cfg, weights, w)[group] ** 2 for w in windows]
  # Over all windows and tokens: [W, L, T, C] -> [L, C].
  expected = np.sqrt(np.mean(squares, axis=(0, 2)))

  assert stats[group].shape == (3, budget.group_widths(cfg)[group])
  assert stats[group].dtype == np.float32
  np.testing.assert_allclose(stats[group], expected, rtol=2e-4)


def test_windows_weigh_the_same_in_any_order(cfg, weights, windows, stats):
  again = calibration.activation_rms(weights, cfg, windows[::-1])
  one = calibration.activation_rms(weights, cfg, windows[:1])
  rest = calibration.activation_rms(weights, cfg, windows[1:])

  for group, size in stats.items():
    np.testing.assert_allclose(again[group], size, rtol=1e-5)
    pooled = np.sqrt((one[group] ** 2 + 2 * rest[group] ** 2) / 3)
    np.testing.assert_allclose(pooled, size, rtol=1e-5)


def test_bfloat16_weights_give_the_same_sizes_in_float32(
  cfg, weights, windows, stats
):
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights)

  rough = calibration.activation_rms(half, cfg, windows)

  for group, size in rough.items():
    assert size.dtype == np.float32
    # Three digits in each of some twenty operations.
    np.testing.assert_allclose(size, stats[group], rtol=0.1)
