"""CompressionSpec: the decision, made by a search or a rule, on disk.

`spec.json` says for which model, with which bits, how it was made and what it
comes to; `masks.npz` holds one bit per channel. No jax here.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from toga_jax import budget, config

VERSION = 1

Masks = Mapping[str, np.ndarray]  # group -> [L, width] bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressionSpec:
  """Which channels are kept, and which of those get more bits.

  Invariants, checked when made: `keep` has all six groups and `salient` the
  four input groups, each [L, width] bool; salient channels are kept.
  """

  cfg: config.ModelConfig
  quant: config.QuantConfig
  keep: Masks
  salient: Masks
  fingerprint: str  # of the model it was made for
  made_by: Mapping[str, Any]  # how: settings, or the name of a rule

  def __post_init__(self):
    widths = budget.group_widths(self.cfg)
    for name, masks, groups in (
      ('keep', self.keep, budget.GROUPS),
      ('salient', self.salient, budget.INPUT_GROUPS),
    ):
      if set(masks) != set(groups):
        raise config.UserError(
          f'spec: {name} has groups {sorted(masks)}, expected {sorted(groups)}'
        )
      for group in groups:
        expected = (self.cfg.num_layers, widths[group])
        if masks[group].shape != expected or masks[group].dtype != bool:
          raise config.UserError(
            f'spec: {name}/{group} is {masks[group].dtype}'
            f'{list(masks[group].shape)}, expected bool{list(expected)}'
          )
    for group, salient in self.salient.items():
      if np.any(salient & ~self.keep[group]):
        raise config.UserError(f'spec: {group} has pruned salient channels')

  def kept_counts(self) -> dict[str, np.ndarray]:
    """group -> [L] kept channels."""
    return {g: self.keep[g].sum(-1) for g in budget.GROUPS}

  def salient_counts(self) -> dict[str, np.ndarray]:
    """input group -> [L] kept and salient channels."""
    return {g: self.salient[g].sum(-1) for g in budget.INPUT_GROUPS}

  def size(self) -> budget.Size:
    """What the model comes to under this decision."""
    return budget.exact_size(
      self.cfg, self.quant, self.kept_counts(), self.salient_counts()
    )

  def digest(self) -> str:
    """sha256 of the masks and the bits: equal decisions have equal digests."""
    digest = hashlib.sha256(repr(self.quant).encode())
    for masks in (self.keep, self.salient):
      for group in sorted(masks):
        digest.update(group.encode() + masks[group].tobytes())
    return digest.hexdigest()

  def check_model(self, fingerprint: str) -> None:
    """Raises UserError when the spec was made for another model."""
    if fingerprint != self.fingerprint:
      raise config.UserError(
        f'this spec was made for model {self.fingerprint[:12]}, the one given '
        f'is {fingerprint[:12]}; search again or pass the model it is for'
      )

  def save(self, folder: pathlib.Path) -> pathlib.Path:
    """Writes masks.npz and spec.json, each whole or not at all.

    Returns:
      The path of spec.json. It is written last and names the digest of the
      masks, so a folder with a spec.json has the masks that belong to it.
    """
    buffer = io.BytesIO()
    arrays = {f'keep/{g}': m for g, m in self.keep.items()}
    arrays |= {f'salient/{g}': m for g, m in self.salient.items()}
    np.savez_compressed(buffer, **arrays)
    described = {
      'version': VERSION,
      'fingerprint': self.fingerprint,
      'made_by': dict(self.made_by),
      'size': dataclasses.asdict(self.size()),
      'model': dataclasses.asdict(self.cfg),
      'quant': dataclasses.asdict(self.quant),
      'kept': {g: n.tolist() for g, n in self.kept_counts().items()},
      'salient': {g: n.tolist() for g, n in self.salient_counts().items()},
      'masks_sha256': hashlib.sha256(buffer.getvalue()).hexdigest(),
    }
    write_atomically(folder / 'masks.npz', buffer.getvalue())
    text = json.dumps(described, indent=1) + '\n'
    return write_atomically(folder / 'spec.json', text.encode())


def load(folder: pathlib.Path) -> CompressionSpec:
  """Reads what `save` wrote.

  Raises:
    UserError: no spec there, another version, or damaged masks.
  """
  path = folder / 'spec.json'
  if not path.exists():
    raise config.UserError(f'no spec.json in {folder}; run the search first')
  try:
    raw = json.loads(path.read_text())
    if raw['version'] != VERSION:
      raise config.UserError(
        f'{path} is version {raw["version"]}, this code reads {VERSION}'
      )
    masks_bytes = (folder / 'masks.npz').read_bytes()
    if hashlib.sha256(masks_bytes).hexdigest() != raw['masks_sha256']:
      raise config.UserError(
        f'{folder / "masks.npz"} is damaged: its checksum differs from the one '
        'in spec.json'
      )
    with np.load(io.BytesIO(masks_bytes)) as arrays:
      masks = {'keep': {}, 'salient': {}}
      for name in arrays.files:
        decision, group = name.split('/')
        masks[decision][group] = arrays[name]
    return CompressionSpec(
      cfg=model_config(raw['model']),
      quant=config.QuantConfig(**raw['quant']),
      fingerprint=raw['fingerprint'],
      made_by=raw['made_by'],
      **masks,
    )
  except (KeyError, TypeError, json.JSONDecodeError, UnicodeError) as e:
    raise config.UserError(f'{path} is not a spec of this version: {e}') from e
  except FileNotFoundError as e:
    raise config.UserError(f'{e.filename} is missing beside spec.json') from e


def model_config(raw: Mapping[str, Any]) -> config.ModelConfig:
  """The config that `dataclasses.asdict` and JSON made `raw` of."""
  fields = dict(raw)
  scaling = fields['rope_scaling']
  fields['rope_scaling'] = config.RopeScaling(**scaling) if scaling else None
  fields['eos_ids'] = tuple(fields['eos_ids'])
  return config.ModelConfig(**fields)


def write_atomically(path: pathlib.Path, data: bytes) -> pathlib.Path:
  """Writes to a temporary name, syncs, renames; leaves no half-written file."""
  partial = path.with_name(path.name + '.tmp')
  try:
    with partial.open('wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    partial.replace(path)
  finally:
    partial.unlink(missing_ok=True)
  return path
