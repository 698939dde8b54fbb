import dataclasses
import hashlib
import io
import json
import os
import time

import numpy as np
import pytest

from tests import tiny
from toga_jax import budget, config, spec

FINGERPRINT = '0123456789abcdef' * 4


def make(cfg=None, **changes):
  cfg = cfg or tiny.config()
  keep, salient = tiny.decision(cfg, 3, heads=True)
  fields = {
    'cfg': cfg,
    'quant': config.QuantConfig(low_bits=3, group_size=16),
    'keep': keep,
    'salient': salient,
    'fingerprint': FINGERPRINT,
    'made_by': {'rule': 'learned', 'budget': 0.28125, 'sparsity': None},
  }
  return spec.CompressionSpec(**(fields | changes))


def rewrite(folder, **changes):
  """Changes keys of a saved spec.json; None deletes one."""
  path = folder / 'spec.json'
  raw = json.loads(path.read_text())
  for key, value in changes.items():
    raw[key] = value
    if value is None:
      del raw[key]
  path.write_text(json.dumps(raw))


def replace_masks(folder, arrays):
  """Puts other masks in a saved spec, checksum included."""
  buffer = io.BytesIO()
  np.savez(buffer, **arrays)
  (folder / 'masks.npz').write_bytes(buffer.getvalue())
  rewrite(folder, masks_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())


@pytest.mark.parametrize(
  'changes',
  [
    {},
    {
      'rope_scaling': config.RopeScaling(kind='llama3', factor=32.0),
      'eos_ids': (5, 7),
      'bos_id': 3,
    },
  ],
  ids=['plain', 'scaled'],
)
def test_load_gives_back_what_was_saved(tmp_path, changes):
  made = make(tiny.config(**changes))

  assert made.save(tmp_path) == tmp_path / 'spec.json'
  loaded = spec.load(tmp_path)

  assert loaded.cfg == made.cfg
  assert hash(loaded.cfg) == hash(made.cfg)  # it is a static argument of jit
  assert loaded.quant == made.quant
  assert loaded.fingerprint == FINGERPRINT
  assert loaded.made_by == made.made_by
  assert set(loaded.keep) == set(budget.GROUPS)
  assert set(loaded.salient) == set(budget.INPUT_GROUPS)
  for ours, theirs in (
    (loaded.keep, made.keep),
    (loaded.salient, made.salient),
  ):
    for group, mask in theirs.items():
      assert ours[group].dtype == bool
      np.testing.assert_array_equal(ours[group], mask)


def test_the_same_decision_is_the_same_bytes(tmp_path, monkeypatch):
  folders = tmp_path / 'one', tmp_path / 'two'
  now = time.time()
  for years, folder in enumerate(folders):
    monkeypatch.setattr(time, 'time', lambda y=years: now + y * 3e7)
    folder.mkdir()
    make().save(folder)

  for name in ('spec.json', 'masks.npz'):
    one, two = ((folder / name).read_bytes() for folder in folders)
    assert one == two


def test_spec_json_says_what_it_comes_to(tmp_path):
  made = make()
  made.save(tmp_path)

  raw = json.loads((tmp_path / 'spec.json').read_text())

  assert raw['version'] == 1
  assert raw['size'] == dataclasses.asdict(made.size())
  assert raw['kept']['mlp_mid'] == [int(m.sum()) for m in made.keep['mlp_mid']]
  assert raw['salient']['attn_in'] == [
    int(m.sum()) for m in made.salient['attn_in']
  ]
  digest = hashlib.sha256((tmp_path / 'masks.npz').read_bytes()).hexdigest()
  assert raw['masks_sha256'] == digest


def test_size_counts_the_masks():
  made = make()

  size = made.size()

  kept = {g: np.array([row.sum() for row in m]) for g, m in made.keep.items()}
  more = {
    g: np.array([row.sum() for row in m]) for g, m in made.salient.items()
  }
  assert size == budget.exact_size(made.cfg, made.quant, kept, more)
  assert 0 < size.sparsity < 1


def test_a_spec_is_for_one_model_only():
  made = make()

  assert made.check_model(FINGERPRINT) is None
  with pytest.raises(config.UserError, match='made for model 0123456789ab, '):
    made.check_model('f' * 64)


def other(masks, group, change):
  return masks | {group: change(masks[group])}


