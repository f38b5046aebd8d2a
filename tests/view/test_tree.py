"""The tree: OpenDelta's own, byte for byte; golden renders; sums; and models that are hard to draw."""

import io
import re
from html.parser import HTMLParser

import pytest
import torch
import transformers as tf
from rich.cells import cell_len
from rich.console import Console
from torch import nn

import deltakit as dk
from deltakit.view.folding import folded
from deltakit.view.node import walk
from deltakit.view.tree import build as tree
from support.golden import golden
from support.models import Transformer
from support.paths import GOLDEN
from support.tiny_transformers import build


def t5_large():
    with torch.device("meta"):
        return tf.T5ForConditionalGeneration(
            tf.T5Config(d_model=1024, d_ff=4096, num_layers=24, num_heads=16, d_kv=64, vocab_size=32100)
        )


def test_the_tree_that_opendelta_prints_of_t5_large(capsys):
    view = dk.Visualization(t5_large()).structure_graph()
    wanted = (GOLDEN / "t5_large_seed.txt").read_text(encoding="utf-8")
    assert str(view) + "\n" == wanted
    assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "mixtral", "t5", "bart", "vit", "clip", "bloom"])
def test_golden_renders(kind):
    model = build(kind)
    dk.attach(model, dk.LoRA(r=3), dk.BitFit(at="@ff.down") if kind != "mixtral" else dk.BitFit(at="norm"))
    golden(kind, str(dk.show(model)))


@pytest.mark.parametrize("kind", ["bert", "t5", "albert", "mixtral", "clip"])
def test_sums_are_those_of_the_parameters(kind):
    model = build(kind, tf.AutoModel)
    total = sum(p.numel() for p in model.parameters())
    assert tree(model).sizes.parameters == total
    delta = dk.attach(model, dk.LoRA(r=3))
    for node in (tree(model), folded(tree(model))):
        assert (node.sizes.parameters, node.sizes.delta, node.sizes.trained, node.sizes.delta_trained) == (
            total,
            delta.num_parameters,
            0,
            delta.num_parameters,
        )


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2", "mixtral"])
def test_a_folded_row_is_true_of_every_member(kind):
    model = build(kind)
    assert _rows(folded(tree(model))) == sum(1 for _ in walk(tree(model)))


def _rows(node):
    inner = 1 + sum(_rows(child) for child in node.children)
    return inner * node.members


def test_what_differs_is_not_folded():
    blocks = nn.Sequential(*(nn.Linear(3, 3) for _ in range(6)))
    blocks[2].weight.requires_grad_(False)
    blocks[4].half()
    assert [line.split(" ")[1] for line in str(dk.show(blocks)).splitlines()[1:-2]] == ["0-1", "2", "3", "4", "5"]
    assert "○" in str(dk.show(blocks[2:3])) or "◐" in str(dk.show(blocks[2:3]))
    listed = nn.ModuleList(nn.Linear(3, 3 + (n % 5 == 3)) for n in range(40))
    assert "0-39!3-38:5 (Linear)" in str(dk.show(listed))
    assert "3-38:5 (Linear)" in str(dk.show(listed))


def test_trained_frozen_and_delta_differ_without_colour():
    model = Transformer()
    dk.attach(model, dk.LoRA(r=3), train="@head")
    text = str(dk.show(model))
    assert re.search(r"classifier \(Linear\).* ● ", text)
    assert re.search(r"embed \(Embedding\).* ○ ", text)
    assert re.search(r"\+lora r=3 alpha=16  A:\[3, 20\] B:\[20, 3\] +×\d+ +Δ", text)
    dk.deltas(model)[0].active = False
    assert re.search(r"alpha=16 off  A:.* off  ", str(dk.show(model)))
    dk.deltas(model)[0].trainable = False
    assert re.search(r"alpha=16 off frozen  A:.* off  ", str(dk.show(model)))
    dk.deltas(model)[0].active = True
    assert re.search(r"alpha=16 frozen  A:.* Δ○ ", str(dk.show(model)))


def test_ties():
    free = nn.ModuleDict({"a": nn.Embedding(5, 3), "b": nn.Linear(3, 5, bias=False)})
    assert "a (Embedding) weight:[5, 3]" in str(dk.show(free))
    free["b"].weight = free["a"].weight
    text = str(dk.show(free))
    assert "a (Embedding), b (Linear) weight:[5, 3]  tied" in text
    assert text.splitlines()[-1].startswith("15 parameters")
    t5 = str(dk.show(build("t5")))
    assert re.search(r"embed_tokens \(Embedding\) weight:\[97, 24\]  = shared\.weight +tied", t5)


