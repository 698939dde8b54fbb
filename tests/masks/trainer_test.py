"""Training learns, keeps to the budget, resumes to the bit, stops on NaN."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config
from toga_jax.masks import calibration, harden, prior, space, trainer

QUANT = config.QuantConfig(
  low_bits=2, high_bits=8, act_low_bits=4, act_high_bits=8
)
SEARCH = config.SearchConfig(
  kind='joint',
  budget=0.2,
  start='cold',
  steps=6,
  seq_len=16,
  checkpoint_every=2,
  channel_multiple=4,
  prune_heads=True,
)


@pytest.fixture(scope='module')
def tokens():
  return np.asarray(tiny.tokens(5, 700))


def _train(weights, cfg, tokens, workdir, search=SEARCH):
  stats = calibration.activation_rms(weights, cfg, tokens[:64].reshape(4, 16))
  start = prior.make(stats, cfg=cfg, quant=QUANT, search=search)
  workdir.mkdir(exist_ok=True)
  return trainer.train(
    weights, start, tokens, workdir, cfg=cfg, quant=QUANT, search=search
  )


def test_interrupted_training_resumes_to_the_bit(
  cfg, weights, tokens, tmp_path, monkeypatch
):
  straight = _train(weights, cfg, tokens, tmp_path / 'straight')

  class Killed(BaseException):
    pass

  sample = trainer.batches.sample_batch

  def dies(*args, step, **kwargs):
    if step == 5:
      raise Killed
    return sample(*args, step=step, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(trainer.batches, 'sample_batch', dies)
    with pytest.raises(Killed):
      _train(weights, cfg, tokens, tmp_path / 'killed')
  asked = []

  def counts(*args, step, **kwargs):
    asked.append(step)
    return sample(*args, step=step, **kwargs)

  monkeypatch.setattr(trainer.batches, 'sample_batch', counts)
  resumed = _train(weights, cfg, tokens, tmp_path / 'killed')
  assert asked == [4, 5]  # from the checkpoint of step 4, no replay
  jax.tree.map(np.testing.assert_array_equal, straight, resumed)
  logs = [
    (tmp_path / run / 'metrics.jsonl').read_text()
    for run in ('straight', 'killed')
  ]
  assert logs[0] == logs[1]
  assert [json.loads(x)['step'] for x in logs[0].splitlines()] == [*range(6)]


def test_search_closes_in_on_the_budget_and_hardens_on_it(
  cfg, weights, tokens, tmp_path
):
  search = dataclasses.replace(
    SEARCH, steps=100, checkpoint_every=100, learning_rate=1e-2
  )
  logits = _train(weights, cfg, tokens, tmp_path, search)
  masks = trainer.deterministic_masks(cfg, logits, search)
  share = budget.linear_budget(cfg, QUANT, *space.counts(cfg, masks))
  assert float(share) == pytest.approx(0.2, rel=0.05)
  keep, salient, _ = harden.harden(
    jax.tree.map(np.asarray, logits), cfg=cfg, quant=QUANT, search=search
  )
  hard = budget.linear_budget(
    cfg,
    QUANT,
    {g: m.sum(-1) for g, m in keep.items()},
    {g: m.sum(-1) for g, m in salient.items()},
  )
  assert 0.18 < hard <= 0.2
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  noise = [json.loads(x)['noise'] for x in lines]
  assert noise[0] == 1
  assert noise[70:] == [0] * 30  # fades over 70 % of the steps


def test_non_finite_loss_stops_with_quantity_and_step(
  cfg, weights, tokens, tmp_path
):
  broken = weights.replace(final_norm=weights.final_norm * jnp.nan)
  with pytest.raises(FloatingPointError, match='step 0: ce is nan'):
    _train(broken, cfg, tokens, tmp_path)


def test_full_disk_while_checkpointing_is_an_oserror(
  cfg, weights, tokens, tmp_path, monkeypatch
):
  def full(*args, **kwargs):
    # What orbax 0.12 raised on a full tmpfs.
    raise ValueError('RESOURCE_EXHAUSTED: Error writing "a" in OCDBT database')

  monkeypatch.setattr(trainer.ocp.CheckpointManager, 'save', full)
  with pytest.raises(OSError, match='No space left') as caught:
    _train(weights, cfg, tokens, tmp_path)
  assert caught.value.filename == str(tmp_path / 'state')


def test_checkpoint_that_will_not_fit_is_not_begun(
  cfg, weights, tokens, tmp_path, monkeypatch
):
  usage = trainer.shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(trainer.shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(OSError, match='No space left on device, a checkpoint'):
    _train(weights, cfg, tokens, tmp_path)
  assert not any((tmp_path / 'state').iterdir())


def test_weights_get_no_gradient_and_do_not_change(cfg, weights):
  search = SEARCH
  state = trainer.init_state(cfg, search)
  start = prior.make(None, cfg=cfg, quant=QUANT, search=search)
  before = jax.tree.map(np.array, weights)
  theta = jax.tree.map(np.array, state.theta)
  state, _ = trainer.train_step(
    state,
    weights,
    start,
    tiny.tokens(0, 1, 16),
    cfg=cfg,
    quant=QUANT,
    search=search,
  )
  jax.tree.map(np.testing.assert_array_equal, before, weights)
  moved = jax.tree.map(
    lambda a, b: bool(np.any(a != np.asarray(b))), theta, state.theta
  )
  assert all(jax.tree.leaves(moved))
