"""The one table of tensor names: our fields, Hugging Face's, GGUF's.

Our linear kernels are [in, out]; both formats store [out, in]. Those are
marked `transposed`. Embeddings are [V, D] everywhere.
"""

import dataclasses
import re
from collections.abc import Mapping

from toga_jax import config
from toga_jax.model import params


@dataclasses.dataclass(frozen=True)
class TensorName:
  """What one field is called on disk; `{i}` stands for the layer."""

  hf: str
  gguf: str
  transposed: bool = False


def _layer(hf: str, gguf: str, transposed: bool = False) -> TensorName:
  return TensorName(f'model.layers.{{i}}.{hf}', f'blk.{{i}}.{gguf}', transposed)


# Field of LayerParams -> names.
LAYER: Mapping[str, TensorName] = {
  'attn_norm': _layer('input_layernorm.weight', 'attn_norm.weight'),
  'q': _layer('self_attn.q_proj.weight', 'attn_q.weight', True),
  'k': _layer('self_attn.k_proj.weight', 'attn_k.weight', True),
  'v': _layer('self_attn.v_proj.weight', 'attn_v.weight', True),
  'o': _layer('self_attn.o_proj.weight', 'attn_output.weight', True),
  'mlp_norm': _layer('post_attention_layernorm.weight', 'ffn_norm.weight'),
  'gate': _layer('mlp.gate_proj.weight', 'ffn_gate.weight', True),
  'up': _layer('mlp.up_proj.weight', 'ffn_up.weight', True),
  'down': _layer('mlp.down_proj.weight', 'ffn_down.weight', True),
  'q_bias': _layer('self_attn.q_proj.bias', 'attn_q.bias'),
  'k_bias': _layer('self_attn.k_proj.bias', 'attn_k.bias'),
  'v_bias': _layer('self_attn.v_proj.bias', 'attn_v.bias'),
  'q_norm': _layer('self_attn.q_norm.weight', 'attn_q_norm.weight'),
  'k_norm': _layer('self_attn.k_norm.weight', 'attn_k_norm.weight'),
}

# Field of LlamaParams -> names.
MODEL: Mapping[str, TensorName] = {
  'embed': TensorName('model.embed_tokens.weight', 'token_embd.weight'),
  'final_norm': TensorName('model.norm.weight', 'output_norm.weight'),
  'head': TensorName('lm_head.weight', 'output.weight'),
}

# GGUF name (pattern, for layers) -> field.
_LAYER_BY_GGUF = {name.gguf: field for field, name in LAYER.items()}
_MODEL_BY_GGUF = {name.gguf: field for field, name in MODEL.items()}


def hf_shapes(cfg: config.ModelConfig) -> dict[str, tuple[int, ...]]:
  """HF name -> HF shape of every tensor a model of `cfg` consists of."""
  v, d = cfg.vocab_size, cfg.hidden_size
  shapes = {MODEL['embed'].hf: (v, d), MODEL['final_norm'].hf: (d,)}
  if not cfg.tie_embeddings:
    shapes[MODEL['head'].hf] = (v, d)
  for field, shape in params.layer_shapes(cfg).items():
    name = LAYER[field]
    for i in range(cfg.num_layers):
      shapes[name.hf.format(i=i)] = shape[::-1] if name.transposed else shape
  return shapes


def from_gguf(gguf_name: str) -> tuple[str, str] | None:
  """(field, HF name) of a GGUF tensor; None when the table has no such one."""
  layer = re.fullmatch(r'blk\.(\d+)\.(.+)', gguf_name)
  if layer:
    field = _LAYER_BY_GGUF.get(f'blk.{{i}}.{layer[2]}')
    return field and (field, LAYER[field].hf.format(i=int(layer[1])))
  field = _MODEL_BY_GGUF.get(gguf_name)
  return field and (field, MODEL[field].hf)
