"""A config.json's worth of settings out of GGUF metadata."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from toga_jax import config

# Llama 3.1's rope scaling: one divisor per frequency, in place of settings.
ROPE_FACTORS = 'rope_freqs.weight'

_ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen3': 'Qwen3ForCausalLM',
}

# The settings of every published Llama 3.x; only `factor` differs.
_LLAMA3 = {
  'rope_type': 'llama3',
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8192,
}


def raw_config(
  path: pathlib.Path,
  metadata: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  rope_factors: np.ndarray | None,
) -> dict[str, Any]:
  """What config.json would say.

  Args:
    path: for messages.
    metadata: GGUF key -> value.
    shapes: GGUF tensor name -> shape, slowest dimension first.
    rope_factors: [H/2], contents of `rope_freqs.weight`, or None.

  Raises:
    config.UserError: unsupported architecture or setting, or a missing key.
  """
  arch = metadata.get('general.architecture')
  _refuse_unsupported(path, metadata, arch)

  def get(key: str, default: Any = None) -> Any:
    value = metadata.get(f'{arch}.{key}', default)
    if isinstance(value, list):  # one value per layer
      if len(set(value)) != 1:
        raise config.UserError(
          f'{path}: {arch}.{key} differs between layers: not supported'
        )
      value = value[0]
    if value is None:
      raise config.UserError(f'{path} has no {arch}.{key}')
    return value

  if 'token_embd.weight' not in shapes:
    raise config.UserError(f'{path} has no tensor token_embd.weight')
  hidden, heads = get('embedding_length'), get('attention.head_count')
  head_dim = get('attention.key_length', hidden // heads)
  for key in ('attention.value_length', 'rope.dimension_count'):
    if get(key, head_dim) != head_dim:
      raise config.UserError(
        f'{path}: {arch}.{key}={get(key)} differs from the head size '
        f'{head_dim}: not supported'
      )
  # Llama with biases on q, k and v and none on o is Qwen2's block.
  biased = 'blk.0.attn_q.bias' in shapes
  qwen2 = biased and arch == 'llama'
  theta = _decimal(get('rope.freq_base', 10000.0))
  raw = {
    'architectures': ['Qwen2ForCausalLM' if qwen2 else _ARCHITECTURES[arch]],
    'model_type': 'qwen2' if qwen2 else arch,
    'vocab_size': shapes['token_embd.weight'][0],
    'hidden_size': hidden,
    'intermediate_size': get('feed_forward_length'),
    'num_hidden_layers': get('block_count'),
    'num_attention_heads': heads,
    'num_key_value_heads': get('attention.head_count_kv', heads),
    'head_dim': head_dim,
    'hidden_act': 'silu',
    'rms_norm_eps': _decimal(get('attention.layer_norm_rms_epsilon')),
    'rope_theta': theta,
    'max_position_embeddings': get('context_length'),
    'tie_word_embeddings': 'output.weight' not in shapes,
    'attention_bias': biased,
    'bos_token_id': metadata.get('tokenizer.ggml.bos_token_id'),
    'eos_token_id': _eos_ids(metadata),
  }
  scaling = _linear_scaling(metadata, arch)
  if rope_factors is not None:
    scaling = _llama3_scaling(path, rope_factors, theta, head_dim) or scaling
  if scaling:
    raw['rope_scaling'] = scaling
  return raw


def _decimal(x: float) -> float:
  """The number that was meant: metadata is float32, 1e-5 arrives with noise."""
  return float(str(np.float32(x)))


def _refuse_unsupported(
  path: pathlib.Path, metadata: Mapping[str, Any], arch: str | None
) -> None:
  """Raises UserError for files that hold something other than our block."""
  if arch not in _ARCHITECTURES:
    raise config.UserError(
      f'{path}: architecture {arch} is not supported; supported: '
      f'{", ".join(_ARCHITECTURES)}'
    )
  if metadata.get('split.count', 0) > 1:
    raise config.UserError(
      f'{path} is one of {metadata["split.count"]} parts; join them with: '
      'llama-gguf-split --merge'
    )
  if metadata.get(f'{arch}.expert_count', 0):
    raise config.UserError(f'{path}: mixture of experts is not supported')
  window = metadata.get(f'{arch}.attention.sliding_window', 0)
  if 0 < window < metadata.get(f'{arch}.context_length', 0):
    raise config.UserError(
      f'{path}: sliding_window={window}: windowed attention is not supported'
    )


def _eos_ids(metadata: Mapping[str, Any]) -> list[int]:
  """End of sequence, of turn and of message: all of them end generation."""
  keys = (f'tokenizer.ggml.{name}_token_id' for name in ('eos', 'eot', 'eom'))
  ids = (metadata.get(key) for key in keys)
  return list(dict.fromkeys(i for i in ids if i is not None))


def _linear_scaling(
  metadata: Mapping[str, Any], arch: str
) -> dict[str, Any] | None:
  """HF's `rope_scaling` of the metadata; ModelConfig refuses other kinds."""
  kind = metadata.get(f'{arch}.rope.scaling.type', 'none')
  if kind == 'none':
    return None
  factor = metadata.get(f'{arch}.rope.scaling.factor', 1.0)
  return {'rope_type': kind, 'factor': float(factor)}


def _llama3_scaling(
  path: pathlib.Path, factors: np.ndarray, theta: float, head_dim: int
) -> dict[str, Any] | None:
  """HF's `rope_scaling` that yields these divisors of the frequencies.

  The converter stores, for the wavelength w of each frequency,
    1                          if w < original / high,
    factor                     if w > original / low,
    1 / ((1 - s) / factor + s) between, s = (original / w - low) / (high - low)
  with factor in plain sight (the largest) and the rest gone. The published
  settings are tried, and the answer is held against the file.

  Args:
    path: for messages.
    factors: [H/2] divisors.
    theta: rope base.
    head_dim: H.
  """
  factor = float(factors.max())
  if np.all(factors == 1):
    return None
  low, high = _LLAMA3['low_freq_factor'], _LLAMA3['high_freq_factor']
  original = _LLAMA3['original_max_position_embeddings']
  wavelength = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
  share = np.clip((original / wavelength - low) / (high - low), 0, 1)
  expected = 1 / ((1 - share) / factor + share)
  if factors.shape != expected.shape or not np.allclose(
    factors, expected, rtol=1e-3
  ):
    raise config.UserError(
      f'{path}: {ROPE_FACTORS} does not follow the llama3 rule with {low=}, '
      f'{high=}, {original=}: not supported; use the HF checkpoint'
    )
  return _LLAMA3 | {'factor': factor}
