"""Measures perplexity: of the dense model, or of a search's decision.

  python -m toga_jax.evaluate --flagfile=configs/demo.cfg [--subject=dense]

Without --subject it takes the most finished thing in --workdir: the masks of
spec.json if there are any, else the dense model. The protocol is GPTQ's (one
string, windows that do not overlap, no BOS, tail dropped); --max_eval_windows,
--eval_seq_len, --bos and --tail change it.
"""

import json
import pathlib
from typing import Any

import numpy as np

from toga_jax import api, cli, config, metrics
from toga_jax import spec as spec_lib
from toga_jax.data import text


def main(settings: config.Settings) -> dict[str, Any]:
  """The verb; returns the keys of its JSON line."""
  folder = pathlib.Path(settings.workdir)
  subject = settings.subject
  if not subject:
    subject = 'masked' if (folder / 'spec.json').exists() else 'dense'
  spec = spec_lib.load(folder) if subject == 'masked' else None
  model = api.load(settings.model, settings.dtype)
  if spec is not None:
    spec.check_model(model.fingerprint)
  tokens = api.encode(model, settings.eval_data, split_of(settings.eval_data))
  metrics.say(f'evaluate: {subject}, {len(tokens):,} tokens')
  result = row(subject, model, tokens, settings, spec)
  if folder.is_dir():
    spec_lib.write_atomically(
      folder / 'eval.json', (json.dumps(result, indent=1) + '\n').encode()
    )
  return result


def split_of(eval_data: str) -> text.Split:
  """The split results are reported on: WikiText-2's test text, as GPTQ does."""
  return 'test' if eval_data == 'wikitext2' else 'validation'


def row(
  name: str,
  model: api.Model,
  tokens: np.ndarray,
  settings: config.Settings,
  spec: spec_lib.CompressionSpec | None,
) -> dict[str, Any]:
  """One measured line of a table: a name, its size and its perplexity."""
  if spec is None:
    dense = config.QuantConfig(low_bits=16, high_bits=16)
    size = api.rule_spec(model, None, dense, settings.search).size()
  else:
    size = spec.size()
  how = settings.evaluation
  measured = api.perplexity(model, tokens, how, spec, what=name)
  return {
    'name': name,
    'perplexity': measured.perplexity,
    'windows': measured.windows,
    'eval_seq_len': how.seq_len,
    'linear_budget': size.linear_budget,
    'bits_per_weight': size.bits_per_weight,
    'average_bits': size.average_bits,
    'sparsity': size.sparsity,
    'total_bytes': size.total_bytes,
  }


if __name__ == '__main__':
  cli.main(main, __doc__)
