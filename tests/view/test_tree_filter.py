"""`dk.show(model, filter=...)`: what matches with what is around it, and counts of the whole model."""

import json

import pytest
from torch import nn

import deltakit as dk
from deltakit.view.filtering import filtered
from deltakit.view.folding import folded, unfolded
from deltakit.view.node import walk
from deltakit.view.tree import build as tree
from support.models import Transformer
from support.tiny_transformers import build

LEFT_OUT = "left out by the filter: "


def shown(view):
    """The selectors of the rows of a view, and its parameters and modules left out by row."""
    found, ahead = {}, [json.loads(view.json())["root"]]
    while ahead:
        row = ahead.pop()
        found[row["selector"]] = row
        ahead += row.get("children", [])
    return found


@pytest.mark.parametrize("selectors", ["@attn.q", ["mlp", "embed"], "re:.*[qv]_proj", "encoder/@attn.{k,v}", "^"])
def test_a_row_matches_or_has_a_match_below_it(selectors):
    model = build("t5") if "encoder" in selectors else Transformer()
    dk.attach(model, dk.LoRA(r=3))
    wanted = set(dk.select(model, selectors))
    around = {path[:end] for path in wanted for end in [0, *(n for n, c in enumerate(path) if c == ".")]}
    rows = shown(dk.show(model, filter=selectors, fold=False))
    assert {selector.replace("^", "") for selector in rows} == wanted | around
    # Counts are those of the unfiltered tree, and what is not shown is said.
    everything = shown(dk.show(model, fold=False))
    for selector, row in rows.items():
        assert row["parameters"] == everything[selector]["parameters"]
        below = [other for other in everything if selector in ("^", other[: len(selector)]) and other not in rows]
        inside = [other for other in below if selector == "^" or other.startswith(f"{selector}.")]
        assert row.get("modules_filtered_out", 0) == len(inside)
    lines = str(dk.show(model, filter=selectors)).splitlines()
    assert lines[-1] == f"{LEFT_OUT}{len(everything) - len(rows)} modules, which the counts include"
    assert lines[-2] in str(dk.show(model))


@pytest.mark.parametrize("kind", ["t5", "mixtral", "clip"])
def test_a_filtered_tree_folds_and_unfolds(kind):
    model = build(kind)
    dk.attach(model, dk.LoRA(r=3))
    narrow = filtered(tree(model), model, "@attn.{q,v}")
    assert unfolded(folded(narrow)) == narrow
    for selector, row in shown(dk.show(model, filter="@attn.{q,v}")).items():
        assert len(dk.select(model, selector)) == row["modules"]


def test_blocks_of_which_more_is_left_out_do_not_fold():
    def block(*sizes):
        others = {f"k{n}": nn.Linear(2, size, bias=False) for n, size in enumerate(sizes)}
        return nn.ModuleDict({"q": nn.Linear(2, 3), **others})

    rows = shown(dk.show(nn.ModuleList([block(4), block(2, 2), block(4)]), filter="q"))
    assert {selector: row["modules_filtered_out"] for selector, row in rows.items() if "q" not in selector} == {
        "^": 4,
        "{0,2}": 2,
        "1": 2,
    }


def test_what_a_filter_shows_of_a_match():
    model = Transformer()
    dk.attach(model, dk.LoRA(r=3, at="q_proj"))
    for selector in ("q_proj.weight", "q_proj"):
        assert str(dk.show(model, filter=selector)) == str(dk.show(model, filter="@attn.q"))
    text = str(dk.show(model, filter="@attn.q"))
    assert "+lora r=3" in text
    assert "k_proj" not in text
    assert "k_proj" in str(dk.show(model, filter=["@attn", "@attn/**"]))
    assert "k_proj" not in str(dk.show(model, filter="@attn"))
    # All of it is the tree as it is.
    assert str(dk.show(model, filter="**")) == str(dk.show(model))
    assert LEFT_OUT in dk.show(model, filter="@attn.q").html()


def test_a_depth_hides_rows_of_the_filtered_tree():
    model = Transformer()
    text = str(dk.show(model, filter="@attn.q", depth=1))
    rows = sum(1 for _ in walk(folded(filtered(tree(model), model, "@attn.q"))))
    assert f"… {rows - 2} more lines" in text
    assert text.splitlines()[-1] == str(dk.show(model, filter="@attn.q")).splitlines()[-1]


def test_both_names_of_a_module_match():
    one = nn.Linear(2, 3)
    model = nn.ModuleDict({"a": one, "b": one, "c": nn.Linear(3, 2)})
    assert [line.split(" ")[1] for line in str(dk.show(model, filter="b")).splitlines()[1:3]] == ["a", "b"]


def test_gaps_that_the_filter_made_are_not_explained_otherwise():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    assert "missing numbers" in str(dk.show(model))
    assert "missing numbers" not in str(dk.show(model, filter="2"))
    assert f"{LEFT_OUT}1 module, which" in str(dk.show(model, filter="2"))


def test_filters_that_match_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(dk.SelectorError, match="selector 'qproj' matches none of .*; nearest: .*q_proj"):
        dk.show(Transformer(), filter=["v_proj", "qproj"])
    with pytest.raises(dk.SelectorError, match=r"such as 1, has no parameters, and so no row; pass all_modules=True"):
        dk.show(model, filter="1")
    assert "1 (ReLU)" in str(dk.show(model, filter="1", all_modules=True))
    with pytest.raises(dk.SelectorError, match="an empty list of selectors"):
        dk.show(model, filter=[])
    with pytest.raises(dk.RoleError):
        dk.show(model, filter="@attention.q")
