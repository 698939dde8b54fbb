"""The packed model on disk: whole or not there, and checked when read.

  packed/
    manifest.json        what it is, how it was made, sha256 of each part.json
    embeddings/          embed, head unless tied, final_norm
    block_000/ ...       a block: packed linears, norms, indices
      part.json          how the arrays make up the part, sha256 of its files
      arrays/            orbax checkpoint, uncompressed: bytes are as counted

A part is written under another name and renamed; so is the whole. Parts of a
run that was cut short wait in `packed.partial/` for the next one.
"""

import dataclasses
import errno
import hashlib
import json
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from toga_jax import budget, config
from toga_jax import spec as spec_lib
from toga_jax.ckpt import encoding
from toga_jax.model import params

VERSION = 1
_MANIFEST, _PART, _IDENTITY = 'manifest.json', 'part.json', 'identity.json'
EMBEDDINGS = 'embeddings'
# What metadata may take beside the arrays, when asking for room on the disk.
_SPARE_BYTES = 4 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a packed model is and how it was made."""

  cfg: config.ModelConfig
  quant: config.QuantConfig
  kept: Mapping[str, list[int]]  # group -> [L]
  salient: Mapping[str, list[int]]  # input group -> [L]
  fingerprint: str  # of the dense model
  identity: Mapping[str, Any]  # what the result depends on
  parts: Mapping[str, str]  # name -> sha256 of its part.json
  disk_bytes: int  # of all files but the manifest

  def size(self) -> budget.Size:
    """What it comes to by the formula."""
    return budget.exact_size(
      self.cfg,
      self.quant,
      {g: np.asarray(n) for g, n in self.kept.items()},
      {g: np.asarray(n) for g, n in self.salient.items()},
    )

  def average_act_bits(self) -> float:
    """Activation bits averaged over the channels that linears read."""
    return budget.average_act_bits(
      self.quant,
      {g: np.asarray(n) for g, n in self.kept.items()},
      {g: np.asarray(n) for g, n in self.salient.items()},
    )


def block_name(layer: int) -> str:
  """The name of a block's part."""
  return f'block_{layer:03}'


def partial_folder(
  target: pathlib.Path, identity: Mapping[str, Any]
) -> pathlib.Path:
  """The folder to collect parts in: resumed, or emptied if it is another's."""
  folder = target.with_name(target.name + '.partial')
  text = json.dumps(identity, indent=1, sort_keys=True) + '\n'
  path = folder / _IDENTITY
  if folder.exists() and not (path.exists() and path.read_text() == text):
    shutil.rmtree(folder)
  folder.mkdir(parents=True, exist_ok=True)
  spec_lib.write_atomically(path, text.encode())
  return folder


def check_room(folder: pathlib.Path, needed_bytes: int) -> None:
  """Raises UserError when the disk cannot hold what is to be written."""
  free = shutil.disk_usage(folder).free
  if free < needed_bytes + _SPARE_BYTES:
    raise config.UserError(
      f'{folder}: the packed model takes {needed_bytes / 1e6:.1f} MB, the disk '
      f'has {free / 1e6:.1f} MB left'
    )


def save_part(folder: pathlib.Path, name: str, part: encoding.Part) -> None:
  """Writes one part; a part of that name is either whole or not there.

  Raises:
    UserError: the disk is full.
  """
  arrays, structure = encoding.encode(part)
  partial = folder / f'{name}.tmp'
  shutil.rmtree(partial, ignore_errors=True)
  partial.mkdir()
  try:
    with _checkpointer() as checkpointer:
      checkpointer.save(
        (partial / 'arrays').absolute(), args=ocp.args.PyTreeSave(arrays)
      )
    described = {'structure': structure, 'files': _digests(partial / 'arrays')}
    text = json.dumps(described, indent=1) + '\n'
    spec_lib.write_atomically(partial / _PART, text.encode())
  except (OSError, ValueError) as e:
    # The storage library wraps the system's error in a ValueError.
    full = 'No space left' in str(e) or 'RESOURCE_EXHAUSTED' in str(e)
    if full or getattr(e, 'errno', None) in (errno.ENOSPC, errno.EDQUOT):
      raise config.UserError(f'no space left on the disk of {folder}') from e
    raise
  shutil.rmtree(folder / name, ignore_errors=True)
  partial.rename(folder / name)


def load_part(folder: pathlib.Path, name: str) -> encoding.Part:
  """Reads a part after checking every byte of it.

  Raises:
    UserError: a file is missing, cut short or damaged; names it.
  """
  path = folder / name / _PART
  described = _read_json(path)
  _check(folder / name / 'arrays', described['files'])
  with _checkpointer() as checkpointer:
    arrays = checkpointer.restore((folder / name / 'arrays').absolute())
  return encoding.decode(arrays, described['structure'])


