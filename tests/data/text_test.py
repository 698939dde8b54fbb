import importlib.util
import json
import os
import re
import subprocess
import sys
import time
import types

import huggingface_hub.constants
import pytest

from toga_jax import config
from toga_jax.data import text

needs_demo = pytest.mark.skipif(
  importlib.util.find_spec('gensim') is None, reason='gensim is not installed'
)


def refusal(name, split='train'):
  with pytest.raises(config.UserError) as e:
    text.load_text(str(name), split)
  message = str(e.value)
  assert '\n' not in message
  return message


# The demo.


@pytest.fixture(scope='module')
def demo():
  return {split: text.load_documents('demo', split) for split in SPLITS}


SPLITS = ('train', 'validation')


@needs_demo
def test_demo_has_the_size_its_docstring_states(demo):
  assert [len(demo[s]) for s in SPLITS] == [85, 10]
  sizes = [len(text.load_text('demo', s)) for s in SPLITS]
  assert sizes == [pytest.approx(2.45e6, rel=0.01), pytest.approx(0.27e6, 0.03)]


@needs_demo
def test_demo_splits_share_no_article_and_no_paragraph(demo):
  titles, paragraphs = (
    {
      split: {part for document in demo[split] for part in cut(document)}
      for split in SPLITS
    }
    for cut in (
      lambda document: [document.partition('\n')[0]],
      lambda document: [p for p in document.split('\n\n') if len(p) > 60],
    )
  )

  assert len(titles['train']) == 85
  assert titles['train'].isdisjoint(titles['validation'])
  assert len(paragraphs['validation']) > 300
  assert paragraphs['train'].isdisjoint(paragraphs['validation'])


@needs_demo
@pytest.mark.parametrize('split', SPLITS)
def test_demo_holds_no_markup(split):
  whole = text.load_text('demo', split)

  remnants = re.findall(
    r"\[\[|\]\]|\{\{|\}\}|\{\||\|\}|''|</|<(?:ref|br|sub|math|div)|https?:"
    r'|&[a-z]+;|^[*#:;|!=]|==|__[A-Z]|\bthumb\||\d+px|[\x00-\x09\x0b-\x1f]'
    r'|\(\s*[,;]| {2}|\n{3}|\bCategory:|\b(?:File|Image):',
    whole,
    re.MULTILINE,
  )

  assert remnants == []


@needs_demo
def test_demo_reads_as_prose(demo):
  article = next(d for d in demo['train'] if d.startswith('Actrius\n'))

  assert article.startswith(
    'Actrius\n\nActresses (Catalan: Actrius) is a 1997 Catalan language '
    'Spanish drama film produced and directed by Ventura Pons and based on '
    'the award-winning stage play E.R. by Josep Maria Benet i Jornet. The '
    'film has no male actors, with all roles played by females.'
  )
  paragraphs = [p for s in SPLITS for d in demo[s] for p in d.split('\n\n')]
  long = [p for p in paragraphs if len(p.split()) >= 8]
  assert sum(map(len, long)) > 0.97 * sum(map(len, paragraphs))
  ends_well = [p.rstrip('"”\u2019\')')[-1] in '.!?:…' for p in long]
  assert sum(ends_well) > 0.97 * len(long)


@needs_demo
def test_demo_test_split_is_validation():
  assert text.load_text('demo', 'test') == text.load_text('demo', 'validation')


@needs_demo
def test_demo_is_quick_and_imports_no_gensim():
  code = (
    'import sys; from toga_jax.data import text; '
    "text.load_text('demo', 'train'); print('gensim' in sys.modules)"
  )
  start = time.monotonic()

  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )

  assert out.stdout == 'False\n'
  assert time.monotonic() - start < 20


def test_demo_without_the_wheel_says_what_to_install(monkeypatch):
  text._demo_articles.cache_clear()
  monkeypatch.setattr(text.importlib.util, 'find_spec', lambda name: None)

  assert "pip install 'toga_jax[demo]'" in refusal('demo')


# Local files.


@pytest.mark.parametrize('name', ['a.txt', 'a.raw', 'a.md', 'a', 'a.json'])
@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_a_file_is_one_string_as_it_is(tmp_path, name, split):
  content = ' = A title = \n\n\n Grüße, 世界 \n\tx\r\n'
  (tmp_path / name).write_bytes(content.encode())

  assert text.load_text(str(tmp_path / name), split) == content


def test_jsonl_gives_its_texts(tmp_path):
  path = tmp_path / 'a.jsonl'
  # A bare line separator inside a string does not end the line.
  rows = [{'text': 'one\nmore'}, {'id': 3, 'text': 'two\u2028x'}]
  path.write_text(
    '\n\n'.join(json.dumps(row, ensure_ascii=False) for row in rows) + '\n',
    encoding='utf-8',
  )

  assert text.load_documents(str(path), 'train') == ['one\nmore', 'two\u2028x']
  assert text.load_text(str(path), 'test') == 'one\nmore\n\ntwo\u2028x'


def test_a_glob_reads_its_files_in_order(tmp_path):
  (tmp_path / 'sub').mkdir()
  (tmp_path / 'b.txt').write_text('second')
  (tmp_path / 'a.jsonl').write_text('{"text": "first"}\n')
  (tmp_path / 'sub' / 'c.txt').write_text('third')
  (tmp_path / 'folder.txt').mkdir()

  assert text.load_text(f'{tmp_path}/[ab].*', 'train') == 'first\n\nsecond'
  assert text.load_documents(f'{tmp_path}/**/*.txt', 'train') == [
    'second',
    'third',
  ]


