"""Each row of a batch with a delta of its own: as if it had been run alone with that delta."""

import pytest
import torch
import transformers as tf
from backbones import build
from models import Transformer, ids, randomize
from torch import nn

import deltakit as dk

METHODS = {
    "LoRA": lambda k: dk.LoRA(r=2 + k),
    "Adapter": lambda k: dk.Adapter(size=2 + k),
    "BitFit": lambda k: dk.BitFit(),
    "Prefix": lambda k: dk.Prefix(tokens=1 + k),
    "both": lambda k: dk.LoRA(r=2) if k else dk.Adapter(size=3),
}
NAMES = ["spelling", "topic", None, "facts", "topic"]


def several(model, kind):
    made = [dk.attach(model, METHODS[kind](k), name=name) for k, name in enumerate(("spelling", "topic", "facts"))]
    return {delta.name: randomize(delta, 0.3) for delta in made}


def alone(model, deltas, name):
    """Only this delta, or none, switched on."""
    for other, delta in deltas.items():
        delta.active = other == name
    return model


def outputs(model, batch):
    return model(**batch)[0]


def one(batch, row):
    return {name: value[row : row + 1] for name, value in batch.items()}


def the_batch(model):
    tokens = torch.randint(5, 30, (len(NAMES), 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    more = {"decoder_input_ids": tokens[:, :4]} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, "attention_mask": mask, **more}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "gpt_neox"])
def test_as_if_alone(name, kind):
    model = build(name, tf.AutoModel).double()
    model.config.use_cache = False
    deltas, batch = several(model, kind), the_batch(model)
    with dk.rows(model, NAMES):
        together = outputs(model, batch)
    singles = []
    for row, own in enumerate(NAMES):
        singles.append(outputs(alone(model, deltas, own), one(batch, row)))
    seen = batch["attention_mask"].bool() if not model.config.is_encoder_decoder else slice(None)
    torch.testing.assert_close(together[seen], torch.cat(singles)[seen])


@pytest.mark.parametrize("kind", METHODS)
def test_gradients(kind):
    model = build("llama", tf.AutoModel).double()
    deltas, batch = several(model, kind), the_batch(model)
    weight = torch.randn(len(NAMES), 7, 1, dtype=torch.float64) * batch["attention_mask"][..., None]
    with dk.rows(model, NAMES):
        (outputs(model, batch) * weight).square().sum().backward()
    found = {n: [p.grad.clone() for p in d.parameters()] for n, d in deltas.items()}
    model.zero_grad()
    for row, own in enumerate(NAMES):
        if own is not None:
            (outputs(alone(model, deltas, own), one(batch, row)) * weight[row : row + 1]).square().sum().backward()
    for name, delta in deltas.items():
        torch.testing.assert_close([p.grad for p in delta.parameters()], found[name])


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
def test_generation(kind, options):
    model = build("llama", tf.AutoModelForCausalLM)
    deltas, batch = several(model, kind), the_batch(model)
    options |= {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with dk.rows(model, NAMES):
        together = model.generate(**batch, **options)
    for row, own in enumerate(NAMES):
        single = alone(model, deltas, own).generate(**one(batch, row), **options)
        assert torch.equal(together[row], single[0]), own


def test_trained_factors_are_used_at_once():
    model = Transformer().eval()
    delta = randomize(dk.attach(model, dk.LoRA(r=2), name="a"))
    with torch.no_grad(), dk.rows(model, ["a", None, "a", "a"]):
        before = model(torch.cat([ids()] * 2)[:4])
        next(delta.parameters()).add_(1)
        assert not torch.equal(model(torch.cat([ids()] * 2)[:4]), before)


def test_bad_input(tmp_path):
    model = Transformer().eval()
    delta = dk.attach(model, dk.LoRA(r=2), name="a", train="^layers.0.norm_1")
    with pytest.raises(dk.StateError, match=r"delta 'a' trains layers\.0\.norm_1\.weight whole"), dk.rows(model, ["a"]):
        pass
    delta.detach()
    delta = dk.attach(model, dk.LoRA(r=2), name="b")
    for names, error, message in (
        (["b", "c"], dk.OptionError, r"no delta named 'c' is attached; there are 'b'"),
        ([], dk.OptionError, r"expected a list with the name of a delta"),
        ("b", dk.OptionError, r"expected a list with the name of a delta"),
    ):
        with pytest.raises(error, match=message), dk.rows(model, names):
            pass
    delta.active = False
    with pytest.raises(dk.StateError, match=r"delta 'b' is not active"), dk.rows(model, ["b"]):
        pass
    delta.active = True
    with (
        pytest.raises(dk.StateError, match=r"another rows\(\) block holds"),
        dk.rows(model, ["b"]),
        dk.rows(model, ["b"]),
    ):
        pass
    with (
        pytest.raises(dk.StateError, match=r"expected 3 rows as rows\(\) was given names"),
        dk.rows(model, ["b", None, "b"]),
    ):
        model(ids()[:2])
    with pytest.raises(dk.StateError, match=r"a rows\(\) block holds on its backbone"), dk.rows(model, ["b"]):
        delta.detach()
    assert delta._record.batch is None
    assert delta.attached


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (nn.Sequential(nn.TransformerEncoderLayer(12, 2, 20)), dk.LoRA(r=2), "works by the weight"),
        (build("llama", tf.AutoModel), dk.SoftPrompt(tokens=2), "acts on the whole batch"),
        (build("bloom", tf.AutoModel), dk.Prefix(tokens=2), "acts on the whole batch"),
    ],
    ids=["by weight", "soft prompt", "prefix outside the interface"],
)
def test_what_all_rows_share(model, method, message):
    dk.attach(model, method, name="a")
    with pytest.raises(dk.StateError, match=message), dk.rows(model, ["a", None]):
        pass
    dk.deltas(model)[0].detach()
