"""Template and verbalizer travel in the files of a delta, are read strictly, and other extras do, too."""

import copy
import json
import pickle

import pytest
import safetensors
import torch
from safetensors.torch import save_file

import deltakit as dk
from deltakit.core import StoredExtra
from deltakit.errors import CheckpointError, DeltaWarning, StateError
from deltakit.prompting import (
    KnowledgeableVerbalizer,
    PromptModel,
    PrototypicalVerbalizer,
    RuleVerbalizer,
    SoftVerbalizer,
    Template,
    Verbalizer,
    WordVerbalizer,
)
from support.loopback_hub import LoopbackHub
from support.models import randomize
from support.prompt_models import REVIEWS, WORDS, model_of, tokenizer_of

TOKENIZER = tokenizer_of("wordpiece")
TEXT = '{"placeholder": "text", "filter": "lower"} {"soft": "it was"} {"soft"} {"mask"}'
LOWER = {"lower": str.lower}
MAKE = {
    "words": lambda model: WordVerbalizer(TOKENIZER, WORDS, prefix=""),
    "knowledgeable": lambda model: KnowledgeableVerbalizer(TOKENIZER, {**WORDS, "other": ["film", "it was", "plot"]}),
    "soft": lambda model: SoftVerbalizer(model, WORDS, tokenizer=TOKENIZER),
    "prototypical": lambda model: PrototypicalVerbalizer(model, ["good", "bad"], size=5),
    "rules": lambda model: RuleVerbalizer(TOKENIZER, {"good": ["film"], "bad": ["plot"]}),
}


def trained(kind="words"):
    """A prompt model on a backbone with a delta, all with random values."""
    model = model_of("bert")
    template = Template(TEXT, TOKENIZER, model, max_length=31, truncate="balanced", filters=LOWER)
    delta = randomize(dk.attach(model, template.soft_prompt(), dk.LoRA(r=2)))
    verbalizer = MAKE[kind](model)
    with torch.no_grad():
        for tensor in verbalizer.state_dict().values():
            if tensor.is_floating_point():
                tensor.normal_()
    return PromptModel(model, template, verbalizer).eval(), delta


@pytest.mark.parametrize("kind", MAKE)
def test_a_delta_gives_template_and_verbalizer_back(kind, tmp_path):
    model, delta = trained(kind)
    delta.save(tmp_path)
    loaded = dk.load(tmp_path, model_of("bert"))
    other = PromptModel.from_delta(loaded, TOKENIZER, filters=LOWER).eval()
    assert other.template.to_dict() == model.template.to_dict()
    assert other.verbalizer.to_dict() == model.verbalizer.to_dict()
    assert other.predict(REVIEWS) == model.predict(REVIEWS)
    # And again from there.
    loaded.save(tmp_path / "again")
    again = PromptModel.from_delta(dk.load(tmp_path / "again", model_of("bert")), TOKENIZER, filters=LOWER)
    assert again.predict(REVIEWS) == model.predict(REVIEWS)


def test_a_loaded_delta_keeps_what_it_has_without_a_prompt_model(tmp_path):
    model, delta = trained("soft")
    delta.save(tmp_path / "one")
    dk.load(tmp_path / "one", model_of("bert")).save(tmp_path / "two")
    first, second = (dk.load(tmp_path / name, model_of("bert")) for name in ("one", "two"))
    one, two = (PromptModel.from_delta(own, TOKENIZER, filters=LOWER).predict(REVIEWS) for own in (first, second))
    assert one == two == model.predict(REVIEWS)


def test_which_deltas_keep_it(tmp_path):
    model = model_of("bert")
    before, later = dk.attach(model, dk.LoRA(r=2), name="before"), dk.attach(model, dk.BitFit(), name="later").detach()
    prompt = PromptModel(model, Template('{"placeholder": "text"} {"mask"}', TOKENIZER, model), MAKE["words"](model))
    assert "prompting" in before._record.extras
    assert "prompting" not in later._record.extras
    prompt.keep_with(later)
    randomize(later).save(tmp_path)
    assert dk.inspect(tmp_path).extras["prompting"]["verbalizer"]["words"] == WORDS
    assert repr(dk.inspect(tmp_path)).endswith("(it also holds prompting)")
    assert "(it also" not in repr(
        dk.inspect(randomize(dk.attach(model_of("bert"), dk.LoRA(r=2))).save(tmp_path / "plain"))
    )


