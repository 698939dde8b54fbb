"""Shared fixtures; shapes in annotations are checked while tests run."""

import os

import jaxtyping

# Tiny programs take longer to optimise than to run. The programs that tests
# start inherit it.
os.environ.setdefault('XLA_FLAGS', '--xla_backend_optimization_level=0')

# Before toga_jax is imported: every jaxtyping annotation becomes a check here,
# and stays free in production.
jaxtyping.install_import_hook('toga_jax', 'beartype.beartype')

import jax  # noqa: E402  (the hook above must come first)
import pytest  # noqa: E402

from tests import tiny  # noqa: E402


def pytest_addoption(parser):
  parser.addoption(
    '--slow', action='store_true', help='also run tests that take minutes'
  )


def pytest_collection_modifyitems(config, items):
  has_gpu = jax.default_backend() == 'gpu'
  for item in items:
    if 'slow' in item.keywords and not config.getoption('--slow'):
      item.add_marker(pytest.mark.skip(reason='slow: run with --slow'))
    if 'gpu' in item.keywords and not has_gpu:
      item.add_marker(pytest.mark.skip(reason='no CUDA device here'))


@pytest.fixture(scope='session')
def cfg():
  """A tiny model's shape: grouped queries, tied head, no two sizes equal."""
  return tiny.config()


@pytest.fixture(scope='session')
def weights(cfg):
  """Random weights for `cfg`."""
  return tiny.weights(cfg)
