import json
import struct

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models

from toga_jax import config
from toga_jax.ckpt import hf

NORM = 'model.norm.weight'


def fails(folder, *parts):
  """The one-line message with which opening `folder` fails."""
  with pytest.raises(config.UserError) as e:
    hf.HFCheckpoint(folder)
  message = str(e.value)
  assert '\n' not in message
  for part in parts:
    assert part in message
  return message


def edit_header(file, edit):
  """Rewrites a safetensors header with `edit(header)`; data stay."""
  raw = file.read_bytes()
  size = struct.unpack('<Q', raw[:8])[0]
  header = json.loads(raw[8 : 8 + size])
  edit(header)
  text = json.dumps(header).encode()
  file.write_bytes(struct.pack('<Q', len(text)) + text + raw[8 + size :])


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize(
  'dtype', [np.float32, np.float16, np.float64, ml_dtypes.bfloat16]
)
def test_reads_what_was_written(write_hf, tensors, shards, dtype):
  tensors = {n: x.astype(dtype) for n, x in tensors.items()}
  ckpt = hf.HFCheckpoint(write_hf(tensors, shards=shards))
  assert ckpt.names() == sorted(tensors)
  for name, x in tensors.items():
    assert ckpt.shape(name) == x.shape
    read = ckpt.read(name)
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, x)


def test_shards_without_an_index(write_hf, tensors):
  folder = write_hf(tensors, shards=3)
  (folder / 'model.safetensors.index.json').unlink()
  assert hf.HFCheckpoint(folder).names() == sorted(tensors)


def test_config_is_checked_and_kept(write_hf, tensors, raw_config):
  ckpt = hf.HFCheckpoint(write_hf(tensors))
  assert ckpt.raw_config == raw_config
  assert ckpt.config == config.ModelConfig.from_hf(raw_config)


def test_an_index_hides_other_copies(write_hf, tensors):
  folder = write_hf(tensors, shards=2)
  safetensors.numpy.save_file(tensors, folder / 'consolidated.safetensors')
  assert hf.HFCheckpoint(folder).names() == sorted(tensors)


def test_auto_map_is_ignored(write_hf, tensors, raw_config):
  raw = raw_config | {'auto_map': {'AutoModelForCausalLM': 'evil.Model'}}
  folder = write_hf(tensors, raw)
  (folder / 'evil.py').write_text('raise RuntimeError("was run")')
  np.testing.assert_array_equal(
    hf.HFCheckpoint(folder).read(NORM), tensors[NORM]
  )


def test_missing_folder(tmp_path):
  fails(tmp_path / 'nothing', 'nothing: no such folder')


def test_missing_config(tmp_path):
  fails(tmp_path, 'has no config.json')
  (tmp_path / 'some.gguf').touch()
  fails(tmp_path, 'has no config.json', 'give', 'some.gguf')


@pytest.mark.parametrize('text', ['{"a": ', '[1, 2]', b'\xff\xfe'])
def test_config_that_is_not_json(write_hf, tensors, text):
  folder = write_hf(tensors)
  text = text if isinstance(text, bytes) else text.encode()
  (folder / 'config.json').write_bytes(text)
  fails(folder, 'config.json', 'JSON')


def test_unknown_architecture(write_hf, tensors, raw_config):
  raw = raw_config | {'architectures': ['MambaForCausalLM']}
  fails(write_hf(tensors, raw), 'MambaForCausalLM')


def test_quantized_checkpoint(write_hf, tensors, raw_config):
  raw = raw_config | {'quantization_config': {'quant_method': 'gptq'}}
  fails(write_hf(tensors, raw), 'quantized already', 'gptq')


@pytest.mark.parametrize('indexed', [True, False])
def test_missing_shard(write_hf, tensors, indexed):
  folder = write_hf(tensors, shards=3)
  (folder / 'model-00002-of-00003.safetensors').unlink()
  if not indexed:
    (folder / 'model.safetensors.index.json').unlink()
  fails(folder, 'model-00002-of-00003.safetensors is missing')


def test_index_without_a_weight_map(write_hf, tensors):
  folder = write_hf(tensors, shards=2)
  (folder / 'model.safetensors.index.json').write_text('{}')
  fails(folder, 'index.json has no weight_map')


