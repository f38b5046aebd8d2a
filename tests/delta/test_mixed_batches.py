"""Each row of a batch with a delta of its own: as if it had been run alone with that delta."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.core import current_batch
from deltakit.ops.low_rank_batched import Gathered, Masked
from support.models import Transformer, ids, randomize
from support.tiny_transformers import build

METHODS = {
    "LoRA": lambda k: dk.LoRA(r=2 + k),
    "Adapter": lambda k: dk.Adapter(size=2 + k),
    "Compacter": lambda k: dk.Compacter(size=4 + 4 * k),
    "ParallelAdapter": lambda k: dk.ParallelAdapter(size=2 + k),
    "BitFit": lambda k: dk.BitFit(),
    "Prefix": lambda k: dk.Prefix(tokens=1 + k),
    "SoftPrompt": lambda k: dk.SoftPrompt(tokens=1 + k),
    "both": lambda k: dk.LoRA(r=2) if k else dk.Adapter(size=3),
}
NAMES = ["spelling", "topic", None, "facts", "topic"]


def several(model, kind, **options):
    methods = [replace(METHODS[kind](k), **options) for k in range(3)]
    made = [dk.attach(model, m, name=name) for m, name in zip(methods, ("spelling", "topic", "facts"), strict=True)]
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


def generates_as_alone(model, deltas, batch, options):
    options = options | {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with dk.rows(model, NAMES):
        together = model.generate(**batch, **options)
    for row, own in enumerate(NAMES):
        single = alone(model, deltas, own).generate(**one(batch, row), **options)
        assert torch.equal(together[row], single[0]), own


def the_batch(model):
    tokens = torch.randint(5, 30, (len(NAMES), 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    more = {"decoder_input_ids": tokens[:, :4]} if model.config.is_encoder_decoder else {}
    return {"input_ids": tokens, "attention_mask": mask, **more}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "t5", "gpt_neox"])
def test_as_if_alone(name, kind):
    model = build(name, tf.AutoModel).double()
    # Encoders fill no cache, whatever their config says.
    model.config.use_cache = name in ("bert", "roberta")
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
    model.config.use_cache = False
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
    generates_as_alone(model, deltas, batch, options)


@pytest.mark.parametrize("tokens", [1, 3, 4])
@pytest.mark.parametrize("grad", [False, True])
def test_many_rows_of_few_deltas(tokens, grad):
    model = Transformer().double().eval()
    deltas = {name: randomize(dk.attach(model, dk.LoRA(r=2 + k), name=name), 0.3) for k, name in enumerate("ab")}
    names = ["a", None, "b", "b"] * 5
    batch = torch.randint(2, 31, (20, tokens))
    with torch.set_grad_enabled(grad), dk.rows(model, names):
        together = model(batch)
        kept = current_batch([deltas["a"]._record]).kept.values()
        made = [value[-1] for value in kept if isinstance(value, tuple) and isinstance(value[-1], Gathered | Masked)]
        # Masked for up to three tokens an example, where nothing needs gradients.
        assert [isinstance(factors, Masked) for factors in made] == [tokens < 4 and not grad] * len(made)
        assert bool(made) is not grad
    for row, own in enumerate(names):
        torch.testing.assert_close(together[row], alone(model, deltas, own)(batch[row : row + 1])[0])


def test_factors_without_a_version_are_read_each_time():
    """In inference mode tensors do not count their changes."""
    model = Transformer().eval()
    randomize(dk.attach(model, dk.LoRA(r=2), name="a"))
    tokens = torch.cat([ids()] * 2)[:4]
    with torch.inference_mode():
        twin = copy.deepcopy(model)
        (delta,) = dk.deltas(twin)
        with dk.rows(twin, ["a", None, "a", "a"]):
            before = twin(tokens)
            next(delta.parameters()).add_(1)
            assert not torch.equal(twin(tokens), before)
    with torch.no_grad(), dk.rows(model, ["a", None, "a", "a"]):
        torch.testing.assert_close(model(tokens), before)


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
    with pytest.raises(dk.StateError, match=r"delta 'a' fully trains layers\.0\.norm_1\.weight"), dk.rows(model, ["a"]):
        pass
    delta.detach()
    delta = dk.attach(model, dk.LoRA(r=2), name="b")
    for names, error, message in (
        (["b", "c"], dk.OptionError, r"no delta named 'c' is attached; the attached deltas are 'b'"),
        ([None, "c"], dk.OptionError, r"no delta named 'c' is attached; the attached deltas are 'b'"),
        ([], dk.OptionError, r"expected a list with the name of a delta"),
        (
            "b",
            dk.OptionError,
            r"rows\(names='b'\): expected a list of texts or None, found the text 'b'; write names=\['b'\]",
        ),
    ):
        with pytest.raises(error, match=message), dk.rows(model, names):
            pass
    delta.active = False
    with pytest.raises(dk.StateError, match=r"delta 'b' is not active"), dk.rows(model, ["b"]):
        pass
    delta.active = True
    with (
        pytest.raises(dk.StateError, match=r"this backbone is in another rows\(\) block"),
        dk.rows(model, ["b"]),
        dk.rows(model, ["b"]),
    ):
        pass
    with (
        pytest.raises(dk.StateError, match=r"rows\(\) has 3 names"),
        dk.rows(model, ["b", None, "b"]),
    ):
        model(ids()[:2])
    with pytest.raises(dk.StateError, match=r"its backbone is in a rows\(\) block"), dk.rows(model, ["b"]):
        delta.detach()
    with (
        pytest.raises(
            dk.StateError, match=r"'new': its backbone is in a rows\(\) block; leave the block before attach or detach"
        ),
        dk.rows(model, ["b"]),
    ):
        dk.attach(model, dk.BitFit(), name="new")
    assert not delta._record.open_blocks
    assert delta.attached


class Encoder(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(31, 12)
        layer = nn.TransformerEncoderLayer(12, 2, 20, dropout=0, **options)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids, attention_mask=None):
        return (self.layers(self.embed(input_ids)),)


@pytest.mark.parametrize(
    ("name", "kind"), [("bloom", "Prefix"), ("bloom", "SoftPrompt"), ("torch", "Prefix"), ("toy", "Prefix")]
)
def test_attention_outside_the_interface(name, kind):
    torch.manual_seed(0)
    makers = {"torch": lambda: Encoder(batch_first=True), "toy": Transformer}
    model = makers[name]().eval() if name in makers else build(name, tf.AutoModel)
    deltas = several(model.double(), kind)
    batch = {"input_ids": torch.randint(5, 30, (len(NAMES), 7), generator=torch.Generator().manual_seed(0))}
    if name == "bloom":
        batch |= {"use_cache": False, "attention_mask": torch.ones_like(batch["input_ids"])}
        batch["attention_mask"][1, 5:] = 0

    def run(these):
        output = model(**{k: these.get(k, v) if k != "use_cache" else v for k, v in batch.items()})
        return output if isinstance(output, torch.Tensor) else output[0]

    with dk.rows(model, NAMES):
        together = run(batch)
    for row, own in enumerate(NAMES):
        alone(model, deltas, own)
        single = run({k: v[row : row + 1] for k, v in batch.items() if k != "use_cache"})[0]
        real = slice(0, 5) if row == 1 and "attention_mask" in batch else slice(None)
        torch.testing.assert_close(together[row][real], single[real])


def test_batch_second_is_refused():
    model = Encoder(batch_first=False)
    dk.attach(model, dk.Adapter(size=2, at="@block"), name="a")
    with (
        pytest.raises(dk.StateError, match=r"layers\.layers\.0\.self_attn is attention with batch_first=False"),
        dk.rows(model, ["a"]),
    ):
        pass


def test_a_weight_patch_is_shared():
    model = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True))
    dk.attach(model, dk.LoRA(r=2), name="a")
    with pytest.raises(dk.StateError, match="patches a weight"), dk.rows(model, ["a", None]):
        pass


def two_layers(*methods):
    """A bare backbone's output, and deltas on it, randomised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    x = torch.randn(2, 3, 8)
    bare = model(x)
    return model, x, bare, [randomize(dk.attach(model, method, name=f"d{k}"), 0.3) for k, method in enumerate(methods)]


