"""What every input format offers: a config, named tensors, a tokenizer."""

import abc
import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from toga_jax import config
from toga_jax.data import tokenizer as tokenizer_lib

_HEAD_BYTES = 1024  # of each tensor, for the fingerprint


class Checkpoint(abc.ABC):
  """A model on disk, read one tensor at a time under Hugging Face names.

  Attributes:
    path: the file or folder it was opened from.
    raw_config: config.json as parsed, or what it would say.
    config: the same, checked.
  """

  path: pathlib.Path
  raw_config: dict[str, Any]
  config: config.ModelConfig

  @abc.abstractmethod
  def names(self) -> list[str]:
    """All tensor names, sorted. One the name table lacks keeps its own."""

  @abc.abstractmethod
  def shape(self, name: str) -> tuple[int, ...]:
    """The shape `read(name)` will have, from the header alone."""

  @abc.abstractmethod
  def read(self, name: str) -> np.ndarray:
    """One tensor, [out, in] for linears, in a float type of its own choice.

    Raises:
      config.UserError: its type on disk is not one that holds plain weights.
    """

  @abc.abstractmethod
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """The model's tokenizer, with the config's BOS and EOS ids."""

  @abc.abstractmethod
  def _head(self, name: str, num_bytes: int) -> bytes:
    """The first bytes of a tensor as stored (all of a shorter one)."""

  def fingerprint(self) -> str:
    """A sha256 that tells one model from another without reading it all.

    Over the checked config and each tensor's name, shape and first KiB: a
    renamed folder keeps it, a fine-tuned or requantized model does not.
    """
    digest = hashlib.sha256()

    def add(item: Any) -> None:
      digest.update(json.dumps(item, sort_keys=True).encode() + b'\n')

    add(dataclasses.asdict(self.config))
    for name in self.names():
      add([name, self.shape(name)])
      digest.update(self._head(name, _HEAD_BYTES))
    return digest.hexdigest()


def read_bytes(path: pathlib.Path, offset: int, count: int) -> np.ndarray:
  """`count` bytes at `offset` as uint8.

  Read, not mapped: a map held too long counts as this process's memory, and
  a file cut short under a map kills the process instead of raising.
  """
  return np.fromfile(path, np.uint8, count, offset=offset)


def check_not_lfs_pointer(path: pathlib.Path) -> None:
  """Raises UserError when git fetched the pointer and not the file."""
  with path.open('rb') as f:
    if f.read(23) == b'version https://git-lfs':
      raise config.UserError(
        f'{path} is a Git LFS pointer, not the file itself; fetch it with: '
        'git lfs pull'
      )