def test_no_weights(write_hf, tensors):
  folder = write_hf(tensors)
  (folder / 'model.safetensors').unlink()
  fails(folder, 'has no *.safetensors')


@pytest.mark.parametrize('file', ['pytorch_model.bin', 'model.pt'])
def test_pickles_are_refused(write_hf, tensors, file):
  folder = write_hf(tensors)
  (folder / 'model.safetensors').rename(folder / file)
  fails(folder, file, 'pickle', 'save_pretrained')


def test_a_pickle_beside_safetensors_does_not_matter(write_hf, tensors):
  folder = write_hf(tensors)
  (folder / 'pytorch_model.bin').touch()
  assert hf.HFCheckpoint(folder).names() == sorted(tensors)


def test_duplicate_tensors(write_hf, tensors):
  folder = write_hf(tensors)
  safetensors.numpy.save_file(
    {NORM: tensors[NORM]}, folder / 'more.safetensors'
  )
  fails(folder, NORM, 'model.safetensors', 'more.safetensors')


@pytest.mark.parametrize('kept', [0, 5, 8, 100, -1])
def test_truncated_file(write_hf, tensors, kept):
  file = write_hf(tensors) / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:kept])
  fails(file.parent, 'model.safetensors is truncated')


def test_git_lfs_pointer(write_hf, tensors):
  file = write_hf(tensors) / 'model.safetensors'
  file.write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\n')
  fails(file.parent, 'model.safetensors', 'git lfs pull')


@pytest.mark.parametrize('text', [b'{"a": 1}', b'[]', b'{"a": {}}', b'\xff{}'])
def test_damaged_header(write_hf, tensors, text):
  file = write_hf(tensors) / 'model.safetensors'
  file.write_bytes(struct.pack('<Q', len(text)) + text)
  fails(file.parent, 'model.safetensors is damaged')


@pytest.mark.parametrize(
  'change',
  [
    {'shape': [63]},
    {'shape': [64, 2]},
    {'dtype': 'BF16'},
    {'data_offsets': [8, 4]},
    {'data_offsets': [-256, 0]},
  ],
)
def test_header_that_contradicts_itself(write_hf, tensors, change):
  file = write_hf(tensors) / 'model.safetensors'
  edit_header(file, lambda header: header[NORM].update(change))
  fails(file.parent, 'model.safetensors is damaged', NORM)


def test_integer_weights_are_refused(write_hf, tensors):
  tensors[NORM] = np.arange(64, dtype=np.int32)
  ckpt = hf.HFCheckpoint(write_hf(tensors))
  with pytest.raises(config.UserError, match=f'{NORM} .* stored as I32'):
    ckpt.read(NORM)


def test_fingerprint_knows_the_model_and_not_the_place(write_hf, tensors):
  folder = write_hf(tensors)
  before = hf.HFCheckpoint(folder).fingerprint()
  moved = folder.rename(folder.parent / 'moved')
  assert hf.HFCheckpoint(moved).fingerprint() == before

  tensors[NORM][7] += 1
  safetensors.numpy.save_file(tensors, moved / 'model.safetensors')
  assert hf.HFCheckpoint(moved).fingerprint() != before


def test_fingerprint_reads_the_config(write_hf, tensors, raw_config):
  folder = write_hf(tensors)
  before = hf.HFCheckpoint(folder).fingerprint()
  raw = raw_config | {'rope_theta': 10000.0}
  (folder / 'config.json').write_text(json.dumps(raw))
  assert hf.HFCheckpoint(folder).fingerprint() != before


def test_tokenizer_of_the_folder(write_hf, tensors):
  folder = write_hf(tensors)
  ckpt = hf.HFCheckpoint(folder)
  with pytest.raises(config.UserError, match=r'tokenizer\.json is missing'):
    ckpt.tokenizer()
  vocab = {'a': 0, 'b': 1, 'ab': 2}
  backend = tokenizers.Tokenizer(models.BPE(vocab, [('a', 'b')]))
  backend.save(str(folder / 'tokenizer.json'))
  tokenizer = ckpt.tokenizer()
  assert tokenizer.encode('abb').tolist() == [2, 1]
  assert tokenizer.bos_id == 1
  assert tokenizer.eos_ids == (2,)
