"""PromptModel: slots alone are computed, batches equal examples one by one, words of several tokens, and what does not fit."""

import copy
import threading
from types import MappingProxyType

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.errors import OptionError, StateError, TargetError
from deltakit.prompting import (
    Ensemble,
    KnowledgeableVerbalizer,
    Prediction,
    PromptModel,
    PrototypicalVerbalizer,
    RuleVerbalizer,
    SoftVerbalizer,
    Template,
    WordVerbalizer,
)
from support.prompt_models import MODELS, REVIEW, REVIEWS, TOKENIZER_OF, WORDS, model_of, tokenizer_of

SOFT = '{"placeholder": "text"} {"soft"} It was {"mask"}'


def prompt_model(kind="bert", text=REVIEW, multi="mean", backbone=None, verbalizer=None, **options):
    tokenizer = tokenizer_of(TOKENIZER_OF[kind])
    model = model_of(kind) if backbone is None else backbone
    template = Template(text, tokenizer, model, **options)
    if template.num_soft:
        dk.attach(model, template.soft_prompt())
    chosen = WordVerbalizer(tokenizer, WORDS, multi=multi) if verbalizer is None else verbalizer(model, tokenizer)
    return PromptModel(model, template, chosen).eval()


def logits_of(model, examples):
    return model(**model.template.collate(examples))["logits"]


def plain(examples):
    return [{"text": example["text"]} for example in examples]


