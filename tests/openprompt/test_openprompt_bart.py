"""OpenPrompt's templates on BART: the slot is a mask token in the encoder's text, and the decoder reads that text, too."""

import pytest
import torch
import transformers as tf

import deltakit as dk
from deltakit.errors import TargetError
from deltakit.openprompt import PromptDataLoader, PromptForClassification
from deltakit.openprompt.data_utils import InputExample
from deltakit.openprompt.plms import MLMTokenizerWrapper, T5TokenizerWrapper
from deltakit.openprompt.prompts import ManualTemplate, ManualVerbalizer, MixedTemplate, SoftTemplate
from deltakit.prompting import Template, call_at
from support.prompt_models import model_of, tokenizer_of

TOKENIZER = tokenizer_of("bpe")
TEXTS = ["a film to remember", "the plot was boring, bad and awful", ""]
EXAMPLES = [InputExample(guid=number, text_a=text, label=0) for number, text in enumerate(TEXTS)]
MIXED = '{"soft"} {"placeholder": "text_a"} {"soft": "it was"} {"mask"} {"soft": None, "duplicate": 2}.'
PLAIN = '{"placeholder": "text_a"} it was {"mask"}.'


def loader_of(template, wrapper=T5TokenizerWrapper):
    return next(iter(PromptDataLoader(EXAMPLES, template, None, TOKENIZER, wrapper, max_seq_length=41, batch_size=3)))


def model_with(template, plm):
    verbalizer = ManualVerbalizer(TOKENIZER, num_classes=2, label_words=[["good"], ["bad"]])
    return PromptForClassification(plm, template, verbalizer).eval()


def test_the_pieces_are_those_of_openprompt():
    """As OpenPrompt's own MixedTemplate wraps this example with this tokenizer. Its call of BART then raises an error."""
    wrapped = MixedTemplate(model_of("bart"), TOKENIZER, MIXED).wrap_one_example(EXAMPLES[0])[0]
    assert [(piece["text"], piece["soft_token_ids"], piece["loss_ids"]) for piece in wrapped] == [
        ("", 1, 0),
        (" a film to remember", 0, 0),
        ("Ġit", 2, 0),
        ("Ġwas", 3, 0),
        ("<mask>", 0, 1),
        ("", 4, 0),
        ("", 5, 0),
        (".", 0, 0),
    ]


@pytest.mark.parametrize("scaled", [False, True])
def test_a_mixed_template_is_the_same_as_soft_tokens_of_a_delta(scaled):
    """The other way to the same text: ids behind the vocabulary, which transformers itself shifts for the decoder."""
    plm = scaled_bart() if scaled else model_of("bart")
    mixed = MixedTemplate(plm, TOKENIZER, MIXED)
    found = model_with(mixed, plm).forward_without_verbalize(loader_of(mixed))
    own = Template(MIXED, TOKENIZER, plm)
    start = mixed.soft_embedding.weight.detach()[1:] / (plm.model.shared.embed_scale if scaled else 1)
    dk.attach(plm, own.soft_prompt(init_vectors=start))
    batch = own.collate([{"text_a": text} for text in TEXTS])
    slots = batch.pop("slots")
    with torch.no_grad():
        expected = call_at(plm, batch, slots).logits[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def scaled_bart():
    config = model_of("bart").config
    config.scale_embedding = True
    torch.manual_seed(0)
    return tf.BartForConditionalGeneration(config).eval()


@pytest.mark.parametrize("wrapper", [MLMTokenizerWrapper, T5TokenizerWrapper])
def test_untrained_words_of_a_mixed_template_are_words(wrapper):
    plm = scaled_bart()
    mixed = MixedTemplate(plm, TOKENIZER, PLAIN.replace("it was", '{"soft": "it was"}'))
    manual = ManualTemplate(TOKENIZER, PLAIN)
    scores = [model_with(own, plm)(loader_of(own, wrapper)) for own in (mixed, manual)]
    torch.testing.assert_close(*scores)


def test_vectors_of_a_soft_template_are_in_the_encoder_alone():
    plm = scaled_bart()
    template = SoftTemplate(plm, TOKENIZER, PLAIN, num_tokens=3)
    batch = loader_of(template)
    found = model_with(template, plm).forward_without_verbalize(batch)
    ids = batch["input_ids"]
    # The same as tokens: the first three words of the vocabulary ahead of the encoder's text.
    ahead = torch.arange(3).expand(len(ids), -1)
    mask = torch.cat([torch.ones_like(ahead), batch["attention_mask"]], 1)
    later = plm.prepare_decoder_input_ids_from_labels(ids)
    full = plm(input_ids=torch.cat([ahead, ids], 1), attention_mask=mask, decoder_input_ids=later).logits
    slots = batch["loss_ids"].argmax(1)
    torch.testing.assert_close(found, full[torch.arange(3), slots], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixed", "soft"])
def test_vectors_and_deltas_are_trained_on_a_frozen_bart(kind):
    plm = model_of("bart")
    template = (
        MixedTemplate(plm, TOKENIZER, MIXED) if kind == "mixed" else SoftTemplate(plm, TOKENIZER, PLAIN, num_tokens=4)
    )
    model, batch = model_with(template, plm), loader_of(template)
    dk.attach(plm, dk.LoRA(r=2))
    labels = torch.tensor([0, 1, 0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(12):
        loss = torch.nn.functional.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_a_decoder_that_does_not_say_what_it_reads():
    plm = model_of("bart")
    template = SoftTemplate(plm, TOKENIZER, PLAIN, num_tokens=3)
    plm.prepare_decoder_input_ids_from_labels = None
    with pytest.raises(TargetError, match="has no prepare_decoder_input_ids_from_labels"):
        model_with(template, plm)(loader_of(template))
