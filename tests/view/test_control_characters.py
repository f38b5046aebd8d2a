"""Names come from other people's files and configs: none of their control characters reaches a terminal, a page or a card."""

import re
import warnings
from html.parser import HTMLParser

import pytest
import yaml
from rich.console import Console
from torch import nn

import deltakit as dk
from deltakit.errors import DeltaError, printable
from deltakit.files import model_card
from support.models import Transformer, attached
from support.tiny_transformers import build

# Clears the screen; a new line; overwrites the line; reverses what follows; a C1 control sequence; half of a pair; the end of a line.
BAD = ["\x1bc", "\n", "\r", "\u202e", "\x9b2J", "\ud800", "\u2028", "\x7f", "\x00"]
NAMES = [f"a{bad}b" for bad in BAD]


def is_safe(text):
    return all(line.isprintable() for line in text.split("\n"))


def model():
    part = nn.ModuleDict({name: nn.Linear(3, 5) for name in NAMES})
    return nn.ModuleDict({"part": part, "last": nn.Linear(5, 2)})


@pytest.mark.parametrize("bad", BAD)
def test_each_is_written_as_an_escape(bad):
    assert printable(f"käse{bad}") == "käse" + bad.encode("unicode_escape").decode()
    assert printable("plain ✓ 日本") == "plain ✓ 日本"


def test_reports_plans_and_trees():
    backbone = model()
    plan = dk.plan(backbone, dk.LoRA(r=1, at="part.*"), train="part")
    delta = dk.attach(backbone, dk.LoRA(r=1, at="part.*"), train="part.*")
    for text in (
        repr(plan),
        repr(delta),
        str(dk.show(backbone)),
        str(dk.show(backbone, fold=False)),
        repr(delta.methods),
    ):
        assert is_safe(text)
    for text in (repr(plan), repr(delta), str(dk.show(backbone))):
        assert r"a\x1bcb" in text
        assert r"a\nb" in text


def test_in_colour_and_under_a_name_of_the_user(capsys):
    backbone = model()
    console = Console(force_terminal=False, width=400)
    console.print(dk.show(backbone, fold=False))
    dk.Visualization(backbone).structure_graph(rootname="ro\x1b[2Jot")
    assert is_safe(capsys.readouterr().out)


def test_types_of_modules_and_of_models(tmp_path):
    kind = type("Ba\x1b[2Jd", (nn.Linear,), {})
    backbone = nn.Sequential(kind(3, 5), nn.Linear(5, 2))
    assert is_safe(str(dk.show(backbone)))
    whole = type("Who\nle", (nn.Sequential,), {})(nn.Linear(3, 5), nn.Linear(5, 2))
    delta = attached(whole, dk.LoRA(r=1, at="0"))
    assert repr(delta).startswith(r"delta 'delta' on Who\nle: attached")
    assert is_safe(repr(delta))
    assert is_safe(repr(dk.roles(whole)))
    assert r"# A delta for Who\\nle" in (delta.save(tmp_path) / "README.md").read_text()


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.text = set(), ""

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def test_pages():
    backbone = nn.ModuleDict({"<script>alert(1)</script>": nn.Linear(3, 5), **model()})
    page = Page()
    page.feed(dk.show(backbone).html())
    assert page.tags <= {"div", "details", "summary", "span", "style", "script", "code"}
    assert is_safe(page.text)


def test_errors_and_warnings():
    backbone = model()
    for call in (
        lambda: dk.select(backbone, "no\x1b[2Jthing"),
        lambda: dk.attach(backbone, dk.LoRA(r=99, at="part.*")),
        lambda: dk.attach(backbone, dk.LoRA(r=1, at="last"), name="na\x1bme"),
        lambda: dk.load("no\x1b[2J/such/folder", backbone),
    ):
        with pytest.raises(DeltaError) as caught:
            call()
        assert str(caught.value).isprintable()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        warnings.warn("a\x1b[2J", dk.DeltaWarning, stacklevel=1)
    assert str(told[0].message) == r"a\x1b[2J"


@pytest.mark.parametrize("bad", BAD)
def test_a_delta_s_name_has_none(bad):
    with pytest.raises(dk.OptionError, match="expected a word without dots, spaces and control characters"):
        dk.attach(Transformer(), dk.LoRA(), name=f"a{bad}")


def test_the_readable_copy(tmp_path):
    backbone = model()
    with pytest.raises(dk.CheckpointError, match=r"could not be saved: .*surrogates not allowed"):
        attached(backbone, dk.LoRA(r=1, at="part.*")).save(tmp_path)
    dk.deltas(backbone)[0].detach()
    folder = attached(backbone, dk.LoRA(r=1, at="part.*", exclude="re:.*\ud800.*")).save(tmp_path)
    assert is_safe((folder / "delta_config.json").read_text())
    assert is_safe((folder / "README.md").read_text())


# The model card

HOSTILE = [
    *NAMES,
    "`",
    "``a`",
    "<img src=x onerror=alert(1)>",
    "[click](http://bad.example)",
    "![x](http://bad.example/pixel.png)",
    "# big",
    "---\nlicense: mit",
    "- item",
    "a & b < c",
    "*bold*",
    "|a|b|",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_card_is_the_card_whatever_the_names_are(name):
    """Parsed as Markdown, the text has the same parts as with plain names; and the names are in it as they are."""

    markdown = pytest.importorskip("markdown_it").MarkdownIt().enable("table")

    def parts(name):
        config = {
            "methods": [{"method": name, "targets": [name, "b"], "option": name, "at": name}],
            "train": {"names": [name]},
            "backbone": {"id": None, "class": name, "fingerprint": {"parameters": 7}},
            "num_parameters": 3,
        }
        card = model_card(config)
        assert is_safe(card)
        _, front, text = card.split("---\n", 2)
        tokens = markdown.parse(text)
        inline = [child for token in tokens for child in token.children or ()]
        return yaml.safe_load(front), [token.type for token in (*tokens, *inline) if token.type != "text"], inline

    front, types, inline = parts(name)
    plain_front, plain_types, _ = parts("plain")
    assert front == {**plain_front, "tags": list(dict.fromkeys(["deltakit", name]))}
    assert types == plain_types
    assert {token.content.strip() for token in inline if token.type == "code_inline"} == {printable(name).strip(), "b"}


@pytest.mark.parametrize(
    "name",
    [
        "out/checkpoint",
        "/home/me/model",
        "../model",
        "~/model",
        "C:\\me\\model",
        "a/b\nlicense: mit",
        "me/mod el",
        7,
        "",
        None,
    ],
)
def test_a_folder_of_the_user_is_in_no_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    backbone = build("bert")
    backbone.config._name_or_path = name
    backbone.config._commit_hash = f"{name}"
    folder = attached(backbone, dk.LoRA(r=1)).save(tmp_path / "saved")
    saved = b"".join(file.read_bytes() for file in folder.iterdir()).decode("latin-1")
    assert not name or str(name).split("\\")[0] not in re.sub(r"[0-9]", "", saved)
    assert '"id": null' in saved
    assert "# A delta for BertModel" in saved


def test_the_name_of_a_model_on_the_hub_is(tmp_path):
    backbone = build("bert")
    backbone.config._name_or_path, backbone.config._commit_hash = "some_one/a-model.v2", "0" * 40
    saved = attached(backbone, dk.LoRA(r=1)).save(tmp_path)
    card = (saved / "README.md").read_text()
    assert 'base_model: "some_one/a-model.v2"' in card
    assert "# A delta for some_one/a-model.v2" in card
    assert f'"commit": "{"0" * 40}"' in (saved / "delta_config.json").read_text()
