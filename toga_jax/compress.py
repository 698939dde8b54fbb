"""Applies a decision for good: spec and weights become a packed checkpoint.

  python -m toga_jax.compress --flagfile=configs/demo.cfg [--gptq=false]

Cuts channels out, puts the rest in order, rounds block by block with GPTQ on
--gptq_windows windows of --data, and writes --workdir/packed. The same command
resumes behind the last finished block. The decision is that of --workdir, or of
the folder --spec names.
"""

import dataclasses
import pathlib
import time
from typing import Any

from toga_jax import api, cli, config, metrics, workdir
from toga_jax import spec as spec_lib
from toga_jax.ckpt import store


def main(settings: config.Settings) -> dict[str, Any]:
  """The verb; returns the keys of its JSON line."""
  source = pathlib.Path(settings.spec or settings.workdir)
  spec = spec_lib.load(source)
  model = api.load(settings.model, settings.dtype)
  spec.check_model(model.fingerprint)
  # --overwrite here replaces the packed model; the search's files stay.
  kept = dataclasses.replace(settings, overwrite=False)
  with workdir.opened(kept, model.fingerprint) as folder:
    start = time.monotonic()
    manifest = run(model, settings, spec, folder)
    seconds = time.monotonic() - start
  size = manifest.size()
  return {
    'packed': str(folder / 'packed'),
    'total_bytes': size.total_bytes,
    'disk_bytes': manifest.disk_bytes,
    'linear_budget': size.linear_budget,
    'bits_per_weight': size.bits_per_weight,
    'average_bits': size.average_bits,
    'sparsity': size.sparsity,
    'seconds': seconds,
    'peak_bytes': metrics.peak_bytes(),
  }


def run(
  model: api.Model,
  settings: config.Settings,
  spec: spec_lib.CompressionSpec,
  folder: pathlib.Path,
) -> store.Manifest:
  """Compresses into a run folder: done already, resumed, or from the start."""
  spec = api.compressed_spec(spec, settings.quant)
  tokens = None
  if spec.quant.weights_on:
    tokens = api.encode(model, settings.data, 'train')
  return api.compress_model(
    model,
    tokens,
    spec,
    settings.compress,
    folder / 'packed',
    data=settings.data,
    overwrite=settings.overwrite,
  )


if __name__ == '__main__':
  cli.main(main, __doc__)
