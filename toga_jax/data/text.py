"""Raw text by name: the demo sample, a Hub data set, or local files."""

import bz2
import dataclasses
import functools
import glob
import importlib.util
import json
import pathlib
import ssl
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from toga_jax import config
from toga_jax.data import wiki

Split = Literal['train', 'validation', 'test']

_DEMO_FILE = 'test/test_data/enwiki-latest-pages-articles1.xml-*-shortened.bz2'
_DEMO_VALIDATION_EVERY = 10  # articles
_DEMO_MIN_CHARS = 1000  # less is a stub or a page of links
_HUB_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _HubSet:
  """Where a data set lies on the Hub, and how GPTQ makes one string of it."""

  repo: str
  config_name: str | None = None
  splits: Mapping[Split, Split]  # ours -> theirs
  files: Mapping[Split, str] | None = None  # None = all files of the split
  max_documents: Mapping[Split, int] = dataclasses.field(default_factory=dict)
  joint: str = '\n\n'


_HUB_SETS = {
  'wikitext2': _HubSet(
    repo='Salesforce/wikitext',
    config_name='wikitext-2-raw-v1',
    splits={'train': 'train', 'validation': 'validation', 'test': 'test'},
  ),
  'c4': _HubSet(
    repo='allenai/c4',
    splits={'train': 'train', 'validation': 'validation', 'test': 'validation'},
    files={
      'train': 'en/c4-train.00000-of-01024.json.gz',
      'validation': 'en/c4-validation.00000-of-00008.json.gz',
    },
    # Validation is what GPTQ scores (256 windows of it). It trains on single
    # documents of the first shard; 50,000 of 356,000 are 25 million tokens.
    max_documents={'train': 50_000, 'validation': 1100},
    joint=' ',
  ),
}
KNOWN = ('demo', *_HUB_SETS)


def load_text(name: str, split: Split) -> str:
  r"""One string: all documents of a split, joined.

  | name        | what                                   | joined by |
  |-------------|----------------------------------------|-----------|
  | `demo`      | Wikipedia articles, see below          | `\n\n`    |
  | `wikitext2` | rows of WikiText-2 raw                 | `\n\n`    |
  | `c4`        | of the first shard of C4, see _HUB_SETS| a space   |
  | a path      | a file as it is; `.jsonl`: its `text`s | `\n\n`    |
  | a glob      | the matching files, sorted by path     | `\n\n`    |

  `demo` is the English Wikipedia sample in the gensim wheel (CC BY-SA), reduced
  to prose. Every tenth article is for validation: 85 articles, 2.45 million
  characters to train on; 10 articles, 0.27 million to validate.

  Local files know no splits: each split is the same text. `demo` and `c4` have
  no test split; theirs is the validation split.

  Args:
    name: one of `KNOWN`, a path, or a glob.
    split: which part.

  Raises:
    UserError: no such data, not reachable, not readable, or empty.
  """
  joint = _HUB_SETS[name].joint if name in _HUB_SETS else '\n\n'
  text = joint.join(load_documents(name, split))
  if not text.strip():
    raise config.UserError(f'data {name!r}: the text is empty')
  return text


def load_documents(name: str, split: Split) -> list[str]:
  """The documents that `load_text` joins: articles, rows, lines or files."""
  assert split in get_args(Split), split
  if name == 'demo':
    return _demo_documents(is_train=split == 'train')
  if name in _HUB_SETS:
    return _hub_documents(name, split)
  return [document for path in _paths(name) for document in _read(path)]


# Local files.


def _paths(name: str) -> list[pathlib.Path]:
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    raise config.UserError(
      f'data {name!r} is a folder: expected a file, or a glob such as '
      f'{str(path / "*.txt")!r}'
    )
  if path.exists():
    return [path]
  if glob.has_magic(name):
    matches = glob.glob(str(path), recursive=True)
    paths = [p for p in map(pathlib.Path, sorted(matches)) if p.is_file()]
    if not paths:
      raise config.UserError(f'data {name!r}: no file matches')
    return paths
  raise config.UserError(
    f'data {name!r}: no such file, and no known name; known: {", ".join(KNOWN)}'
  )


