"""The state of a picker: rows, ticks, names everywhere, the filter, and selectors that select exactly what is ticked."""

import itertools
from functools import cache

import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import deltakit as dk
from deltakit.picking.picked_modules import summary
from deltakit.picking.picker import Picker, act, state_of, tree_of
from support.models import Transformer, method_of, randomize
from support.tiny_transformers import build

KINDS = ("bert", "llama", "t5", "gpt2", "albert", "clip")


@cache
def model(kind):
    return build(kind, tf.AutoModelForCausalLM if kind == "llama" else tf.AutoModel)


@cache
def shared_picker(kind):
    """Its index of the model is made once."""
    return Picker(model(kind))


def row_of(picker, path):
    (row,) = (row for row in picker.rows if row.path == path)
    return row.number


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_are_the_modules_each_once(kind):
    picker = Picker(model(kind))
    paths = [path for row in picker.rows for path in row.paths]
    with_parameters = {
        path for path, module in model(kind).named_modules() if path and any(True for _ in module.parameters())
    }
    assert sorted(paths) == sorted(with_parameters)
    for row in picker.rows:
        assert row.number == picker.rows.index(row)
        assert row.parent < row.number
        assert row.depth == (picker.rows[row.parent].depth + 1 if row.parent >= 0 else 0)


def test_members_of_lists_are_folded_and_equal_leaves_are_not():
    picker = Picker(build("llama", num_hidden_layers=5))
    labels = [row.label for row in picker.rows]
    assert "0-4 (LlamaDecoderLayer)  ×5" in labels
    assert [label.split()[0] for label in labels if "_proj" in label] == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]


def test_other_names_of_a_module_cannot_be_ticked():
    shared = torch.nn.Linear(2, 3)
    backbone = torch.nn.ModuleDict({"a": shared, "b": shared, "c": torch.nn.Linear(3, 5)})
    picker = Picker(backbone)
    assert [row.paths for row in picker.rows] == [("a",), (), ("c",)]
    assert picker.rows[1].label == "b (Linear) → a"
    picker.tick(1)
    assert not picker.ticked
    picker.tick(0)
    assert picker.selection().selectors == ("a",)


def test_same_name_everywhere():
    picker = Picker(build("t5", num_layers=3, num_decoder_layers=5))
    # In the first block and in the others, in the encoder and in the decoder, in all kinds of attention.
    picker.everywhere(row_of(picker, "encoder.block.0.layer.0.SelfAttention.q"))
    picker.everywhere(row_of(picker, "decoder.block.{1-4}.layer.1.EncDecAttention.v"))
    found = picker.selection()
    assert (len(found.names), found.selectors) == (2 * (3 + 2 * 5), ("{q,v}",))
    assert found.line == 'dk.LoRA(at="{q,v}")'
    picker.everywhere(row_of(picker, "encoder.block.0.layer.0.SelfAttention.q"), on=False)
    assert picker.selection().selectors == ("v",)
    picker.clear()
    # Of members of a list, those of the same class in lists of the same name.
    picker.everywhere(row_of(picker, "encoder.block.0"))
    assert picker.selection().selectors == ("@block",)
    assert len(picker.selection().names) == 8
    picker.clear()
    picker.everywhere(row_of(picker, "decoder.block.0.layer.1"))
    assert picker.selection().names == tuple(f"decoder.block.{n}.layer.1" for n in range(5))


@given(data=st.data())
@settings(max_examples=60)
def test_selectors_select_exactly_what_is_ticked(data):
    kind = data.draw(st.sampled_from(KINDS))
    picker, ticked = shared_picker(kind), set()
    picker.clear()
    actions = st.tuples(st.sampled_from(["tick", "everywhere"]), st.integers(0, len(picker.rows) - 1), st.booleans())
    for what, number, on in data.draw(st.lists(actions, max_size=6)):
        getattr(picker, what)(number, on=on)
        name = picker.rows[number].same_name
        meant = {number} if what == "tick" else {row.number for row in picker.rows if row.same_name == name}
        meant = {path for one in meant for path in picker.rows[one].paths}
        ticked = ticked | meant if on else ticked - meant
        assert picker.ticked == ticked
    found = picker.selection()
    assert set(found.names) == ticked
    if ticked:
        assert list(dk.select(model(kind), found.selectors)) == list(found.names)
        assert found.line.startswith("dk.LoRA(at=")
        assert eval(found.line, {"dk": dk}).at == (found.selectors if len(found) > 1 else found.selectors[0])
    else:
        assert (found.selectors, found.line) == ((), "")


def test_a_filter_is_a_part_of_a_name_or_a_selector():
    picker = Picker(model("t5"))
    assert picker.shown() == list(range(len(picker.rows)))
    assert picker.matches() == set()
    picker.filter = "ENCDEC"
    names = {path.rpartition(".")[2] for path in picker.matches()}
    assert names == {"EncDecAttention", "q", "k", "v", "o"}
    picker.filter = "encoder/@attn.q"
    assert picker.matches() == {f"encoder.block.{n}.layer.0.SelfAttention.q" for n in (0, 1)}
    # With the rows around them.
    assert len(picker.shown()) == 2 + 2 + 4 * 2
    picker.tick_matches()
    assert picker.selection().selectors == ("encoder/q",)
    picker.tick_matches(on=False)
    assert not picker.ticked
    for unfinished in ("{q,", "@nothing", "re:(", "[r]", "a..b", "\0"):
        picker.filter = unfinished
        assert picker.matches() == set()
        assert picker.shown() == []
    picker.filter = "  "
    assert len(picker.shown()) == len(picker.rows)