def finish(
  partial: pathlib.Path,
  target: pathlib.Path,
  spec: spec_lib.CompressionSpec,
  identity: Mapping[str, Any],
) -> Manifest:
  """Writes the manifest and gives the whole folder its name.

  An older packed model of that name is replaced.
  """
  names = [EMBEDDINGS, *map(block_name, range(spec.cfg.num_layers))]
  (partial / _IDENTITY).unlink(missing_ok=True)
  manifest = Manifest(
    cfg=spec.cfg,
    quant=spec.quant,
    kept={g: n.tolist() for g, n in spec.kept_counts().items()},
    salient={g: n.tolist() for g, n in spec.salient_counts().items()},
    fingerprint=spec.fingerprint,
    identity=identity,
    parts={name: _sha256(partial / name / _PART) for name in names},
    disk_bytes=sum(p.stat().st_size for p in _files(partial)),
  )
  described = {
    'version': VERSION,
    **dataclasses.asdict(manifest),
    'size': dataclasses.asdict(manifest.size()),
  }
  text = json.dumps(described, indent=1) + '\n'
  spec_lib.write_atomically(partial / _MANIFEST, text.encode())
  old = target.with_name(target.name + '.old')
  shutil.rmtree(old, ignore_errors=True)
  if target.exists():
    target.rename(old)
  partial.rename(target)
  shutil.rmtree(old, ignore_errors=True)
  return manifest


def read_manifest(folder: pathlib.Path) -> Manifest:
  """Reads packed/manifest.json.

  Raises:
    UserError: there is none, it is of another version, or damaged.
  """
  path = folder / _MANIFEST
  if not folder.exists():
    raise config.UserError(f'no packed model in {folder}; run compress first')
  raw = _read_json(path)
  if raw.get('version') != VERSION:
    raise config.UserError(
      f'{path} is version {raw.get("version")}, this code reads {VERSION}'
    )
  try:
    names = [f.name for f in dataclasses.fields(Manifest)]
    fields = {name: raw[name] for name in names}
    fields['cfg'] = spec_lib.model_config(raw['cfg'])
    fields['quant'] = config.QuantConfig(**raw['quant'])
  except (KeyError, TypeError) as e:
    raise config.UserError(f'{path} is damaged: {e}') from e
  return Manifest(**fields)


def load(folder: pathlib.Path) -> tuple[params.LlamaParams, Manifest]:
  """A packed model as NumPy arrays, every file checked.

  Raises:
    UserError: anything missing, cut short or damaged; names the file.
  """
  manifest = read_manifest(folder)
  for name, digest in manifest.parts.items():
    path = folder / name / _PART
    if not path.exists():
      raise config.UserError(f'{path} is missing; compress again')
    if _sha256(path) != digest:
      raise config.UserError(
        f'{path} is damaged: its checksum differs; compress again'
      )
  rest = load_part(folder, EMBEDDINGS)
  blocks = tuple(
    load_part(folder, block_name(i)) for i in range(manifest.cfg.num_layers)
  )
  return params.LlamaParams(layers=blocks, **rest), manifest


def _checkpointer() -> ocp.Checkpointer:
  """Uncompressed, so that the size on disk is the size counted."""
  handler = ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)
  return ocp.Checkpointer(handler)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob('*') if p.is_file())


def _sha256(path: pathlib.Path) -> str:
  with path.open('rb') as f:
    return hashlib.file_digest(f, 'sha256').hexdigest()


def _digests(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """path in the folder -> its size and sha256."""
  return {
    p.relative_to(folder).as_posix(): {
      'bytes': p.stat().st_size,
      'sha256': _sha256(p),
    }
    for p in _files(folder)
  }


def _check(folder: pathlib.Path, files: Mapping[str, Mapping]) -> None:
  """Raises UserError naming the first file that is not as it was written."""
  for name, expected in files.items():
    path = folder / name
    if not path.exists():
      raise config.UserError(f'{path} is missing; compress again')
    size = path.stat().st_size
    if size != expected['bytes']:
      raise config.UserError(
        f'{path} has {size} bytes, not the {expected["bytes"]} that were '
        'written; compress again'
      )
    if _sha256(path) != expected['sha256']:
      raise config.UserError(
        f'{path} is damaged: its checksum differs; compress again'
      )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as e:
    raise config.UserError(f'{path} is missing; compress again') from e
  except (json.JSONDecodeError, UnicodeError) as e:
    raise config.UserError(f'{path} is damaged: {e}; compress again') from e