def _read(path: pathlib.Path) -> list[str]:
  try:
    text = path.read_bytes().decode('utf-8-sig')
  except OSError as e:
    raise config.UserError(f'cannot read {path}: {e.strerror}') from e
  except UnicodeDecodeError as e:
    raise config.UserError(
      f'{path} is not UTF-8 text: bad byte at offset {e.start}'
    ) from e
  return list(_jsonl(path, text)) if path.suffix == '.jsonl' else [text]


def _jsonl(path: pathlib.Path, text: str) -> Iterator[str]:
  # Not splitlines(): JSON strings may hold other line separators as they are.
  for number, line in enumerate(text.split('\n'), start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except json.JSONDecodeError as e:
      raise config.UserError(
        f'{path}, line {number}: not JSON: {e.msg} at column {e.colno}'
      ) from e
    if not isinstance(row, dict) or not isinstance(row.get('text'), str):
      raise config.UserError(
        f"{path}, line {number}: expected an object with a string 'text'"
      )
    yield row['text']


# The demo: articles of a Wikipedia dump.


def _demo_documents(*, is_train: bool) -> list[str]:
  # By place in the dump, so that better cleaning moves no article across.
  return [
    f'{title}\n\n{prose}'
    for i, (title, prose) in enumerate(_demo_articles())
    if (i % _DEMO_VALIDATION_EVERY != 0) == is_train
    and len(prose) >= _DEMO_MIN_CHARS
  ]


@functools.cache  # both splits come from one pass, about two seconds
def _demo_articles() -> tuple[tuple[str, str], ...]:
  """(title, prose) of each article in the dump, short ones included."""
  # Found, not imported: the wheel is wanted for this file only.
  spec = importlib.util.find_spec('gensim')
  roots = list(spec.submodule_search_locations or []) if spec else []
  files = [f for r in roots for f in pathlib.Path(r).glob(_DEMO_FILE)]
  if not files:
    raise config.UserError(
      "data 'demo' is a file of the gensim wheel, which is not installed: "
      "pip install 'toga_jax[demo]'"
    )
  with bz2.open(files[0]) as dump:
    return tuple((t, wiki.to_prose(source)) for t, source in _articles(dump))


def _articles(dump) -> Iterator[tuple[str, str]]:
  """(title, wikitext) of each page that is an article and no redirect."""
  for _, page in ET.iterparse(dump):
    if page.tag.endswith('}page'):
      is_article = page.findtext('{*}ns') == '0'
      if is_article and page.find('{*}redirect') is None:
        source = page.findtext('{*}revision/{*}text') or ''
        yield page.findtext('{*}title') or '', source
      page.clear()


# The Hub.


def _hub_documents(name: str, split: Split) -> list[str]:
  _check_hub_answers(name)
  # Imported here: it takes a second, and most runs read local text.
  import datasets

  source = _HUB_SETS[name]
  theirs = source.splits[split]
  try:
    rows = datasets.load_dataset(
      source.repo,
      source.config_name,
      split=theirs,
      data_files={theirs: source.files[theirs]} if source.files else None,
      # One shard has fewer rows than the data set's card promises.
      verification_mode='no_checks',
    )
  except (OSError, ValueError, datasets.exceptions.DatasetsError) as e:
    reason = str(e).partition('\n')[0]
    raise config.UserError(_no_hub(name, reason)) from e
  return rows[: source.max_documents.get(theirs)]['text']


def _check_hub_answers(name: str) -> None:
  """Raises UserError if no Hub answers; `datasets` would retry for 23 s."""
  from huggingface_hub import constants

  if constants.HF_HUB_OFFLINE:
    return  # the cache is read, which fails at once
  request = urllib.request.Request(constants.ENDPOINT, method='HEAD')
  try:
    urllib.request.urlopen(request, timeout=_HUB_TIMEOUT_S).close()
  except urllib.error.HTTPError:
    return  # an answer
  except OSError as e:
    reason = getattr(e, 'reason', e)
    # Whether to trust the answer is for the Hub's client, with its own
    # certificates, to say.
    if not isinstance(reason, ssl.SSLError):
      message = _no_hub(name, f'{constants.ENDPOINT}: {reason}')
      raise config.UserError(message) from e


def _no_hub(name: str, reason: str) -> str:
  return (
    f'data {name!r} comes from the Hugging Face Hub, which failed ({reason}); '
    'offline, save its text elsewhere and pass the .txt or .jsonl file by '
    'path, or bring the Hub cache along and set HF_HUB_OFFLINE=1'
  )
