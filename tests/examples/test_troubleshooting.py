"""Each message in the guide is one that deltakit gives: every heading meets the situation in which a newcomer gets it."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import deltakit as dk
from support.guides import GUIDES
from support.models import Transformer, ids, randomize

GUIDE = (GUIDES / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### `(\w+): (.+)`$", GUIDE, flags=re.M)
LORA = dk.LoRA(r=2, at="q_proj")


class Reads(nn.Module):
    """Uses the weight of a layer without calling it, in a way that its code does not show."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x):
        held = vars(self)["_modules"]["layer"]
        return nn.functional.linear(x, held.weight)


class Around(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Reads()

    def forward(self, x):
        return self.inner(x)


def trained(**options):
    model = Transformer()
    return model, randomize(dk.attach(model, LORA, **options))


def no_match():
    dk.attach(Transformer(), dk.LoRA(at="query"))


def no_role():
    dk.attach(Transformer(), dk.LoRA(at="@attention"))


def no_position():
    dk.attach(nn.LSTM(5, 7), dk.LoRA())


def wrong_type():
    dk.attach(Transformer(), dk.LoRA(at="norm_1"))


def rank_too_high():
    dk.attach(Transformer(), dk.LoRA(r=64, at="q_proj"))


def tied_weight():
    model = Transformer()
    model.classifier.weight = nn.Parameter(torch.randn(31, 20))
    model.embed.weight = model.classifier.weight
    dk.attach(model, dk.LoRA(r=2, at="classifier"))


def of_peft():
    dk.LoRA(target_modules=["q_proj"])


def attached_twice():
    trained()[1].attach()


def method_there():
    model, _ = trained()
    dk.attach(model, LORA)


def new_head():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    dk.attach(BertForSequenceClassification(BertConfig(vocab_size=11, **sizes)), dk.LoRA(r=2))


def never_called():
    model = Around()
    dk.attach(model, dk.LoRA(r=2, at="layer"))
    model(torch.randn(2, 5))


def wrapped():
    dk.attach(nn.DataParallel(Transformer()), LORA)


def frozen_later():
    model, _ = trained()
    model.requires_grad_(False)
    model.train()(ids())


def saved_untrained():
    dk.attach(Transformer(), LORA).save("d")


def failed_training():
    _, delta = trained()
    next(delta.parameters()).data.fill_(torch.nan)
    delta.save("d")


def saved_with_a_scale():
    _, delta = trained()
    delta.scale = 0.5
    delta.save("d")


def other_model():
    trained()[1].save("d")
    torch.manual_seed(5)
    dk.load("d", Transformer())


def no_folder():
    dk.load("no-such-folder", Transformer())


def no_delta():
    Path("empty").mkdir()
    dk.load("empty", Transformer())


def edited():
    trained()[1].save("d")
    file = Path("d/delta_config.json")
    file.write_text(file.read_text().replace('"alpha": 16', '"alpha": 32'))
    dk.load("d", Transformer())


def unknown_name():
    dk.use(trained()[0], "topic")


def not_in_rows():
    model = Transformer()
    dk.attach(model, LORA, train="classifier", name="a")
    with dk.rows(model, ["a", None]):
        model(ids())


def merged_in_training():
    model, delta = trained()
    delta.merge()
    model.train()(ids())


def cannot_be_merged():
    dk.attach(Transformer(), dk.Adapter(size=3)).merge()


def no_sum():
    model = Transformer()
    dk.attach(model, dk.Adapter(size=3), name="a")
    dk.combine(model, {"a": 0.5})


CASES = [
    no_match,
    no_role,
    no_position,
    wrong_type,
    rank_too_high,
    tied_weight,
    of_peft,
    attached_twice,
    method_there,
    new_head,
    never_called,
    wrapped,
    frozen_later,
    saved_untrained,
    failed_training,
    saved_with_a_scale,
    other_model,
    no_folder,
    no_delta,
    edited,
    unknown_name,
    not_in_rows,
    merged_in_training,
    cannot_be_merged,
    no_sum,
]


def headings_of(error):
    """The headings that have this message."""
    return [
        (kind, text)
        for kind, text in HEADINGS
        if type(error).__name__ == kind and re.fullmatch(".*".join(map(re.escape, text.split("..."))), str(error))
    ]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_a_message_is_in_the_guide(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(), pytest.raises((dk.DeltaError, dk.DeltaWarning)) as caught:
        warnings.simplefilter("error")
        case()
    assert len(headings_of(caught.value)) == 1, f"{type(caught.value).__name__}: {caught.value}"


def test_every_message_in_the_guide_has_a_case():
    assert len(HEADINGS) == len(set(HEADINGS)) == len(CASES)


@pytest.mark.parametrize("option", ["layers_to_transform", "layers_pattern"])
def test_the_advice_for_layers_works(option):
    with pytest.raises(dk.OptionError) as caught:
        dk.LoRA(**{option: [0]})
    (selector,) = re.findall(r"at='([^']+)'", str(caught.value))
    assert list(dk.select(Transformer(), selector)) == ["layers.0.self_attn.q_proj", "layers.1.self_attn.q_proj"]