def test_a_part_of_a_list():
    picker = Picker(build("llama", num_hidden_layers=7))
    picker.filter = "layers.{0-3}/@attn.q"
    picker.tick_matches()
    picker.filter = ""
    number = row_of(picker, "layers.{0-6}.self_attn.q_proj")
    assert picker.ticked_in(number) == 4
    assert state_of(picker)["ticked"] == {number: 4}
    found = picker.selection()
    assert (found.selectors, len(found.names)) == (("layers.{0-3}/q_proj",), 4)
    picker.filter = "layers.{2-6}/@attn.q"
    picker.tick_matches(on=False)
    assert picker.selection().names == ("layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj")
    picker.tick(number)
    assert picker.selection().selectors == ("q_proj",)


def test_messages():
    picker = Picker(Transformer())
    for message in (
        *(None, [], 5, "tick", {}, {"do": "tock"}, {"do": "tick"}, {"do": "filter", "text": 5}),
        *({"do": "tick", "row": row, "on": True} for row in (-1, len(picker.rows), True, 1.0, "1", None, [1])),
        *({"do": what, "row": 1, "on": on} for what, on in itertools.product(["tick", "everywhere"], [None, 1, "yes"])),
    ):
        with pytest.raises(dk.OptionError, match="load the page again"):
            act(picker, message)
        assert (picker.ticked, picker.filter) == (set(), "")
    number = row_of(picker, "layers.{0-1}.self_attn.v_proj")
    act(picker, {"do": "tick", "row": number, "on": True})
    act(picker, {"do": "filter", "text": "q_proj"})
    act(picker, {"do": "look"})
    state = state_of(picker)
    assert (state["ticked"], state["matches"]) == ({number: 2}, 2)
    assert (state["summary"], state["line"]) == ("2 modules (2 v_proj)", 'dk.LoRA(at="v_proj")')
    act(picker, {"do": "matches", "on": True})
    assert state_of(picker)["summary"] == "4 modules (2 q_proj, 2 v_proj)"
    act(picker, {"do": "clear"})
    assert state_of(picker)["summary"] == "nothing is ticked yet"
    rows = tree_of(picker)["rows"]
    assert [row["modules"] for row in rows] == [len(row.paths) for row in picker.rows]


def test_summaries():
    assert summary(["head"]) == "1 module (1 head)"
    assert summary([f"layers.{n}" for n in range(3)]) == "3 modules (3 layers.*)"
    assert summary(["a", "b", "c", "d", "e", "f"]) == "6 modules (1 a, 1 b, 1 c, 1 d and 2 more names)"


def test_a_selection_stands_where_selectors_do(tmp_path):
    backbone = Transformer(blocks=3)
    picker = Picker(backbone)
    picker.tick(row_of(picker, "layers.{0-2}.self_attn.q_proj"))
    picker.tick(row_of(picker, "layers.{0-2}.mlp"))
    found = picker.selection()
    assert len(found) == len(found.selectors)
    for at in (found, found.selectors, list(found)):
        plan = dk.plan(backbone, dk.LoRA(r=2, at=at))
        assert dk.LoRA(at=at).at == tuple(found.selectors)
        assert {path for built in plan.built for path in built} >= {f"layers.{n}.self_attn.q_proj" for n in range(3)}
    assert set(dk.select(backbone, "**", exclude=found)).isdisjoint(found.names)
    head = Picker(backbone)
    head.tick(row_of(head, "classifier"))
    delta = dk.attach(backbone, dk.BitFit(at=found), train=head.selection())
    assert delta.methods[0].at == tuple(found)
    assert delta.fully_trained == ["classifier.weight", "classifier.bias"]
    fresh = Transformer(blocks=3)
    fresh.load_state_dict(dk.base_state_dict(backbone))
    assert dk.load(randomize(delta).save(tmp_path / "saved"), fresh).methods[0].at == tuple(found)
    assert found == dk.Selection(found.names, found.selectors)
    assert len({found, dk.Selection(found.names, found.selectors)}) == 1
    assert found != dk.Selection()
    assert repr(dk.Selection()) == "Selection of no module"
    assert not dk.Selection()


@pytest.mark.parametrize("name", dk.METHODS)
def test_all_methods_take_a_selection(name):
    found = dk.Selection(["layers.0.mlp", "layers.1.mlp"], ["mlp", "@attn.q"])
    assert method_of(name, at=found, exclude=found).to_dict()["at"] == ["mlp", "@attn.q"]
    assert method_of(name, exclude=found).exclude == ("mlp", "@attn.q")


def test_what_cannot_be_picked_from():
    with pytest.raises(dk.TargetError, match=r"this Linear has no module with parameters in it; at='\^' selects"):
        Picker(torch.nn.Linear(2, 3))
    assert dk.plan(torch.nn.Linear(2, 3), dk.LoRA(r=1, at="^")).num_parameters == 5


def test_quotes_and_control_characters_in_names():
    backbone = torch.nn.Sequential()
    for name in ('a"b', "a'b", "a\\b", "a\u202eb", "[bold]x", "a/b", "{q,v}", "*"):
        backbone.add_module(name, torch.nn.Linear(2, 3))
    picker = Picker(backbone)
    for number in range(len(picker.rows)):
        picker.clear()
        picker.tick(number)
        found = picker.selection()
        assert found.line.isprintable()
        assert list(dk.select(backbone, eval(found.line, {"dk": dk}).at)) == list(found.names)