@pytest.mark.parametrize(
  ('field', 'change', 'message'),
  [
    (
      'keep',
      lambda m: {g: v for g, v in m.items() if g != 'mlp_out'},
      r'keep has groups .*, expected .*mlp_out',
    ),
    (
      'salient',
      lambda m: m | {'attn_out': np.zeros((3, 48), bool)},
      r'salient has groups .*attn_out.*, expected',
    ),
    (
      'keep',
      lambda m: other(m, 'attn_mid', lambda v: v[:, ::48]),
      r'keep/attn_mid is bool\[3, 2\], expected bool\[3, 96\]',
    ),
    (
      'salient',
      lambda m: other(m, 'mlp_mid', lambda v: v[:2]),
      r'salient/mlp_mid is bool\[2, 80\], expected bool\[3, 80\]',
    ),
    (
      'keep',
      lambda m: other(m, 'mlp_in', lambda v: v.astype(np.float32)),
      r'keep/mlp_in is float32\[3, 48\], expected bool\[3, 48\]',
    ),
    (
      'salient',
      lambda m: other(m, 'attn_in', np.ones_like),
      'attn_in has pruned salient channels',
    ),
  ],
  ids='missing extra heads layers floats pruned'.split(),
)
def test_masks_that_are_no_decision_are_refused(field, change, message):
  masks = getattr(make(), field)

  with pytest.raises(config.UserError, match=message):
    make(**{field: change(masks)})


def test_a_folder_without_a_spec_says_what_to_do(tmp_path):
  with pytest.raises(config.UserError, match=r'no spec\.json in .* run the'):
    spec.load(tmp_path)


def test_a_spec_of_another_version_is_refused(tmp_path):
  make().save(tmp_path)
  rewrite(tmp_path, version=2)

  with pytest.raises(config.UserError, match='is version 2, this code reads 1'):
    spec.load(tmp_path)


def test_a_flipped_bit_of_the_masks_is_noticed(tmp_path):
  make().save(tmp_path)
  path = tmp_path / 'masks.npz'
  damaged = bytearray(path.read_bytes())
  damaged[len(damaged) // 2] ^= 1
  path.write_bytes(damaged)

  with pytest.raises(config.UserError, match=r'masks\.npz is damaged'):
    spec.load(tmp_path)


def test_missing_masks_are_named(tmp_path):
  make().save(tmp_path)
  (tmp_path / 'masks.npz').unlink()

  with pytest.raises(config.UserError, match=r'masks\.npz is missing beside'):
    spec.load(tmp_path)


@pytest.mark.parametrize(
  'content',
  [b'{"version": 1', b'[]', b'{}', b'\xff\xfe{}'],
  ids=['cut', 'list', 'empty', 'binary'],
)
def test_a_spec_json_of_other_content_is_refused(tmp_path, content):
  make().save(tmp_path)
  (tmp_path / 'spec.json').write_bytes(content)

  with pytest.raises(config.UserError, match='is not a spec of this version'):
    spec.load(tmp_path)


@pytest.mark.parametrize('key', ['model', 'quant', 'made_by', 'masks_sha256'])
def test_a_missing_key_is_named(tmp_path, key):
  make().save(tmp_path)
  rewrite(tmp_path, **{key: None})

  with pytest.raises(config.UserError, match=f'not a spec.*{key}'):
    spec.load(tmp_path)


def test_saved_masks_are_checked_as_made_ones_are(tmp_path):
  made = make()
  made.save(tmp_path)
  arrays = {f'keep/{g}': m for g, m in made.keep.items()}
  arrays |= {f'salient/{g}': m for g, m in made.salient.items()}
  replace_masks(tmp_path, arrays | {'keep/mlp_in': np.ones((3, 47), bool)})

  with pytest.raises(config.UserError, match=r'keep/mlp_in is bool\[3, 47\]'):
    spec.load(tmp_path)


def test_a_failing_write_leaves_the_old_file_and_no_other(
  tmp_path, monkeypatch
):
  path = tmp_path / 'spec.json'
  path.write_bytes(b'old')

  def full_disk(descriptor):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk)
  with pytest.raises(OSError, match='No space left'):
    spec.write_atomically(path, b'new')

  assert [p.name for p in tmp_path.iterdir()] == ['spec.json']
  assert path.read_bytes() == b'old'


def test_a_save_that_fails_half_way_leaves_no_spec(tmp_path, monkeypatch):
  synced = []

  def full_disk_the_second_time(descriptor):
    synced.append(descriptor)
    if len(synced) == 2:
      raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'fsync', full_disk_the_second_time)
  with pytest.raises(OSError, match='No space left'):
    make().save(tmp_path)

  assert [p.name for p in tmp_path.iterdir()] == ['masks.npz']


def test_an_atomic_write_replaces_and_returns_the_path(tmp_path):
  path = tmp_path / 'x.json'
  path.write_bytes(b'something longer')

  with path.open('rb') as reader:
    assert spec.write_atomically(path, b'new') == path
    # Who reads the old file meanwhile reads all of it.
    assert reader.read() == b'something longer'

  assert path.read_bytes() == b'new'
  assert [p.name for p in tmp_path.iterdir()] == ['x.json']
