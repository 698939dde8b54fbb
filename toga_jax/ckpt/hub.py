"""Fetches a model from the Hugging Face Hub: data files only."""

import pathlib
import socket
import urllib.parse
import urllib.request

import huggingface_hub
from huggingface_hub import constants as hub_constants
from huggingface_hub import errors as hub_errors

from toga_jax import config

_TIMEOUT_S = 5
_FILES = ['*.json', '*.safetensors']
_SKIPPED = ['consolidated*', '*/*']  # second copies of the weights


def download(repo_id: str) -> pathlib.Path:
  """The local folder of a Hub model, fetched unless the cache has it.

  Raises:
    config.UserError: no such model, no network and no copy, or a download
      that broke off.
  """
  offline = hub_constants.HF_HUB_OFFLINE or not _answers()
  try:
    folder = huggingface_hub.snapshot_download(
      repo_id,
      allow_patterns=_FILES,
      ignore_patterns=_SKIPPED,
      etag_timeout=_TIMEOUT_S,
      local_files_only=offline,
    )
  except hub_errors.HFValidationError as e:
    raise config.UserError(
      f'--model={repo_id}: neither a local path nor a Hub id'
    ) from e
  except hub_errors.RepositoryNotFoundError as e:  # gated ones too
    raise config.UserError(
      f'--model={repo_id}: no local path, and on the Hub it does not exist or '
      'asks for a login (hf auth login)'
    ) from e
  except hub_errors.LocalEntryNotFoundError as e:
    raise config.UserError(
      f'--model={repo_id}: no local path, the Hugging Face Hub is out of '
      'reach, and its cache has no full copy; download it where there is a '
      f'network (hf download {repo_id}) and give the folder'
    ) from e
  # Not every network error is an OSError: the Hub's HTTP client has its own.
  except (OSError, hub_errors.HTTPError) as e:
    reason = str(e).partition('\n')[0] or type(e).__name__
    raise config.UserError(
      f'--model={repo_id}: download failed: {reason}'
    ) from e
  return pathlib.Path(folder)


def _answers() -> bool:
  """Whether the Hub's host takes a connection.

  Asked first, because where packets vanish silently, as on many compute nodes,
  the Hub client's first request waits longer and lets no one shorten it.
  Behind a proxy the answer is yes, and the client finds out.
  """
  url = urllib.parse.urlsplit(hub_constants.ENDPOINT)
  if url.scheme in urllib.request.getproxies():
    return True
  port = url.port or (443 if url.scheme == 'https' else 80)
  try:
    socket.create_connection((url.hostname, port), _TIMEOUT_S).close()
  except OSError:
    return False
  return True
