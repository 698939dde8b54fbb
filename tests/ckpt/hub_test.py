import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time

import huggingface_hub
import pytest

from toga_jax import config
from toga_jax.ckpt import hub, load


def open_fails(model, *parts):
  """How `open_checkpoint` fails; it has seconds to do so."""
  start = time.monotonic()
  with pytest.raises(config.UserError) as e:
    load.open_checkpoint(str(model))
  assert time.monotonic() - start < 5
  assert '\n' not in str(e.value)
  for part in parts:
    assert part in str(e.value)


def test_names_that_are_not_hub_ids_either():
  open_fails('what is this?', 'neither a local path nor a Hub id')


def test_hub_model_is_downloaded_and_opened(monkeypatch, write_hf, tensors):
  folder = write_hf(tensors)
  asked = {}

  def snapshot_download(repo_id, **kwargs):
    asked.update(kwargs, repo_id=repo_id)
    return str(folder)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
  monkeypatch.setattr(hub, '_answers', lambda: True)
  ckpt = load.open_checkpoint('some/model')
  assert ckpt.path == folder
  assert asked['repo_id'] == 'some/model'
  assert asked['allow_patterns'] == ['*.json', '*.safetensors']
  assert not asked['local_files_only']


OPEN = """
import sys, time
from toga_jax.ckpt import load

start = time.monotonic()
try:
  load.open_checkpoint(sys.argv[1])
except ValueError as e:
  print(time.monotonic() - start)
  print(e)
"""


def test_offline_mode_fails_at_once(tmp_path):
  # A process of its own: the client reads its environment once.
  env = {
    'HF_HUB_OFFLINE': '1',
    'HF_HOME': str(tmp_path),
    'JAX_PLATFORMS': 'cpu',
  }
  done = subprocess.run(
    [sys.executable, '-c', OPEN, 'nobody/no-model'],
    capture_output=True,
    text=True,
    check=False,
    env=os.environ | env,
  )
  assert done.returncode == 0, done.stderr
  seconds, *lines = done.stdout.splitlines()
  assert float(seconds) < 2
  assert len(lines) == 1
  assert 'hf download nobody/no-model' in lines[0]


@pytest.fixture
def hub_at(monkeypatch, tmp_path):
  """Points the Hub client at another address, with an empty cache."""

  def point(url):
    for key in ('http_proxy', 'https_proxy', 'all_proxy'):
      monkeypatch.delenv(key, raising=False)
      monkeypatch.delenv(key.upper(), raising=False)
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setattr(constants, 'ENDPOINT', url)

  return point


def test_no_network_fails_at_once(hub_at):
  with socket.socket() as free:  # a port where nobody listens
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  hub_at(f'http://127.0.0.1:{port}')
  open_fails('nobody/no-such-model', 'out of reach', 'hf download')


def test_vanishing_packets_fail_within_seconds(hub_at, monkeypatch):
  hub_at('https://hub.example')
  asked = []

  def vanish(address, timeout):
    asked.append((address, timeout))
    raise TimeoutError

  monkeypatch.setattr(socket, 'create_connection', vanish)
  open_fails('nobody/no-such-model', 'out of reach')
  assert asked == [(('hub.example', 443), 5)]


@pytest.fixture
def fake_hub(hub_at):
  """A server that answers every request with a status and headers."""

  class Handler(http.server.BaseHTTPRequestHandler):
    status, code = 404, 'RepoNotFound'

    def do_GET(self):
      self.send_response(self.status)
      self.send_header('X-Error-Code', self.code)
      self.send_header('Content-Length', '0')
      self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  hub_at(f'http://127.0.0.1:{server.server_port}')
  yield Handler
  server.shutdown()
  thread.join()
  server.server_close()


@pytest.mark.parametrize(
  ('status', 'code'), [(404, 'RepoNotFound'), (403, 'GatedRepo')]
)
def test_hub_says_no(fake_hub, status, code):
  fake_hub.status, fake_hub.code = status, code
  open_fails('nobody/no-such-model', 'does not exist or asks for a login')


def test_hub_is_broken(fake_hub):
  fake_hub.status, fake_hub.code = 500, ''
  open_fails('nobody/no-such-model', 'nobody/no-such-model', 'hf download')


def test_cached_hub_model_opens_offline(hub_at, tmp_path, write_hf, tensors):
  hub_at('http://127.0.0.1:1')
  folder = write_hf(tensors)
  commit = '0' * 40
  cache = tmp_path / 'cache' / 'models--some--model'
  (cache / 'refs').mkdir(parents=True)
  (cache / 'refs' / 'main').write_text(commit)
  (cache / 'snapshots').mkdir()
  folder.rename(cache / 'snapshots' / commit)
  trees = cache / 'trees'  # what the newest clients check completeness by
  trees.mkdir()
  (trees / f'{commit}.json').write_text(json.dumps({}))
  ckpt = load.open_checkpoint('some/model')
  assert ckpt.names() == sorted(tensors)
