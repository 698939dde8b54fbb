"""The whole pipeline on one model: search, evaluate, compare.

  python -m toga_jax --flagfile=configs/demo.cfg [--flag=override]

Learns the decision, then measures it on held-out text beside the dense model,
uniform low bits and the activation rule at the same budget: same data, same
windows, same run. Rows that are measured already are not measured again.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from toga_jax import (
  api,
  budget,
  cli,
  config,
  evaluate,
  metrics,
  search,
  workdir,
)
from toga_jax import spec as spec_lib


def main(settings: config.Settings) -> dict[str, Any]:
  """The verb; returns the keys of its JSON line."""
  budget.check_target(settings.search, settings.quant)
  model = api.load(settings.model, settings.dtype)
  with workdir.opened(settings, model.fingerprint) as folder:
    learned = search.run(model, settings, folder)
    rows = _rows(model, settings, learned, folder)
  metrics.say('\n' + table(rows))
  return {'rows': rows}


def _rows(
  model: api.Model,
  settings: config.Settings,
  learned: spec_lib.CompressionSpec,
  folder: pathlib.Path,
) -> list[dict[str, Any]]:
  """Measures every row, keeping finished ones in rows.json."""
  how = settings.evaluation
  protocol = f'{settings.eval_data} {how}'
  path = folder / 'rows.json'
  saved = workdir.read_json(path, {})
  done = saved.get('rows', {}) if saved.get('protocol') == protocol else {}
  tokens = api.encode(
    model, settings.eval_data, evaluate.split_of(settings.eval_data)
  )
  for name, spec in _contenders(model, settings, learned):
    if name in done:
      continue
    done[name] = evaluate.row(name, model, tokens, settings, spec())
    text = json.dumps({'protocol': protocol, 'rows': done}, indent=1) + '\n'
    spec_lib.write_atomically(path, text.encode())
  return list(done.values())


def _contenders(
  model: api.Model,
  settings: config.Settings,
  learned: spec_lib.CompressionSpec,
):
  """(name, function that makes the spec or None) of each row."""
  quant, search_cfg = settings.quant, settings.search

  def rule():
    tokens = api.encode(model, settings.data, 'train')
    stats = api.statistics(model, tokens, search_cfg)
    return api.rule_spec(model, stats, quant, search_cfg)

  yield 'dense', lambda: None
  if search_cfg.kind == 'quant' and quant.weights_on:
    yield (
      f'uniform W{quant.low_bits}A{quant.act_low_bits}',
      lambda: api.rule_spec(model, None, quant, search_cfg),
    )
    yield 'activation rule', rule
  if learned.made_by['rule'] == 'learned':
    yield 'learned', lambda: learned


def table(rows: Sequence[Mapping[str, Any]]) -> str:
  """The rows as a Markdown table."""
  lines = [
    '| model | linear_budget | average bits | bits per weight | sparsity '
    '| total MB | perplexity |',
    '|---|---|---|---|---|---|---|',
  ]
  lines += [
    f'| {r["name"]} | {r["linear_budget"]:.5f} | {r["average_bits"]:.3f} '
    f'| {r["bits_per_weight"]:.3f} | {r["sparsity"]:.3f} '
    f'| {r["total_bytes"] / 1e6:.1f} | {r["perplexity"]:.2f} |'
    for r in rows
  ]
  return '\n'.join(lines)


if __name__ == '__main__':
  cli.main(main, __doc__)
