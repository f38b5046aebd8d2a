"""The grammar: each line of it, a slow and obvious matcher beside it, and what a miss says."""

import re

import pytest
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import deltakit as dk
from deltakit.core.folding import expand
from deltakit.selection.grammar import match
from support import backbone_zoo
from support.models import Transformer
from support.tiny_transformers import build

PATHS = ["", "enc", *(f"enc.layer.{i}.{part}" for i in range(12) for part in ("q", "k", "v", "qk")), "dec", "dec.q"]


def hits(selector, paths=PATHS):
    return match(selector, paths, lambda role: ())


def some(layers, *parts):
    return [f"enc.layer.{i}.{part}" for i in layers for part in parts]


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("k", some(range(12), "k")),
        ("q", [*some(range(12), "q"), "dec.q"]),
        ("0.q", some([0], "q")),
        ("^dec", ["dec"]),
        ("^", [""]),
        ("dec.q", ["dec.q"]),
        ("enc.layer.3.q", some([3], "q")),
        ("^layer.3.q", []),
        ("layer.3.{q,v}", some([3], "q", "v")),
        ("layer.{0-2}.q", some([0, 1, 2], "q")),
        ("{0-10:5}.q", some([0, 5, 10], "q")),
        ("{0-11!1-10}.k", some([0, 11], "k")),
        ("layer.*.k", some(range(12), "k")),
        ("enc.**.v", some(range(12), "v")),
        ("dec.**", ["dec.q"]),
        ("1*.q", some([1, 10, 11], "q")),
        ("re:enc.*[02]\\.q", some([0, 2, 10], "q")),
        ("[r]layer.[02].q", some([0, 2], "q")),
        ("dec/q", ["dec.q"]),
        ("enc/**", [path for path in PATHS if path.startswith("enc.")]),
    ],
)
def test_each_line_of_the_grammar(selector, wanted):
    assert hits(selector) == wanted


def slow(selector, paths):
    """One component at a time, by recursion; no anchoring at the root, which the strategy below never asks for."""

    def fits(pattern, parts):
        if not pattern:
            return not parts
        if pattern[0] == "**":
            rest = pattern[1:]
            least = 0 if rest else 1
            return any(fits(rest, parts[n:]) for n in range(least, len(parts) + 1))
        return bool(parts) and (pattern[0] == "*" or parts[0] in expand(pattern[0])) and fits(pattern[1:], parts[1:])

    pattern = selector.split(".")
    return [p for p in paths if p and any(fits(pattern, p.split(".")[n:]) for n in range(len(p.split("."))))]


names = st.sampled_from(["a", "b", "ab", "0", "1", "10"])


paths_of = st.lists(
    st.lists(names, min_size=1, max_size=4).map(lambda c: "root." + ".".join(c)), unique=True, max_size=12
)


components = st.one_of(names, st.just("*"), st.just("**"), st.just("{a,b}"), st.just("{0-1}"))


@given(paths=paths_of, pattern=st.lists(components, min_size=1, max_size=4))
def test_equals_a_slow_obvious_matcher(paths, pattern):
    selector = ".".join(pattern)
    assert hits(selector, paths) == slow(selector, paths)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("", "selector ''"),
        ("a..b", "an empty component"),
        ("{a", "an unbalanced brace"),
        ("{a,,b}", "a member of the braces is empty"),
        ("{}", "a member of the braces is empty"),
        ("{5-1}", "the range '5-1' runs backwards"),
        ("re:(", "invalid regular expression"),
        ("block@.x@", "OpenDelta's common names are attn@"),
        ("@attn.", "selector '@attn.': a part of the role is empty; write '@' and one role"),
        ("@ff.", "a part of the role is empty"),
        ("@block.", "a part of the role is empty"),
        ("@.q", "a part of the role is empty"),
        ("@attn..q", "a part of the role is empty"),
        ("@{attn,ff}.", "a part of the role is empty"),
        ("dec/@attn.", "a part of the role is empty"),
        ("re:", "selector 're:': no regular expression follows the prefix; write one, such as 're:.*query'"),
        ("[r]", "selector '[r]': no regular expression follows the prefix"),
        ("dec/re:", "no regular expression follows the prefix"),
        ("dec/", "selector 'dec/': one side of the slash is empty"),
        ("/dec", "one side of the slash is empty"),
    ],
)
def test_malformed(selector, message):
    with pytest.raises(dk.SelectorError, match=re.escape(message)):
        hits(selector)


