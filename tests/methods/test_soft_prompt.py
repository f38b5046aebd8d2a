"""Soft prompts against hand-built `inputs_embeds` without hooks, and in everything that heads and `generate` do."""

import copy
import threading

import pytest
import torch
import transformers as tf

import deltakit as dk
from support.backbone_inputs import inputs
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build

DECODERS = ["gpt2", "gpt_neox", "gptj", "opt", "bloom", "llama", "qwen2", "gemma", "mixtral"]
ENCODERS = ["bert", "roberta", "distilbert", "electra", "deberta-v2"]
PADDINGS = pytest.mark.parametrize("padding", ["none", "left", "right"])


def attached(model, **options):
    delta = dk.attach(model, dk.SoftPrompt(**{"tokens": 3, **options}), train=())
    randomize(delta)
    return delta


def by_hand(model, batch, prompt, at=0):
    """The same text with the prompt's rows among its embeddings, and everything else as long."""
    table = model.get_input_embeddings()
    x = table(batch["input_ids"])
    rows = (prompt * getattr(table, "embed_scale", 1.0)).expand(len(x), -1, -1).to(x.dtype)
    ones = torch.ones(len(x), len(prompt), dtype=torch.long)
    mask = batch["attention_mask"]
    return {
        "inputs_embeds": torch.cat([x[:, :at], rows, x[:, at:]], 1),
        "attention_mask": torch.cat([mask[:, :at], ones, mask[:, at:]], 1),
    }


@PADDINGS
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_equal_hand_built_embeddings(kind, padding):
    model = build(kind, tf.AutoModelForCausalLM)
    batch = inputs(kind, model, padding=padding)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    delta = attached(model)
    ours = model(**batch, labels=labels)
    (prompt,) = delta.parameters()
    delta.detach()
    theirs = model(**by_hand(model, batch, prompt)).logits[:, 3:]
    torch.testing.assert_close(ours.logits, theirs, rtol=1e-5, atol=1e-5)
    loss = torch.nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(ours.loss, loss, rtol=1e-5, atol=1e-5)


