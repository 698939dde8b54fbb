import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from toga_jax import config
from toga_jax.ckpt import gguf

DOWN = 'model.layers.1.mlp.down_proj.weight'


def fails(path, *parts):
  """The one-line message with which opening `path` fails."""
  with pytest.raises(config.UserError) as e:
    gguf.GGUFCheckpoint(path)
  message = str(e.value)
  assert '\n' not in message
  for part in parts:
    assert part in message
  return message


@pytest.mark.parametrize(
  ('kind', 'dtype'),
  [('F32', np.float32), ('F16', np.float16), ('BF16', ml_dtypes.bfloat16)],
)
def test_float_tensors_come_back_exactly(write_gguf, tensors, kind, dtype):
  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors, kind=kind))
  assert ckpt.names() == sorted(tensors)
  for name, x in tensors.items():
    assert ckpt.shape(name) == x.shape
    read = ckpt.read(name)
    assert read.dtype == (dtype if x.ndim == 2 else np.float32)
    # Random normals of 8 bits' precision are exact in float16, but for the
    # few below its smallest normal number.
    np.testing.assert_allclose(read.astype(np.float32), x, rtol=0, atol=6e-8)


@pytest.mark.parametrize(
  ('kind', 'levels'),
  # Half a step, a step being the largest of 32 values over this many.
  [('Q8_0', 127), ('Q4_0', 7.5), ('Q4_1', 15), ('Q5_0', 15.5), ('Q5_1', 31)],
)
def test_packed_tensors_come_back_within_half_a_step(
  write_gguf, tensors, kind, levels
):
  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors, kind=kind))
  for name, x in tensors.items():
    read = ckpt.read(name)
    assert read.dtype == np.float32
    assert read.shape == ckpt.shape(name) == x.shape
    if x.ndim == 1:
      np.testing.assert_array_equal(read, x)
      continue
    blocks = x.reshape(-1, 32)
    # With an offset (_1), the range; without, twice the largest.
    span = np.ptp(blocks, 1) if kind[-1] == '1' else 2 * np.abs(blocks).max(1)
    step = span / levels if kind[-1] == '1' else span / (2 * levels)
    error = np.abs(read - x).reshape(-1, 32).max(1)
    # Q4_0 and Q5_0 reach one step less on one side; scales are float16.
    slack = 1.02 if kind in ('Q4_0', 'Q5_0') else 0.51
    assert np.all(error <= slack * step + 2e-3 * span)
    assert error.max() > 0  # it was packed at all


def test_k_quants(write_gguf, tensors):
  """Q6_K: 256 values of 6 bits, 16 scales of 8 bits, one of 16."""
  rng = np.random.default_rng(1)
  rows = []
  expected = np.zeros((5, 256), np.float32)
  for row in range(5):
    low = rng.integers(0, 256, 128, dtype=np.uint8)
    high = rng.integers(0, 256, 64, dtype=np.uint8)
    scales = rng.integers(-128, 128, 16).astype(np.int8)
    scale = np.float16(rng.uniform(0.01, 0.1))
    for n in range(256):
      half, place = divmod(n, 128)
      quarter, j = divmod(place, 32)
      four = low[64 * half + 32 * (quarter % 2) + j] >> (4 * (quarter // 2))
      two = high[32 * half + j] >> (2 * quarter)
      value = int(four & 15) + 16 * int(two & 3) - 32
      expected[row, n] = np.float32(scale) * scales[n // 16] * value
    parts = (low, high, scales, np.array([scale]))
    rows.append(np.concatenate([p.view(np.uint8) for p in parts]))
  del tensors[DOWN]

  def add(writer):
    writer.add_tensor(
      'blk.1.ffn_down.weight',
      np.stack(rows),
      raw_dtype=GGMLQuantizationType.Q6_K,
    )

  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors, edit=add))
  assert ckpt.shape(DOWN) == (5, 256)
  np.testing.assert_allclose(ckpt.read(DOWN), expected, rtol=1e-6)


def test_biases_of_q_and_k_are_permuted_back_too(write_gguf, tensors, table):
  rng = np.random.default_rng(2)
  for name, (shape, _) in table(biases=True).items():
    if name.endswith('bias'):
      tensors[name] = rng.normal(size=shape).astype(np.float32)
  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors))
  # Llama with these biases is Qwen2's block.
  assert ckpt.config.architecture == 'Qwen2ForCausalLM'
  assert ckpt.config.attention_bias
  for name, x in tensors.items():
    np.testing.assert_array_equal(ckpt.read(name), x)


@pytest.mark.parametrize(
  ('arch', 'kwargs'),
  [('qwen2', {'biases': True}), ('qwen3', {'qk_norms': True})],
)
def test_qwen_files_are_not_permuted(write_gguf, table, arch, kwargs):
  rng = np.random.default_rng(3)
  tensors = {
    name: rng.normal(size=shape).astype(np.float32)
    for name, (shape, _) in table(**kwargs).items()
  }
  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors, arch=arch))
  assert ckpt.config.architecture.lower() == f'{arch}forcausallm'
  assert ckpt.names() == sorted(tensors)
  for name, x in tensors.items():
    np.testing.assert_array_equal(ckpt.read(name), x)