@pytest.mark.parametrize(
    ("selector", "wanted"),
    [
        ("{0-99999999999}.q", ["h.0.q", "h.7.q", "h.10.q", "h.0070.11.q"]),
        ("{3-99999999999:7}.q", ["h.10.q"]),
        ("{0-99999999999!1-99999999998}.q", ["h.0.q"]),
        ("{0-99999999999!1-99999999998!7}.q", ["h.0.q", "h.7.q"]),
        ("{0-99999999999!7}.q", ["h.0.q", "h.10.q", "h.0070.11.q"]),
        ("h.00{0-99999999999}.11.q", ["h.0070.11.q"]),
        ("h.0{0-9}{0-9}0.11.q", ["h.0070.11.q"]),
        ("h.{0-999999}{0-999999}{0-999999}{0-999999}.11.q", ["h.0070.11.q"]),
        ("{" + ",".join(["0-99999999999!0-99999999999"] * 100) + ",7}.q", ["h.7.q"]),
        ("{0-9" + "!0-9" * 10_000 + "}.q", ["h.0.q", "h.7.q"]),
        ("h.{0-" + "9" * 5_000 + ",7}.q", ["h.7.q"]),
        ("{4-6}.q", []),
    ],
)
def test_ranges_are_never_expanded_beyond_the_paths(selector, wanted):
    paths = ["", "h", "h.0.q", "h.7.q", "h.10.q", "h.0070.11.q", "h.0x.q"]
    assert hits(selector, paths) == wanted


def test_a_long_range_that_matches_nothing_is_a_miss():
    for selector in ("{5-99999999999}", "x{0-99999999999}{0-99999999999}", "x" + "{0-99999999999}" * 50):
        with pytest.raises(dk.SelectorError, match="matches none of the [0-9]+ modules of Transformer"):
            dk.select(Transformer(), selector)
    with pytest.raises(
        dk.SelectorError, match=r"'attn.\{0-99999999999\}' stands for more than 1,000 names; write the ones"
    ):
        dk.select(Transformer(), "@attn.{0-99999999999}")


def test_a_miss_names_what_is_near_and_what_there_is():
    with pytest.raises(dk.SelectorError) as caught:
        dk.select(Transformer(), "q_porj")
    assert "'q_porj' matches none of the" in str(caught.value)
    assert "nearest: layers.0.self_attn.q_proj" in str(caught.value)
    assert "last components of its paths: embed, layers" in str(caught.value)
    with pytest.raises(dk.SelectorError, match="'typo' matches none"):
        dk.select(Transformer(), ["q_proj", "typo"])
    with pytest.raises(dk.SelectorError, match="an empty list of selectors"):
        dk.select(Transformer(), [])


def test_a_plan_shows_the_tower_that_was_not_meant():
    model, _ = backbone_zoo.build("clip")
    keys = set(model.state_dict())
    assert "{text_model,vision_model}.encoder.layers.{0-1}.self_attn.q_proj" in repr(
        dk.plan(model, dk.LoRA(r=2, at="q_proj"))
    )
    assert "      text_model.encoder.layers.{0-1}.self_attn.q_proj\n" in repr(
        dk.plan(model, dk.LoRA(r=2, at="text_model/@attn.q"))
    )
    assert set(model.state_dict()) == keys


def test_a_typo_in_one_entry_of_a_list_is_an_error():
    with pytest.raises(
        dk.SelectorError, match=r"selector 'v_projj' matches none of the \d+ modules.*nearest: .*v_proj"
    ):
        dk.select(Transformer(), ["q_proj", "v_projj"])


@pytest.mark.parametrize("option", ["at", "exclude", "train"])
def test_malformed_selectors_never_mean_the_whole_backbone(option):
    for selector in ("re:", "[r]", "@attn.", "@ff."):
        method = dk.LoRA(r=2, **({} if option == "train" else {option: selector}))
        with pytest.raises(dk.SelectorError, match="is empty|no regular expression"):
            dk.plan(Transformer(), method, train=selector if option == "train" else None)
    assert dk.select(nn.ModuleDict({"re:": nn.Linear(2, 2), "0": nn.Linear(2, 2)}), "re:").keys() == {"re:"}


