"""Reads a GGUF file: config, tensors under HF names, tokenizer."""

import dataclasses
import os
import pathlib

import gguf
import ml_dtypes
import numpy as np

from toga_jax import config
from toga_jax.ckpt import checkpoint, gguf_config, names
from toga_jax.data import tokenizer as tokenizer_lib

_Type = gguf.GGMLQuantizationType

# Stored as they are; everything in _PACKED is dequantized to float32.
_FLOATS = {
  _Type.F64: np.dtype(np.float64),
  _Type.F32: np.dtype(np.float32),
  _Type.F16: np.dtype(np.float16),
  _Type.BF16: np.dtype(ml_dtypes.bfloat16),
}
_PACKED = {
  *(_Type.Q4_0, _Type.Q4_1, _Type.Q5_0, _Type.Q5_1, _Type.Q8_0),
  *(_Type.Q2_K, _Type.Q3_K, _Type.Q4_K, _Type.Q5_K, _Type.Q6_K),
}


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where one tensor lies, and how."""

  gguf_name: str
  kind: gguf.GGMLQuantizationType
  shape: tuple[int, ...]  # slowest dimension first; GGUF lists the reverse
  offset: int
  num_bytes: int


class GGUFCheckpoint(checkpoint.Checkpoint):
  """One GGUF file of the Llama family, as llama.cpp's converter writes it.

  Args:
    path: the file.

  Raises:
    config.UserError: missing, damaged, or of an architecture, tensor type or
      rope scaling that is not supported.
  """

  def __init__(self, path: str | os.PathLike[str]):
    self.path = pathlib.Path(path)
    reader = _open(self.path)
    self._metadata = {k: f.contents() for k, f in reader.fields.items()}
    self._entries: dict[str, _Entry] = {}  # by HF name
    rope_factors = None
    for tensor in reader.tensors:
      if tensor.name == gguf_config.ROPE_FACTORS:
        rope_factors = np.array(tensor.data, np.float32)
        continue
      if tensor.tensor_type not in _FLOATS.keys() | _PACKED:
        raise config.UserError(
          f'{self.path}: tensor {tensor.name} has type '
          f'{tensor.tensor_type.name}; supported: '
          f'{", ".join(t.name for t in sorted(_FLOATS.keys() | _PACKED))}'
        )
      known = names.from_gguf(tensor.name)
      self._entries[known[1] if known else tensor.name] = _Entry(
        gguf_name=tensor.name,
        kind=tensor.tensor_type,
        shape=tuple(int(n) for n in reversed(tensor.shape)),
        offset=tensor.data_offset,
        num_bytes=tensor.n_bytes,
      )
    shapes = {e.gguf_name: e.shape for e in self._entries.values()}
    self.raw_config = gguf_config.raw_config(
      self.path, self._metadata, shapes, rope_factors
    )
    self.config = config.ModelConfig.from_hf(self.raw_config)

  def names(self) -> list[str]:
    """See base class."""
    return sorted(self._entries)

  def shape(self, name: str) -> tuple[int, ...]:
    """See base class."""
    return self._entries[name].shape

  def read(self, name: str) -> np.ndarray:
    """See base class. Packed types come as float32."""
    entry = self._entries[name]
    data = checkpoint.read_bytes(self.path, entry.offset, entry.num_bytes)
    if entry.kind in _FLOATS:
      data = data.view(_FLOATS[entry.kind]).reshape(entry.shape)
    else:
      shape = gguf.quants.quant_shape_to_byte_shape(entry.shape, entry.kind)
      data = gguf.quants.dequantize(data.reshape(shape), entry.kind)
    if self._metadata['general.architecture'] != 'llama':
      return data
    field = (names.from_gguf(entry.gguf_name) or ('',))[0]
    if field in ('q', 'q_bias'):
      return unpermute_rows(data, self.config.num_heads)
    if field in ('k', 'k_bias'):
      return unpermute_rows(data, self.config.num_kv_heads)
    return data

  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """See base class. Built from the vocabulary in the file."""
    meta = {
      k.removeprefix('tokenizer.ggml.'): v for k, v in self._metadata.items()
    }
    kind = meta.get('model')
    known = {'gpt2': ('merges',), 'llama': ('scores',)}
    if kind not in known:
      raise config.UserError(
        f'{self.path}: tokenizer {kind!r} is not supported; known: '
        f'{", ".join(known)}'
      )
    for key in ('tokens', *known[kind]):
      if key not in meta:
        raise config.UserError(f'{self.path} has no tokenizer.ggml.{key}')
    ids = {'bos_id': self.config.bos_id, 'eos_ids': self.config.eos_ids}
    types = meta.get('token_type')
    if kind == 'gpt2':
      return tokenizer_lib.from_bpe(
        meta['tokens'], meta['merges'], types, meta.get('pre', 'default'), **ids
      )
    return tokenizer_lib.from_spm(
      meta['tokens'],
      meta['scores'],
      types,
      add_space_prefix=meta.get('add_space_prefix', True),
      **ids,
    )

  def _head(self, name: str, num_bytes: int) -> bytes:
    entry = self._entries[name]
    count = min(num_bytes, entry.num_bytes)
    return checkpoint.read_bytes(self.path, entry.offset, count).tobytes()


class _Reader(gguf.GGUFReader):
  """GGUFReader over a plain view of its memory map.

  It slices the map once per metadata element; slices of np.memmap are objects
  with state of their own, which makes a large vocabulary take 2.5 times as
  long.
  """

  @property
  def data(self) -> np.ndarray:
    return self._data

  @data.setter
  def data(self, value: np.ndarray) -> None:
    self._data = np.asarray(value)


def _open(path: pathlib.Path) -> gguf.GGUFReader:
  """The parsed header; UserError for what is not a whole GGUF file."""
  if not path.is_file():
    raise config.UserError(f'{path}: no such file')
  checkpoint.check_not_lfs_pointer(path)
  with path.open('rb') as f:
    if f.read(4) != b'GGUF':
      raise config.UserError(f'{path} is not a GGUF file')
  try:
    reader = _Reader(path)
  except (ValueError, KeyError, IndexError, OverflowError) as e:
    raise config.UserError(
      f'{path} is truncated, damaged, or newer than the installed gguf '
      f'package: {e}'
    ) from e
  if reader.byte_order != 'I':
    raise config.UserError(f'{path} has the other byte order of this machine')
  return reader


def unpermute_rows(x: np.ndarray, num_heads: int) -> np.ndarray:
  """Rows of q or k in HF's order, from llama.cpp's.

  HF rotates row j of a head with row j + H/2; llama.cpp's `llama` rotates
  neighbours, so its converter stores, in each head, rows
  0, H/2, 1, H/2 + 1, ... The qwen architectures are stored unchanged.

  Args:
    x: [num_heads * H, ...], a weight or a bias.
    num_heads: of q, or of k.
  """
  pairs = x.reshape(num_heads, -1, 2, *x.shape[1:])
  return pairs.swapaxes(1, 2).reshape(x.shape)
