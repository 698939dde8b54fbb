"""Wikipedia's wikitext as prose: one article's markup in, paragraphs out.

What a reader would not read aloud goes: templates, tables, references, images,
lists of names or numbers, closing sections. What stands inside a sentence
stays where it can be written plainly; where it cannot (most formulas), the
sentence goes, for a sentence with a hole is worse than none.
"""

import dataclasses
import html
import re
from collections.abc import Iterator, Sequence

from toga_jax.data import wiki_templates

_HOLE, _CUT = wiki_templates.HOLE, wiki_templates.CUT
_COMMENT = re.compile(r'<!--.*?-->', re.DOTALL)
_CUT_ELEMENT = re.compile(
  r'<(?P<tag>ref|gallery|source|syntaxhighlight|timeline|imagemap|score'
  r'|references)\b(?:[^<>]*?/>|[^>]*>.*?</(?P=tag)\s*>)',
  re.DOTALL | re.IGNORECASE,
)
_MATH = re.compile(r'<math\b[^>]*>(.*?)</math\s*>', re.DOTALL | re.IGNORECASE)
_PLAIN_MATH = re.compile(r'[\w\s.,=+\-/()]+')  # readable as it stands
_SCRIPT = re.compile(
  r'<su(?P<kind>[bp])\b[^>]*>(?P<text>[^<]*)</su[bp]\s*>', re.IGNORECASE
)
_EXPONENT = re.compile(
  rf'[+{wiki_templates.DASHES}]?\d+[+{wiki_templates.DASHES}]?'
)
_BREAK = re.compile(r'</?(?:p|div|blockquote|poem|center)\b[^>]*>')
_TAG = re.compile(r'</?[a-zA-Z][^<>]*>')

# Brackets that nest. A table opens and closes at the start of a line only.
_TOKEN = re.compile(
  r'(\{\{|\}\}|\[\[|\]\]|^[ \t:]*\{\||^[ \t]*\|\}(?!\})|\|)', re.MULTILINE
)
_OPENS = ('{{', '[[', '{|')
_CLOSES = {'}}': '{{', ']]': '[[', '|}': '{|'}
_URL_LINK = re.compile(
  r'\[(?:(?:https?|ftp)://|//|mailto:)[^\s\]]*[ \t]*([^\]\n]*)\]'
)
_SILENT_LINK = re.compile(  # puts nothing into the running text
  r'\s*(?:file|image|media|category)\s*:', re.IGNORECASE
)
_OTHER_WIKI = re.compile(r'\s*[a-z]{2,3}:')

_QUOTES = re.compile(r"'{2,}")
_INVISIBLE = dict.fromkeys(map(ord, '\u200b\u200e\u200f\ufeff\u00ad'))
_HEADING = re.compile(r'(={2,6})\s*(.*?)\s*\1')
_CLOSING_SECTION = re.compile(
  r'see also|(external|related) links|further reading|((foot|end)?notes|'
  r'references)( and .*)?|.*(references|bibliography|bibliographies|'
  r'filmography|discography|gallery)|citations|((primary|secondary) )?sources'
  r'|works cited|cited .*|(list of|selected|published) works|(other )?books'
  r'|publications|reference literature',
  re.IGNORECASE,
)
_SENTENCE_GAP = re.compile(r'(?<=[.!?]) (?=[A-Z"(])|(?<=[.!?][")]) ')
_TERM_LEVEL = 7  # one below the deepest heading
_MIN_WORDS = 8  # a shorter line is a caption, a name or a label


def to_prose(wikitext: str) -> str:
  """The paragraphs and headings of one article, separated by blank lines.

  Args:
    wikitext: an article's source. Unbalanced brackets are read as text.

  Returns:
    Plain text; a heading is a paragraph of its own and stands only above text.
    Empty if nothing reads as prose.
  """
  text = _COMMENT.sub('', wikitext)
  text = _CUT_ELEMENT.sub(_CUT, text)
  text = _MATH.sub(_math, text)
  text = _SCRIPT.sub(_script, text)
  text = _flatten(text)
  text = _URL_LINK.sub(r'\1', text)
  text = _BREAK.sub('\n\n', text)
  text = _TAG.sub('', re.sub(r'<br\b[^>]*>|__[A-Z]+__', ' ', text))
  text = html.unescape(text).translate(_INVISIBLE)
  return '\n\n'.join(_keep(_blocks(text.split('\n'))))


def _math(match: re.Match) -> str:
  formula = match[1].strip()
  return formula if _PLAIN_MATH.fullmatch(formula) else _HOLE


def _script(match: re.Match) -> str:
  text = html.unescape(match['text'].strip())
  if match['kind'] in 'pP' and _EXPONENT.fullmatch(text):
    return wiki_templates.raised(text)
  return text


# Brackets: links, tables, templates.


def _flatten(text: str) -> str:
  """Resolves templates, tables and links, the innermost first.

  An open bracket is a frame (bracket, arguments); `|` starts a new argument. A
  bracket that is never closed turns into text of the frame below it.
  """
  frames: list[tuple[str, list[str]]] = [('', [''])]
  for token in _TOKEN.split(text):
    kind = token.strip(' \t:')
    if kind in _OPENS:
      frames.append((kind, ['']))
    elif kind in _CLOSES and any(f[0] == _CLOSES[kind] for f in frames):
      while frames[-1][0] != _CLOSES[kind]:
        _, arguments = frames.pop()
        frames[-1][1][-1] += '|'.join(arguments)
      bracket, arguments = frames.pop()
      frames[-1][1][-1] += _render(bracket, arguments)
    elif token == '|' and len(frames) > 1:
      frames[-1][1].append('')
    elif kind not in _CLOSES:
      frames[-1][1][-1] += token
  return ''.join('|'.join(arguments) for _, arguments in frames)