def test_narrowing():
    model = Transformer()
    assert list(dk.select(model, "layers.0.**", of=nn.LayerNorm)) == ["layers.0.norm_1", "layers.0.norm_2"]
    assert list(dk.select(model, "layers.0.**", of="Linear", exclude=["self_attn.*", "down_proj"])) == [
        "layers.0.mlp.up_proj"
    ]
    with pytest.raises(dk.SelectorError, match="selects 2 targets in Transformer, and of=.*Embedding.* leaves none"):
        dk.select(model, "q_proj", of=nn.Embedding)
    with pytest.raises(dk.SelectorError, match="'nope' matches none"):
        dk.select(model, "q_proj", exclude="nope")


def test_a_module_with_two_names_is_picked_once():
    """Under each of its names it would get a delta of its own, and be changed twice."""
    model = Transformer()
    model.again = model.layers[0].self_attn
    once = ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
    assert list(dk.select(model, "q_proj")) == list(dk.select(model, ["again.q_proj", "q_proj"])) == once
    assert list(dk.select(model, "again.*", of=nn.Linear, exclude=["k_proj", "v_proj", "o_proj"])) == once[:1]


def test_roles_in_selectors():
    model = build("t5", tf.AutoModelForSeq2SeqLM)
    assert len(dk.select(model, "@attn.{q,v}")) == 12
    assert len(dk.select(model, "attn@.q@")) == 6
    assert len(dk.select(model, "decoder/@attn.q")) == len(dk.select(model, "decoder@.attn@.q@")) == 4
    assert list(dk.select(model, "decoder.block.0/@attn.cross")) == ["decoder.block.0.layer.1.EncDecAttention"]
    assert list(dk.select(model, "@head")) == ["lm_head"]
    with pytest.raises(dk.RoleError, match=r"there is no role '@attn\.query'; use one of @block, @attn, @attn\.q"):
        dk.select(model, "@attn.query")
    gpt2 = build("gpt2")
    rows = [f"h.{i}.attn.c_attn[{letter}]" for i in (0, 1) for letter in "qv"]
    assert sorted(dk.select(gpt2, "@attn.{q,v}")) == sorted(dk.select(gpt2, "c_attn[{q,v}]")) == rows
    assert list(dk.select(gpt2, "h.0.attn.c_attn[k]", of="Conv1D")) == ["h.0.attn.c_attn[k]"]
    with pytest.raises(dk.SelectorError, match=r"'c_attn\[o\]' matches none"):
        dk.select(gpt2, "c_attn[o]")


def test_parameters_are_picked_by_name_only():
    model = build("mixtral")
    experts = [f"layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")]
    picked = dk.select(model, "experts.{gate_up_proj,down_proj}")
    assert sorted(picked) == sorted(experts)
    assert picked[experts[0]] is model.layers[0].mlp.experts.gate_up_proj
    assert all(isinstance(module, nn.Module) for module in dk.select(model, "**").values())
    assert list(dk.select(model, "re:layers.0.*down_proj")) == [experts[1]]
    assert list(dk.select(model, "experts.down_proj", exclude="^layers.0.mlp.experts.down_proj")) == [experts[3]]
    with pytest.raises(dk.SelectorError, match="leaves none of them; omit that"):
        dk.select(model, "experts.down_proj", of=nn.Linear)


def test_what_is_printed_can_be_pasted():
    model = build("t5")
    delta = dk.attach(model, dk.LoRA(r=3))
    printed = [line.strip() for line in repr(delta).splitlines() if line.startswith("      ")]
    assert list(dk.select(model, printed)) == sorted(delta.modules, key=list(dict(model.named_modules())).index)


def test_an_exclude_takes_something_out_or_is_an_error():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True), 2)
    left = dk.plan(model, dk.LoRA(r=2, exclude="layers.0.self_attn")).paths["lora"]
    assert left == ["layers.1.self_attn.in_proj_weight[q]", "layers.1.self_attn.in_proj_weight[v]"]
    assert dk.plan(model, dk.LoRA(r=2, exclude="layers.0")).paths["lora"] == left
    with pytest.raises(dk.SelectorError, match=r"exclude='layers\.0' removes none of the 2 .*'layers\.0/\*\*'"):
        dk.plan(model, dk.Adapter(size=2, exclude=["layers.1/**", "layers.0"]))