def test_a_weight_patch_that_is_not_named_takes_no_part():
    model, x, bare, _ = two_layers(dk.LoRA(r=2, at="1.weight"), dk.LoRA(r=2, at="0"))
    with dk.rows(model, ["d1", None]):
        together = model(x)
    torch.testing.assert_close(together[1], bare[1])
    assert not torch.allclose(together[0], bare[0])


def test_what_all_rows_share_is_refused_named_or_not():
    model, _, _, (one, _) = two_layers(dk.LoRA(r=2, at="1"), dk.LoRA(r=2, at="0"))
    one.merge()
    with (
        pytest.raises(dk.StateError, match="delta 'd0' is merged into the weights, which all examples share"),
        dk.rows(model, ["d1"]),
    ):
        pass
    one.unmerge().freeze(train="1")
    with pytest.raises(dk.StateError, match=r"delta 'd0' fully trains 1\.weight"), dk.rows(model, ["d1"]):
        pass


def test_nothing_changes_in_a_block():
    model, x, _, (one, _) = two_layers(dk.LoRA(r=2, at="0"), dk.LoRA(r=2, at="0"))
    with dk.rows(model, ["d0", "d1"]):
        before = model(x)
        for change, what in ((lambda: setattr(one, "active", False), "changing active"), (one.merge, "merge")):
            with pytest.raises(dk.StateError, match=f"leave the block before {what}"):
                change()
        assert torch.equal(model(x), before)
        twin = copy.deepcopy(model)
    assert dk.deltas(twin)[0].detach().attached is False


