"""Parts of a packed model as plain arrays and JSON, and back.

Arrays go to the checkpoint as nested dicts; what is static in the pytrees (bit
widths, sizes, borders) goes to JSON beside them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from toga_jax import budget, config
from toga_jax.model import linear, params
from toga_jax.quant import packed

# A block, or {'embed', 'head', 'final_norm'}.
Part = params.PackedBlock | dict[str, Any]
Arrays = dict[str, Any]
Structure = Mapping[str, Any]


def encode(part: Part) -> tuple[Arrays, Structure]:
  """(arrays, JSON) of a block or of the embeddings."""
  if isinstance(part, params.PackedBlock):
    return _encode_block(part)
  arrays, structure = {}, {}
  for name, leaf in part.items():
    if leaf is not None:
      arrays[name], structure[name] = _encode_range(leaf)
  return arrays, {'kind': 'embeddings', 'ranges': structure}


def decode(arrays: Arrays, structure: Structure) -> Part:
  """What `encode` was given, in NumPy arrays."""
  if structure['kind'] == 'block':
    return _decode_block(arrays, structure)
  return {
    name: _decode_range(arrays[name], how)
    for name, how in structure['ranges'].items()
  }


def _encode_range(part: packed.Leaf) -> tuple[Arrays, Structure]:
  if not isinstance(part, packed.PackedRange):
    return {'values': np.asarray(part)}, {'bits': config.OFF_BITS}
  arrays = {'words': part.words, 'scale': part.scale}
  if part.zero is not None:
    arrays['zero'] = part.zero
  structure = {n: getattr(part, n) for n in ('bits', 'k', 'group_size')}
  return {n: np.asarray(a) for n, a in arrays.items()}, structure


def _decode_range(arrays: Arrays, structure: Structure) -> packed.Leaf:
  arrays = {n: np.asarray(a) for n, a in arrays.items()}
  if structure['bits'] == config.OFF_BITS:
    return arrays['values']
  return packed.PackedRange(**arrays, **structure)


def _encode_block(block: params.PackedBlock) -> tuple[Arrays, Structure]:
  arrays: Arrays = {}
  linears, floats = {}, []
  for name, leaf in vars(block.weights).items():
    if isinstance(leaf, packed.PackedLinear):
      encoded = [_encode_range(part) for part in leaf.parts]
      arrays[name] = {str(i): a for i, (a, _) in enumerate(encoded)}
      linears[name] = [how for _, how in encoded]
    elif leaf is not None:
      arrays[name] = np.asarray(leaf)
      floats.append(name)
  channels = block.channels
  indices = {g: gather.index for g, gather in channels.read.items()}
  indices |= channels.write
  indices = {g: np.asarray(i) for g, i in indices.items() if i is not None}
  if indices:
    arrays['index'] = indices
  return arrays, {
    'kind': 'block',
    'linears': linears,
    'floats': floats,
    'indexed': sorted(indices),
    'read': {g: [r.low, r.high] for g, r in channels.read.items()},
    'width': channels.width,
  }


def _decode_block(arrays: Arrays, structure: Structure) -> params.PackedBlock:
  fields = {name: np.asarray(arrays[name]) for name in structure['floats']}
  for name, how in structure['linears'].items():
    parts = [_decode_range(arrays[name][str(i)], h) for i, h in enumerate(how)]
    fields[name] = packed.PackedLinear(tuple(parts))
  index = {g: np.asarray(arrays['index'][g]) for g in structure['indexed']}
  read = {
    group: linear.Gather(index=index.get(group), low=low, high=high)
    for group, (low, high) in structure['read'].items()
  }
  outputs = [g for g in budget.GROUPS if g not in budget.INPUT_GROUPS]
  return params.PackedBlock(
    weights=params.LayerParams(**fields),
    channels=linear.PackedChannels(
      read=read,
      write={g: index.get(g) for g in outputs},
      width=structure['width'],
    ),
  )
