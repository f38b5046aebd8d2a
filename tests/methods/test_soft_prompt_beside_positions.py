"""Methods that act on some positions of the text, on a model with a soft prompt: they count the text, and not the prompt.

A prompt with the vectors of some words is the same as those words ahead of the text.
"""

import pytest
import torch
import transformers as tf

import deltakit as dk
from support.models import randomize
from support.tiny_transformers import build

WORDS = [5, 6, 8]
TEXTS = torch.tensor([[9, 7, 4, 3, 11, 12], [3, 9, 9, 7, 4, 2]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
PADDED = torch.tensor([[0, 0, 9, 7, 4, 3], [3, 9, 9, 7, 4, 2]])

METHODS = {
    "alora": lambda: dk.LoRA(r=3, invocation=[7, 4]),
    "reft": lambda: dk.ReFT(r=2, prefix_positions=0, suffix_positions=2),
}


def model_of(kind="llama"):
    return build(kind, tf.AutoModelForCausalLM).double()


def with_prompt(kind, method):
    model = model_of(kind)
    dk.attach(model, dk.SoftPrompt(tokens=len(WORDS), init_ids=WORDS), name="prompt")
    randomize(dk.attach(model, method, name="other"))
    return model


def with_words(kind, method):
    model = model_of(kind)
    randomize(dk.attach(model, method, name="other"))
    return model


def ahead(ids, value=None):
    words = torch.tensor(WORDS) if value is None else torch.full((len(WORDS),), value)
    return torch.cat([words.expand(len(ids), -1), ids], 1)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_outputs_are_those_with_the_words_in_the_text(kind, name):
    model, other = with_prompt(kind, METHODS[name]()), with_words(kind, METHODS[name]())
    for mask in (None, torch.ones_like(TEXTS)):
        found = model(TEXTS, attention_mask=mask).logits
        wanted = other(ahead(TEXTS), attention_mask=None if mask is None else ahead(mask, 1)).logits[:, len(WORDS) :]
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    with dk.deltas(model)[1].detached():
        assert not torch.allclose(model(TEXTS).logits, found)


@pytest.mark.parametrize("name", METHODS)
def test_generation(name):
    model, other = with_prompt("llama", METHODS[name]()), with_words("llama", METHODS[name]())
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = model.generate(TEXTS, attention_mask=torch.ones_like(TEXTS), **options)
    wanted = other.generate(ahead(TEXTS), attention_mask=torch.ones_like(ahead(TEXTS)), **options)
    assert torch.equal(found[:, TEXTS.shape[1] :], wanted[:, TEXTS.shape[1] + len(WORDS) :])


def test_first_positions_with_padding():
    model = model_of()
    dk.attach(model, dk.SoftPrompt(tokens=3, init_ids=WORDS), name="prompt")
    delta = randomize(
        dk.attach(model, dk.ReFT(r=2, prefix_positions=2, suffix_positions=0, at="layers.0"), name="other")
    )
    seen = {}
    ((module,),) = delta.modules.values()
    bare = model.model.layers[0].forward

    def forward(*args, **kwargs):
        seen["before"] = bare(*args, **kwargs)
        return seen["before"]

    model.model.layers[0].forward = forward
    model.model.layers[1].register_forward_pre_hook(lambda _, args: seen.update(after=args[0]))
    model(PADDED, attention_mask=MASK)
    edited = (seen["before"] != seen["after"]).any(-1)
    assert edited.nonzero().tolist() == [[0, 5], [0, 6], [1, 3], [1, 4]]
    h, rows = seen["before"][edited], module.rows()[0]
    wanted = h + (h @ module.source[0].T + module.bias[0] - h @ rows.T) @ rows
    torch.testing.assert_close(seen["after"][edited], wanted, rtol=1e-10, atol=1e-10)


def test_prompts_of_different_lengths_in_one_batch():
    model = model_of()
    for name, words in (("short", WORDS[:1]), ("long", WORDS)):
        dk.attach(model, dk.SoftPrompt(tokens=len(words), init_ids=words), dk.LoRA(r=3, invocation=[7, 4]), name=name)
        randomize_but_the_prompt(model)
    with dk.rows(model, ["short", "long"]):
        both = model(TEXTS, attention_mask=torch.ones_like(TEXTS)).logits
    for number, name in enumerate(("short", "long")):
        with dk.rows(model, [name]):
            alone = model(TEXTS[number : number + 1]).logits
        torch.testing.assert_close(both[number : number + 1], alone, rtol=1e-9, atol=1e-9)


def randomize_but_the_prompt(model):
    for name, parameter in dk.deltas(model)[-1].named_parameters():
        if name.endswith((".A", ".B")):
            torch.nn.init.normal_(parameter, std=0.3)
