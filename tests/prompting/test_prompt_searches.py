"""Searches for words: planted triggers, templates and label words are found, against random ones of the same budget."""

import copy

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

import deltakit as dk
from deltakit.errors import OptionError, TargetError
from deltakit.prompting import (
    Template,
    WordVerbalizer,
    generate_templates,
    score_templates,
    search_label_words,
    search_triggers,
)
from support.prompt_models import LINES, model_of, tokenizer_of

VERBALIZED = {"good": "great", "bad": "bad"}
TEXTS = {
    "good": ["a film to remember", "it was good and fine", "a film"],
    "bad": ["it was boring", "awful and boring", "plot"],
}
EXAMPLES = [{"text": text, "label": label} for label, own in TEXTS.items() for text in own]
TRIGGER = '{"placeholder": "text"} {"soft": "so"} {"mask"}'
PLANTED = "people"


def fit(model, steps, loss_of, rate=3e-3):
    """Trains a tiny model; it then knows what tests plant in it."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        loss_of(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def words_alone():
    """A tokenizer whose tokens are words, the same in each process: trained ones are not."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for line in LINES for word in line.lower().split() if word.isalpha()})
    own = Tokenizer(models.WordLevel({word: place for place, word in enumerate([*special, *words])}, unk_token="[UNK]"))
    own.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=own, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", mask_token="[MASK]"
    )


@pytest.fixture(scope="module")
def planted():
    """A masked model that predicts the right label word behind the planted trigger, and the wrong one behind other words."""
    tokenizer = words_alone()
    backbone = model_of("bert", tokenizer)
    verbalizer = WordVerbalizer(tokenizer, VERBALIZED)
    others = sorted(set(tokenizer.get_vocab()) - {PLANTED} - set(tokenizer.all_special_tokens))
    words = tokenizer.convert_tokens_to_ids([PLANTED, *others])
    template = Template(TRIGGER, tokenizer, backbone)
    batch = template.collate(EXAMPLES, classes=verbalizer.classes)
    labels, slots, ids = batch.pop("labels"), batch.pop("slots"), batch.pop("input_ids")
    all_ids = torch.cat([torch.where(ids >= template.first_soft, word, ids) for word in words])
    masks = {name: tensor.repeat(len(words), 1) for name, tensor in batch.items()}
    answers = torch.cat([verbalizer.ids[labels if word == words[0] else 1 - labels, 0] for word in words])
    place, slots = torch.arange(len(all_ids)), slots[:, 0].repeat(len(words))

    def loss_of(model):
        logits = model(input_ids=all_ids, **masks).logits[place, slots]
        losses = nn.functional.cross_entropy(logits, answers, reduction="none")
        # The trigger has as much weight as all other words together.
        return losses[: len(ids)].mean() + losses[len(ids) :].mean()

    return tokenizer, fit(backbone, 200, loss_of, rate=5e-3), verbalizer


def same(model, before):
    return all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_planted_trigger_is_found_where_random_words_miss_it(planted):
    tokenizer, backbone, verbalizer = planted
    template = Template(TRIGGER, tokenizer, backbone)
    before = copy.deepcopy(backbone.state_dict())
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.modules()]
    found = search_triggers(backbone, template, verbalizer, EXAMPLES, forwards=14, candidates=5)
    assert found.best.text == f'{{"placeholder": "text"}} {PLANTED} {{"mask"}}'
    assert found.best.accuracy == 1
    assert [one.text for one in found.templates[1:]] == ['{"placeholder": "text"} so {"mask"}']
    assert found.templates[1].accuracy == 0
    assert found.forwards == 14
    assert list(found.losses) == sorted(found.losses, reverse=True)
    again = search_triggers(backbone, template, verbalizer, EXAMPLES, forwards=14, candidates=5)
    assert again == found
    drawn = [
        search_triggers(
            backbone, template, verbalizer, EXAMPLES, forwards=14, candidates=5, propose="random", seed=seed
        )
        for seed in range(4)
    ]
    assert all(one.forwards <= 14 for one in drawn)
    assert sum(one.best.loss for one in drawn) / 4 > found.best.loss + 0.1
    assert same(backbone, before)
    assert not any(module.training for module in backbone.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in backbone.modules()]
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.parameters())


