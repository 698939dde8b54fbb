"""Learns the compression decision of a model under a budget.

  python -m toga_jax.search --flagfile=configs/demo.cfg [--flag=override]

Trains a small hypernetwork on the model's own language-modelling loss; the
weights stay frozen. Writes spec.json and masks.npz into --workdir. The same
command again resumes, to the bit, or says that the run is done.
"""

import pathlib
from typing import Any

from toga_jax import api, budget, cli, config, metrics, workdir
from toga_jax import spec as spec_lib


def main(settings: config.Settings) -> dict[str, Any]:
  """The verb; returns the keys of its JSON line."""
  budget.check_target(settings.search, settings.quant)
  model = api.load(settings.model, settings.dtype)
  with workdir.opened(settings, model.fingerprint) as folder:
    spec = run(model, settings, folder)
  size = spec.size()
  return {
    'spec': str(folder / 'spec.json'),
    'steps': spec.made_by.get('steps', 0),
    'linear_budget': size.linear_budget,
    'bits_per_weight': size.bits_per_weight,
    'average_bits': size.average_bits,
    'sparsity': size.sparsity,
    'total_bytes': size.total_bytes,
  }


def run(
  model: api.Model, settings: config.Settings, folder: pathlib.Path
) -> spec_lib.CompressionSpec:
  """The search of a run folder: done already, resumed, or from the start."""
  if (folder / 'spec.json').exists():
    spec = spec_lib.load(folder)
    spec.check_model(model.fingerprint)
    metrics.say(f'{folder}/spec.json is there already; nothing to search')
    return spec
  search, quant = settings.search, settings.quant
  if search.salient == 'none':
    spec = api.rule_spec(model, None, quant, search)
  else:
    tokens = api.encode(model, settings.data, 'train')
    metrics.say(f'search: {len(tokens):,} training tokens')
    if search.salient == 'activation':
      stats = api.statistics(model, tokens, search)
      spec = api.rule_spec(model, stats, quant, search)
    else:
      check = api.encode(model, settings.eval_data, 'validation')
      spec = api.search_masks(model, tokens, quant, search, folder, check)
  spec.save(folder)
  return spec


if __name__ == '__main__':
  cli.main(main, __doc__)
