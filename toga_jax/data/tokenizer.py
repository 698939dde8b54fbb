"""Text to token ids and back, from tokenizer.json or a GGUF vocabulary."""

import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import tokenizers
from jaxtyping import Int
from tokenizers import decoders, models, normalizers, pre_tokenizers

from toga_jax import config

# GGUF token types (llama.cpp's llama_token_type).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4

_SPACE = '\u2581'  # SentencePiece writes a space as this

# Words of Llama 3 and Qwen 2; they differ in how many digits stay together.
_WORDS = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
  r'|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+'
  r'|\p{{N}}{digits}'
  r'| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*'
  r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)


class Tokenizer:
  """A `tokenizers.Tokenizer` with the ids a language model needs.

  Attributes:
    bos_id: put in front of a text by models that want it; None if there is
      none.
    eos_ids: any of these ends generation.
  """

  def __init__(
    self,
    backend: tokenizers.Tokenizer,
    bos_id: int | None = None,
    eos_ids: Iterable[int] = (),
  ):
    # A tokenizer.json may ask for both; here, no token is cut off or added.
    backend.no_truncation()
    backend.no_padding()
    self._backend = backend
    self.bos_id = bos_id
    self.eos_ids = tuple(eos_ids)

  @property
  def vocab_size(self) -> int:
    """One more than the largest id: rows an embedding must have."""
    return 1 + max(self._backend.get_vocab().values(), default=-1)

  def encode(self, text: str) -> Int[np.ndarray, ' T']:
    """Token ids of the text alone: no BOS or EOS is added.

    A special token spelled out in the text becomes its single id.
    """
    ids = self._backend.encode(text, add_special_tokens=False).ids
    return np.array(ids, np.int32)

  def decode(self, ids: npt.ArrayLike, skip_special: bool = False) -> str:
    """The text of ids [T]; `skip_special` leaves out special tokens."""
    return self._backend.decode(
      np.asarray(ids).tolist(), skip_special_tokens=skip_special
    )

  def save(self, path: str | os.PathLike[str]) -> None:
    """Writes it as a tokenizer.json."""
    self._backend.save(os.fspath(path))