def test_the_estimate_is_the_gradient_at_the_place(planted):
    """On the line between two words the loss changes as the estimate says, if the step is small."""
    import random

    from deltakit.prompting.searching.scoring import batches_of
    from deltakit.prompting.searching.triggers import _Search
    from deltakit.prompting.searching.vocabulary import WordTokens

    tokenizer, backbone, verbalizer = planted
    backbone, verbalizer = copy.deepcopy(backbone).double(), copy.deepcopy(verbalizer)
    # A token for the trigger that no text has, so that its row of the embedding is its place alone.
    template = Template('{"placeholder": "text"} {"soft": "hello"} {"mask"}', tokenizer, backbone)
    search = _Search(backbone, template, verbalizer, WordTokens(tokenizer, len(tokenizer)), random.Random(0))
    (trigger,) = [search.start()]
    batch = next(batches_of(backbone, template, verbalizer.classes, EXAMPLES, 10))
    _, order = search.ranked(trigger, batch, 0)
    table = backbone.get_input_embeddings().weight
    row = table[trigger[0]].clone()
    measured = []
    for token in range(len(table)):
        with torch.no_grad():
            # The head is tied to the embedding, but reads no row of this word for the loss.
            table[trigger[0]] = row + 1e-6 * (table[token] - row)
            measured.append(float(search.loss(trigger, batch)))
            table[trigger[0]] = row
    slopes = (torch.tensor(measured, dtype=torch.float64) - float(search.loss(trigger, batch))) / 1e-6
    ranks = torch.stack([slopes.argsort().argsort(), torch.tensor(order).argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.999


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "t5", "bart"])
def test_triggers_on_any_kind_of_backbone(kind):
    tokenizer = tokenizer_of({"t5": "unigram"}.get(kind, "bpe"))
    backbone = model_of(kind)
    verbalizer = WordVerbalizer(tokenizer, {"good": "good", "bad": "bad"}, multi="mean")
    template = Template('{"soft"} {"placeholder": "text"} {"soft": None, "duplicate": 2} {"mask"}', tokenizer, backbone)
    before = copy.deepcopy(backbone.state_dict())
    backbone.train()
    found = search_triggers(backbone, template, verbalizer, EXAMPLES, forwards=40, candidates=5, batch_size=4, seed=1)
    assert found.forwards <= 40
    assert found.best.loss == min(one.loss for one in found.templates)
    assert len(found.losses) == (40 - 4) // 6
    assert backbone.training
    assert same(backbone, before)
    text = Template(found.best.text, tokenizer, backbone)
    assert text.num_soft == 0
    assert score_templates(backbone, [text], verbalizer, EXAMPLES, batch_size=4) == [found.best]


def test_manual_templates_have_the_scores_of_the_search(planted):
    tokenizer, backbone, verbalizer = planted
    texts = [f'{{"placeholder": "text"}} {word} {{"mask"}}' for word in ("so", PLANTED)]
    found = score_templates(backbone, [Template(text, tokenizer, backbone) for text in texts], verbalizer, EXAMPLES)
    assert [one.text for one in found] == texts[::-1]
    batch = Template(texts[1], tokenizer, backbone).collate(EXAMPLES, classes=verbalizer.classes)
    labels, slots = batch.pop("labels"), batch.pop("slots")
    words = backbone(**batch).logits[torch.arange(len(slots)), slots[:, 0]][:, verbalizer.ids[:, 0]]
    assert found[0].loss == pytest.approx(float(nn.functional.cross_entropy(words, labels)), rel=1e-5)
    # In batches of another size, and with a delta that does nothing yet.
    with_delta = copy.deepcopy(backbone)
    dk.attach(with_delta, dk.LoRA(r=2))
    templates = [Template(text, tokenizer, with_delta) for text in texts]
    again = score_templates(with_delta, templates, verbalizer, EXAMPLES, batch_size=4)
    assert [one.loss for one in again] == pytest.approx([one.loss for one in found], rel=1e-5)


