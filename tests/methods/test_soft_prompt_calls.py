"""Soft prompts in calls that pass their hooks by, or that continue from a cache the caller kept."""

import copy
import pickle

import pytest
import torch
import transformers as tf
from torch.utils.checkpoint import checkpoint

import deltakit as dk
from support.backbone_inputs import inputs
from support.models import randomize
from support.tiny_transformers import build

DECODERS = ["gpt2", "gpt_neox", "gptj", "opt", "bloom", "llama", "qwen2", "gemma", "mixtral"]
SETTINGS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
SETTINGS |= {"output_logits": True, "return_dict_in_generate": True}


def attached(kind, auto=tf.AutoModelForCausalLM, **options):
    model = build(kind, auto)
    return model, randomize(dk.attach(model, dk.SoftPrompt(**{"tokens": 3, **options})))


# A forward that is called directly


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "gpt2", "llama"])
def test_a_forward_called_directly_is_an_error(kind):
    model, _ = attached(kind, tf.AutoModel)
    batch = inputs(kind, model)
    with pytest.raises(
        dk.StateError, match=rf"{type(model).__name__}: its forward was called directly, so torch ran no"
    ):
        model.forward(**batch)
    # The advice: the module itself.
    assert model(**batch).last_hidden_state.shape == (2, 7, 24)


def test_a_forward_called_directly_inside_a_wrapper():
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, **batch):
            return self.model.forward(**batch)

    model, delta = attached("bert", tf.AutoModel)
    wrapper, batch = Wrapper(model), inputs("bert", model)
    with pytest.raises(dk.StateError, match="use Prefix instead of SoftPrompt"):
        wrapper(**batch)
    delta.active = False
    bare = wrapper(**batch).last_hidden_state
    delta.detach()
    assert torch.equal(wrapper(**batch).last_hidden_state, bare)
    # The advice: a prefix is inserted where attention is computed, and takes part.
    prefix = randomize(dk.attach(model, dk.Prefix(tokens=3)))
    out = wrapper(**batch).last_hidden_state
    assert not torch.equal(out, bare)
    (out * torch.randn_like(out)).sum().backward()
    assert all(parameter.grad.any() for parameter in prefix.parameters())


