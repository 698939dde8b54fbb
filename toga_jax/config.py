"""Settings: frozen, keyword-only dataclasses, checked when they are made.

Nothing here touches flags, files or devices, so every room may import it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

OFF_BITS = 16  # "16 bits" in any bits flag means: not quantized.


class UserError(ValueError):
  """What a user gave cannot work; the message is one line that says why."""


def _check_bits(name: str, bits: int) -> None:
  if bits != OFF_BITS and not 1 <= bits <= 8:
    raise UserError(f'--{name}={bits}: expected 1..8, or 16 for off')


def _check_positive(obj: Any, *names: str) -> None:
  for name in names:
    value = getattr(obj, name)
    if not value > 0:
      raise UserError(f'--{name}={value}: expected a number above 0')


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
  """How rotary frequencies are stretched for longer contexts.

  `kind` is 'linear' or 'llama3' (the piecewise rule of Llama 3.1).
  """

  kind: str
  factor: float
  low_freq_factor: float = 1.0
  high_freq_factor: float = 4.0
  original_max_positions: int = 8192

  @classmethod
  def from_hf(cls, raw: Mapping[str, Any]) -> 'RopeScaling | None':
    """Reads HF's `rope_scaling` / `rope_parameters`; None for no scaling."""
    kind = raw.get('rope_type', raw.get('type', 'default'))
    if kind == 'default':
      return None
    if kind not in ('linear', 'llama3'):
      raise UserError(
        f'rope scaling {kind!r} is not supported; known: default, linear, '
        'llama3'
      )
    extra = {}
    if kind == 'llama3':
      extra = {
        'low_freq_factor': float(raw['low_freq_factor']),
        'high_freq_factor': float(raw['high_freq_factor']),
        'original_max_positions': int(raw['original_max_position_embeddings']),
      }
    return cls(kind=kind, factor=float(raw['factor']), **extra)


