"""Measures perplexity: of the dense model, of a decision, of a packed model.

  python -m toga_jax.evaluate --flagfile=configs/demo.cfg [--subject=dense]

Without --subject it takes the most finished thing in --workdir: the packed
model, else the masks of spec.json, else the dense model. The protocol is GPTQ's
(one string, windows that do not overlap, no BOS, tail dropped);
--max_eval_windows, --eval_seq_len, --bos and --tail change it. A packed model
is also compared with the dense one, on --drift_windows windows.
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from toga_jax import api, budget, cli, config, metrics
from toga_jax import spec as spec_lib
from toga_jax.data import text


def main(settings: config.Settings) -> dict[str, Any]:
  """The verb; returns the keys of its JSON line."""
  folder = pathlib.Path(settings.workdir)
  source = pathlib.Path(settings.spec or settings.workdir)
  subject = settings.subject or _most_finished(folder, source)
  spec = spec_lib.load(source) if subject == 'masked' else None
  packed = None
  if subject == 'packed':
    packed = api.load_packed(folder / 'packed', settings.dtype)
  model = api.load(settings.model, settings.dtype)
  if spec is not None:
    spec.check_model(model.fingerprint)
  tokens = api.encode(model, settings.eval_data, split_of(settings.eval_data))
  metrics.say(f'evaluate: {subject}, {len(tokens):,} tokens')
  if packed is not None:
    result = packed_row(subject, model, packed, tokens, settings)
  else:
    result = row(subject, model, tokens, settings, spec)
  if folder.is_dir():
    spec_lib.write_atomically(
      folder / 'eval.json', (json.dumps(result, indent=1) + '\n').encode()
    )
  return result


def _most_finished(folder: pathlib.Path, source: pathlib.Path) -> str:
  if (folder / 'packed').exists():
    return 'packed'
  return 'masked' if (source / 'spec.json').exists() else 'dense'


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
  counted = spec
  if spec is None:
    dense = config.QuantConfig(low_bits=16, high_bits=16)
    counted = api.rule_spec(model, None, dense, settings.search)
  how, kv_bits = settings.evaluation, settings.quant.kv_bits
  measured = api.perplexity(model, tokens, how, spec, name, kv_bits)
  act_bits = budget.average_act_bits(
    counted.quant, counted.kept_counts(), counted.salient_counts()
  )
  return {
    'name': name,
    **_measured(measured, settings),
    **_counted(counted.size()),
    'act_bits': act_bits,
    'kv_bits': kv_bits,
  }


def packed_row(
  name: str,
  model: api.Model,
  packed: api.Packed,
  tokens: np.ndarray,
  settings: config.Settings,
) -> dict[str, Any]:
  """`row` for a packed model, with its bytes on disk and its drift."""
  kv_bits = settings.quant.kv_bits
  manifest = packed.manifest
  if manifest.fingerprint != model.fingerprint:
    raise config.UserError(
      f'the packed model was made from model {manifest.fingerprint[:12]}, '
      f'--model is {model.fingerprint[:12]}'
    )
  how = settings.evaluation
  measured = api.packed_perplexity(packed, tokens, how, kv_bits, name)
  result = {
    'name': name,
    **_measured(measured, settings),
    **_counted(manifest.size()),
    'act_bits': manifest.average_act_bits(),
    'kv_bits': kv_bits,
    'disk_bytes': manifest.disk_bytes,
  }
  if settings.drift_windows:
    few = dataclasses.replace(how, max_windows=settings.drift_windows)
    moved = api.drift(model, packed, tokens, few, kv_bits)
    result['drift'] = dataclasses.asdict(moved)
  return result


def _measured(measured: Any, settings: config.Settings) -> dict[str, Any]:
  return {
    'perplexity': measured.perplexity,
    'windows': measured.windows,
    'eval_seq_len': settings.evaluation.seq_len,
  }


def _counted(size: budget.Size) -> dict[str, Any]:
  names = (
    'linear_budget bits_per_weight average_bits sparsity total_bytes'
  ).split()
  return {name: getattr(size, name) for name in names}


if __name__ == '__main__':
  cli.main(main, __doc__)
