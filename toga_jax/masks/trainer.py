"""Trains the hypernetwork; resumes to the bit after any crash.

A step depends on (seed, step) and the saved state alone: batches and noise are
drawn by counter, so resuming replays nothing.
"""

import contextlib
import errno
import functools
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from jaxtyping import Array, Float, Int

from toga_jax import config, metrics
from toga_jax.data import batches
from toga_jax.masks import hypernet, objective, relax, space
from toga_jax.model import linear, params

Leaf = Any


@struct.dataclass
class SearchState:
  """All that changes during a search."""

  step: Leaf  # int32 []
  theta: Leaf  # the hypernetwork's parameters
  opt_state: Leaf


def _network(
  cfg: config.ModelConfig, search: config.SearchConfig
) -> hypernet.HyperNetwork:
  return hypernet.HyperNetwork(
    num_layers=cfg.num_layers, heads=space.decisions(cfg, search)
  )


def _optimizer(search: config.SearchConfig) -> optax.GradientTransformation:
  return optax.adamw(search.learning_rate, weight_decay=search.weight_decay)


def init_state(
  cfg: config.ModelConfig, search: config.SearchConfig
) -> SearchState:
  """The state before step 0, from the seed alone."""
  theta = _network(cfg, search).init(jax.random.key(search.seed))['params']
  return SearchState(
    step=jnp.zeros((), jnp.int32),
    theta=theta,
    opt_state=_optimizer(search).init(theta),
  )


@functools.partial(jax.jit, static_argnames=('cfg', 'search'))
def decision_logits(
  theta: dict,
  prior: space.Tree,
  *,
  cfg: config.ModelConfig,
  search: config.SearchConfig,
) -> space.Tree:
  """The logits of every decision: the network's output plus the prior."""
  out = _network(cfg, search).apply({'params': theta})
  return jax.tree.map(jnp.add, out, prior)


@functools.partial(
  jax.jit,
  static_argnames=('cfg', 'quant', 'search'),
  donate_argnames=('state',),
)
def train_step(
  state: SearchState,
  weights: params.LlamaParams,
  prior: space.Tree,
  tokens: Int[Array, 'B T'],
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> tuple[SearchState, dict[str, Float[Array, '']]]:
  """One step of AdamW on eq. (7); weights stay as they are."""
  key = jax.random.fold_in(jax.random.key(search.seed), state.step)
  noise = relax.noise_scale(state.step, search.steps, search.noise_fade)

  def loss_of(theta):
    logits = decision_logits(theta, prior, cfg=cfg, search=search)
    return objective.search_loss(
      logits, weights, tokens, key, noise, cfg=cfg, quant=quant, search=search
    )

  grad = jax.value_and_grad(loss_of, has_aux=True)
  (total, parts), slope = grad(state.theta)
  update, opt_state = _optimizer(search).update(
    slope, state.opt_state, state.theta
  )
  state = SearchState(
    step=state.step + 1,
    theta=optax.apply_updates(state.theta, update),
    opt_state=opt_state,
  )
  norm = optax.global_norm(slope)
  return state, {**parts, 'loss': total, 'grad_norm': norm, 'noise': noise}


def deterministic_masks(
  cfg: config.ModelConfig, logits: space.Tree, search: config.SearchConfig
) -> linear.ChannelMasks:
  """The masks the logits stand for without noise, before hardening."""
  return space.to_masks(
    cfg, relax.sample(logits, None, 0.0, search.temperature)
  )


@contextlib.contextmanager
def _manager(
  folder: pathlib.Path, every: int
) -> Iterator[ocp.CheckpointManager]:
  """Orbax's manager; a full disk is an OSError, as it is elsewhere."""
  options = ocp.CheckpointManagerOptions(
    max_to_keep=2, save_interval_steps=every, enable_async_checkpointing=True
  )
  try:
    with ocp.CheckpointManager(folder.absolute(), options=options) as manager:
      yield manager
      manager.wait_until_finished()
  except ValueError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    reason = os.strerror(errno.ENOSPC)
    raise OSError(errno.ENOSPC, reason, str(folder)) from e


def _check_space(folder: pathlib.Path, state: SearchState) -> None:
  """Raises OSError unless the disk has room for a checkpoint.

  Orbax finds out as well, but in many threads and with a page of tracebacks.
  """
  needed = sum(x.nbytes for x in jax.tree.leaves(state))
  if shutil.disk_usage(folder).free < needed:
    raise OSError(
      errno.ENOSPC,
      f'{os.strerror(errno.ENOSPC)}, a checkpoint takes {needed:,} bytes',
      str(folder),
    )


def _report(log: metrics.JsonLines, step: int, device_values: dict) -> dict:
  """Fetches one step's metrics, checks and logs them."""
  values = {k: float(v) for k, v in jax.device_get(device_values).items()}
  metrics.check_finite(values, step)
  log.write(step, values)
  return values


def train(
  weights: params.LlamaParams,
  prior: space.Tree,
  tokens: np.ndarray,
  workdir: pathlib.Path,
  *,
  cfg: config.ModelConfig,
  quant: config.QuantConfig,
  search: config.SearchConfig,
) -> space.Tree:
  """Runs the search from the newest checkpoint in `workdir/state` to its end.

  Args:
    weights: frozen.
    prior: logits the search starts from.
    tokens: [n] int32, the training text.
    workdir: gets `state/` (checkpoints) and `metrics.jsonl`.
    cfg: the model's shape.
    quant: bit widths seen by the loss.
    search: settings.

  Returns:
    The final logits, noise-free.

  Raises:
    FloatingPointError: a loss or gradient is not finite; names it and the step.
  """
  state = init_state(cfg, search)
  with _manager(workdir / 'state', search.checkpoint_every) as manager:
    if manager.latest_step() is not None:
      restore = ocp.args.StandardRestore(jax.eval_shape(lambda: state))
      state = manager.restore(manager.latest_step(), args=restore)
    first = int(state.step)
    if first:
      metrics.say(f'search: resuming at step {first} of {search.steps}')
    log = metrics.JsonLines(workdir / 'metrics.jsonl', first)
    per_step = search.batch_size * search.seq_len
    progress = metrics.Progress('search', search.steps, first, per_step)
    pending = None  # metrics are read one step late, so the device never waits
    for step in range(first, search.steps):
      batch = batches.sample_batch(
        tokens,
        seed=search.seed,
        step=step,
        batch_size=search.batch_size,
        seq_len=search.seq_len,
      )
      state, values = train_step(
        state, weights, prior, batch, cfg=cfg, quant=quant, search=search
      )
      if pending:
        _show(progress, search, step, _report(log, step - 1, pending))
      pending = values
      done = step + 1
      if done % search.checkpoint_every == 0 or done == search.steps:
        _show(progress, search, done, _report(log, step, pending))
        pending = None
        _check_space(workdir, state)
        manager.save(done, args=ocp.args.StandardSave(state), force=True)
    log.close()
  return decision_logits(state.theta, prior, cfg=cfg, search=search)


def _show(
  progress: metrics.Progress,
  search: config.SearchConfig,
  done: int,
  values: dict[str, float],
) -> None:
  progress.update(
    done,
    f'ce {values["ce"]:.3f}  budget {values["budget"]:.4f}/{search.budget:.4f}'
    f'  noise {values["noise"]:.2f}',
  )