def test_one_deltas_overflow_stays_in_its_rows():
    model, _, _, (one,) = two_layers(dk.LoRA(r=2, at="0"))
    x = torch.randn(16, 1, 8)
    for value in (float("nan"), 1e38):
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.fill_(value)
            with dk.rows(model, ["d0"] + [None] * 15):
                output = model(x)
        assert not output[0].isfinite().all()
        assert output[1:].isfinite().all()


def test_experts_are_refused():
    model = nn.ModuleDict({"experts": nn.ModuleList([nn.Linear(8, 8)])})
    dk.attach(model, dk.LoRA(r=2, at="experts.0"), name="a")
    with (
        pytest.raises(dk.StateError, match=r"is on an expert, experts\.0, whose input mixes the tokens"),
        dk.rows(model, ["a"]),
    ):
        pass


class TestSoftPrompts:
    """Prompts of different lengths: padding behind the text, or ahead of it where a cache is filled."""

    @pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gpt_neox", "roberta"])
    def test_ahead_of_the_text_where_a_cache_is_filled(self, name):
        # RoBERTa takes the positions from the ids that are its padding.
        own = {"is_decoder": True, "pad_token_id": 1} if name == "roberta" else {}
        model = build(name, tf.AutoModel, **own).double()
        model.config.use_cache = True
        deltas, batch = several(model, "SoftPrompt", where="start"), the_batch(model)
        batch["attention_mask"][1] = torch.tensor([1, 1, 1, 1, 1, 0, 0])
        with dk.rows(model, NAMES):
            together = outputs(model, batch)
        for row, own in enumerate(NAMES):
            single = outputs(alone(model, deltas, own), one(batch, row))
            seen = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][seen], single[0][seen])

    @pytest.mark.parametrize("padded", [True, False], ids=["padded", "none padded"])
    @pytest.mark.parametrize("options", [{"num_beams": 3}, {}], ids=["beams", "greedy"])
    @pytest.mark.parametrize("name", ["gpt2", "t5", "opt", "gpt_neox", "llama", "bloom"])
    def test_generation(self, name, options, padded):
        model = build(name, tf.AutoModelForSeq2SeqLM if name == "t5" else tf.AutoModelForCausalLM)
        deltas, batch = several(model, "SoftPrompt"), the_batch(model)
        batch.pop("decoder_input_ids", None)
        if not padded:
            # transformers drops a mask of ones on the way.
            batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        generates_as_alone(model, deltas, batch, options)

    def test_of_one_length_in_any_stack(self):
        model = build("bart", tf.AutoModel).double()
        deltas = {name: dk.attach(model, dk.SoftPrompt(tokens=3), name=name) for name in "ab"}
        batch = {name: value[:3] for name, value in the_batch(model).items()}
        with dk.rows(model, ["b", "a", "b"]):
            together = outputs(model, batch)
        for row, own in enumerate("bab"):
            single = outputs(alone(model, deltas, own), one(batch, row))
            torch.testing.assert_close(together[row], single[0])

    def test_ids_of_ones_own(self):
        model = build("llama", tf.AutoModel).double()
        for name, tokens in (("a", 2), ("b", 3)):
            randomize(dk.attach(model, dk.SoftPrompt(tokens=tokens, prepend=False), name=name))
        deltas = {delta.name: delta for delta in dk.deltas(model)}
        vocabulary = model.get_input_embeddings().num_embeddings
        written = torch.tensor([[5, vocabulary, vocabulary + 1, 7], [vocabulary + 2, 5, vocabulary, 9], [5, 6, 7, 8]])
        with dk.rows(model, ["a", "b", None]):
            together = model(input_ids=written)[0]
        for row, own in enumerate(["a", "b", None]):
            single = alone(model, deltas, own)(input_ids=written[row : row + 1])[0]
            torch.testing.assert_close(together[row], single[0])

    def test_positions_that_cannot_be_told(self):
        model = build("llama", tf.AutoModel)
        several(model, "SoftPrompt")
        batch = the_batch(model)
        with dk.rows(model, NAMES):
            with pytest.raises(
                dk.StateError, match=r"lengths \(1, 2, 0, 3, 2\), and the positions .* pass position_ids"
            ):
                model(**batch, use_cache=True)
            model(**batch, use_cache=False)

    def test_padding_within_the_text_is_refused_where_a_cache_is_filled(self):
        """There windows, chunks and relative biases count by place."""
        model = build("llama", tf.AutoModel)
        for name, tokens in (("a", 2), ("b", 3)):
            dk.attach(model, dk.SoftPrompt(tokens=tokens, where="after_first"), name=name)
        with dk.rows(model, ["a", "b"]):
            with pytest.raises(dk.StateError, match="cannot be determined; call it with use_cache=False"):
                model(input_ids=torch.tensor([[5, 6], [7, 8]]), use_cache=True)
            model(input_ids=torch.tensor([[5, 6], [7, 8]]), use_cache=False)

    def test_blocks_of_more_than_attention_are_refused(self):
        model = tf.AutoModel.from_config(tf.MambaConfig(vocab_size=31, hidden_size=24, num_hidden_layers=2)).eval()
        deltas = [dk.attach(model, dk.SoftPrompt(tokens=n), name=name) for name, n in (("a", 2), ("b", 3))]
        ids = torch.tensor([[5, 6], [7, 8]])
        with (
            dk.rows(model, ["a", "b"]),
            pytest.raises(dk.StateError, match=r"lengths \(2, 3\), so the shorter ones need"),
        ):
            model(input_ids=ids)
        with dk.rows(model, ["a", "a"]):
            together = model(input_ids=ids)[0]
        deltas[1].active = False
        torch.testing.assert_close(together, model(input_ids=ids)[0])

    def test_a_static_cache_is_refused(self):
        model = build("qwen2", tf.AutoModelForCausalLM)
        dk.attach(model, dk.SoftPrompt(tokens=2))
        with pytest.raises(dk.StateError, match="cannot be inserted with a static cache"):
            model.generate(torch.tensor([[5, 6]]), max_new_tokens=3, cache_implementation="static", pad_token_id=0)

    def test_places_that_differ_are_refused(self):
        model = build("bert", tf.AutoModel)
        for name, where in (("a", "start"), ("b", "after_first")):
            dk.attach(model, dk.SoftPrompt(tokens=2, where=where), name=name)
        with pytest.raises(dk.StateError, match=r"are inserted after \[0, 1\] tokens"), dk.rows(model, ["a", "b"]):
            model(input_ids=torch.tensor([[5, 6], [7, 8]]))


