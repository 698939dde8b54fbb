"""The packed checkpoint: sizes, checks, damage, crashes."""

import dataclasses
import errno
import json
import shutil

import jax
import numpy as np
import pytest

from tests import tiny
from toga_jax import api, config
from toga_jax import spec as spec_lib
from toga_jax.ckpt import store
from toga_jax.data import tokenizer

QUANT = config.QuantConfig(
  low_bits=4,
  high_bits=8,
  act_low_bits=4,
  act_high_bits=8,
  group_size=16,
  symmetric=False,
  embed_bits=6,
)
HOW = config.CompressConfig(windows=4, seq_len=16)
FINGERPRINT = 'f' * 64


@pytest.fixture(scope='module')
def model():
  cfg = tiny.config(num_layers=2, tie_embeddings=False)
  return api.Model(
    weights=tiny.weights(cfg),
    cfg=cfg,
    tokenizer=object.__new__(tokenizer.Tokenizer),
    fingerprint=FINGERPRINT,
  )


def spec_of(cfg, quant=QUANT):
  keep, salient = tiny.decision(cfg, 3, heads=True)
  return spec_lib.CompressionSpec(
    cfg=cfg,
    quant=quant,
    keep=keep,
    salient=salient,
    fingerprint=FINGERPRINT,
    made_by={'rule': 'test'},
  )


def text():
  return np.asarray(tiny.tokens(2, 400))


def compress(model, target, spec=None, how=HOW, **kwargs):
  spec = spec or spec_of(model.cfg)
  return api.compress_model(model, text(), spec, how, target, **kwargs)


@pytest.fixture(scope='module')
def whole(model, tmp_path_factory):
  """A finished packed model; tests that spoil it copy it."""
  target = tmp_path_factory.mktemp('run') / 'packed'
  compress(model, target)
  return target


@pytest.fixture
def copy(whole, tmp_path):
  shutil.copytree(whole, tmp_path / 'packed')
  return tmp_path / 'packed'


def die(*args):
  raise KeyboardInterrupt


def arrays(folder):
  weights, _ = store.load(folder)
  leaves, structure = jax.tree.flatten(weights)
  return [(a.dtype.name, a.shape, a.tobytes()) for a in leaves], structure


def test_what_is_loaded_is_what_was_counted(model, whole):
  weights, manifest = store.load(whole)
  size = spec_of(model.cfg).size()
  assert sum(a.nbytes for a in jax.tree.leaves(weights)) == size.total_bytes
  assert manifest.size() == size
  kinds = {a.dtype.name for a in jax.tree.leaves(weights)}
  assert kinds == {'int32', 'float16', 'bfloat16'}
  files = [p for p in whole.rglob('*') if p.is_file()]
  on_disk = sum(p.stat().st_size for p in files if p.name != 'manifest.json')
  assert manifest.disk_bytes == on_disk
  assert not whole.with_name('packed.partial').exists()


def test_bytes_on_disk_are_the_counted_ones_within_a_percent(tmp_path):
  """Metadata is some ten kB a block: it takes a larger model to be 1 %."""
  cfg = tiny.config(
    num_layers=1, hidden_size=480, intermediate_size=1920, vocab_size=3000
  )
  quant = config.QuantConfig(low_bits=16, high_bits=16, embed_bits=8)
  keep = {g: np.ones_like(m) for g, m in tiny.decision(cfg, 0)[0].items()}
  for group in ('mlp_in', 'mlp_mid', 'attn_out'):
    keep[group][:, ::3] = False
  spec = dataclasses.replace(
    spec_of(cfg, quant),
    keep=keep,
    salient={g: np.zeros_like(m) for g, m in spec_of(cfg).salient.items()},
  )
  big = api.Model(
    weights=tiny.weights(cfg),
    cfg=cfg,
    tokenizer=object.__new__(tokenizer.Tokenizer),
    fingerprint=FINGERPRINT,
  )
  manifest = api.compress_model(big, None, spec, HOW, tmp_path / 'packed')
  files = [p for p in tmp_path.rglob('*') if p.is_file()]
  on_disk = sum(p.stat().st_size for p in files)
  assert on_disk == pytest.approx(manifest.size().total_bytes, rel=0.01)


def test_second_call_finds_it_done(model, whole, capsys):
  before = arrays(whole)
  compress(model, whole)
  assert 'nothing to compress' in capsys.readouterr().err
  assert arrays(whole) == before


def test_other_settings_are_refused_unless_told_to_replace(model, copy):
  other = dataclasses.replace(HOW, gptq=False)
  before = arrays(copy)
  with pytest.raises(config.UserError, match='--gptq was True, now False'):
    compress(model, copy, how=other)
  assert arrays(copy) == before
  manifest = compress(model, copy, how=other, overwrite=True)
  assert manifest.identity['--gptq'] is False
  assert arrays(copy) != before
  assert [p.name for p in copy.parent.iterdir()] == ['packed']


@pytest.mark.parametrize('stop', [0, 1])
def test_a_run_stopped_at_a_block_ends_with_the_same_bits(
  model, whole, tmp_path, monkeypatch, capsys, stop
):
  target = tmp_path / 'packed'
  save = store.save_part

  def die_at_the_block(folder, name, part):
    if name == store.block_name(stop):
      (folder / f'{name}.tmp').mkdir()  # as a kill while writing leaves it
      raise KeyboardInterrupt
    save(folder, name, part)

  monkeypatch.setattr(store, 'save_part', die_at_the_block)
  with pytest.raises(KeyboardInterrupt):
    compress(model, target)
  assert not target.exists()
  monkeypatch.setattr(store, 'save_part', save)
  capsys.readouterr()
  compress(model, target)
  said = capsys.readouterr().err
  assert 'embeddings is there already' in said
  assert said.count('block_000 is there already') == stop
  assert arrays(target) == arrays(whole)
  assert [p.name for p in tmp_path.iterdir()] == ['packed']