@pytest.fixture(scope="module")
def filler():
    """A T5 that fills the gap ahead of a label word with "it was", and the one behind it with "and"."""
    tokenizer = tokenizer_of("unigram")
    examples = [*EXAMPLES, {"text": "the answer is a word", "label": "good"}]
    texts = [f"{one['text']}<extra_id_0> {VERBALIZED[one['label']]}<extra_id_1>" for one in examples]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    answer = tokenizer("<extra_id_0> it was<extra_id_1> and<extra_id_2>", return_tensors="pt")["input_ids"]

    def loss_of(model):
        return model(
            **{name: batch[name] for name in ("input_ids", "attention_mask")}, labels=answer.repeat(len(texts), 1)
        ).loss

    return tokenizer, fit(model_of("t5"), 60, loss_of, rate=1e-2)


LAYOUT = '{"placeholder": "text"} {"soft"} {"mask"} {"soft"}'


def test_a_filler_writes_the_planted_template(filler):
    tokenizer, model = filler
    before = copy.deepcopy(model.state_dict())
    found = generate_templates(model, tokenizer, LAYOUT, VERBALIZED, EXAMPLES, beams=3)
    assert found[0].text == '{"placeholder": "text"} it was {"mask"} and'
    assert len(found) == 3
    assert [one.log_probability for one in found] == sorted((one.log_probability for one in found), reverse=True)
    # The sum over the examples of the decoder's log-probabilities.
    texts = [f"{one['text']}<extra_id_0> {VERBALIZED[one['label']]}<extra_id_1>" for one in EXAMPLES]
    answer = tokenizer("<extra_id_0> it was<extra_id_1> and<extra_id_2>", return_tensors="pt")["input_ids"][0, :-1]
    log_probs = 0.0
    for text in texts:
        decoder = torch.cat([torch.tensor([0]), answer])[None]
        logits = model(**tokenizer(text, return_tensors="pt"), decoder_input_ids=decoder).logits.log_softmax(-1)
        words = [place for place, token in enumerate(answer.tolist()) if place]
        log_probs += sum(float(logits[0, place, answer[place]]) for place in words)
    assert found[0].log_probability == pytest.approx(log_probs, rel=1e-3)
    assert same(model, before)
    again = generate_templates(model, tokenizer, LAYOUT, VERBALIZED, EXAMPLES, beams=3, batch_size=2)
    assert [one.text for one in again] == [one.text for one in found]
    # It reads the label word: a layout without a gap ahead of it gets other words.
    other = generate_templates(
        model, tokenizer, '{"soft"} {"placeholder": "text"} {"mask"}.', VERBALIZED, EXAMPLES, beams=2
    )
    assert all(one.text.endswith('{"placeholder": "text"} {"mask"}.') for one in other)


def test_planted_label_words_are_found(planted):
    tokenizer, backbone, _ = planted
    template = Template(f'{{"placeholder": "text"}} {PLANTED} {{"mask"}}', tokenizer, backbone)
    before = copy.deepcopy(backbone.state_dict())
    found = search_label_words(backbone, template, ["good", "bad"], EXAMPLES, candidates=4)
    assert found[0].words == VERBALIZED
    assert found[0].accuracy == 1
    # The scores are those of a verbalizer with these words.
    for one in found:
        (scored,) = score_templates(backbone, [template], WordVerbalizer(tokenizer, one.words), EXAMPLES)
        assert (scored.loss, scored.accuracy) == pytest.approx((one.loss, one.accuracy), rel=1e-5)
    drawn = search_label_words(backbone, template, ["good", "bad"], EXAMPLES, candidates=4, propose="random")
    assert drawn[0].loss > found[0].loss
    # One random choice is improved one class at a time.
    drawn = [
        search_label_words(
            backbone, template, ["good", "bad"], EXAMPLES, candidates=4, assignments=1, keep=1, seed=seed
        )
        for seed in range(4)
    ]
    assert [one[0].accuracy for one in drawn] == [1] * 4
    assert same(backbone, before)