def test_a_module_under_two_names_and_a_lazy_one():
    one = nn.Linear(2, 3)
    model = nn.ModuleDict({"a": one, "x": nn.LayerNorm(2), "b": one, "c": nn.LazyLinear(4)})
    text = str(dk.show(model))
    assert "b (Linear) → a" in text
    assert "weight:?" in text
    assert text.splitlines()[-1].startswith("13 parameters")


def test_own_parameters_of_the_root_and_modules_without_any():
    model = nn.Sequential(nn.ReLU(), nn.Dropout())
    model.scale = nn.Parameter(torch.ones(3))
    assert str(dk.show(model)).splitlines()[0].startswith("root scale:[3]")
    assert len(str(dk.show(model)).splitlines()) == 3
    assert "ReLU" in str(dk.show(model, all_modules=True))
    assert str(dk.show(nn.Identity())).splitlines()[0] == "root"


HOSTILE = ["[bold]x", "<b>x</b>", "a\"b'c", "{q}", "ünï", "名前"]


def test_hostile_names():
    model = nn.ModuleDict({name: nn.Linear(2, 3 + n) for n, name in enumerate(HOSTILE)})
    view = dk.show(model)
    console = Console(width=200, color_system=None, file=io.StringIO())
    with console.capture() as capture:
        console.print(view)
    for name in HOSTILE:
        assert f"{name} (Linear)" in str(view)
        assert f"{name} (Linear)" in capture.get()
    assert "<b>" not in view.html()
    assert "<b>" not in view.svg()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_no_row_is_wider_than_asked(width):
    model = build("t5")
    dk.attach(model, dk.Adapter(size=3))
    for line in str(dk.show(model, width=width)).splitlines():
        assert cell_len(line) <= width
        assert line == line.rstrip()


def test_ascii():
    model = Transformer()
    dk.attach(model, dk.LoRA(r=3))
    assert str(dk.show(model, ascii=True)).isascii()
    assert len(str(dk.show(model, ascii=True)).splitlines()) == len(str(dk.show(model)).splitlines())


def test_colour_only_where_it_is_asked_for():
    view = dk.show(Transformer())
    texts = []
    for color in (None, "standard"):
        console = Console(width=120, color_system=color, force_terminal=True, no_color=color is None)
        with console.capture() as capture:
            console.print(view)
        texts.append(capture.get())
    assert "\x1b[" in texts[1]
    assert re.sub(r"\x1b\[[0-9;]*m", "", texts[1]) == re.sub(r"\x1b\[[0-9;]*m", "", texts[0])


class Check(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], "", set()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_html_says_what_the_text_says_without_scripts():
    model = build("t5")
    dk.attach(model, dk.LoRA(r=3))
    view = dk.show(model)
    check = Check()
    check.feed(view.html())
    assert not check.open
    assert check.tags <= {"div", "details", "summary", "span", "style", "script", "code"}
    for line in str(view).splitlines():
        label = line.lstrip("│├└─ ").split("  ")[0]
        assert label in check.text
    assert set(view._repr_mimebundle_()) == {"text/plain", "text/html"}


def test_depth():
    text = str(dk.show(build("bert"), depth=2))
    assert re.search(r"… \d+ more lines", text)
    assert "query" not in text
    assert "more lines" in dk.show(build("bert"), depth=2).html()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dk.show("model"), r"show\(backbone='model'\): expected a torch.nn.Module, found the text 'model'"),
        (
            lambda: dk.show(nn.ReLU(), columns=("size",)),
            "unknown column 'size'; choose from members, state, count, each, dtype, bytes, device",
        ),
        (
            lambda: dk.Visualization(nn.ReLU()).structure_graph(columns=["size"]),
            "unknown column 'size'; choose from members, state, count, each, dtype, bytes, device",
        ),
        (lambda: dk.show(nn.ReLU(), width=0), "width=0: expected at least 1"),
        (lambda: dk.show(nn.ReLU(), depth=-1), r"show\(depth=-1\)"),
    ],
)
def test_bad_input(unchecked, call, message):
    with pytest.raises(dk.DeltaError, match=message):
        call()


def test_a_large_model_on_the_meta_device_is_a_short_tree(unchecked):
    config = tf.LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    )
    with torch.device("meta"):
        model = tf.AutoModel.from_config(config)
    text = str(dk.show(model))
    assert len(text.splitlines()) < 20
