import dataclasses

import pytest

from tests import tiny
from toga_jax import config

LLAMA2_7B = {
  'architectures': ['LlamaForCausalLM'],
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 11008,
  'max_position_embeddings': 4096,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 32,
  'pretraining_tp': 1,
  'rms_norm_eps': 1e-05,
  'rope_scaling': None,
  'tie_word_embeddings': False,
  'torch_dtype': 'float16',
  'vocab_size': 32000,
}
LLAMA31_8B = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'bos_token_id': 128000,
  'eos_token_id': [128001, 128008, 128009],
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 8.0,
    'high_freq_factor': 4.0,
    'low_freq_factor': 1.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': False,
  'vocab_size': 128256,
}
# As transformers 5 writes it: the rotary settings all in one place.
LLAMA32_1B = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'bos_token_id': 128000,
  'dtype': 'bfloat16',
  'eos_token_id': 128001,
  'head_dim': 64,
  'hidden_act': 'silu',
  'hidden_size': 2048,
  'intermediate_size': 8192,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'num_attention_heads': 32,
  'num_hidden_layers': 16,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_parameters': {
    'factor': 32.0,
    'high_freq_factor': 4.0,
    'low_freq_factor': 1.0,
    'original_max_position_embeddings': 8192,
    'rope_theta': 500000.0,
    'rope_type': 'llama3',
  },
  'tie_word_embeddings': True,
  'vocab_size': 128256,
}
MISTRAL_7B = {
  'architectures': ['MistralForCausalLM'],
  'bos_token_id': 1,
  'eos_token_id': 2,
  'head_dim': None,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 14336,
  'max_position_embeddings': 32768,
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_theta': 1000000.0,
  'sliding_window': None,
  'tie_word_embeddings': False,
  'vocab_size': 32768,
}
QWEN2_05B = {
  'architectures': ['Qwen2ForCausalLM'],
  'bos_token_id': 151643,
  'eos_token_id': 151643,
  'hidden_act': 'silu',
  'hidden_size': 896,
  'intermediate_size': 4864,
  'max_position_embeddings': 131072,
  'max_window_layers': 24,
  'num_attention_heads': 14,
  'num_hidden_layers': 24,
  'num_key_value_heads': 2,
  'rms_norm_eps': 1e-06,
  'rope_theta': 1000000.0,
  'sliding_window': 131072,
  'tie_word_embeddings': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
QWEN3_06B = {
  'architectures': ['Qwen3ForCausalLM'],
  'attention_bias': False,
  'bos_token_id': 151643,
  'eos_token_id': 151645,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 1024,
  'intermediate_size': 3072,
  'max_position_embeddings': 40960,
  'max_window_layers': 28,
  'num_attention_heads': 16,
  'num_hidden_layers': 28,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': None,
  'tie_word_embeddings': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}


@pytest.mark.parametrize(
  ('raw', 'expected'),
  [
    (
      LLAMA2_7B,
      config.ModelConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        max_positions=4096,
        bos_id=1,
        eos_ids=(2,),
      ),
    ),
    (
      LLAMA31_8B,
      config.ModelConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=config.RopeScaling(
          kind='llama3',
          factor=8.0,
          low_freq_factor=1.0,
          high_freq_factor=4.0,
          original_max_positions=8192,
        ),
        max_positions=131072,
        bos_id=128000,
        eos_ids=(128001, 128008, 128009),
      ),
    ),
    (
      LLAMA32_1B,
      config.ModelConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=config.RopeScaling(
          kind='llama3',
          factor=32.0,
          low_freq_factor=1.0,
          high_freq_factor=4.0,
          original_max_positions=8192,
        ),
        max_positions=131072,
        tie_embeddings=True,
        bos_id=128000,
        eos_ids=(128001,),
      ),
    ),
    (
      MISTRAL_7B,
      config.ModelConfig(
        vocab_size=32768,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        max_positions=32768,
        architecture='MistralForCausalLM',
        bos_id=1,
        eos_ids=(2,),
      ),
    ),
    (
      QWEN2_05B,
      config.ModelConfig(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_layers=24,
        num_heads=14,
        num_kv_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_positions=131072,
        tie_embeddings=True,
        attention_bias=True,
        architecture='Qwen2ForCausalLM',
        bos_id=151643,
        eos_ids=(151643,),
      ),
    ),
    (
      QWEN3_06B,
      config.ModelConfig(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_layers=28,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_positions=40960,
        tie_embeddings=True,
        qk_norm=True,
        architecture='Qwen3ForCausalLM',
        bos_id=151643,
        eos_ids=(151645,),
      ),
    ),
  ],
  ids='llama2 llama3.1 llama3.2 mistral qwen2 qwen3'.split(),
)
def test_a_published_config_is_read(raw, expected):
  assert config.ModelConfig.from_hf(raw) == expected