def from_file(
  path: str | os.PathLike[str],
  bos_id: int | None = None,
  eos_ids: Iterable[int] = (),
) -> Tokenizer:
  """Reads a tokenizer.json.

  Raises:
    config.UserError: the file is missing or is not one.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise config.UserError(
      f'{path} is missing; write it with: python -c "import transformers as t; '
      f"t.AutoTokenizer.from_pretrained('{path.parent}')"
      f".save_pretrained('{path.parent}')\""
    )
  try:
    backend = tokenizers.Tokenizer.from_file(os.fspath(path))
  except Exception as e:  # tokenizers raises nothing narrower
    raise config.UserError(f'{path} is not a tokenizer.json: {e}') from e
  return Tokenizer(backend, bos_id, eos_ids)


def from_bpe(
  tokens: Sequence[str],
  merges: Sequence[str],
  token_types: Sequence[int] | None = None,
  pre: str = 'default',
  bos_id: int | None = None,
  eos_ids: Iterable[int] = (),
) -> Tokenizer:
  """A byte-level BPE tokenizer: GGUF's tokenizer model `gpt2`.

  Args:
    tokens: id -> token, bytes spelled in GPT-2's printable alphabet.
    merges: 'left right', the earliest first.
    token_types: id -> GGUF token type; all normal if None.
    pre: how text is split into words, GGUF's `tokenizer.ggml.pre`.
    bos_id: see Tokenizer.
    eos_ids: see Tokenizer.

  Raises:
    config.UserError: unknown `pre`, or a merge of what is not a token.
  """
  splits = _byte_level_splits()
  if pre not in splits:
    raise config.UserError(
      f'pre-tokenizer {pre!r} is not supported; known: {", ".join(splits)}'
    )
  vocab = _vocab(tokens)
  pairs = []
  for merge in merges:
    left, _, right = merge.partition(' ')
    if not (left in vocab and right in vocab and left + right in vocab):
      raise config.UserError(f'tokenizer: merge {merge!r} is not of tokens')
    pairs.append((left, right))
  # Llama 3 takes a word that is a token whole, whatever its merges say.
  ignore_merges = splits[pre] is splits['llama-bpe']
  backend = tokenizers.Tokenizer(
    models.BPE(vocab, pairs, ignore_merges=ignore_merges)
  )
  if splits[pre] is splits['qwen2']:
    backend.normalizer = normalizers.NFC()
  backend.pre_tokenizer = splits[pre]
  backend.decoder = decoders.ByteLevel()
  _add_special(backend, tokens, _check_types(tokens, token_types))
  return Tokenizer(backend, bos_id, eos_ids)


def from_spm(
  tokens: Sequence[str],
  scores: Sequence[float],
  token_types: Sequence[int] | None = None,
  add_space_prefix: bool = True,
  bos_id: int | None = None,
  eos_ids: Iterable[int] = (),
) -> Tokenizer:
  """A SentencePiece BPE tokenizer: GGUF's tokenizer model `llama`.

  SentencePiece merges the neighbours whose union scores highest. As a list of
  merges that is every way to split a token into two, ordered by its score.

  Args:
    tokens: id -> token, spaces spelled U+2581, bytes `<0x0A>`.
    scores: id -> score.
    token_types: id -> GGUF token type; all normal if None.
    add_space_prefix: whether text starts with a space it does not show.
    bos_id: see Tokenizer.
    eos_ids: see Tokenizer.

  Raises:
    config.UserError: not one score, or type, for each token.
  """
  types = _check_types(tokens, token_types)
  if len(scores) != len(tokens):
    raise config.UserError(
      f'tokenizer: {len(tokens)} tokens, but {len(scores)} scores'
    )
  vocab = _vocab(tokens)
  normal = {t for t, kind in zip(tokens, types, strict=True) if kind == _NORMAL}
  # Ties (two splits of one token) go to the one whose parts came first.
  ranked = sorted(
    (-scores[vocab[token]], vocab[token[:i]], vocab[token[i:]])
    for token in normal
    for i in range(1, len(token))
    if token[:i] in normal and token[i:] in normal
  )
  unknown = [t for t, k in zip(tokens, types, strict=True) if k == _UNKNOWN]
  backend = tokenizers.Tokenizer(
    models.BPE(
      vocab,
      [(tokens[left], tokens[right]) for _, left, right in ranked],
      unk_token=unknown[0] if unknown else None,
      fuse_unk=True,
      byte_fallback=True,
    )
  )
  # Prefix first: the Replace then turns it into U+2581 like any other space.
  prefix = [normalizers.Prepend(' ')] if add_space_prefix else []
  backend.normalizer = normalizers.Sequence(
    [*prefix, normalizers.Replace(' ', _SPACE)]
  )
  strip = [decoders.Strip(' ', 1, 0)] if add_space_prefix else []
  backend.decoder = decoders.Sequence(
    [
      decoders.Replace(_SPACE, ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      *strip,
    ]
  )
  _add_special(backend, tokens, types)
  return Tokenizer(backend, bos_id, eos_ids)


def _byte_level_splits() -> dict[str, pre_tokenizers.PreTokenizer]:
  """`tokenizer.ggml.pre` -> the split it stands for, aliases shared.

  From the tokenizer.json of the models that the names stand for.
  """
  gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
  smollm = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), gpt2]
  )
  llama3, qwen2 = (
    pre_tokenizers.Sequence(
      [
        pre_tokenizers.Split(
          tokenizers.Regex(_WORDS.format(digits=digits)), 'isolated'
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
      ]
    )
    for digits in ('{1,3}', '')
  )
  return {
    'default': gpt2,
    'gpt-2': gpt2,
    'smollm': smollm,
    'llama-bpe': llama3,
    'qwen2': qwen2,
    'deepseek-r1-qwen': qwen2,
  }


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
  """Token -> id; of tokens that are spelled alike, the first."""
  vocab: dict[str, int] = {}
  for i, token in enumerate(tokens):
    vocab.setdefault(token, i)
  return vocab


def _check_types(
  tokens: Sequence[str], token_types: Sequence[int] | None
) -> Sequence[int]:
  """One type for each token; normal where nothing is said."""
  if token_types is None:
    return [_NORMAL] * len(tokens)
  if len(token_types) != len(tokens):
    raise config.UserError(
      f'tokenizer: {len(tokens)} tokens, but types for {len(token_types)}'
    )
  return token_types


def _add_special(
  backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> None:
  """Makes control and user-defined tokens match before any splitting."""
  backend.add_tokens(
    [
      tokenizers.AddedToken(
        token, normalized=False, special=kind != _USER_DEFINED
      )
      for token, kind in zip(tokens, types, strict=True)
      if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    ]
  )
