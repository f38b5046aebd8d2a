"""Which modules OpenDelta's names match: facts measured with OpenDelta itself."""

import re

import pytest
import torch
import transformers as tf

import deltakit as dk
from deltakit.opendelta.matching import Addresses, matches
from deltakit.opendelta.utils.structure_mapping import CommonStructureMap, transform
from support.opendelta_models import MODELS

# On BERT, T5, GPT-2 and OPT.
COMMON = {
    "attn@": (2, 4, 2, 2),
    "q@": (2, 6, 0, 2),
    "attn@.q@": (2, 4, 0, 2),
    "crossattn@.q@": (0, 2, 0, 0),
    "ff@": (4, 4, 2, 4),
    "ff@.w1@": (2, 4, 2, 2),
    "layer_norm@": (4, 12, 5, 4),
    "0.attn@.proj@": (1, 2, 1, 1),
}


@pytest.mark.parametrize(("place", "name"), list(enumerate(["bert", "t5", "gpt2", "opt"])))
def test_common_names(place, name):
    with torch.device("meta"):
        model = MODELS[name]()
    found = Addresses(model, common=True).select(COMMON, ())
    assert {common: len(paths) for common, paths in found.items()} == {key: n[place] for key, n in COMMON.items()}
    # With "@" they mean the same without common_structure=True.
    assert Addresses(model, common=False).select(COMMON, ()) == found


@pytest.mark.parametrize(
    ("key", "name", "expected"),
    [
        ("a.0.attn.q", "q", True),
        ("a.0.attn.q", "attn", False),
        ("a.0.attn.q", r"[r](\d).attn.q", True),
        ("a.0.attn.q", "[r]attn", False),
        ("a.0.attn.q", "[r]attn.*", True),
        ("a.10.attn.q", "0.attn.q", False),
        ("a.10.attn.q", "[r]0.attn.q", False),
        ("x.attn.c_attn", "attn", False),
    ],
)
def test_names(key, name, expected):
    assert matches(key, name) is expected


def test_exclude_modules_is_the_beginning_of_a_path():
    model = MODELS["bert"]()
    delta = dk.LoraModel(model, modified_modules=["query"], exclude_modules=["bert.encoder.layer.0"])
    assert list(delta.delta.modules) == ["bert.encoder.layer.1.attention.self.query"]
    # Alone, it leaves out default positions. (In OpenDelta nothing matches then.)
    alone = dk.LoraModel(MODELS["bert"](), exclude_modules=["bert.encoder.layer.0"])
    assert {path.split(".")[3] for path in alone.delta.modules} == {"1"}


def test_what_has_no_common_name_keeps_its_own():
    model = MODELS["t5"]()
    names = CommonStructureMap.load(model)
    assert transform("encoder.block.1.layer.0.SelfAttention.q", names) == "encoder@.block@.1.attn@.q@"
    assert transform("decoder.block.0.layer.1.EncDecAttention", names) == "decoder@.block@.0.crossattn@.EncDecAttention"
    assert transform("encoder.dropout", names) == "encoder@.dropout"
    assert transform("lm_head", names) == "lm_head"
    with pytest.raises(dk.OptionError, match="BartForConditionalGeneration: no common names; the classes that have"):
        CommonStructureMap.load(MODELS["bart"]())


def test_a_known_class_inside_another_module():
    with torch.device("meta"):
        around = torch.nn.ModuleDict({"text": tf.BertModel(tf.BertConfig(num_hidden_layers=2))})
    assert Addresses(around, common=True).select(["attn@.q@"], ())["attn@.q@"] == [
        f"text.encoder.layer.{number}.attention.self.query" for number in (0, 1)
    ]


def test_names_that_match_nothing_are_warnings():
    model = MODELS["bert"]()
    with pytest.warns(
        dk.DeltaWarning, match=r"LoraModel: 'no_such' matched no module of this BertForSequence.*nothing is"
    ):
        delta = dk.LoraModel(model, modified_modules=["no_such"])
    assert delta.delta is None
    assert dk.deltas(model) == []
    with pytest.warns(dk.DeltaWarning, match=r"this LoraModel matched no module.*state_dict\(\) keeps the whole model"):
        delta.freeze_module()
    assert len(model.state_dict()) == len(MODELS["bert"]().state_dict())
    delta.freeze_module(set_state_dict=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    delta.detach()
    delta.attach()
    assert len(model.state_dict()) == len(MODELS["bert"]().state_dict())
    with pytest.raises(dk.StateError, match="this LoraModel matched no module, so it has no delta"):
        delta.save_finetuned("nowhere")
    with pytest.warns(dk.DeltaWarning, match="'no_such' matched no module and has no effect"):
        delta = dk.LoraModel(model, modified_modules=["no_such", "query"])
    assert len(delta.delta.modules) == 2


def test_a_single_text_is_one_name():
    assert len(dk.LoraModel(MODELS["bert"](), modified_modules="query").delta.modules) == 2


def test_common_names_beside_plain_ones():
    """OpenDelta translates every path first, so that plain names match nothing; here they still mean the model's own."""
    delta = dk.LoraModel(MODELS["t5"](), modified_modules=["EncDecAttention.q", "crossattn@.v@"], common_structure=True)
    assert [path.split(".", 5)[-1] for path in delta.delta.modules] == ["EncDecAttention.q", "EncDecAttention.v"] * 2


def test_another_architecture_with_common_names():
    assert len(dk.LoraModel(MODELS["bart"](), modified_modules=["attn@.q@"], common_structure=True).delta.modules) == 6
    message = "this BartForConditionalGeneration has none of the classes that have common names; omit common_structure="
    with pytest.raises(dk.SelectorError, match=message):
        dk.LoraModel(MODELS["bart"](), modified_modules=["fc1"], common_structure=True)


def test_pairs_of_a_parallel_adapter():
    with pytest.raises(dk.OptionError, match=r"expected pairs of names, found 1; name the module whose input is read"):
        dk.ParallelAdapterModel(MODELS["bert"](), modified_modules=["attention"])


def test_a_regular_expression_that_is_none():
    message = re.escape("'[r](': this is no regular expression: missing ), unterminated subpattern")
    with pytest.raises(dk.OptionError, match=message):
        dk.LoraModel(MODELS["bert"](), modified_modules=["[r]("])