def test_what_old_configs_leave_out_has_transformers_defaults():
  left_out = (
    'num_key_value_heads rms_norm_eps eos_token_id bos_token_id '
    'tie_word_embeddings max_position_embeddings rope_scaling hidden_act'
  )
  raw = {k: v for k, v in LLAMA2_7B.items() if k not in left_out.split()}

  cfg = config.ModelConfig.from_hf(raw)

  assert cfg.num_kv_heads == 32
  assert cfg.head_dim == 128
  assert cfg.rms_norm_eps == 1e-6
  assert cfg.rope_theta == 10000.0
  assert cfg.max_positions == 2048
  assert (cfg.bos_id, cfg.eos_ids, cfg.tie_embeddings) == (None, (), False)


def test_linear_rope_scaling_is_read_in_its_old_spelling():
  scaling = config.RopeScaling.from_hf({'type': 'linear', 'factor': 4.0})

  assert scaling == config.RopeScaling(kind='linear', factor=4.0)


@pytest.mark.parametrize('raw', [{}, {'rope_type': 'default'}])
def test_default_rope_is_no_scaling(raw):
  assert config.RopeScaling.from_hf(raw) is None


@pytest.mark.parametrize(
  ('raw', 'changes', 'message'),
  [
    (
      LLAMA2_7B,
      {'architectures': ['GPT2LMHeadModel']},
      'architecture GPT2LMHeadModel is not supported; supported: '
      'LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, '
      'Qwen3ForCausalLM; ',
    ),
    (LLAMA2_7B, {'architectures': None}, 'architecture (none named) is not'),
    (LLAMA2_7B, {'hidden_act': 'gelu'}, "hidden_act='gelu': only silu"),
    (LLAMA31_8B, {'mlp_bias': True}, 'mlp_bias=true is not supported'),
    (LLAMA31_8B, {'attention_bias': True}, 'LlamaForCausalLM with attention_b'),
    (QWEN3_06B, {'attention_bias': True}, 'Qwen3ForCausalLM with attention_b'),
    (MISTRAL_7B, {'sliding_window': 4096}, 'sliding_window=4096: windowed'),
    (QWEN2_05B, {'use_sliding_window': True}, 'sliding_window=131072: window'),
    (
      LLAMA32_1B,
      {'rope_parameters': {'rope_type': 'yarn', 'factor': 4.0}},
      "rope scaling 'yarn' is not supported; known: default, linear, llama3",
    ),
    (
      LLAMA2_7B,
      {'num_key_value_heads': 5},
      '32 query heads do not divide into 5 kv heads',
    ),
    (LLAMA2_7B, {'head_dim': 127}, 'head_dim=127 must be even'),
    (LLAMA2_7B, {'vocab_size': 0}, 'vocab_size=0, expected an int > 0'),
    (LLAMA2_7B, {'hidden_size': None}, 'config.json: int() argument must be'),
    (LLAMA2_7B, {'num_hidden_layers': 'many'}, 'config.json: invalid literal'),
  ],
)
def test_what_this_code_cannot_run_is_refused(raw, changes, message):
  with pytest.raises(config.UserError) as raised:
    config.ModelConfig.from_hf(raw | changes)

  assert message in str(raised.value)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  'key',
  'vocab_size hidden_size intermediate_size num_hidden_layers '
  'num_attention_heads'.split(),
)
def test_a_missing_size_is_named(key):
  raw = {k: v for k, v in LLAMA2_7B.items() if k != key}

  with pytest.raises(config.UserError, match=f"config.json has no '{key}'"):
    config.ModelConfig.from_hf(raw)


@pytest.mark.parametrize(
  'key',
  ['factor', 'low_freq_factor', 'original_max_position_embeddings'],
)
def test_a_missing_rope_setting_is_named(key):
  scaling = LLAMA31_8B['rope_scaling']
  scaling = {k: v for k, v in scaling.items() if k != key}

  with pytest.raises(config.UserError, match=f"config.json has no '{key}'"):
    config.ModelConfig.from_hf(LLAMA31_8B | {'rope_scaling': scaling})


