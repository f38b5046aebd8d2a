"""The syntax of templates: what is parsed, and the column of what is not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltakit.errors import OptionError
from deltakit.prompting.pieces import Field, Slot, Soft, Text
from deltakit.prompting.syntax import parse


def test_the_seeds_template():
    text = '{"placeholder":"text_a"} Deduction: {"placeholder":"text_b"}. Is it correct? {"mask"}.'
    assert parse(text) == [
        Field("text_a"),
        Text(" Deduction: "),
        Field("text_b", column=text.index('{"placeholder":"text_b')),
        Text(". Is it correct? "),
        Slot(column=text.index('{"mask')),
        Text("."),
    ]


@pytest.mark.parametrize(
    ("piece", "expected"),
    [
        ('{"mask"}', Slot()),
        ("{'mask'}", Slot()),
        ('{"placeholder": "a"}', Field("a")),
        ('{"placeholder": "a", "shortenable": False}', Field("a", shortenable=False)),
        ('{"placeholder": "a", "filter": "lower"}', Field("a", filter="lower")),
        ('{"placeholder": "a", "post_processing": "lower"}', Field("a", filter="lower")),
        ('{"meta": "entity"}', Field("entity", meta=True, shortenable=False)),
        ('{"meta": "entity", "shortenable": True}', Field("entity", meta=True)),
        ('{"soft"}', Soft()),
        ('{"soft": None, "duplicate": 5}', Soft(count=5)),
        ('{"soft": None, "duplicate": 5, "same": True}', Soft(count=5, same=True)),
        ('{"soft": "Question: {what}?"}', Soft("Question: {what}?")),
        ('{"soft": "Question", "soft_id": 1}', Soft("Question", soft_id=1)),
        ('{"soft_id": "q"}', Soft(soft_id="q")),
        ('{"text": "a } b", "shortenable": True}', Text("a } b", shortenable=True)),
    ],
)
def test_a_piece(piece, expected):
    assert parse(piece) == [expected]


def test_braces_of_the_text():
    assert parse('{{"a": 1}} {"mask"} }}{{') == [Text('{"a": 1} '), Slot(column=11), Text(" }{")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a } b", "column 3 of 'a } b': found '}' without its '{'; write '}}'"),
        ('It {"mask"', "column 4 of 'It {\"mask\"': the '{' is not closed: the template ends"),
        ('It {"mask', 'inside a text that starts with "'),
        ("It {mask}", "column 4 of 'It {mask}': expected names in quotes"),
        ("It {}", "expected one name, or names with values, found {}"),
        ('{"maskk"}', "found 'maskk'; did you mean mask?"),
        ('{"mask": 1}', "a slot has no value, found 1"),
        ('{"mask", "soft"}', "expected one name, or names with values"),
        ('{"mask": None, "soft_id": 1}', "'mask' has no option 'soft_id'; it may have nothing else"),
        ('{"placeholder": 3}', "expected the name of a field for 'placeholder', found 3"),
        ('{"placeholder"}', "expected the name of a field"),
        ('{"placeholder": "a", "shortnable": True}', "no option 'shortnable'; did you mean shortenable?"),
        ('{"placeholder": "a", "shortenable": "True"}', "expected True or False for 'shortenable', found 'True'"),
        ('{"placeholder": "a", "post_processing": lambda x: x.lower()}', 'write "filter": "name", and pass Template'),
        ('{"placeholder": __import__("os").getcwd()}', "templates are not executed"),
        ('{"placeholder": "a", "placeholder": "b"}', "'placeholder' is there twice"),
        ('{"placeholder": "a", "filter": "f", "post_processing": "f"}', "two names of one option"),
        ('{"soft": "", "soft_id": 1}', "the text of a soft piece is empty"),
        ('{"soft": "a b", "duplicate": 2}', "says how many tokens there are"),
        ('{"soft": "a b", "same": True}', "'same' makes one vector of all"),
        ('{"soft": None, "duplicate": 0}', "expected 1 to 1,000 for 'duplicate', found 0"),
        ('{"soft": None, "duplicate": True}', "expected a number of tokens for 'duplicate', found True"),
        ('{"text"}', "expected a text for 'text', found none"),
        ('{"a" + }', "expected a piece such as"),
        ("{" + "x" * 3000, "there is no '}' within 2,000 characters"),
        ("a" * 100_001, "it has 100,001 characters, and at most 100,000 are read"),
        ("{" * 101 + "(" * 500 + "}" * 101, "expected a piece such as"),
    ],
)
def test_what_is_malformed(text, message):
    with pytest.raises(OptionError) as error:
        parse(text)
    assert message in str(error.value)


@given(st.text(alphabet="{}\"'\\mask: placehder,TrueNone\n🎉א", max_size=60))
def test_any_text_is_parsed_or_refused(text):
    try:
        pieces = parse(text)
    except OptionError as error:
        assert "column" in str(error)
    else:
        assert all(isinstance(piece, Field | Slot | Soft | Text) for piece in pieces)


@given(st.text(max_size=40))
def test_text_with_doubled_braces_is_the_text(text):
    assert parse(text.replace("{", "{{").replace("}", "}}")) == ([Text(text)] if text else [])