def _render(bracket: str, arguments: list[str]) -> str:
  if bracket == '{{':
    return wiki_templates.show(arguments)
  if bracket == '[[':
    return _link(arguments)
  return ''


def _link(arguments: list[str]) -> str:
  target, label = arguments[0], arguments[-1]
  if _SILENT_LINK.match(target):
    return ''
  if len(arguments) > 1 and label.strip():
    return label
  if _OTHER_WIKI.match(target):
    return ''
  return target.lstrip(':').partition('#')[0]


# Lines: which of them read as prose.


@dataclasses.dataclass(frozen=True)
class _Block:
  """A heading (level > 0), a list (several items), or a paragraph."""

  lines: Sequence[str]
  level: int = 0
  is_list: bool = False


def _blocks(lines: Sequence[str]) -> Iterator[_Block]:
  """Headings, lists and paragraphs; a paragraph may span several lines."""
  run: list[str] = []
  is_list = False
  for line in [*lines, '']:
    line = _tidy(line)
    heading = _HEADING.fullmatch(line)
    starts_item = line.startswith(('*', '#', ':'))
    breaks = not line or heading or line.startswith(tuple('|!{};'))
    if run and (breaks or starts_item != is_list):
      yield _Block(run if is_list else [' '.join(run)], is_list=is_list)
      run = []
    if line.startswith(';'):  # a term above its explanation
      yield _Block([line.lstrip('; ')], level=_TERM_LEVEL)
    elif heading:
      yield _Block([heading[2].replace(_HOLE, '')], level=len(heading[1]))
    elif not breaks:
      run.append(line.lstrip('*#: '))
      is_list = starts_item


def _keep(blocks: Iterator[_Block]) -> list[str]:
  """The prose among blocks, and the headings that have some below them."""
  # Announcements first: a heading may have nothing else below it.
  prose = _without_announcements(list(_prose(blocks)))
  kept: list[str] = []
  headings: dict[int, str] = {}  # level -> heading with no text below it yet
  for block in prose:
    if block.level:
      headings = {k: v for k, v in headings.items() if k < block.level}
      headings[block.level] = block.lines[0]
    elif block.lines:
      kept += [headings[level] for level in sorted(headings)]
      kept += block.lines
      headings = {}
  return kept


def _prose(blocks: Iterator[_Block]) -> Iterator[_Block]:
  """Blocks before the closing sections, with only their prose lines."""
  closed_level = 0  # of the closing section being skipped; 0 = none
  for block in blocks:
    if block.level and (not closed_level or block.level <= closed_level):
      is_closing = _CLOSING_SECTION.fullmatch(block.lines[0])
      closed_level = block.level if is_closing else 0
    if closed_level:
      continue
    if block.level:
      yield block
    else:
      lines = _prose_of_list(block) if block.is_list else _prose_of(block)
      yield dataclasses.replace(block, lines=lines)


def _without_announcements(prose: list[_Block]) -> list[_Block]:
  """Cuts 'For example:' off a paragraph where the example was left out."""
  result = list(prose)
  for i, block in enumerate(prose):
    after = prose[i + 1] if i + 1 < len(prose) else _Block([])
    announced = after.lines and after.level in (0, _TERM_LEVEL)
    if not block.level and block.lines and not announced:
      *lines, last = block.lines
      if last.endswith(':'):
        sentences = _SENTENCE_GAP.split(last)[:-1]
        lines += [' '.join(sentences)] if sentences else []
        result[i] = dataclasses.replace(block, lines=lines)
  return result


def _prose_of(paragraph: _Block) -> list[str]:
  """The paragraph without sentences that have a hole; [] if little is left."""
  text = paragraph.lines[0]
  if _HOLE in text:
    sentences = _SENTENCE_GAP.split(text)
    text = ' '.join(s for s in sentences if _HOLE not in s)
    if len(text) < sum(map(len, sentences)) / 2:
      return []
  is_long = len(text.split()) >= 3 * _MIN_WORDS and _SENTENCE_GAP.search(text)
  return [text] if is_long or _is_sentence(text) else []


def _prose_of_list(items: _Block) -> list[str]:
  """The items that are sentences, if most are: else it is a list of names."""
  lines = [line for line in items.lines if line]
  sentences = [line for line in lines if _is_sentence(line)]
  return sentences if 3 * len(sentences) >= 2 * len(lines) else []


def _is_sentence(line: str) -> bool:
  ends_well = line.rstrip('"”\u2019\')')[-1:] in tuple('.!?:…')
  return ends_well and _HOLE not in line and len(line.split()) >= _MIN_WORDS


def _tidy(line: str) -> str:
  """One line without marks of emphasis and of what was cut from it."""
  line = re.sub(r"''([^']+)'''s\b", r"\1's", line)  # ''Iliad'''s
  line = re.sub(r'\s+', ' ', _QUOTES.sub('', line))
  if _CUT in line:
    gap = rf'[\s;,:]*{_CUT}[\s;,:{_CUT}]*'
    line = re.sub(rf'\({gap}\)', _CUT, line)
    line = re.sub(rf'\({gap}', '(', line)
    line = re.sub(rf'{gap}\)', ')', line)
    line = re.sub(rf'[;,]\s*{_CUT}[\s{_CUT}]*(?=[;,])', '', line)
    line = re.sub(rf'\s*{_CUT}[\s{_CUT}]*(?=[,.;:!?])', '', line)
    line = re.sub(r' {2,}', ' ', line.replace(_CUT, ''))
  return re.sub(r'(?<=\w) (?=[,.;:] )', '', line).strip()
