"""Reads a Hugging Face folder: config.json, *.safetensors, tokenizer.json.

Only data is read. Code that a folder carries (`auto_map`) is ignored, pickles
are refused.
"""

import dataclasses
import json
import math
import os
import pathlib
import re
from typing import Any

import ml_dtypes
import numpy as np

from toga_jax import config
from toga_jax.ckpt import checkpoint
from toga_jax.data import tokenizer as tokenizer_lib

_INDEX = 'model.safetensors.index.json'
_PICKLES = ('*.bin', '*.pt', '*.pth')

# Safetensors' name -> the type NumPy reads it as; only plain floats.
_FLOATS = {
  'F64': np.dtype(np.float64),
  'F32': np.dtype(np.float32),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where one tensor lies."""

  file: pathlib.Path
  dtype: str
  shape: tuple[int, ...]
  offset: int  # from the start of the file
  num_bytes: int


class HFCheckpoint(checkpoint.Checkpoint):
  """A folder as `save_pretrained` writes it, sharded or not.

  Args:
    folder: holds config.json and *.safetensors.

  Raises:
    config.UserError: something is missing, damaged or not supported.
  """

  def __init__(self, folder: str | os.PathLike[str]):
    self.path = pathlib.Path(folder)
    if not self.path.is_dir():
      raise config.UserError(f'{self.path}: no such folder')
    if not (self.path / 'config.json').is_file():
      raise config.UserError(
        f'{self.path} has no config.json{_hint(self.path)}'
      )
    self.raw_config = _read_json(self.path / 'config.json')
    quantized = self.raw_config.get('quantization_config')
    if quantized:
      method = quantized.get('quant_method', 'unknown')
      raise config.UserError(
        f'{self.path} is quantized already (quant_method {method}); give the '
        'unquantized model'
      )
    self.config = config.ModelConfig.from_hf(self.raw_config)
    self._entries = _index_tensors(self.path)

  def names(self) -> list[str]:
    """See base class."""
    return sorted(self._entries)

  def shape(self, name: str) -> tuple[int, ...]:
    """See base class."""
    return self._entries[name].shape

  def read(self, name: str) -> np.ndarray:
    """See base class."""
    entry = self._entries[name]
    if entry.dtype not in _FLOATS:
      raise config.UserError(
        f'tensor {name} in {entry.file} is stored as {entry.dtype}; expected '
        f'one of {", ".join(_FLOATS)}'
      )
    data = checkpoint.read_bytes(entry.file, entry.offset, entry.num_bytes)
    return data.view(_FLOATS[entry.dtype]).reshape(entry.shape)

  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """See base class."""
    return tokenizer_lib.from_file(
      self.path / 'tokenizer.json', self.config.bos_id, self.config.eos_ids
    )

  def _head(self, name: str, num_bytes: int) -> bytes:
    entry = self._entries[name]
    count = min(num_bytes, entry.num_bytes)
    return checkpoint.read_bytes(entry.file, entry.offset, count).tobytes()


def _hint(folder: pathlib.Path) -> str:
  """What to do with a folder that holds a GGUF file instead."""
  found = sorted(folder.glob('*.gguf'))
  return f'; to read the GGUF file in it, give {found[0]}' if found else ''


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as e:  # not JSON, or not UTF-8
    raise config.UserError(f'{path} is not JSON: {e}') from e
  if not isinstance(value, dict):
    raise config.UserError(f'{path}: expected a JSON object')
  return value


def _index_tensors(folder: pathlib.Path) -> dict[str, _Entry]:
  """Tensor name -> where it lies, over all shards."""
  entries: dict[str, _Entry] = {}
  for file in _shards(folder):
    for name, entry in _read_header(file).items():
      if name in entries:
        raise config.UserError(
          f'tensor {name} is in both {entries[name].file.name} and '
          f'{file.name} of {folder}'
        )
      entries[name] = entry
  return entries


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """The safetensors files that make up the model, all of them present."""
  index = folder / _INDEX
  if index.is_file():
    # Other *.safetensors are then other copies (Mistral's `consolidated`).
    weight_map = _read_json(index).get('weight_map')
    if not isinstance(weight_map, dict) or not weight_map:
      raise config.UserError(f'{index} has no weight_map')
    files = [folder / str(shard) for shard in set(weight_map.values())]
  else:
    files = list(folder.glob('*.safetensors'))
    for file in list(files):
      part = re.fullmatch(r'(.*)-(\d+)-of-(\d+)\.safetensors', file.name)
      if part:
        stem, width = part[1], len(part[2])
        files += [
          folder / f'{stem}-{i:0{width}}-of-{part[3]}.safetensors'
          for i in range(1, int(part[3]) + 1)
        ]
  files = sorted(set(files))
  for file in files:
    if not file.is_file():
      raise config.UserError(f'shard {file.name} is missing in {folder}')
  if files:
    return files
  pickles = sorted(p.name for ext in _PICKLES for p in folder.glob(ext))
  if not pickles:
    raise config.UserError(f'{folder} has no *.safetensors{_hint(folder)}')
  raise config.UserError(
    f'{folder} has only pickled weights ({pickles[0]}), which can run code '
    'when read and are refused; convert them where you trust them: python -c '
    '"import transformers as t; t.AutoModelForCausalLM.from_pretrained('
    f"'{folder}', dtype='auto').save_pretrained('NEW_FOLDER')\""
  )


def _read_header(file: pathlib.Path) -> dict[str, _Entry]:
  """Tensor name -> place, from a safetensors file checked against its size.

  The format: header length (uint64, little-endian), a JSON header of
  {name: {dtype, shape, data_offsets}}, then the data, offsets from its start.
  """
  checkpoint.check_not_lfs_pointer(file)
  file_bytes = file.stat().st_size
  with file.open('rb') as f:
    header_bytes = int.from_bytes(f.read(8), 'little')
    start = 8 + header_bytes
    if start > file_bytes or header_bytes == 0:
      raise config.UserError(
        f'{file} is truncated or not a safetensors file: {file_bytes} bytes, '
        f'its header alone should take {header_bytes}'
      )
    text = f.read(header_bytes)
  try:
    header = json.loads(text)
    header.pop('__metadata__', None)
    entries = {
      name: _Entry(
        file=file,
        dtype=raw['dtype'],
        shape=tuple(raw['shape']),
        offset=start + raw['data_offsets'][0],
        num_bytes=raw['data_offsets'][1] - raw['data_offsets'][0],
      )
      for name, raw in header.items()
    }
  except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
    raise config.UserError(
      f'{file} is damaged: its header is not a safetensors header'
    ) from e
  _check_extents(file, entries, start, file_bytes)
  return entries


def _check_extents(
  file: pathlib.Path, entries: dict[str, _Entry], start: int, file_bytes: int
) -> None:
  """Raises UserError unless every tensor lies in the file at its full size."""
  for name, entry in entries.items():
    dtype = _FLOATS.get(entry.dtype)
    needed = dtype and math.prod(entry.shape) * dtype.itemsize
    inside = start <= entry.offset and entry.num_bytes >= 0
    if not inside or (dtype and needed != entry.num_bytes):
      raise config.UserError(
        f'{file} is damaged: tensor {name} of shape {entry.shape} and type '
        f'{entry.dtype} takes {entry.num_bytes} bytes'
      )
  end = max((e.offset + e.num_bytes for e in entries.values()), default=start)
  if end > file_bytes:
    raise config.UserError(
      f'{file} is truncated: {file_bytes} bytes, its tensors end at {end}'
    )