@pytest.mark.parametrize("multi", ["mean", "first", "score"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_is_its_examples_one_by_one(kind, multi):
    model = prompt_model(kind, SOFT, multi)
    with torch.no_grad():
        together = logits_of(model, plain(REVIEWS))
        alone = torch.cat([logits_of(model, [one]) for one in plain(REVIEWS)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-6)
    assert together.exp().sum(1).allclose(torch.ones(3))


@pytest.mark.parametrize("kind", MODELS)
def test_only_the_slots_are_computed(kind):
    """The head gets one position an example, and gives the logits that the full call has there."""
    model = prompt_model(kind)
    batch = model.template.collate(plain(REVIEWS))
    slots = batch.pop("slots")
    head, seen = model.backbone.get_output_embeddings(), []
    handle = head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        found = model.slot_output(batch, slots)
        full = model.backbone(**batch).logits
    handle.remove()
    vocabulary = model.backbone.config.vocab_size
    assert seen[0] == (3, 1, vocabulary)
    assert seen[1][:2] == full.shape[:2]
    torch.testing.assert_close(found.logits, full[torch.arange(3)[:, None], slots], rtol=1e-5, atol=1e-6)
    assert found.hidden.shape == (3, 1, 28)
    assert not head._forward_pre_hooks


def test_threads_have_their_own_slots():
    model, results = prompt_model(), {}

    def run(number):
        with torch.no_grad():
            for _ in range(20):
                results.setdefault(number, []).append(logits_of(model, plain(REVIEWS)[number % 3 :]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in results.items():
        with torch.no_grad():
            expected = logits_of(model, plain(REVIEWS)[number % 3 :])
        assert all(torch.equal(one, expected) for one in found)


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_the_score_of_a_word_is_the_probability_of_its_tokens(kind):
    """sum_t log p(w_t | w_<t), each from a call of its own with the tokens ahead of it."""
    tokenizer = tokenizer_of(TOKENIZER_OF[kind])
    words = {"good": "remember film", "bad": ["bad", "awful boring"]}
    model = prompt_model(kind, verbalizer=lambda _, own: WordVerbalizer(own, words, multi="score"), max_length=60)
    assert sorted(len(word.ids) for word in model.verbalizer.label_words)[-1] > 1
    batch = model.template.collate(plain(REVIEWS))
    slots = batch.pop("slots")
    with torch.no_grad():
        found = model.slot_output(batch, slots).word_scores
        for row, example in enumerate(plain(REVIEWS)):
            for column, word in enumerate(model.verbalizer.label_words):
                alone = model.template.collate([example])
                place = alone.pop("slots").item()
                grown = "decoder_input_ids" if kind == "t5" else "input_ids"
                score = 0.0
                for one in word.ids:
                    logits = model.backbone(**alone).logits[0, place]
                    score += logits.log_softmax(-1)[one].item()
                    alone[grown] = torch.cat([alone[grown], torch.tensor([[one]])], 1)
                    if grown == "input_ids":
                        alone["attention_mask"] = torch.ones_like(alone[grown])
                    place += 1
                assert abs(found[row, column].item() - score) < 1e-4
    assert tokenizer.decode(list(model.verbalizer.label_words[0].ids)).strip() == "remember film"


@pytest.mark.parametrize("kind", ["bert", "roberta", "bart"])
def test_masked_models_score_all_tokens_of_a_word_at_once(kind):
    words = {"good": "remember it", "bad": "bad"}
    model = prompt_model(kind, verbalizer=lambda _, own: WordVerbalizer(own, words, multi="score"), max_length=60)
    text = REVIEW.replace('{"mask"}', '{"mask"}{"mask"}')
    two = Template(text, model.template.tokenizer, model.backbone)
    word = model.verbalizer.label_words[0].ids
    assert len(word) == 2
    batch, pair = model.template.collate(plain(REVIEWS)), two.collate(plain(REVIEWS))
    slots, places = batch.pop("slots"), pair.pop("slots")
    with torch.no_grad():
        found = model.slot_output(batch, slots).word_scores[:, 0]
        logits = model.backbone(**pair).logits[torch.arange(3)[:, None], places].log_softmax(-1)
    expected = logits[:, 0, word[0]] + logits[:, 1, word[1]]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_room_for_words_of_several_tokens():
    def make(max_length):
        words = {"good": "remember it was", "bad": "bad"}
        return prompt_model(
            "bert", verbalizer=lambda _, own: WordVerbalizer(own, words, multi="score"), max_length=max_length
        )

    with pytest.raises(
        OptionError,
        match=r"up to 2 tokens beyond max_length 71, and the backbone takes 71; pass Template\(max_length=69\)",
    ):
        make(71)
    model = make(69)
    assert model.predict({"text": "word " * 100}).label in ("good", "bad")


def test_texts_that_are_longer_than_the_backbone():
    """They would fail in the table of positions, in the first long example: so they are refused ahead of any."""
    with pytest.raises(
        OptionError, match=r"Template\(max_length=72\): BertForMaskedLM has positions for 71 tokens; pass at most 71"
    ):
        prompt_model("bert", max_length=72)
    backbone, tokenizer = model_of("bert"), tokenizer_of("wordpiece")
    words = WordVerbalizer(tokenizer, WORDS)
    free = Template(REVIEW, tokenizer, kind="mlm")
    with pytest.raises(OptionError, match=r"made without it and has no limit; pass Template\(max_length=71\)"):
        PromptModel(backbone, free, words)
    with pytest.raises(
        OptionError, match=r"max_length is 80, and the backbone takes 71; pass Template\(max_length=71\)"
    ):
        PromptModel(backbone, Template(REVIEW, tokenizer, kind="mlm", max_length=80), words)
    # The table of a vocabulary of as many words is none of positions.
    same = model_of("t5")
    same.config.max_position_embeddings = same.config.vocab_size
    assert Template(REVIEW, tokenizer_of("unigram"), same).max_length is None


def test_the_room_for_an_attached_prompt():
    backbone = model_of("bert")
    dk.attach(backbone, dk.SoftPrompt(tokens=20))
    with pytest.raises(
        OptionError,
        match=r"an attached prompt takes 20 tokens beyond max_length 71, and the backbone takes 71; pass Template\(max_length=51\)",
    ):
        prompt_model(backbone=backbone)
    model = prompt_model(backbone=backbone, max_length=51)
    assert model.predict({"text": "a film " * 60}).label in WORDS


def test_predict():
    model = prompt_model()
    one, listed = model.predict(REVIEWS[0], top_k=3), model.predict(REVIEWS, top_k=3, batch_size=2)
    assert isinstance(one, Prediction)
    assert one.label == max(one.probabilities, key=one.probabilities.get)
    assert listed[0].label == one.label
    batch = model.template.collate(plain(REVIEWS[:1]))
    batch.pop("slots")
    place = model.template.encode(REVIEWS[0]).slots[0]
    with torch.no_grad():
        best = model.backbone(**batch).logits[0, place].softmax(-1).topk(3)
    known = model.template.tokenizer.convert_ids_to_tokens(best.indices.tolist())
    assert [word for word, _ in one.words[0]] == known
    assert [chance for _, chance in one.words[0]] == pytest.approx(best.values.tolist(), rel=1e-4)
    assert model.predict(REVIEWS[0], top_k=0).words == []
    assert model.predict([]) == []
    for options, message in (({"top_k": -1}, "top_k=-1"), ({"batch_size": 0}, "batch_size=0")):
        with pytest.raises(OptionError, match=message):
            model.predict(REVIEWS[0], **options)
    with pytest.raises(OptionError, match="expected an example or a list of examples, found int"):
        model.predict(3)


def test_a_data_set_is_a_list_of_examples():
    """As that of `datasets`, which is no `Sequence`, and whose slices are columns."""

    class DataSet:
        def __init__(self, rows):
            self.rows = rows

        def __len__(self):
            return len(self.rows)

        def __getitem__(self, place):
            if isinstance(place, slice):
                return {"text": [row["text"] for row in self.rows[place]]}
            return self.rows[place]

    def make(_, own):
        return KnowledgeableVerbalizer(own, WORDS)

    one, other = prompt_model(verbalizer=make), prompt_model(verbalizer=make)
    for name in ("calibrate", "refine"):
        getattr(one, name)(DataSet(REVIEWS))
        getattr(other, name)(REVIEWS)
        assert torch.equal(one.verbalizer.prior, other.verbalizer.prior)
        with pytest.raises(OptionError, match=f"{name}: expected at least one example"):
            getattr(one, name)(DataSet([]))
        with pytest.raises(OptionError, match=f"{name}: expected a list of examples, found dict"):
            getattr(one, name)(REVIEWS[0])
    assert one.predict(DataSet(REVIEWS)) == other.predict(REVIEWS)


def test_predict_leaves_modes_and_gradients_as_they_were():
    model = prompt_model()
    model.train()
    model.backbone.bert.encoder.layer[0].eval()
    before = [module.training for module in model.modules()]
    first, second = model.predict(REVIEWS), model.predict(REVIEWS)
    assert first == second
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_labels_by_name_or_index():
    model = prompt_model()
    assert model.collate(REVIEWS)["labels"].tolist() == [0, 1, 0]
    assert model.collate([{"text": "a", "label": 1}])["labels"].tolist() == [1]
    with pytest.raises(
        OptionError, match="expected as a label one of 'good', 'bad', or an index below 2, found 'fine'"
    ):
        model.collate([{"text": "a", "label": "fine"}])
    found = model(**model.collate(REVIEWS))
    assert list(found) == ["loss", "logits"]
    torch.testing.assert_close(found["loss"], nn.functional.nll_loss(found["logits"], torch.tensor([0, 1, 0])))


def test_calibration_with_a_model():
    model = prompt_model("gpt2")
    free = [{"text": "N/A"}, {"text": ""}]
    model.calibrate(free[:1])
    assert model.predict(free[0]).probabilities["good"] == pytest.approx(0.5, abs=1e-5)
    with pytest.raises(OptionError, match="calibrate: expected at least one example"):
        model.calibrate([])
    with pytest.raises(OptionError, match="refine: a WordVerbalizer drops no words"):
        model.refine(free)


def test_refining_with_a_model():
    words = {"good": ["good", "great", "fine", "film"], "bad": ["bad", "awful", "boring", "it was"]}
    model = prompt_model(verbalizer=lambda _, own: KnowledgeableVerbalizer(own, words))
    model.refine(plain(REVIEWS), batch_size=2)
    assert model.verbalizer.dropped()
    assert model.verbalizer.prior.abs().min() > 0
    assert model.predict(REVIEWS[0]).label in words


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "make",
    [
        lambda model, own: SoftVerbalizer(model, WORDS, tokenizer=own),
        lambda model, own: PrototypicalVerbalizer(model, ["good", "bad"], size=5),
        lambda model, own: KnowledgeableVerbalizer(own, WORDS, multi="mean"),
    ],
    ids=["soft", "prototypical", "knowledgeable"],
)
def test_verbalizers_are_trained_with_a_frozen_backbone(kind, make):
    model = prompt_model(kind, SOFT, verbalizer=make)
    batch = model.collate([{**one, "label": index % 2} for index, one in enumerate(REVIEWS)])
    model.backbone.requires_grad_(False)
    model(**batch)["loss"].backward()
    trained = dict(model.verbalizer.named_parameters())
    assert trained
    assert all(parameter.grad is not None for parameter in trained.values())


@pytest.mark.parametrize("kind", ["bert", "t5", "bart"])
def test_several_slots(kind):
    rules = {"good": ("a", "film"), "bad": ("a", "plot"), "other": ("no", "film")}
    model = prompt_model(
        kind,
        '{"placeholder": "text"}: {"mask"} is {"mask"} .',
        verbalizer=lambda _, own: RuleVerbalizer(own, rules, multi="mean"),
    )
    with torch.no_grad():
        together = logits_of(model, plain(REVIEWS))
        alone = torch.cat([logits_of(model, [one]) for one in plain(REVIEWS)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=2e-6)
    assert len(model.predict(REVIEWS[0]).words) == 2


def test_what_does_not_fit():
    tokenizer, model = tokenizer_of("wordpiece"), model_of("bert")
    words = WordVerbalizer(tokenizer, WORDS)
    with pytest.raises(OptionError, match="the template has 2 slots, and the WordVerbalizer reads 1"):
        PromptModel(model, Template('{"mask"} {"mask"}', tokenizer, model), words)
    with pytest.raises(
        TargetError, match=r"BertModel: it has no language-model head .* load it with AutoModelForMaskedLM"
    ):
        PromptModel(model.bert, Template(REVIEW, tokenizer, kind="mlm"), words)
    small = model_of("bert")
    small.resize_token_embeddings(len(tokenizer) // 2)
    with pytest.raises(OptionError, match="and the backbone knows .* use its own tokenizer"):
        PromptModel(
            small,
            Template(REVIEW, tokenizer, small),
            WordVerbalizer(
                tokenizer,
                {"a": tokenizer.convert_ids_to_tokens(len(tokenizer) - 1).strip("#")},
                prefix="",
                multi="mean",
            ),
        )
    soft = Template(SOFT, tokenizer, model)
    with pytest.raises(
        StateError,
        match=r"1 soft tokens, and no attached and active delta has their vectors; attach them first: dk.attach",
    ):
        PromptModel(model, soft, words)
    dk.attach(model, dk.SoftPrompt(tokens=3, prepend=False))
    with pytest.raises(StateError, match="an attached one has 3"):
        PromptModel(model, soft, words)
    larger = model_of("bert")
    larger.resize_token_embeddings(400)
    with pytest.raises(OptionError, match="make the template with this backbone"):
        PromptModel(larger, soft, words)


def test_a_detached_delta_is_noticed_before_the_embedding_fails():
    model = prompt_model(text=SOFT)
    (delta,) = dk.deltas(model.backbone)
    with delta.detached(), pytest.raises(StateError, match="no attached and active delta has their vectors"):
        model.predict(REVIEWS[0])
    assert model.predict(REVIEWS[0]).label


def test_a_head_that_is_read_directly():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(300, 5), nn.Linear(5, 300)

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return self.head

        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            return (nn.functional.linear(self.embed(input_ids), self.head.weight),)

    tokenizer = tokenizer_of("wordpiece")
    model = PromptModel(Reads(), Template(REVIEW, tokenizer, kind="mlm"), WordVerbalizer(tokenizer, WORDS))
    with pytest.raises(TargetError, match="Reads: its language-model head was not called with hidden states"):
        model.predict(REVIEWS[0])


def test_a_prompt_ahead_of_the_text():
    """A soft prompt that is inserted leaves the slots where they are, unless its hidden states stay."""
    model = prompt_model()
    delta = dk.attach(model.backbone, dk.SoftPrompt(tokens=3))
    changed = model.predict(REVIEWS[0])
    delta.detach()
    assert changed.probabilities != model.predict(REVIEWS[0]).probabilities
    dk.attach(model.backbone, dk.SoftPrompt(tokens=3, trim=False))
    with pytest.raises(
        StateError,
        match=r"its head got \d+ positions for \d+ ids, so slots are elsewhere; attach soft prompts with trim=True",
    ):
        model.predict(REVIEWS[0])


def test_any_delta_composes():
    model = prompt_model(text=SOFT)
    before = model.predict(REVIEWS)
    delta = dk.attach(model.backbone, dk.LoRA(r=2), dk.BitFit(), dk.LoRA(r=2, at="@head", untie=True), name="more")
    assert model.predict(REVIEWS) == before
    model.train()
    model(**model.collate(REVIEWS))["loss"].backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    delta.detach()
    assert model.predict(REVIEWS) == before


def test_a_copy_has_its_own_values():
    model = prompt_model(text=SOFT, verbalizer=lambda own, tokenizer: SoftVerbalizer(own, WORDS, tokenizer=tokenizer))
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.verbalizer.vectors.zero_()
    assert other.verbalizer.vectors.abs().sum() > 0
    (record,) = [delta._record for delta in dk.deltas(other.backbone)]
    assert record.extras["prompting"].verbalizer is other.verbalizer


def test_ensembles():
    """log_softmax of the weighted mean of the members' log-probabilities."""
    backbone = model_of("bert")
    models = [
        prompt_model(backbone=backbone, text=text) for text in (REVIEW, 'All in all {"mask"}: {"placeholder": "text"}')
    ]
    both = Ensemble(models, weights=[3, 1])
    batch = both.collate(REVIEWS)
    found = both(**batch)
    each = [logits_of(model, plain(REVIEWS)) for model in models]
    torch.testing.assert_close(found["logits"], (0.75 * each[0] + 0.25 * each[1]).log_softmax(-1))
    torch.testing.assert_close(found["loss"], nn.functional.nll_loss(found["logits"], torch.tensor([0, 1, 0])))
    probabilities = [prediction.probabilities["good"] for prediction in both.predict(REVIEWS)]
    torch.testing.assert_close(torch.tensor(probabilities), found["logits"].exp()[:, 0])
    assert len(both.predict(REVIEWS[0], top_k=2).words) == 2
    assert both.predict(MappingProxyType(REVIEWS[0])) == both.predict(REVIEWS[0])
    # The backbone that they share is in the state dict once, and loads again.
    state = both.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) == len(state)
    both.load_state_dict(state, strict=True)


def test_members_that_contradict_each_other_with_certainty():
    """The probability of a class that a member excludes is 0 in float32, and its logarithm is not."""
    models = [prompt_model(verbalizer=lambda own, _: SoftVerbalizer(own, ["a", "b"])) for _ in range(2)]
    with torch.no_grad():
        for model, bias in zip(models, ([0.0, 200.0], [201.0, 0.0]), strict=True):
            model.verbalizer.vectors.zero_()
            model.verbalizer.bias.copy_(torch.tensor(bias))
    both = Ensemble(models)
    assert both.predict(REVIEWS)[1].probabilities == pytest.approx({"a": 0.62246, "b": 0.37754}, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": []}, "expected at least one PromptModel"),
        ({"weights": [1.0]}, "expected 2 numbers above 0"),
        ({"weights": [1.0, 0.0]}, "expected 2 numbers above 0"),
        ({"weights": [1.0, float("nan")]}, "expected a list of finite numbers"),
    ],
)
def test_ensembles_that_cannot_work(options, message):
    model = prompt_model()
    with pytest.raises(OptionError, match=message):
        Ensemble(**{"models": [model, model], **options})
    other = prompt_model(verbalizer=lambda _, own: WordVerbalizer(own, {"bad": "bad", "good": "good"}))
    with pytest.raises(OptionError, match="the classes of its models differ"):
        Ensemble([model, other])


def test_a_loss_of_its_own_and_scores_that_are_computed_once():
    model = prompt_model_with(WordVerbalizer(tokenizer_of("wordpiece"), WORDS))
    calls = []
    model.verbalizer.register_forward_hook(lambda *_: calls.append(1))
    batch = model.collate(REVIEWS)
    found = model(**batch)
    assert calls == [1]
    assert torch.equal(found["loss"], torch.nn.functional.nll_loss(found["logits"], batch["labels"]))

    class Doubled(WordVerbalizer):
        def loss(self, output, labels):
            return 2 * super().loss(output, labels)

    other = prompt_model_with(Doubled(tokenizer_of("wordpiece"), WORDS))
    assert torch.equal(other(**batch)["loss"], 2 * found["loss"])


def prompt_model_with(verbalizer):
    model = model_of("bert")
    return PromptModel(model, Template(REVIEW, tokenizer_of("wordpiece"), model), verbalizer).eval()


def test_a_batch_is_tokenized_in_one_call(monkeypatch):
    model = prompt_model_with(WordVerbalizer(tokenizer_of("wordpiece"), WORDS))
    tokenizer, calls = model.template.tokenizer, []

    class Counted:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            calls.append(len(texts))
            return tokenizer(texts, **options)

    expected = model.collate(REVIEWS)
    monkeypatch.setattr(model.template, "tokenizer", Counted())
    found = model.collate(REVIEWS)
    assert calls == [len(REVIEWS)]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
