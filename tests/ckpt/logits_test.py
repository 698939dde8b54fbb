"""Loaded models against PyTorch's, by their logits."""

import jax.numpy as jnp
import numpy as np
import pytest

from toga_jax.ckpt import load
from toga_jax.model import llama

LINEAR = {'rope_type': 'linear', 'factor': 4.0, 'rope_theta': 1e4}
# Wavelengths of these heads are 6, 63, 628 and 6283: below 32 stays, above 128
# is scaled, 63 lies between.
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 128,
  'rope_theta': 1e4,
}


@pytest.mark.parametrize(
  ('model', 'changes'),
  [
    ('Llama', {}),
    ('Llama', {'tie_word_embeddings': True}),
    ('Llama', {'rope_parameters': LINEAR}),
    ('Llama', {'rope_parameters': LLAMA3}),
    ('Mistral', {'sliding_window': None}),
    ('Qwen2', {}),
    ('Qwen3', {'rms_norm_eps': 1e-3}),
  ],
)
def test_logits_equal_the_torch_model(tmp_path, raw_config, model, changes):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  torch.manual_seed(5)
  raw = raw_config | changes
  del raw['architectures'], raw['model_type']
  if 'rope_parameters' in changes:
    del raw['rope_theta']
  cfg = getattr(transformers, f'{model}Config')(**raw)
  # float32 in one fixed order of operations; no fused attention.
  cfg._attn_implementation = 'eager'
  net = getattr(transformers, f'{model}ForCausalLM')(cfg).eval()
  for p in net.parameters():
    torch.nn.init.normal_(p, mean=1.0 if p.ndim == 1 else 0.0, std=0.2)
  net.save_pretrained(tmp_path)
  tokens = np.random.default_rng(6).integers(0, 50, (2, 40))
  with torch.no_grad():
    expected = net(torch.tensor(tokens)).logits.numpy()

  ckpt = load.open_checkpoint(str(tmp_path))
  weights = load.load_params(ckpt)
  ours = llama.logits(weights, ckpt.config, jnp.asarray(tokens, jnp.int32))
  assert expected.std() > 0.5
  np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-4)


def test_the_demo_knows_the_capital_of_france(demo):
  tokenizer = demo.tokenizer()
  tokens = tokenizer.encode('The capital of France is')[None]
  weights = load.load_params(demo)
  logits = llama.logits(weights, demo.config, jnp.asarray(tokens))
  assert tokenizer.decode(logits[0, -1:].argmax(-1)) == ' Paris'