def test_a_delta_that_is_attached_before_training_keeps_it():
    model = model_of("bert")
    prompt = PromptModel(model, Template('{"placeholder": "text"} {"mask"}', TOKENIZER, model), MAKE["words"](model))
    delta = dk.attach(model, dk.LoRA(r=2))
    prompt.train()
    prompt(**prompt.collate(REVIEWS))
    assert "prompting" in delta._record.extras


def test_a_delta_without_a_prompt():
    with pytest.raises(CheckpointError, match="its files have no template and no verbalizer"):
        PromptModel.from_delta(dk.attach(model_of("bert"), dk.LoRA(r=2)), TOKENIZER)


def test_a_prompt_that_does_not_fit(tmp_path):
    _, delta = trained()
    delta.save(tmp_path)
    loaded = dk.load(tmp_path, model_of("bert"), attach=False)
    with pytest.raises(CheckpointError, match=r"extras.prompting.template: .* no filter 'lower' was given"):
        PromptModel.from_delta(loaded, TOKENIZER)
    with pytest.raises(CheckpointError, match="extras.prompting.template: .* needs a mask token"):
        PromptModel.from_delta(loaded, tokenizer_of("unigram"), filters=LOWER)
    with pytest.raises(StateError, match="no attached and active delta has their vectors"):
        PromptModel.from_delta(loaded, TOKENIZER, filters=LOWER)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("template", "kind"), "mml", "at extras.prompting.template.kind"),
        (("template", "max_length"), "9", "at extras.prompting.template.max_length: expected `int | null`, got `str`"),
        (("template", "text"), None, "at extras.prompting.template.text"),
        (("template", "text"), "{", "the '{' is not closed"),
        (("template", "max_length"), 3, "tokens without any field, and max_length is 3"),
        (("verbalizer", "kind"), "own", "found the kind 'own', and deltakit has words, knowledgeable"),
        (("verbalizer", "kind"), ["a"], "found the kind \\['a'\\]"),
        (("verbalizer", "words"), {"good": 3}, "at extras.prompting.verbalizer.words"),
        (("verbalizer", "words"), {}, "expected the names of the classes"),
        (
            ("verbalizer", "words"),
            {"good": ["good"]},
            "@prior|prior: the file has \\(4,\\), the backbone needs \\(1,\\)",
        ),
        (("verbalizer", "multi"), "most", "at extras.prompting.verbalizer.multi"),
        (("verbalizer",), [], "at extras.prompting.verbalizer"),
        (("template",), None, "at extras.prompting.template"),
    ],
)
def test_damaged_data(where, value, message):
    model, delta = trained()
    data = json.loads(json.dumps(delta._record.extras["prompting"].data()))
    inner = data
    for name in where[:-1]:
        inner = inner[name]
    inner[where[-1]] = value
    delta._record.extras["prompting"] = StoredExtra(data, dict(model.verbalizer.state_dict()))
    with pytest.raises(CheckpointError, match=message):
        PromptModel.from_delta(delta, TOKENIZER, filters=LOWER)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "prior is missing"),
        ({"prior": torch.zeros(4), "more": torch.zeros(1)}, "more is unknown"),
        ({"prior": torch.full((4,), torch.nan)}, "infinite or not a number"),
        ({"prior": torch.zeros(4, dtype=torch.int8)}, "the file has torch.int8"),
    ],
)
def test_damaged_tensors(tensors, message):
    _, delta = trained()
    delta._record.extras["prompting"] = StoredExtra(delta._record.extras["prompting"].data(), tensors)
    with pytest.raises(CheckpointError, match=message):
        PromptModel.from_delta(delta, TOKENIZER, filters=LOWER)


def test_a_size_that_no_tensor_has():
    model, delta = trained("prototypical")
    data = json.loads(json.dumps(delta._record.extras["prompting"].data()))
    data["verbalizer"]["size"] = 10**15
    delta._record.extras["prompting"] = StoredExtra(data, dict(model.verbalizer.state_dict()))
    with pytest.raises(
        CheckpointError, match=r"verbalizer.size: it says 1000000000000000, and its tensors have .*\[5\]"
    ):
        PromptModel.from_delta(delta, TOKENIZER, filters=LOWER)