def test_a_file_named_like_a_glob_is_that_file(tmp_path):
  (tmp_path / 'a[1].txt').write_text('this')
  (tmp_path / 'a1.txt').write_text('not this')

  assert text.load_text(f'{tmp_path}/a[1].txt', 'train') == 'this'


@pytest.mark.parametrize(
  ('line', 'why'),
  [
    ('{"text": "open', 'not JSON: .* at column 10'),
    ('{"title": "b"}', "expected an object with a string 'text'"),
    ('{"text": null}', "expected an object with a string 'text'"),
    ('["text"]', "expected an object with a string 'text'"),
  ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, why):
  path = tmp_path / 'bad.jsonl'
  path.write_text(f'{{"text": "fine"}}\n\n{line}\n{{"text": "fine"}}\n')

  assert re.fullmatch(f'{re.escape(str(path))}, line 3: {why}', refusal(path))


def test_an_unknown_name_lists_the_known_ones():
  assert 'known: demo, wikitext2, c4' in refusal('wikitext3')


def test_a_missing_file_is_named(tmp_path):
  assert f"'{tmp_path}/no.txt': no such file" in refusal(tmp_path / 'no.txt')


def test_a_glob_without_match_is_named(tmp_path):
  assert f"'{tmp_path}/*.txt': no file matches" in refusal(tmp_path / '*.txt')


def test_a_folder_is_refused(tmp_path):
  assert f"a glob such as '{tmp_path}/*.txt'" in refusal(tmp_path)


@pytest.mark.parametrize(
  ('name', 'content'), [('a.txt', ' \n'), ('a.jsonl', ''), ('a.txt', '')]
)
def test_empty_text_is_refused(tmp_path, name, content):
  (tmp_path / name).write_text(content)

  assert 'the text is empty' in refusal(tmp_path / name)


def test_undecodable_bytes_name_the_file(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'caf\xe9 au lait')

  assert refusal(path) == f'{path} is not UTF-8 text: bad byte at offset 3'


def test_an_unreadable_file_is_one_line(tmp_path, monkeypatch):
  path = tmp_path / 'a.txt'
  path.write_text('a')

  def fail(self):
    raise PermissionError(13, 'Permission denied')

  monkeypatch.setattr(text.pathlib.Path, 'read_bytes', fail)

  assert refusal(path) == f'cannot read {path}: Permission denied'


# The Hub.


@pytest.fixture
def hub(monkeypatch):
  """A stand-in for `datasets`; collects how it was called."""
  calls = []

  class Rows(list):
    def __getitem__(self, rows):
      return {'text': list.__getitem__(self, rows)}

  def load_dataset(repo, config_name, *, split, data_files, verification_mode):
    calls.append((repo, config_name, split, data_files))
    assert verification_mode == 'no_checks'
    return Rows(['', ' = A = \n', ' b \n'] * 500)

  fake = types.SimpleNamespace(
    load_dataset=load_dataset,
    exceptions=types.SimpleNamespace(DatasetsError=KeyError),
  )
  monkeypatch.setitem(sys.modules, 'datasets', fake)
  monkeypatch.setattr(text, '_check_hub_answers', lambda name: None)
  return calls


@pytest.mark.parametrize('split', ['train', 'validation', 'test'])
def test_wikitext2_is_joined_as_gptq_joins_it(hub, split):
  got = text.load_text('wikitext2', split)

  assert got == '\n\n'.join(['', ' = A = \n', ' b \n'] * 500)
  assert hub == [('Salesforce/wikitext', 'wikitext-2-raw-v1', split, None)]


@pytest.mark.parametrize(
  ('split', 'theirs', 'file', 'rows'),
  [
    ('train', 'train', 'en/c4-train.00000-of-01024.json.gz', 1500),
    ('test', 'validation', 'en/c4-validation.00000-of-00008.json.gz', 1100),
  ],
)
def test_c4_is_the_first_shard_joined_by_spaces(hub, split, theirs, file, rows):
  got = text.load_text('c4', split)

  assert got == ' '.join((['', ' = A = \n', ' b \n'] * 500)[:rows])
  assert hub == [('allenai/c4', None, theirs, {theirs: file})]


@pytest.mark.parametrize('name', ['wikitext2', 'c4'])
def test_no_hub_fails_at_once_and_says_what_to_do(name, monkeypatch):
  constants = huggingface_hub.constants
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  # The discard port: nothing answers there.
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  monkeypatch.setenv('no_proxy', '*')
  start = time.monotonic()

  message = refusal(name)

  assert time.monotonic() - start < 6
  assert message.startswith(
    f"data '{name}' comes from the Hugging Face Hub, which failed "
    '(http://127.0.0.1:9: '
  )
  assert 'pass the .txt or .jsonl file by path' in message
  assert 'HF_HUB_OFFLINE=1' in message


def test_offline_with_an_empty_cache_is_one_line(tmp_path):
  code = (
    'from toga_jax import config\n'
    'from toga_jax.data import text\n'
    'try:\n'
    "  text.load_text('wikitext2', 'test')\n"
    'except config.UserError as e:\n'
    '  print(e)\n'
  )

  out = subprocess.run(
    [sys.executable, '-c', code],
    env={**os.environ, 'HF_HUB_OFFLINE': '1', 'HF_HOME': str(tmp_path)},
    capture_output=True,
    text=True,
    check=True,
  )

  assert len(out.stdout.splitlines()) == 1
  assert "Couldn't reach 'Salesforce/wikitext'" in out.stdout