def test_a_damaged_finished_block_is_made_again(
  model, whole, tmp_path, monkeypatch, capsys
):
  target = tmp_path / 'packed'
  finish = store.finish
  monkeypatch.setattr(store, 'finish', die)
  with pytest.raises(KeyboardInterrupt):
    compress(model, target)
  path = next((tmp_path / 'packed.partial' / 'block_001').rglob('d/*'))
  path.write_bytes(path.read_bytes()[:-1])
  monkeypatch.setattr(store, 'finish', finish)
  compress(model, target)
  assert 'block_001 is made again' in capsys.readouterr().err
  assert arrays(target) == arrays(whole)


def test_parts_of_another_run_are_not_used(model, tmp_path, monkeypatch):
  target = tmp_path / 'packed'
  monkeypatch.setattr(store, 'finish', die)
  with pytest.raises(KeyboardInterrupt):
    compress(model, target)
  part = tmp_path / 'packed.partial' / 'block_000' / 'part.json'
  before = part.stat().st_mtime_ns
  with pytest.raises(KeyboardInterrupt):
    compress(model, target, how=dataclasses.replace(HOW, gptq=False))
  assert part.stat().st_mtime_ns != before


def largest(folder):
  files = [p for p in folder.rglob('*') if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(bytes(data))


def truncate(path):
  path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize(
  ('spoil', 'says'),
  [
    (lambda p: p.unlink(), 'is missing'),
    (truncate, 'bytes, not the'),
    (flip, 'is damaged'),
  ],
  ids=['missing', 'truncated', 'flipped'],
)
@pytest.mark.parametrize('part', ['embeddings', 'block_001'])
def test_damage_is_refused_and_named(copy, part, spoil, says):
  path = largest(copy / part / 'arrays')
  spoil(path)
  with pytest.raises(config.UserError) as raised:
    store.load(copy)
  assert str(path) in str(raised.value)
  assert says in str(raised.value)


@pytest.mark.parametrize(
  ('name', 'spoil', 'says'),
  [
    ('manifest.json', lambda p: p.unlink(), 'manifest.json is missing'),
    ('manifest.json', truncate, 'manifest.json is damaged'),
    ('block_000/part.json', flip, 'part.json is damaged'),
    ('block_000/part.json', lambda p: p.unlink(), 'part.json is missing'),
    ('block_000', shutil.rmtree, 'part.json is missing'),
  ],
)
def test_damaged_descriptions_are_refused(copy, name, spoil, says):
  spoil(copy / name)
  with pytest.raises(config.UserError, match=says):
    store.load(copy)


def test_another_version_is_refused(copy):
  path = copy / 'manifest.json'
  raw = json.loads(path.read_text()) | {'version': 99}
  path.write_text(json.dumps(raw))
  with pytest.raises(config.UserError, match='version 99, this code reads 1'):
    store.load(copy)


def test_nothing_there_is_one_line(tmp_path):
  with pytest.raises(config.UserError, match='run compress first'):
    store.load(tmp_path / 'packed')


def test_a_disk_without_room_is_refused_first(model, tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(config.UserError, match=r'the disk has 0\.0 MB left'):
    compress(model, tmp_path / 'packed')
  assert not (tmp_path / 'packed').exists()


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, 'No space left on device'),
    ValueError('UNKNOWN: Failed to write: No space left on device'),
  ],
)
def test_a_disk_that_fills_up_is_one_line(model, tmp_path, monkeypatch, error):
  class Full:
    def __enter__(self):
      raise error

    def __exit__(self, *args):
      pass

  monkeypatch.setattr(store, '_checkpointer', Full)
  with pytest.raises(config.UserError, match='no space left on the disk'):
    compress(model, tmp_path / 'packed')
  assert not (tmp_path / 'packed').exists()


def test_a_spec_of_another_model_is_refused(model, tmp_path):
  spec = dataclasses.replace(spec_of(model.cfg), fingerprint='a' * 64)
  with pytest.raises(config.UserError, match='made for model aaaaaaaaaaaa'):
    compress(model, tmp_path / 'packed', spec)
  assert list(tmp_path.iterdir()) == []


def test_a_calibration_text_too_short_is_refused(model, tmp_path):
  how = dataclasses.replace(HOW, windows=100)
  with pytest.raises(
    config.UserError, match='25 windows of 16; 100 were asked'
  ):
    compress(model, tmp_path / 'packed', how=how)
  assert list(tmp_path.iterdir()) == []


def test_drift_of_eight_bits_is_small_and_of_two_is_not(model, tmp_path):
  measured = []
  for bits in (8, 2):
    quant = config.QuantConfig(low_bits=bits, high_bits=bits, embed_bits=8)
    spec = spec_of(model.cfg, quant)
    keep = {g: np.ones_like(m) for g, m in spec.keep.items()}
    salient = {g: np.zeros_like(m) for g, m in spec.salient.items()}
    spec = dataclasses.replace(spec, keep=keep, salient=salient)
    compress(model, tmp_path / str(bits), spec)
    packed = api.load_packed(tmp_path / str(bits))
    how = config.EvalConfig(max_windows=2, seq_len=40)
    measured.append(api.drift(model, packed, text(), how, 16))
  eight, two = measured
  assert eight.windows == 2
  assert 0 < eight.kl < 0.01 < two.kl
  assert eight.top1_agreement > 0.9 > two.top1_agreement
  assert max(eight.layer_error) < 0.05 < min(two.layer_error)
  assert len(two.layer_error) == model.cfg.num_layers