def test_sentence_transformers(tmp_path):
    """Version 6 calls the forward of its model directly. A prefix is what works there."""
    pytest.importorskip("sentence_transformers", minversion="6")
    from sentence_transformers.base.modules.transformer import Transformer as Encoder

    build("bert", tf.AutoModel).save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(92))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tf.BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    encoder = Encoder(str(tmp_path)).eval()
    batch = {"input_ids": torch.tensor([[2, 5, 6, 3]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    bare = encoder(dict(batch))["token_embeddings"]
    delta = randomize(dk.attach(encoder.auto_model, dk.SoftPrompt(tokens=3)))
    with pytest.raises(dk.StateError, match="BertModel: its forward was called directly"):
        encoder(dict(batch))
    delta.detach()
    assert torch.equal(encoder(dict(batch))["token_embeddings"], bare)
    for method in (dk.Prefix(tokens=3), dk.LoRA(r=2), dk.Adapter(size=3), dk.BitFit(), dk.IA3()):
        delta = randomize(dk.attach(encoder.auto_model, method))
        out = encoder(dict(batch))["token_embeddings"]
        (out * torch.randn_like(out)).sum().backward()
        assert all(parameter.grad.any() for parameter in delta.parameters())
        delta.detach()


def test_only_the_stack_s_own_forward_counts():
    """The head's forward may be called directly: it calls the stack as a module."""
    model, _ = attached("llama")
    batch = inputs("llama", model)
    assert torch.equal(model.forward(**batch).logits, model(**batch).logits)


def test_the_embedding_alone_and_prompts_written_by_hand():
    model, _ = attached("gpt2", tf.AutoModel)
    table = model.get_input_embeddings()
    assert torch.equal(table(torch.tensor([[5, 6]])), table.weight[5:7][None])
    model, delta = attached("gpt2", tf.AutoModel, prepend=False)
    text = torch.tensor([[97, 98, 99, 5, 6]])
    out = model.forward(text).last_hidden_state
    (prompt,) = delta.parameters()
    delta.detach()
    rows = torch.cat([prompt, model.wte.weight[[5, 6]]])
    torch.testing.assert_close(out, model(inputs_embeds=rows[None]).last_hidden_state)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoders_called_directly_are_errors_and_decoders_are_not(kind):
    model, _ = attached(kind, tf.AutoModelForSeq2SeqLM)
    batch = inputs(kind, model)
    encoder_inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with pytest.raises(dk.StateError, match="its forward was called directly"):
        model.get_encoder().forward(**encoder_inputs)
    states = model.get_encoder()(**encoder_inputs)
    logits = model(encoder_outputs=states, **batch).logits
    torch.testing.assert_close(logits, model(**batch).logits)
    assert model.get_decoder().forward(batch["decoder_input_ids"]).last_hidden_state.shape == (2, 5, 24)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_stack_that_is_computed_again_is_called_as_a_module(reentrant):
    model, delta = attached("gpt2", tf.AutoModel)
    text = torch.tensor([[5, 6, 7]])

    def run(scale):
        return model(text).last_hidden_state * scale

    one = torch.ones((), requires_grad=True)
    checkpoint(run, one, use_reentrant=reentrant).pow(3).sum().backward()
    assert all(parameter.grad.any() for parameter in delta.parameters())


# A cache that the caller keeps


def turns(model, batch, settings=SETTINGS, **more):
    """The second turn of a conversation, from the first one's cache and from nothing."""
    mask = batch["attention_mask"]
    first = model.generate(**batch, **settings)
    said = torch.randint(3, 97, (len(mask), 5), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([first.sequences, said], 1)
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
    kept = model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **settings | more)
    return kept, model.generate(ids, attention_mask=mask, **settings | more)


def same(kept, fresh):
    assert torch.equal(kept.sequences, fresh.sequences)
    torch.testing.assert_close(torch.stack(kept.logits), torch.stack(fresh.logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kind", DECODERS)
def test_a_second_turn_with_the_cache_of_the_first(kind, padding):
    model, _ = attached(kind)
    same(*turns(model, inputs(kind, model, padding=padding)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 11])
def test_prompts_shorter_and_longer_than_a_turn(kind, tokens):
    model, _ = attached(kind, tokens=tokens)
    same(*turns(model, inputs(kind, model, padding="none")))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_with_beams_in_chunks_and_behind_the_first_token(kind):
    model, delta = attached(kind)
    batch = inputs(kind, model)
    same(*turns(model, batch, prefill_chunk_size=3))
    # Beams: the texts are repeated by the caller, so that the first turn's cache has a row for each beam.
    first = model.generate(**batch, **SETTINGS, num_beams=3)
    again = model.generate(**batch, **SETTINGS, num_beams=3, past_key_values=tf.DynamicCache())
    assert torch.equal(first.sequences, again.sequences)
    delta.detach()
    randomize(dk.attach(model, dk.SoftPrompt(tokens=3, where="after_first")))
    same(*turns(model, inputs(kind, model, padding="none")))


def test_with_an_assistant():
    model, _ = attached("llama")
    batch = {key: value[1:] for key, value in inputs("llama", model).items()}
    assistant = build("llama", tf.AutoModelForCausalLM)
    alone = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assisted = model.generate(**batch, max_new_tokens=8, min_new_tokens=8, do_sample=False, assistant_model=assistant)
    assert torch.equal(assisted, alone)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_decoders_of_encoder_decoders_have_no_prompt_in_their_cache(kind):
    model, _ = attached(kind, tf.AutoModelForSeq2SeqLM)
    batch = inputs(kind, model)
    del batch["decoder_input_ids"]
    first = model.generate(**batch, **SETTINGS)
    more = torch.cat([first.sequences, torch.full((2, 3), 7)], 1)
    # Without this mask transformers does not cut the ids that the cache holds, with or without a prompt.
    batch |= {"decoder_input_ids": more, "decoder_attention_mask": torch.ones_like(more)}
    kept = model.generate(**batch, past_key_values=first.past_key_values, **SETTINGS)
    same(kept, model.generate(**batch, **SETTINGS))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_prompts_of_different_lengths(kind):
    model = build(kind, tf.AutoModelForCausalLM)
    for name, tokens in (("a", 2), ("b", 5)):
        randomize(dk.attach(model, dk.SoftPrompt(tokens=tokens), name=name))
    with dk.rows(model, ["a", "b"]):
        same(*turns(model, inputs(kind, model, padding="none")))
        first = model.generate(**inputs(kind, model, padding="none"), **SETTINGS)
    mask = torch.ones(2, 14, dtype=torch.long)
    ids = torch.cat([first.sequences, torch.full((2, 3), 7)], 1)
    with (
        dk.rows(model, ["b", "a"]),
        pytest.raises(dk.StateError, match=r"filled with a soft prompt of \(2, 5\) .* has a soft prompt of \(5, 2\)"),
    ):
        model.generate(ids, attention_mask=mask, past_key_values=first.past_key_values, **SETTINGS)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_loop_of_one_s_own_and_copies_of_the_cache(kind):
    """The masks and the lengths are those of the text, and each branch continues from a copy of one cache."""
    model, _ = attached(kind)
    text = torch.randint(3, 97, (2, 11), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        whole = model(text).logits
        cache = model(text[:, :6], use_cache=True).past_key_values
        assert cache.get_seq_length() == 6
        for twin in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache):
            seen = twin.get_seq_length()
            for end, mask in ((8, torch.ones(2, seen + 2)), (11, None)):
                out = model(text[:, seen:end], attention_mask=mask, past_key_values=twin)
                torch.testing.assert_close(out.logits, whole[:, seen:end], rtol=1e-4, atol=1e-5)
                seen = twin.get_seq_length()
                assert seen == end
        cache.reset()
        assert model(text[:, :6], past_key_values=tf.DynamicCache()).past_key_values.get_seq_length() == 6


def test_caches_of_another_prompt_are_errors():
    model, delta = attached("gpt2")
    text = torch.tensor([[5, 6, 7, 8]])
    new = torch.tensor([[9]])

    def kept():
        return model(text, use_cache=True).past_key_values

    cache = kept()
    with pytest.raises(
        dk.StateError, match="expected an attention_mask with 5 columns, for 4 tokens of text .* found 8"
    ):
        model(new, attention_mask=torch.ones(1, 8), past_key_values=cache)
    # The refused call changed nothing.
    expected = model(torch.cat([text, new], 1)).logits[:, 4:]
    torch.testing.assert_close(model(new, past_key_values=cache).logits, expected)
    for off in (lambda: setattr(delta, "active", False), delta.detach):
        cache = kept()
        off()
        with pytest.raises(dk.StateError, match="holds a soft prompt, and no soft prompt takes part in this call"):
            model(new, past_key_values=cache)
        bare = kept()
        delta.active = True
    delta.attach()
    with pytest.raises(dk.StateError, match=r"filled with no soft prompt, and this call has a soft prompt of 3 tokens"):
        model(new, past_key_values=bare)
    cache = kept()
    delta.detach()
    dk.attach(model, dk.SoftPrompt(tokens=2), name="other")
    with pytest.raises(dk.StateError, match=r"of 3 tokens after 0 of the text, and this call has a soft prompt of 2"):
        model(new, past_key_values=cache)


def test_a_forward_that_fails_leaves_the_cache_to_another_try():
    model, _ = attached("gpt2")
    text = torch.tensor([[5, 6, 7, 8]])
    cache = model(text, use_cache=True).past_key_values
    with pytest.raises(IndexError):
        model(torch.tensor([[1000]]), past_key_values=cache)
    again = model(torch.tensor([[9]]), past_key_values=cache).logits
    torch.testing.assert_close(again, model(torch.tensor([[5, 6, 7, 8, 9]])).logits[:, 4:])
    assert cache.get_seq_length() == 5
