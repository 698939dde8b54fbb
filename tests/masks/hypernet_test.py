import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax import config
from toga_jax.masks import hypernet, space

HIDDEN = 64


@pytest.fixture(scope='module')
def heads(cfg):
  search = config.SearchConfig(kind='joint', prune_heads=True)
  return space.decisions(cfg, search)


@pytest.fixture(scope='module')
def network(cfg, heads):
  return hypernet.HyperNetwork(num_layers=cfg.num_layers, heads=heads)


@pytest.fixture(scope='module')
def init(network):
  return jax.jit(lambda key: network.init(key)['params'])


@pytest.fixture(scope='module')
def theta(init):
  return init(jax.random.key(3))


@pytest.fixture(scope='module')
def moved(theta):
  """Parameters away from the start, no bias or scale at a round number."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: x + jnp.asarray(0.3 * rng.standard_normal(x.shape), x.dtype),
    theta,
  )


@pytest.fixture(scope='module')
def apply(network):
  return jax.jit(lambda theta: network.apply({'params': theta}))


def test_a_logit_for_every_decision(apply, theta, heads):
  logits = apply(theta)

  shapes = jax.tree.map(jnp.shape, logits)
  assert shapes == jax.tree.map(lambda n: (3, n), heads)
  assert {x.dtype for x in jax.tree.leaves(logits)} == {jnp.dtype('float32')}


def test_what_is_not_decided_has_no_head(cfg):
  decided = space.decisions(cfg, config.SearchConfig(kind='quant'))
  network = hypernet.HyperNetwork(num_layers=3, heads=decided)

  out, params = jax.eval_shape(network.init_with_output, jax.random.key(0))

  assert out['keep'] == {}
  assert {g: x.shape[1] for g, x in out['salient'].items()} == {
    'attn_in': 48,
    'attn_mid': 96,
    'mlp_in': 48,
    'mlp_mid': 80,
  }
  kernels = [k for k in params['params'] if k.endswith('_kernel')]
  assert len(kernels) == 4


def test_logits_start_near_zero_and_all_different(apply, theta):
  flat = np.concatenate([x.ravel() for x in jax.tree.leaves(apply(theta))])

  # A prior of one standard deviation of log sizes must outweigh them.
  assert np.abs(flat).max() < 0.5
  assert 0.01 < flat.std() < 0.15
  assert len(np.unique(flat)) > 0.99 * flat.size


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def gru(p, inputs):
  """States [S, hidden] of a GRU that starts at zero, step by step."""
  h, states = np.zeros(HIDDEN), []
  for x in inputs:
    r = sigmoid(x @ p['ir']['kernel'] + p['ir']['bias'] + h @ p['hr']['kernel'])
    z = sigmoid(x @ p['iz']['kernel'] + p['iz']['bias'] + h @ p['hz']['kernel'])
    memory = h @ p['hn']['kernel'] + p['hn']['bias']
    n = np.tanh(x @ p['in']['kernel'] + p['in']['bias'] + r * memory)
    h = (1 - z) * n + z * h
    states.append(h)
  return np.array(states)


def gelu(x):
  return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2


def test_logits_are_those_of_a_gru_in_numpy(apply, moved):
  logits = apply(moved)
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), moved)
  # attn_in of layer 0, attn_mid of layer 0, ..., mlp_out of layer 2.
  order = 'attn_in attn_mid attn_out mlp_in mlp_mid mlp_out'.split()
  codes = jax.random.normal(jax.random.key(0), (3 * len(order), 32))
  codes = np.asarray(codes, np.float64)
  forward = gru(p['GRUCell_0'], codes)
  backward = gru(p['GRUCell_1'], codes[::-1])[::-1]
  h = np.concatenate([forward, backward], axis=-1)
  h = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-6)
  h = gelu(h * p['LayerNorm_0']['scale'] + p['LayerNorm_0']['bias'])

  for decision, groups in logits.items():
    for group, ours in groups.items():
      for layer in range(3):
        x = h[layer * len(order) + order.index(group)]
        kernel = p[f'{decision}_{group}_kernel'][layer]
        expected = x @ kernel + p[f'{decision}_{group}_bias'][layer]
        # Eighteen recurrent steps in float32.
        np.testing.assert_allclose(ours[layer], expected, atol=1e-4)


def test_a_decision_hears_of_later_and_of_earlier_structures(network, moved):
  def logit_sum(theta, of_last):
    keep = network.apply({'params': theta})['keep']
    first, last = jnp.sum(keep['attn_in'][0]), jnp.sum(keep['mlp_out'][-1])
    return jnp.where(of_last, last, first)

  def recurrent(cell):
    return np.abs(cell['hn']['kernel']).max()

  slope = jax.jit(jax.grad(logit_sum))
  of_first, of_last = slope(moved, False), slope(moved, True)

  # The first structure hears only what comes after it, the last only what
  # came before.
  assert recurrent(of_first['GRUCell_0']) == 0
  assert recurrent(of_first['GRUCell_1']) > 1e-4
  assert recurrent(of_last['GRUCell_0']) > 1e-4
  assert recurrent(of_last['GRUCell_1']) == 0


def test_the_key_decides_the_start_and_nothing_else_does(init, apply, theta):
  same, other = init(jax.random.key(3)), init(jax.random.key(4))

  jax.tree.map(np.testing.assert_array_equal, apply(theta), apply(same))
  one, two = apply(theta)['salient'], apply(other)['salient']
  assert np.abs(one['mlp_mid'] - two['mlp_mid']).max() > 0.01
  # Layers start apart as well.
  assert np.abs(one['mlp_mid'][0] - one['mlp_mid'][1]).max() > 0.01