def test_sizes_of_the_heads():
  cfg = tiny.config()

  assert (cfg.q_size, cfg.kv_size) == (96, 32)


@pytest.mark.parametrize(
  ('bits', 'message'),
  [
    ({'low_bits': 0}, '--low_bits=0: expected 1..8, or 16 for off'),
    ({'high_bits': 9}, '--high_bits=9: expected 1..8, or 16 for off'),
    ({'act_low_bits': 15}, '--act_low_bits=15: expected 1..8, or 16 for off'),
    ({'kv_bits': -4}, '--kv_bits=-4: expected 1..8, or 16 for off'),
    ({'embed_bits': 32}, '--embed_bits=32: expected 1..8, or 16 for off'),
    (
      {'low_bits': 8, 'high_bits': 4},
      '--low_bits=8 is above --high_bits=4',
    ),
    (
      {'act_high_bits': 8},
      '--act_low_bits=16 is above --act_high_bits=8',
    ),
    ({'group_size': -1}, '--group_size=-1: expected 0 or more'),
  ],
)
def test_bits_that_make_no_sense_are_refused(bits, message):
  with pytest.raises(config.UserError) as raised:
    config.QuantConfig(**bits)

  assert str(raised.value) == message


def test_which_sides_are_quantized():
  weights_only = config.QuantConfig(low_bits=4, high_bits=16)
  both = config.QuantConfig(act_low_bits=4, act_high_bits=8, kv_bits=8)

  assert (weights_only.weights_on, weights_only.acts_on) == (True, False)
  assert (both.weights_on, both.acts_on) == (True, True)
  off = both.unquantized()
  assert (off.weights_on, off.acts_on, off.kv_bits) == (False, False, 8)


NUMBER = 'expected a number above 0'


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'kind': 'all'}, "kind='all': expected one of quant, prune, joint"),
    (
      {'salient': 'random'},
      "salient='random': expected one of learned, activation, none",
    ),
    ({'start': 'hot'}, "start='hot': expected one of warm, cold"),
    ({'steps': 0}, f'--steps=0: {NUMBER}'),
    ({'batch_size': 0}, f'--batch_size=0: {NUMBER}'),
    ({'learning_rate': -1e-3}, f'--learning_rate=-0.001: {NUMBER}'),
    ({'temperature': 0.0}, f'--temperature=0.0: {NUMBER}'),
    ({'budget': 0.0}, f'--budget=0.0: {NUMBER}'),
    ({'budget': float('nan')}, f'--budget=nan: {NUMBER}'),
    (
      {'budget': 1.5},
      '--budget=1.5: expected a share of the 16-bit linears, 0 < budget <= 1',
    ),
    ({'channel_multiple': 0}, f'--channel_multiple=0: {NUMBER}'),
    ({'calibration_windows': 0}, f'--calibration_windows=0: {NUMBER}'),
    ({'checkpoint_every': 0}, f'--checkpoint_every=0: {NUMBER}'),
    ({'seq_len': 1}, '--seq_len=1: expected at least 2'),
    ({'noise_fade': 1.5}, '--noise_fade=1.5: expected 0..1'),
    (
      {'sparsity': 0.5},
      '--sparsity contradicts --search=quant: it prunes none',
    ),
    (
      {'kind': 'joint', 'sparsity': 1.0},
      '--sparsity=1.0: expected 0 <= s < 1',
    ),
  ],
)
def test_search_settings_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(config.UserError) as raised:
    config.SearchConfig(**settings)

  assert str(raised.value) == message


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'seq_len': 1}, '--eval_seq_len=1: expected at least 2'),
    ({'max_windows': -1}, '--max_eval_windows must be >= 0, '),
    ({'batch_size': 0}, '--eval_batch_size >= 1'),
  ],
)
def test_evaluation_settings_that_make_no_sense_are_refused(settings, message):
  with pytest.raises(config.UserError) as raised:
    config.EvalConfig(**settings)

  assert message in str(raised.value)


def test_settings_are_frozen_and_hashable():
  cfg = config.ModelConfig.from_hf(LLAMA31_8B)

  assert hash(cfg) == hash(dataclasses.replace(cfg))
  with pytest.raises(dataclasses.FrozenInstanceError):
    cfg.num_layers = 2