class TestFactorsThatAreKept:
    """Gathered factors are kept for the calls in a block, as long as they are those of the call."""

    @staticmethod
    def made():
        model = nn.Sequential(nn.Linear(7, 5)).requires_grad_(False)
        deltas = [randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name=name)) for name in ("a", "b")]
        return model, deltas, torch.randn(4, 3, 7), ["a", "b", None, "a"]

    def test_parameters_of_one_call(self):
        model, _, x, names = self.made()
        name = "0.a_lora.B"
        factor = model.get_submodule("0.a_lora")
        bare = F.linear(x[0], model[0].weight, model[0].bias)
        with torch.no_grad(), dk.rows(model, names):
            for number in range(20):
                # Each is gone before the next one is made, which may get its address.
                other = factor.B * number
                found = torch.func.functional_call(model, {name: other}, (x,))
                torch.testing.assert_close(found[0], bare + factor.scaling * x[0] @ factor.A.T @ other.T)
                del other

    def test_a_call_in_training_drops_inputs(self):
        model = nn.Sequential(nn.Linear(7, 5)).requires_grad_(False)
        randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="a"))
        randomize(dk.attach(model, dk.LoRA(r=2, at="0", dropout=0.9), name="b"))
        x = torch.randn(2, 3, 7)
        with torch.no_grad(), dk.rows(model.eval(), ["a", "b"]):
            kept = model(x)
            dropped = model.train()(x)
        torch.testing.assert_close(dropped[0], kept[0])
        assert not torch.allclose(dropped[1], kept[1])

    @pytest.mark.parametrize("gradients", [False, True])
    def test_autocast(self, gradients):
        model, deltas, x, names = self.made()
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(gradients):
            with dk.rows(model, names):
                together = model(x)
            for row, name in enumerate(names):
                for delta in deltas:
                    delta.active = delta.name == name
                torch.testing.assert_close(together[row], model(x[row : row + 1])[0], rtol=0.02, atol=0.02)