def test_config_equals_the_hf_one(write_gguf, tensors, raw_config):
  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors))
  assert ckpt.config == config.ModelConfig.from_hf(raw_config)


def test_without_an_output_matrix_the_model_is_tied(write_gguf, tensors):
  del tensors['lm_head.weight']
  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors))
  assert ckpt.config.tie_embeddings
  assert ckpt.raw_config['tie_word_embeddings'] is True


def test_sizes_that_have_defaults(write_gguf, tensors):
  skip = (
    'attention.head_count_kv',
    'attention.key_length',
    'attention.value_length',
  )
  cfg = gguf.GGUFCheckpoint(write_gguf(tensors, skip=skip)).config
  assert cfg.num_kv_heads == 4
  assert cfg.head_dim == 16


def test_eos_ids_are_all_that_end_a_turn(write_gguf, tensors):
  def edit(writer):
    writer.add_uint32('tokenizer.ggml.eot_token_id', 7)
    writer.add_uint32('tokenizer.ggml.eom_token_id', 2)

  cfg = gguf.GGUFCheckpoint(write_gguf(tensors, edit=edit)).config
  assert cfg.eos_ids == (2, 7)


def llama3_factors(theta, head_dim, factor, low, high, original):
  """The divisors as Llama 3.1's own rule gives them, one at a time."""
  factors = []
  for i in range(head_dim // 2):
    wavelength = 2 * np.pi * theta ** (2 * i / head_dim)
    if wavelength < original / high:
      factors.append(1.0)
    elif wavelength > original / low:
      factors.append(factor)
    else:
      smooth = (original / wavelength - low) / (high - low)
      factors.append(1 / ((1 - smooth) / factor + smooth))
  return np.array(factors, np.float32)


def write_scaled(write_gguf, tensors, factors):
  # A head of 64, as Llama 3.2: 8 would leave no frequency in the middle.
  def edit(writer):
    writer.add_uint32('llama.attention.key_length', 64)
    writer.add_uint32('llama.attention.value_length', 64)
    writer.add_tensor('rope_freqs.weight', factors)

  skip = ('attention.key_length', 'attention.value_length')
  return write_gguf(tensors, edit=edit, skip=skip)


def test_llama3_rope_scaling_is_found_again(write_gguf, tensors):
  factors = llama3_factors(50000.0, 64, 32.0, 1.0, 4.0, 8192)
  assert ((factors > 1) & (factors < 32)).sum() > 0
  ckpt = gguf.GGUFCheckpoint(write_scaled(write_gguf, tensors, factors))
  assert ckpt.config.rope_scaling == config.RopeScaling(
    kind='llama3',
    factor=32.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_positions=8192,
  )
  assert 'rope_freqs.weight' not in ckpt.names()


def test_rope_factors_of_one_are_no_scaling(write_gguf, tensors):
  path = write_scaled(write_gguf, tensors, np.ones(32, np.float32))
  assert gguf.GGUFCheckpoint(path).config.rope_scaling is None


@pytest.mark.parametrize('size', [32, 31])
def test_other_rope_factors_are_refused(write_gguf, tensors, size):
  factors = llama3_factors(50000.0, 64, 32.0, 1.0, 8.0, 8192)[:size]
  path = write_scaled(write_gguf, tensors, factors)
  fails(path, 'rope_freqs.weight', 'llama3')


def test_linear_rope_scaling(write_gguf, tensors):
  def edit(writer):
    writer.add_string('llama.rope.scaling.type', 'linear')
    writer.add_float32('llama.rope.scaling.factor', 4.0)

  cfg = gguf.GGUFCheckpoint(write_gguf(tensors, edit=edit)).config
  assert cfg.rope_scaling == config.RopeScaling(kind='linear', factor=4.0)


@pytest.mark.parametrize(
  ('edit', 'parts'),
  [
    (lambda w: w.add_string('llama.rope.scaling.type', 'yarn'), ['yarn']),
    (lambda w: w.add_uint32('llama.expert_count', 8), ['mixture of experts']),
    (lambda w: w.add_uint16('split.count', 3), ['one of 3 parts', 'merge']),
    (
      lambda w: w.add_uint32('llama.rope.dimension_count', 4),
      ['llama.rope.dimension_count=4', 'head size 8'],
    ),
    (
      lambda w: w.add_uint32('llama.attention.sliding_window', 16),
      ['sliding_window=16'],
    ),
  ],
)
def test_unsupported_settings(write_gguf, tensors, edit, parts):
  fails(write_gguf(tensors, edit=edit), *parts)


def test_layers_that_differ_are_refused(write_gguf, tensors):
  path = write_gguf(
    tensors,
    edit=lambda w: w.add_array('llama.feed_forward_length', [96, 64, 96]),
    skip=('feed_forward_length',),
  )
  fails(path, 'llama.feed_forward_length differs between layers')


def test_missing_setting(write_gguf, tensors):
  path = write_gguf(tensors, skip=('block_count',))
  fails(path, 'has no llama.block_count')


def test_unsupported_architecture(write_gguf):
  fails(write_gguf({}, arch='mamba'), 'mamba', 'llama', 'qwen2')


def test_missing_embedding(write_gguf, tensors):
  del tensors['model.embed_tokens.weight']
  fails(write_gguf(tensors), 'has no tensor token_embd.weight')


def test_unsupported_tensor_type(write_gguf, tensors):
  path = write_gguf(tensors, kind='F32')
  kinds = ['blk.0.ffn_up.weight has type I32', 'Q4_0', 'BF16']
  edited = write_gguf(
    {n: x for n, x in tensors.items() if 'layers.0.mlp.up' not in n},
    edit=lambda w: w.add_tensor(
      'blk.0.ffn_up.weight', np.zeros((96, 64), np.int32)
    ),
  )
  assert edited == path
  fails(edited, *kinds)


def test_missing_file(tmp_path):
  fails(tmp_path / 'no.gguf', 'no.gguf: no such file')


@pytest.mark.parametrize('data', [b'', b'GGU', b'PK\x03\x04' + bytes(100)])
def test_not_a_gguf(tmp_path, data):
  (tmp_path / 'x.gguf').write_bytes(data)
  fails(tmp_path / 'x.gguf', 'x.gguf is not a GGUF file')


def test_git_lfs_pointer(tmp_path):
  text = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'
  (tmp_path / 'x.gguf').write_text(text)
  fails(tmp_path / 'x.gguf', 'git lfs pull')


@pytest.mark.parametrize('share', [0.0, 0.01, 0.02, 0.05, 0.5, 0.9999])
def test_truncated_file(write_gguf, tensors, share):
  path = write_gguf(tensors)
  data = path.read_bytes()
  path.write_bytes(data[: max(4, int(len(data) * share))])
  fails(path, 'llama.gguf is truncated')


def test_tensors_without_a_name_in_the_table_keep_theirs(write_gguf, tensors):
  path = write_gguf(
    tensors,
    edit=lambda w: w.add_tensor('blk.0.extra.weight', np.zeros(3, np.float32)),
  )
  ckpt = gguf.GGUFCheckpoint(path)
  assert 'blk.0.extra.weight' in ckpt.names()


def test_fingerprint_tells_kinds_apart(write_gguf, tensors):
  prints = set()
  for kind in ('F32', 'F16', 'F32'):
    path = write_gguf(tensors, kind=kind)
    prints.add(gguf.GGUFCheckpoint(path).fingerprint())
  assert len(prints) == 2


def add_vocab(kind, tokens, pre=None, merges=None, scores=None):
  def edit(writer: GGUFWriter):
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    if pre:
      writer.add_tokenizer_pre(pre)
    if merges:
      writer.add_token_merges(merges)
    if scores:
      writer.add_token_scores(scores)

  return edit


def test_byte_level_tokenizer(write_gguf, tensors):
  edit = add_vocab('gpt2', ['a', 'b', 'ab'], 'gpt-2', merges=['a b'])
  tokenizer = gguf.GGUFCheckpoint(write_gguf(tensors, edit=edit)).tokenizer()
  assert tokenizer.encode('abb').tolist() == [2, 1]
  assert tokenizer.bos_id == 1
  assert tokenizer.eos_ids == (2,)


def test_sentencepiece_tokenizer(write_gguf, tensors):
  edit = add_vocab(
    'llama', ['\u2581', 'b', '\u2581b'], scores=[-1.0, -2.0, -3.0]
  )
  tokenizer = gguf.GGUFCheckpoint(write_gguf(tensors, edit=edit)).tokenizer()
  assert tokenizer.encode('bb').tolist() == [2, 1]


@pytest.mark.parametrize(
  ('edit', 'message'),
  [
    (lambda w: None, 'tokenizer None is not supported; known: gpt2, llama'),
    (add_vocab('bert', ['a']), "tokenizer 'bert' is not supported"),
    (add_vocab('gpt2', ['a']), 'has no tokenizer.ggml.merges'),
    (add_vocab('llama', ['a']), 'has no tokenizer.ggml.scores'),
    (
      add_vocab('gpt2', ['a'], 'klingon', merges=['a a']),
      "pre-tokenizer 'klingon' is not supported; known: default, gpt-2, smollm",
    ),
  ],
)
def test_unusable_vocabularies(write_gguf, tensors, edit, message):
  ckpt = gguf.GGUFCheckpoint(write_gguf(tensors, edit=edit))
  with pytest.raises(config.UserError, match=message):
    ckpt.tokenizer()


def test_demo_file(demo):
  assert demo.config.num_layers == 30
  assert demo.config.hidden_size == 576
  assert demo.config.num_kv_heads == 3
  assert demo.config.tie_embeddings
  assert demo.config.rms_norm_eps == 1e-5
  assert len(demo.names()) == 272
  assert demo.shape('model.embed_tokens.weight') == (49152, 576)
  k = demo.read('model.layers.29.self_attn.k_proj.weight')
  assert k.shape == (192, 576)
  assert np.isfinite(k).all()
  assert 0.01 < k.std() < 1