def test_tensors_of_an_extra_that_the_config_lacks(tmp_path):
    _, delta = trained("soft")
    delta._record.extras["other"] = StoredExtra({"a": 1}, {"x": torch.ones(3)})
    delta.save(tmp_path)
    with safetensors.safe_open(tmp_path / "delta_model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert torch.equal(tensors["@other.x"], torch.ones(3))
    assert "@prompting.vectors" in tensors
    # The digest is about the tensors, too.
    save_file({**tensors, "@other.x": torch.zeros(3)}, tmp_path / "delta_model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="its tensors are not what was saved"):
        dk.load(tmp_path, model_of("bert"))
    save_file({**tensors, "@more.x": torch.zeros(3)}, tmp_path / "delta_model.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="its tensors are not what was saved"):
        dk.load(tmp_path, model_of("bert"))


def test_files_of_others_cannot_hold_it(tmp_path):
    model = model_of("bert")
    delta = randomize(dk.attach(model, dk.LoRA(r=2)))
    PromptModel(model, Template('{"placeholder": "text"} {"mask"}', TOKENIZER, model), MAKE["words"](model))
    with pytest.warns(
        DeltaWarning, match="files of peft cannot hold its prompting; save it in deltakit's own format, too"
    ):
        delta.save(tmp_path, format="peft")
    assert dk.load(tmp_path, model_of("bert"))._record.extras == {}


def test_a_verbalizer_of_ones_own_is_saved_and_must_be_made_again(tmp_path):
    class Own(Verbalizer):
        def forward(self, output):
            return output.logits[:, 0, :2].log_softmax(-1)

        def to_dict(self):
            return {"kind": "own", "size": 3}

    model = model_of("bert")
    delta = randomize(dk.attach(model, dk.LoRA(r=2)))
    PromptModel(model, Template('{"placeholder": "text"} {"mask"}', TOKENIZER, model), Own(["a", "b"]))
    delta.save(tmp_path)
    with pytest.raises(
        CheckpointError, match="found the kind 'own', .* make the PromptModel of its own template and verbalizer"
    ):
        PromptModel.from_delta(dk.load(tmp_path, model_of("bert")), TOKENIZER)


def test_copies_and_pickles_of_the_backbone():
    """A copied layer has a copy of the record, and no tokenizer; a pickle needs no filter that can be pickled."""
    model = model_of("bert")
    template = Template(
        '{"placeholder": "text", "filter": "f"} {"mask"}', TOKENIZER, model, filters={"f": lambda text: text}
    )
    dk.attach(model, dk.LoRA(r=2))
    PromptModel(model, template, MAKE["words"](model))
    assert len(pickle.dumps(model.bert.encoder.layer[0])) < 300_000
    (delta,) = dk.deltas(copy.deepcopy(model))
    assert delta._record.extras["prompting"].template is template
    (restored,) = dk.deltas(pickle.loads(pickle.dumps(model)))
    assert isinstance(restored._record.extras["prompting"], StoredExtra)
    assert PromptModel.from_delta(restored, TOKENIZER, filters={"f": str.lower}).verbalizer.words_by_class() == WORDS


def test_the_hub_has_all_in_one_repository(hub, tmp_path):
    model, delta = trained("soft")
    delta.push("me/prompted", token=LoopbackHub.TOKEN)
    loaded = dk.load("me/prompted", model_of("bert"), cache_dir=tmp_path)
    assert PromptModel.from_delta(loaded, TOKENIZER, filters=LOWER).predict(REVIEWS) == model.predict(REVIEWS)


def test_a_prompt_that_was_attached_later_takes_a_part_of_the_length(tmp_path):
    """The file has the template as it was made; loaded, its limit is what is left beside the prompt."""
    backbone = model_of("bert")
    limit = backbone.config.max_position_embeddings
    model = PromptModel(
        backbone, Template('{"placeholder": "text"} {"mask"}', TOKENIZER, backbone), MAKE["words"](None)
    )
    delta = randomize(dk.attach(backbone, dk.SoftPrompt(tokens=8)))
    model.train()
    model(**model.collate([{**review, "label": "good"} for review in REVIEWS]))["loss"].backward()
    delta.save(tmp_path)
    other = PromptModel.from_delta(dk.load(tmp_path, model_of("bert")), TOKENIZER)
    assert (model.template.max_length, other.template.max_length) == (limit, limit - 8)
    assert len(other.predict([{"text": "a film " * limit}])) == 1