@PADDINGS
@pytest.mark.parametrize("where", ["start", "after_first"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_equal_hand_built_embeddings(kind, where, padding):
    model = build(kind)
    batch = inputs(kind, model, padding=padding)
    at = int(where == "after_first")
    delta = attached(model, where=where)
    ours = model(**batch).last_hidden_state
    (prompt,) = delta.parameters()
    delta.detach()
    wanted = by_hand(model, batch, prompt, at)
    if kind == "roberta":
        # RoBERTa derives positions from padding, which hand-built embeddings must be told.
        real = torch.cat([batch["input_ids"][:, :at], torch.full((2, 3), 5), batch["input_ids"][:, at:]], 1)
        wanted["position_ids"] = (real != 0).long().cumsum(1) * (real != 0)
    theirs = model(**wanted).last_hidden_state
    theirs = torch.cat([theirs[:, :at], theirs[:, at + 3 :]], 1)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@PADDINGS
@pytest.mark.parametrize("kind", ["t5", "bart", "pegasus"])
def test_encoder_decoders_equal_hand_built_embeddings(kind, padding):
    model = build(kind, tf.AutoModelForSeq2SeqLM)
    batch = inputs(kind, model, padding=padding)
    delta = attached(model)
    ours = model(**batch).logits
    (prompt,) = delta.parameters()
    delta.detach()
    table = model.get_encoder().embed_tokens
    x = table(batch["input_ids"])
    x = torch.cat([(prompt * getattr(table, "embed_scale", 1.0)).expand(2, -1, -1), x], 1)
    mask = torch.cat([torch.ones(2, 3, dtype=torch.long), batch["attention_mask"]], 1)
    theirs = model(inputs_embeds=x, attention_mask=mask, decoder_input_ids=batch["decoder_input_ids"]).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@PADDINGS
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_classification_heads_look_at_the_last_token_of_the_text(kind, padding):
    model = build(kind, tf.AutoModelForSequenceClassification)
    batch = inputs(kind, model, padding=padding)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)
    delta = attached(model)
    ours = model(**batch).logits
    (prompt,) = delta.parameters()
    delta.detach()
    base = getattr(model, model.base_model_prefix)
    states = base(**by_hand(model, batch, prompt)).last_hidden_state[:, 3:]
    places = torch.tensor([4 if padding == "right" else 6, 6])
    torch.testing.assert_close(ours, model.score(states[torch.arange(2), places]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", [*DECODERS, "t5", "bart"])
def test_generates_with_a_cache_as_without(kind, beams):
    encoder_decoder = kind in ("t5", "bart")
    model = build(kind, tf.AutoModelForSeq2SeqLM if encoder_decoder else tf.AutoModelForCausalLM)
    batch = {k: v for k, v in inputs(kind, model).items() if k != "decoder_input_ids"}
    attached(model)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    settings |= {"output_scores": True, "return_dict_in_generate": True}
    cached, plain = (model.generate(**batch, **settings, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(plain.scores), rtol=1e-3, atol=1e-4)


def test_ids_anywhere_in_the_text():
    model = build("gpt2", tf.AutoModelForCausalLM)
    delta = attached(model, prepend=False)
    (prompt,) = delta.parameters()
    text = torch.tensor([[5, 97, 6, 98, 99, 7]])
    ours = model(text).logits
    delta.detach()
    x = model.get_input_embeddings()(text.clamp(max=96))
    x[0, [1, 3, 4]] = prompt.detach()
    torch.testing.assert_close(ours, model(inputs_embeds=x).logits)
    delta.attach()
    with pytest.raises(IndexError):
        model(torch.tensor([[5, 100]]))


def test_starts():
    model = build("gpt2")
    table = model.wte.weight
    rows = {tuple(row.tolist()) for row in table}
    (prompt,) = dk.attach(model, dk.SoftPrompt(tokens=5)).detach().parameters()
    assert all(tuple(row.tolist()) in rows for row in prompt)
    (prompt,) = dk.attach(model, dk.SoftPrompt(tokens=5, init_ids=[3, 4])).detach().parameters()
    assert torch.equal(prompt, table[[3, 4, 3, 4, 3]])
    (prompt,) = dk.attach(model, dk.SoftPrompt(tokens=50, init="random")).detach().parameters()
    assert 0.4 < prompt.abs().max() <= 0.5

    def tokenizer(text, add_special_tokens):
        return {"input_ids": [len(word) for word in text.split()]}

    from_text = dk.SoftPrompt.from_text("a bb ccc", tokenizer)
    assert (from_text.tokens, from_text.init_ids) == (3, (1, 2, 3))
    assert dk.SoftPrompt.from_text("a bb ccc", tokenizer, tokens=7).tokens == 7
    with pytest.raises(
        dk.OptionError, match=r"wte: SoftPrompt\(init_ids=...\) has the id 97, beyond the vocabulary of 97"
    ):
        dk.attach(model, dk.SoftPrompt(init_ids=[97]))


def test_starts_as_one_of_the_frequent_tokens():
    """Section 3.2: of the 5,000 most frequent tokens, which stand first in a vocabulary."""
    model = build("gpt2", vocab_size=10_007)
    (prompt,) = dk.attach(model, dk.SoftPrompt(tokens=101)).detach().parameters()
    rows = torch.cdist(prompt.detach(), model.wte.weight.detach()).argmin(1)
    assert torch.equal(model.wte.weight[rows], prompt)
    assert rows.max() < 5_000


def test_calls_that_cannot_take_a_prompt_are_errors():
    model = build("gpt2")
    attached(model)
    with pytest.raises(dk.StateError, match="a soft prompt is inserted as token ids, and this call has no input_ids"):
        model(inputs_embeds=torch.zeros(1, 2, 24))
    with pytest.raises(dk.StateError, match=r"cannot be inserted under a mask of shape \(1, 1, 2, 2\)"):
        model(torch.tensor([[3, 4]]), attention_mask=torch.zeros(1, 1, 2, 2))
    dk.attach(model, dk.SoftPrompt(tokens=2), name="second")
    with pytest.raises(dk.StateError, match="two soft prompts are active on one embedding"):
        model(torch.tensor([[3, 4]]))


def test_token_types_positions_and_positional_arguments():
    model = build("bert")
    delta = attached(model, where="start")
    text = torch.tensor([[5, 6, 7]])
    ours = model(text, torch.ones_like(text), torch.ones_like(text), torch.arange(3)[None]).last_hidden_state
    (prompt,) = delta.parameters()
    delta.detach()
    x = torch.cat([prompt[None], model.get_input_embeddings()(text)], 1)
    types = torch.tensor([[0, 0, 0, 1, 1, 1]])
    theirs = model(inputs_embeds=x, token_type_ids=types, position_ids=torch.arange(6)[None]).last_hidden_state
    torch.testing.assert_close(ours, theirs[:, 3:])


@pytest.mark.parametrize("where", ["start", "after_first"])
def test_prompt_rows_are_of_the_first_token_type(where):
    """Segments are the text's: a prompt of another type than 0 would start from another embedding than it was trained with."""
    model = build("bert")
    attached(model, where=where)
    types = []
    model.embeddings.token_type_embeddings.register_forward_pre_hook(lambda table, args: types.append(args[0].tolist()))
    text = torch.tensor([[5, 6, 7, 8, 9]])
    model(text, token_type_ids=torch.ones_like(text))
    assert types == [[[0, 0, 0, 1, 1, 1, 1, 1] if where == "start" else [1, 0, 0, 0, 1, 1, 1, 1]]]


def test_tuples_hidden_states_and_attentions_have_the_caller_s_length():
    model = build("bert")
    model.set_attn_implementation("eager")
    batch = inputs("bert", model)
    attached(model)
    out = model(**batch, output_hidden_states=True, output_attentions=True)
    assert {state.shape for state in out.hidden_states} == {(2, 7, 24)}
    assert {weights.shape for weights in out.attentions} == {(2, 4, 7, 7)}
    assert model(**batch, return_dict=False)[0].shape == (2, 7, 24)


def test_threads_do_not_mix():
    model = Transformer().eval()
    attached(model)
    texts = [ids(3, length) for length in (5, 7, 11, 13)]
    wanted = [model(text) for text in texts]
    found = {}

    def work(place):
        for _ in range(5):
            found[place] = model(texts[place])

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place, output in enumerate(wanted):
        torch.testing.assert_close(found[place], output)


def test_an_exception_leaves_nothing_behind():
    model = build("t5")
    batch = inputs("t5", model)
    delta = attached(model)
    output = model(**batch).last_hidden_state
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 1000})
    assert torch.equal(model(**batch).last_hidden_state, output)
    twin = copy.deepcopy(model)
    randomize(delta)
    assert torch.equal(twin(**batch).last_hidden_state, output)


def test_the_prompt_may_stay_in_the_output():
    model = build("llama", tf.AutoModelForCausalLM)
    ids = torch.arange(3, 10)[None].repeat(2, 1)
    trimmed = dk.attach(model, dk.SoftPrompt(tokens=4), name="a", train=())
    expected = model(ids).logits
    trimmed.detach()
    delta = dk.attach(model, dk.SoftPrompt(tokens=4, trim=False), name="b", train=())
    delta.load_state_dict(trimmed.state_dict())
    found = model(ids).logits
    assert (found.shape[1], expected.shape[1]) == (11, 7)
    torch.testing.assert_close(found[:, 4:], expected)
    trimmed.attach()
    message = r"with trim=\[False, True\]; expected the same for all examples"
    with dk.rows(model, ["a", "b"]), pytest.raises(dk.StateError, match=message):
        model(ids)


def test_a_start_from_another_delta(tmp_path):
    """PPT: a prompt that was trained first on other data, also one of another length."""
    model = Transformer().eval()
    trained = randomize(dk.attach(model, dk.SoftPrompt(tokens=3), name="pretrained", train=()))
    wanted, vectors = model(ids()), trained.state_dict()["embed.soft_prompt.prompt"]
    trained.save(tmp_path)
    trained.detach()
    started = dk.attach(model, dk.SoftPrompt.from_delta(trained), name="few", train=())
    assert torch.equal(model(ids()), wanted)
    with torch.no_grad():
        next(started.parameters()).zero_()
    assert torch.equal(trained.state_dict()["embed.soft_prompt.prompt"], vectors)
    started.detach()
    same_length = dk.attach(model, dk.SoftPrompt(tokens=3, init=trained), name="same", train=())
    assert torch.equal(model(ids()), wanted)
    assert same_length.methods[0].to_dict()["init"] == "vocab"
    same_length.detach()
    waiting = dk.load(tmp_path, model, name="file", attach=False)
    longer = dk.attach(model, dk.SoftPrompt.from_delta(waiting, tokens=7, where="start"), train=())
    assert torch.equal(next(longer.parameters()), vectors[[0, 1, 2, 0, 1, 2, 0]])
    randomize(longer)
    assert "init_vectors" not in longer.save(tmp_path / "longer").joinpath("delta_config.json").read_text()
    (fresh,) = dk.load(tmp_path / "longer", model, name="again", attach=False).parameters()
    assert torch.equal(fresh, next(longer.parameters()))


def test_starts_that_cannot_be():
    model = Transformer()
    lora = dk.attach(model, dk.LoRA(r=2))
    with pytest.raises(dk.OptionError, match="SoftPrompt.from_delta: expected a delta with one soft prompt, found 0"):
        dk.SoftPrompt.from_delta(lora)
    with pytest.raises(dk.OptionError, match=r"SoftPrompt\(init=...\): expected a delta with one soft prompt, found 0"):
        dk.SoftPrompt(init=lora)
    with pytest.raises(
        dk.OptionError,
        match=r"SoftPrompt\(init=3\): expected a text or a delta with a soft prompt, such as attach and load return, found",
    ):
        dk.SoftPrompt(init=3)
    with pytest.raises(dk.OptionError, match=r"init=..., init_vectors=...\): omit one of the two"):
        dk.SoftPrompt(init=lora, init_vectors=torch.zeros(3, 20))
    with pytest.raises(dk.OptionError, match="vectors to start from have values that are infinite or not a number"):
        dk.SoftPrompt(init_vectors=torch.full((3, 20), torch.nan))
    with pytest.raises(
        dk.OptionError, match=r"init_ids=\[-1\]\): expected a list of at least one token id, none below 0"
    ):
        dk.SoftPrompt(init_ids=[-1])
    with pytest.raises(
        dk.OptionError, match="expected a delta with a soft prompt, such as attach and load return, found the text"
    ):
        dk.SoftPrompt.from_delta("pretrained")
    with pytest.raises(
        dk.OptionError, match="has vectors of 7 features, and this embedding has 20; use those of a prompt"
    ):
        dk.attach(model, dk.SoftPrompt(init_vectors=torch.zeros(3, 7)))
    with pytest.raises(dk.OptionError, match=r"expected a matrix \[n, d\] with at least one row, found shape \(3,\)"):
        dk.SoftPrompt(init_vectors=torch.zeros(3))
    with pytest.raises(dk.OptionError, match="omit one of the two"):
        dk.SoftPrompt(init_vectors=torch.zeros(3, 20), init_ids=[3])