def test_braces_and_options_of_pieces_are_kept(planted):
    from deltakit.prompting.searching.writing import soft_places, with_text, written

    tokenizer, backbone, _ = planted
    text = (
        'a {{b}} {"placeholder": "x", "shortenable": False, "filter": "f"}{"soft"}, {"meta": "y", "shortenable": True}'
    )
    text += '{"text": "say \\"so\\" {now}", "shortenable": True} {"mask"}{"soft": "it was"}'
    template = Template(text, tokenizer, backbone, filters={"f": str.upper}, max_length=50, truncate="head")
    places = soft_places(template, "test")
    again = with_text(template, written(template.pieces, dict.fromkeys(places, "no {way}")), backbone)
    example = {"x": "hello", "y": "a film"}
    assert again.render(example) == 'a {b} HELLO no {way}, a filmsay "so" {now}[MASK] no {way}'
    kept = [piece for piece in template.pieces if type(piece).__name__ in ("Field", "Slot")]
    fields = [piece for piece in again.pieces if type(piece).__name__ in ("Field", "Slot")]
    assert [vars(one) | {"column": 0} for one in kept] == [vars(one) | {"column": 0} for one in fields]
    assert (again.max_length, again.truncate) == (50, "head")


def test_errors(planted, filler):
    tokenizer, backbone, verbalizer = planted
    plain, template = (Template(text, tokenizer, backbone) for text in ('{"placeholder": "text"} {"mask"}', TRIGGER))

    def triggers(template=template, examples=EXAMPLES, **options):
        return lambda: search_triggers(backbone, template, verbalizer, examples, **options)

    def words(classes=("good", "bad"), template=plain, examples=EXAMPLES, **options):
        return lambda: search_label_words(backbone, template, list(classes), examples, **options)

    def templates(model=filler[1], layout=LAYOUT, examples=EXAMPLES, **options):
        return lambda: generate_templates(model, filler[0], layout, VERBALIZED, examples, **options)

    bare = [{"text": "a film"}]
    for call, said in (
        (triggers(plain), r"no place for words that are searched; write \{\"soft\"\} there"),
        (triggers(examples=[]), "expected at least one example"),
        (triggers(examples=bare), 'search_triggers: 1 of 1 examples have no "label"'),
        (triggers(forwards=12), r"2 calls score the result on 6 examples, and a step takes 11; pass at least 13"),
        (triggers(candidates=0), r"candidates=0\): expected at least 1"),
        (triggers(batch_size=0), r"batch_size=0\): expected at least 1"),
        (words(["good"]), "two or more classes"),
        (words(["good", "bad", "new"]), "the class 'new' has no example"),
        (words(template=Template('{"mask"} {"mask"}', tokenizer, backbone)), "one slot"),
        (words(keep=0), r"keep=0\): expected at least 1"),
        (templates(layout='{"placeholder": "text"} {"mask"}'), "at least one gap, found 1 and 0"),
        (templates(layout='{"soft"} {"mask"} {"soft"} {"soft"}'), "no sentinel <extra_id_3>, and 3 gaps need 4"),
        (templates(forwards=2), "no template was complete by then; pass more, or fewer beams=8"),
        (templates(beams=0), r"beams=0\): expected at least 1"),
        (templates(examples=bare), 'have no "label"'),
    ):
        with pytest.raises(OptionError, match=said):
            call()
    with pytest.raises(TargetError, match="BertForMaskedLM is no encoder-decoder"):
        templates(backbone)()
    assert search_triggers(backbone, template, verbalizer, EXAMPLES, forwards=13).forwards <= 13