# HF architecture -> whether q and k are normalised per head. Biases, tying
# and sizes are read from config.json itself.
ARCHITECTURES: Mapping[str, bool] = {
  'LlamaForCausalLM': False,
  'MistralForCausalLM': False,
  'Qwen2ForCausalLM': False,
  'Qwen3ForCausalLM': True,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The shape of a Llama-family model. Letters as in model/llama.py."""

  vocab_size: int  # V
  hidden_size: int  # D
  intermediate_size: int  # F
  num_layers: int  # L
  num_heads: int  # N
  num_kv_heads: int  # K
  head_dim: int  # H
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | None = None
  max_positions: int = 2048
  tie_embeddings: bool = False
  attention_bias: bool = False  # on q, k and v
  qk_norm: bool = False
  architecture: str = 'LlamaForCausalLM'
  bos_id: int | None = None
  eos_ids: tuple[int, ...] = ()

  def __post_init__(self):
    sizes = (
      'vocab_size hidden_size intermediate_size num_layers num_heads '
      'num_kv_heads head_dim'
    )
    for name in sizes.split():
      value = getattr(self, name)
      if not isinstance(value, int) or value <= 0:
        raise UserError(f'model config: {name}={value!r}, expected an int > 0')
    if self.num_heads % self.num_kv_heads:
      raise UserError(
        f'model config: {self.num_heads} query heads do not divide into '
        f'{self.num_kv_heads} kv heads'
      )
    if self.head_dim % 2:
      raise UserError(f'model config: head_dim={self.head_dim} must be even')

  @property
  def q_size(self) -> int:
    """N * H: width of the concatenated query heads."""
    return self.num_heads * self.head_dim

  @property
  def kv_size(self) -> int:
    """K * H: width of the concatenated key (or value) heads."""
    return self.num_kv_heads * self.head_dim

  @classmethod
  def from_hf(cls, raw: Mapping[str, Any]) -> 'ModelConfig':
    """Reads a Hugging Face config.json (already parsed).

    Raises:
      UserError: the architecture is unknown, uses a feature this code does
        not implement, or a size is missing.
    """
    named = raw.get('architectures') or ['(none named)']
    architecture = named if isinstance(named, str) else named[0]
    if architecture not in ARCHITECTURES:
      raise UserError(
        f'architecture {architecture} is not supported; supported: '
        f'{", ".join(sorted(ARCHITECTURES))}; another one needs its block in '
        'model/ and its names in ckpt/names.py'
      )
    _refuse_unsupported(raw, architecture)
    try:
      hidden, heads = int(raw['hidden_size']), int(raw['num_attention_heads'])
      rope = raw.get('rope_parameters') or raw.get('rope_scaling') or {}
      if not isinstance(rope, Mapping) or heads < 1:
        raise UserError(
          f'config.json: num_attention_heads={heads} must be above 0, and rope '
          f'settings a mapping, not {type(rope).__name__}'
        )
      eos = raw.get('eos_token_id')
      eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
      return cls(
        vocab_size=int(raw['vocab_size']),
        hidden_size=hidden,
        intermediate_size=int(raw['intermediate_size']),
        num_layers=int(raw['num_hidden_layers']),
        num_heads=heads,
        num_kv_heads=int(raw.get('num_key_value_heads') or heads),
        head_dim=int(raw.get('head_dim') or hidden // heads),
        rms_norm_eps=float(raw.get('rms_norm_eps', 1e-6)),
        rope_theta=float(
          rope.get('rope_theta') or raw.get('rope_theta') or 10000.0
        ),
        rope_scaling=RopeScaling.from_hf(rope),
        max_positions=int(raw.get('max_position_embeddings') or 2048),
        tie_embeddings=bool(raw.get('tie_word_embeddings', False)),
        attention_bias=architecture == 'Qwen2ForCausalLM',
        qk_norm=ARCHITECTURES[architecture],
        architecture=architecture,
        bos_id=raw.get('bos_token_id'),
        eos_ids=tuple(int(i) for i in eos_ids),
      )
    except KeyError as e:
      raise UserError(f'config.json has no {e.args[0]!r}') from e
    except UserError:
      raise
    except (TypeError, ValueError) as e:  # null or a word in a number's place
      raise UserError(f'config.json: {e}') from e


def _refuse_unsupported(raw: Mapping[str, Any], architecture: str) -> None:
  """Raises UserError for settings that would silently change the result."""
  if raw.get('hidden_act', 'silu') != 'silu':
    raise UserError(f'hidden_act={raw["hidden_act"]!r}: only silu is supported')
  if raw.get('partial_rotary_factor', 1) != 1:
    raise UserError('partial_rotary_factor other than 1 is not supported')
  if raw.get('mlp_bias'):
    raise UserError('mlp_bias=true is not supported')
  # It puts a bias on o as well; Qwen2 has its own rule: on q, k and v.
  if architecture != 'Qwen2ForCausalLM' and raw.get('attention_bias'):
    raise UserError(f'{architecture} with attention_bias=true is not supported')
  window = raw.get('sliding_window')
  if window and raw.get('use_sliding_window', architecture[:7] == 'Mistral'):
    raise UserError(
      f'sliding_window={window}: windowed attention is not supported; set it '
      'to null in config.json to use full attention'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantConfig:
  """Bit widths of the two precision ranges. 16 means not quantized.

  `group_size` is how many input channels share one scale; 0 is one scale per
  output channel (weights) or token (activations) within each range. Without
  `symmetric`, packed weights of 2 bits and more have zero points; those that a
  search sees never do, and neither do activations.
  """

  low_bits: int = 4
  high_bits: int = 8
  act_low_bits: int = OFF_BITS
  act_high_bits: int = OFF_BITS
  kv_bits: int = OFF_BITS
  embed_bits: int = OFF_BITS
  group_size: int = 0
  symmetric: bool = True

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.name.endswith('bits'):
        _check_bits(field.name, getattr(self, field.name))
    if self.low_bits > self.high_bits:
      raise UserError(
        f'--low_bits={self.low_bits} is above --high_bits={self.high_bits}'
      )
    if self.act_low_bits > self.act_high_bits:
      raise UserError(
        f'--act_low_bits={self.act_low_bits} is above '
        f'--act_high_bits={self.act_high_bits}'
      )
    if self.group_size < 0:
      raise UserError(f'--group_size={self.group_size}: expected 0 or more')

  @property
  def weights_on(self) -> bool:
    """Whether any weight is quantized."""
    return self.low_bits != OFF_BITS

  @property
  def acts_on(self) -> bool:
    """Whether any activation is quantized."""
    return self.act_low_bits != OFF_BITS

  def unquantized(self) -> 'QuantConfig':
    """The same with weights and activations left at 16 bits."""
    return dataclasses.replace(
      self,
      low_bits=OFF_BITS,
      high_bits=OFF_BITS,
      act_low_bits=OFF_BITS,
      act_high_bits=OFF_BITS,
    )


SEARCH_KINDS = ('quant', 'prune', 'joint')
SALIENT_RULES = ('learned', 'activation', 'none')
STARTS = ('warm', 'cold')


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchConfig:
  """What the hypernetwork is trained for, and how. DISP-LLM's defaults."""

  kind: str = 'quant'
  budget: float = 0.28125  # target linear_budget
  sparsity: float | None = None  # fixes the pruned share as well
  salient: str = 'learned'
  start: str = 'warm'
  steps: int = 400
  seq_len: int = 512
  batch_size: int = 1
  seed: int = 0
  learning_rate: float = 1e-3
  weight_decay: float = 0.05
  budget_weight: float = 16.0  # lambda of eq. (7)
  over_budget_weight: float = 1.0  # weight of the over-budget side of (6)
  temperature: float = 0.4
  offset: float = 3.0
  noise_fade: float = 0.7  # noise reaches zero after this share of the steps
  prune_heads: bool = False
  channel_multiple: int = 8
  calibration_windows: int = 16  # windows of seq_len for activation statistics
  checkpoint_every: int = 50

  def __post_init__(self):
    for name, known in (
      ('kind', SEARCH_KINDS),
      ('salient', SALIENT_RULES),
      ('start', STARTS),
    ):
      if getattr(self, name) not in known:
        raise UserError(
          f'{name}={getattr(self, name)!r}: expected one of {", ".join(known)}'
        )
    _check_positive(
      self,
      *[
        'steps',
        'seq_len',
        'batch_size',
        'learning_rate',
        'temperature',
        'budget',
      ],
      *['channel_multiple', 'calibration_windows', 'checkpoint_every'],
    )
    if self.seq_len < 2:
      raise UserError(f'--seq_len={self.seq_len}: expected at least 2')
    if not 0 <= self.noise_fade <= 1:
      raise UserError(f'--noise_fade={self.noise_fade}: expected 0..1')
    if self.sparsity is not None:
      if self.kind == 'quant':
        raise UserError('--sparsity contradicts --search=quant: it prunes none')
      if not 0 <= self.sparsity < 1:
        raise UserError(f'--sparsity={self.sparsity}: expected 0 <= s < 1')
    if not math.isfinite(self.budget) or self.budget > 1:
      raise UserError(
        f'--budget={self.budget}: expected a share of the 16-bit linears, '
        '0 < budget <= 1'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompressConfig:
  """How a decision is applied to the weights."""

  gptq: bool = True  # False rounds to nearest, everything else alike
  reorder: bool = True  # False leaves channels in place; see surgery/reorder.py
  clip_search: bool = True
  act_order: bool = True  # GPTQ rounds columns of a range by falling H_jj
  damping: float = 0.01  # share of the mean of H's diagonal
  windows: int = 128
  seq_len: int = 512
  seed: int = 0

  def __post_init__(self):
    if self.windows < 1 or self.seq_len < 1:
      raise UserError('--gptq_windows and --gptq_seq_len must be >= 1')
    if not 0 <= self.damping <= 1:
      raise UserError(f'--damping={self.damping}: expected 0..1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
  """The perplexity protocol. The defaults are GPTQ's."""

  max_windows: int = 0  # 0 = all
  seq_len: int = 2048
  bos: bool = False  # put BOS in front of every window
  tail: bool = False  # also score the last, shorter window
  batch_size: int = 1

  def __post_init__(self):
    if self.seq_len < 2:
      raise UserError(f'--eval_seq_len={self.seq_len}: expected at least 2')
    if self.max_windows < 0 or self.batch_size < 1:
      raise UserError('--max_eval_windows must be >= 0, --eval_batch_size >= 1')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Everything a verb needs, as `flags.settings()` returns it."""

  model: str
  data: str
  eval_data: str
  workdir: str
  quant: QuantConfig
  search: SearchConfig
  evaluation: EvalConfig
  dtype: str = 'auto'
  overwrite: bool = False
  compress: CompressConfig = CompressConfig()
  spec: str = ''  # folder of the spec to apply; '' = workdir
  drift_windows: int = 4  # windows to compare with the dense model on
  subject: str = ''  # dense, masked, packed; '' = the most finished one
  bench: str = 'search'
  # The flags that change what a search finds, name -> value as text.
  result_flags: tuple[tuple[str, str], ...] = ()
  flagfile: str = ''  # all flags but overwrite, in --flagfile syntax
