"""Literal markup in, literal prose out."""

import pytest

from toga_jax.data import wiki

# Long enough to read as a sentence.
S = 'This is a sentence of the article, and it says something.'


@pytest.mark.parametrize(
  ('source', 'expected'),
  [
    ('the [[termite]]s it eats', 'the termites it eats'),
    ('of [[Ada (ship)|Ada]] and', 'of Ada and'),
    ('of [[wikt:mane|mane]] and', 'of mane and'),
    ('a [[Foo#Bar]] b', 'a Foo b'),
    ('a[[Category:Fish]][[fr:Poisson]] b', 'a b'),
    ('a [https://a.b/c?d=e a site] b', 'a a site b'),
    ("an '''''emphatic''''' and ''quiet'' word", 'an emphatic and quiet word'),
    ("the ''Iliad'''s end", "the Iliad's end"),
    ('an end.<ref name=a>{{cite|url=b}}</ref> And', 'an end. And'),
    ('an end.<ref name="a/b" /> And', 'an end. And'),
    ('a<!-- {{ [[ --> b', 'a b'),
    ('15&nbsp;°C &mdash; and', '15 °C — and'),
    ('H<sub>2</sub>O at 10<sup>-7</sup> m', 'H2O at 10⁻⁷ m'),
    ('the 19<sup>th</sup> of', 'the 19th of'),
    ('where <math>x = 1</math> is', 'where x = 1 is'),
    ('a<br />b', 'a b'),
    ('word {{citation needed|date=May 2010}}, and', 'word, and'),
    ('word{{cn}} and', 'word and'),
    ('Anna ({{IPAc-en|a|n}}; [[Greek]]) of', 'Anna (Greek) of'),
    ('Anna (Greek; {{IPA-el|ana}}) of', 'Anna (Greek) of'),
    ('Anna ({{IPA-el|ana}}) of', 'Anna of'),
    ('f() stays as it is', 'f() stays as it is'),
    ('{{lang|grc|λόγος}} and {{lang-la|verbum}}', 'λόγος and verbum'),
    ('{{nowrap|[[link|3&nbsp;km]]}} on', '3 km on'),
    ('{{convert|663,268|sqmi|km2|0}} or', '663,268 square miles or'),
    ('{{convert|6|ft|2|in|m}} or', '6 feet 2 inches or'),
    ('{{convert|1500|to|2000|km|mi|abbr=on}} or', '1,500 to 2,000 km or'),
    ('{{val|6.241|e=18|u=C}} or', '6.241\u00d710¹⁸ C or'),
    ('it was, {{as of|2010|lc=y}}, so', 'it was, as of 2010, so'),
    ('ship {{USS|Hornet|CV-12|6}} on', 'ship USS Hornet on'),
    ('an {{unknown|{{nested|a}}|b=[[c]]}} end', 'an end'),
    ('an open [[bracket of {{some kind', 'an open bracket of some kind'),
    ('a stray bracket]] of }} some kind', 'a stray bracket of some kind'),
    ('a [[link {{with}} a {{hole]] here', 'a link a hole here'),
  ],
)
def test_inside_a_sentence(source, expected):
  got = wiki.to_prose(f'Here is {source} in a sentence of eight words.')

  assert got == f'Here is {expected} in a sentence of eight words.'


@pytest.mark.parametrize(
  'source',
  [
    '{{Infobox|name=a|image=[[File:a.jpg]]\n|list={{hlist|b|c}}\n}}',
    '[[File:a.jpg|thumb|A [[caption]] that is long enough to be a sentence.]]',
    '{|\n! a !! b\n|-\n| This is a cell that is a whole sentence itself.\n|}',
    '{|\n| a\n|\nThis cell is a whole sentence on a line of its own.\n|}',
    ':{| class=x\n| a\n{|\n| nested\n|}\n| b\n|}',
    '<gallery>\nA.jpg|This is a caption that reads like a full sentence.\n'
    '</gallery>',
    '__NOTOC__',
    '* [[Name]]\n* [[Other name]]\n* A third one, which is a sentence by far.',
    ':<math>\\sum_i x_i</math>',
    'A caption without an end',
    '| a row that lost its table but is long enough to be a sentence.',
  ],
)
def test_what_is_no_prose_goes(source):
  assert wiki.to_prose(f'{S}\n\n{source}\n\n{S}') == f'{S}\n\n{S}'


def test_lines_are_joined_to_paragraphs():
  assert wiki.to_prose(f'{S}\n{S}\n\n{S}') == f'{S} {S}\n\n{S}'


def test_items_that_are_sentences_stay_without_bullets():
  assert wiki.to_prose(f'* {S}\n# {S}\n:: {S}') == f'{S}\n\n{S}\n\n{S}'


def test_a_quotation_is_a_paragraph():
  source = f'He said:\n{{{{quote|{S}|author=Someone}}}}'

  assert wiki.to_prose(f'{S} {source}') == f'{S} He said:\n\n{S}'


def test_headings_stand_only_above_text():
  source = (
    f'{S}\n== Empty ==\n== Full ==\n=== Part ===\n{S}\n=== Bare ===\n* a\n'
    f'== See also ==\n{S}\n=== More ===\n{S}\n== After ==\n{S}'
  )

  assert wiki.to_prose(source).split('\n\n') == [
    S, 'Full', 'Part', S, 'After', S
  ]  # fmt: skip


@pytest.mark.parametrize(
  'title',
  ['References', 'external links', 'Notes and references', 'Sources'],
)
def test_closing_sections_go(title):
  assert wiki.to_prose(f'{S}\n\n== {title} ==\n* {S}\n\n{S}') == S


def test_a_sentence_that_lost_a_formula_goes_alone():
  source = f'{S} It is <math>\\frac{{a}}{{b}}</math> here. {S}'

  assert wiki.to_prose(source) == f'{S} {S}'


def test_an_announcement_of_what_was_left_out_goes():
  source = (
    f'== A ==\n{S} For example:\n* a\n* b\n\n== B ==\nSuch as these:\n* a'
  )

  assert wiki.to_prose(source) == f'A\n\n{S}'


def test_a_term_is_a_heading():
  assert wiki.to_prose(f';Term\n:{S}\n;Other\n:no') == f'Term\n\n{S}'


@pytest.mark.parametrize('source', ['', '{{a', '[[', '{|', '}}', ']]|}', '|'])
def test_scraps_give_no_text(source):
  assert wiki.to_prose(source) == ''
