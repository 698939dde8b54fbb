"""Times the search step against the dense step it is built on.

  python -m toga_jax.bench --flagfile=configs/demo.cfg --bench=search

In one process: a dense forward and gradient-to-inputs step, the search step of
--search on the same tokens with the same rematerialisation, and this machine's
matmul rate. The ratio cannot fall below 4/3: three products per linear in the
dense step (forward, rematerialised forward, input gradient), one more for the
gradient of the masks.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from toga_jax import api, budget, cli, config, metrics
from toga_jax.data import batches
from toga_jax.masks import prior, trainer
from toga_jax.model import llama, loss, params

REPEATS = 7
LOWER_BOUND = 4 / 3


def main(settings: config.Settings) -> dict[str, Any]:
  """The verb; returns the keys of its JSON line."""
  model = api.load(settings.model, settings.dtype)
  tokens = api.encode(model, settings.data, 'train')
  return bench_search(model, tokens, settings.quant, settings.search)


def _interleaved(
  calls: dict[str, Callable[[], Any]], repeats: int
) -> dict[str, list[float]]:
  """Seconds of each call, taken in turn so that drift hits all alike."""
  for call in calls.values():
    jax.block_until_ready(call())
  seconds = {name: [] for name in calls}
  for _ in range(repeats):
    for name, call in calls.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      seconds[name].append(time.perf_counter() - start)
  return seconds


@jax.jit
def _square(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.dot(a, b)


def _dense_step(cfg: config.ModelConfig) -> Callable[..., jax.Array]:
  """jitted gradient of the dense loss with respect to the embedded inputs."""

  @jax.jit
  def step(weights: params.LlamaParams, tokens: jax.Array) -> jax.Array:
    def loss_of(embedded):
      hidden = llama.run_blocks(weights, cfg, embedded)
      return loss.mean_of(hidden, weights, tokens)

    return jax.grad(loss_of)(jnp.take(weights.embed, tokens, axis=0))

  return step


def bench_search(
  model: api.Model,
  tokens: np.ndarray,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> dict[str, Any]:
  """Times both steps; see the module docstring.

  Returns:
    `ratio_to_dense`, `tokens_per_s` of the search step, `matmul_fraction` (the
    dense step's rate as a share of the measured matmul rate), medians and
    spreads in ms, FLOPs, `peak_bytes` of the device or, on CPU, the process.
  """
  cfg = model.cfg
  batch = jnp.asarray(
    batches.sample_batch(
      tokens,
      seed=search.seed,
      step=0,
      batch_size=search.batch_size,
      seq_len=search.seq_len,
    )
  )
  seen_quant = api.search_quant(quant, search)
  stats = api.statistics(model, tokens, search)
  start = prior.make(stats, cfg=cfg, quant=seen_quant, search=search)
  state = trainer.init_state(cfg, search)
  dense_step = _dense_step(cfg)
  size = 2048
  square = jnp.ones((size, size), model.weights.embed.dtype)

  def search_step():
    nonlocal state
    state, values = trainer.train_step(
      state,
      model.weights,
      start,
      batch,
      cfg=cfg,
      quant=seen_quant,
      search=search,
    )
    return values

  metrics.say('bench: compiling')
  seconds = _interleaved(
    {
      'dense': lambda: dense_step(model.weights, batch),
      'search': search_step,
      'matmul': lambda: _square(square, square),
    },
    REPEATS,
  )
  median = {name: statistics.median(s) for name, s in seconds.items()}
  flops = _dense_flops(cfg, batch.shape)
  matmul_rate = 2 * size**3 / median['matmul']
  device = jax.devices()[0]
  memory = device.memory_stats() or {}
  return {
    'bench': 'search',
    'device': device.device_kind,
    'search': search.kind,
    'tokens': batch.size,
    'ratio_to_dense': statistics.median(
      s / d for s, d in zip(seconds['search'], seconds['dense'], strict=True)
    ),
    'ratio_lower_bound': LOWER_BOUND,
    'tokens_per_s': batch.size / median['search'],
    'matmul_fraction': flops / median['dense'] / matmul_rate,
    'matmul_gflops': matmul_rate / 1e9,
    'dense_gflop': flops / 1e9,
    **{
      f'{name}_ms': [
        round(1e3 * f(s), 2) for f in (min, statistics.median, max)
      ]
      for name, s in seconds.items()
    },
    'peak_bytes': memory.get('peak_bytes_in_use', metrics.peak_bytes()),
  }


def _dense_flops(cfg: config.ModelConfig, shape: tuple[int, int]) -> float:
  """FLOPs of the matrix products of a dense step.

  Three products per linear and for attention's two (forward, rematerialised,
  input gradient, which for attention is itself two products each), two for
  the head, whose gradient is taken in the forward pass. Causal attention is
  counted in full, as it is computed.
  """
  b, t = shape
  linears = 3 * 2 * b * t * cfg.num_layers * budget.dense_weights(cfg)
  scores = 2 * b * t * t * cfg.q_size * cfg.num_layers
  head = 2 * 2 * b * t * cfg.vocab_size * cfg.hidden_size
  return linears + 2 * scores * (2 + 2) + head


if __name__ == '__main__':
  cli.main(main, __doc__)
