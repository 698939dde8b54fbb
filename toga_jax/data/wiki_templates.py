"""What Wikipedia's templates show: `{{name|argument|key=value}}` as text.

A template is shown if it stands for words of the sentence around it. Of all
others only a mark is left: CUT where the sentence does without (a footnote, an
infobox), HOLE where it does not (a computed age).
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence

# Two marks that no article contains: XML allows neither character.
HOLE = '\x00'  # something the sentence needs was here
CUT = '\x01'  # something it does not need was here

_EN_DASH, _TIMES = '\u2013', '\u00d7'  # easily taken for - and x
DASHES = r'\-\u2212\u2013'  # hyphen, minus, en dash: for a character class
_SUPERSCRIPTS = str.maketrans('0123456789+-\u2212\u2013', '⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻⁻')

_Named = Mapping[str, str]
_Show = Callable[[Sequence[str], _Named], str]


def raised(number: str) -> str:
  """`-7` as ⁻⁷."""
  return number.strip().translate(_SUPERSCRIPTS)


def show(arguments: Sequence[str]) -> str:
  """The running text a template stands for, or one of the two marks.

  Args:
    arguments: the name, then the arguments, brackets inside them resolved.
  """
  name = arguments[0].replace(CUT, '').strip().lower()
  if name in _FIXED_TEMPLATES:
    return _FIXED_TEMPLATES[name]
  plain, named = [], {}
  for argument in arguments[1:]:
    key, equals, value = argument.partition('=')
    key = key.strip()
    if equals and re.fullmatch(r'[a-z]\w*', key):
      named[key] = value.strip()
    else:
      plain.append((value if equals and key.isdigit() else argument).strip())
  shown_by = _shown_by(name)
  try:
    return shown_by(plain, named) if shown_by else CUT
  except IndexError:  # an argument is missing: a reader would see an error
    return HOLE


@functools.cache
def _shown_by(name: str) -> _Show | None:
  return next((f for pattern, f in _SHOWN if re.fullmatch(pattern, name)), None)


def _nth(index: int) -> _Show:
  return lambda plain, named: plain[index]


def _quote(plain: Sequence[str], named: _Named) -> str:
  return '\n\n' + (named.get('text') or plain[0]) + '\n\n'


def _as_of(plain: Sequence[str], named: _Named) -> str:
  return ('as of ' if 'lc' in named else 'As of ') + plain[0]


def _value(plain: Sequence[str], named: _Named) -> str:
  """`6.2|e=18|u=C` -> 6.2×10¹⁸ C."""
  power = f'{_TIMES}10{raised(named["e"])}' if 'e' in named else ''
  return f'{plain[0]}{power} {named.get("u", "")}'.strip()


def _convert(plain: Sequence[str], named: _Named) -> str:
  """`6|ft|2|in|m` -> 6 feet 2 inches; `1500|mi|km` -> 1,500 miles."""
  words = [plain[0], plain[1]]
  for number, unit in zip(plain[2::2], plain[3::2], strict=False):
    if not re.fullmatch(rf'[\d.,/+{DASHES}]+', number):
      break  # from here on: what to convert to, and how precisely
    words += [number, unit]
  words = [_UNITS.get(word, word) for word in words]
  return ' '.join(f'{int(w):,}' if w.isdigit() else w for w in words)


_UNITS = {
  'C': '°C',
  'F': '°F',
  'km2': 'km²',
  'm2': 'm²',
  'km3': 'km³',
  'm3': 'm³',
  'mi': 'miles',
  'ft': 'feet',
  'in': 'inches',
  'acre': 'acres',
  'sqmi': 'square miles',
  'sqft': 'square feet',
  'cuft': 'cubic feet',
  'cumi': 'cubic miles',
  '-': 'to',
  _EN_DASH: 'to',
  'x': 'by',
}
_FIXED_TEMPLATES = {
  "'": "'",
  "'s": "'s",
  '\' "': '\'"',
  '-"': '"',
  '=': '=',
  'pipe': '|',
  'nbsp': ' ',
  'spaces': ' ',
  'thinsp': ' ',
  'ndash': _EN_DASH,
  'snd': f' {_EN_DASH} ',
  'spaced ndash': f' {_EN_DASH} ',
  'mdash': '—',
  'mdashb': ' — ',
  '·': ' · ',
  'carbon': 'C',
  'hydrogen': 'H',
  'eqm': '⇌',
}
_SHOWN: Sequence[tuple[str, _Show]] = (
  (
    r'abbr|angbr|angle bracket|big|flag|flagcountry|hlist|ipa|keypress|lang-.*'
    r'|large|linktext|math|music|mvar|nastaliq|nihongo|nobold|nobr|nowrap|nq'
    r'|pow|resize|sc|script/arabic|small|smallcaps|smaller|sub|sup|tooltip'
    r'|unicode|us\$|visible anchor|vr',
    _nth(0),
  ),
  (r'lang|rtl-lang|script|ill', _nth(1)),
  (r'transl|color|font color', _nth(-1)),
  (r'quote|blockquote|quotation|cquote', _quote),
  (r'convert|cvt', _convert),
  (r'as of', _as_of),
  (r'val', _value),
  (r'oldstyledate', lambda plain, named: f'{plain[0]}, {plain[1]}'),
  (r'circa|c\.', lambda plain, named: f'c. {plain[0]}'),
  (r'chem', lambda plain, named: ''.join(plain)),
  (r'e', lambda plain, named: f'{_TIMES}10{raised(plain[0])}'),
  (r'hms', lambda plain, named: f'HMS {plain[0]}'),
  (r'uss', lambda plain, named: f'USS {plain[0]}'),
  (
    r'age|bibleref|bibleverse|cite quran|coord|currentyear|dentalformula'
    r'|format price|formatnum:.*|frac|harvtxt|inflation|ipaslink'
    r'|pop density|railgauge|sfrac|us patent',
    lambda plain, named: HOLE,
  ),
)
