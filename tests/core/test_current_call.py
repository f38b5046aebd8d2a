"""Delta modules that read the ids, the mask and the position of the backbone's call."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier
from typing import ClassVar

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.core import DeltaModule
from deltakit.core.backbone_call import CurrentCall, begin_call, current_call, end_call
from deltakit.injection.call_observer import CallObserver
from deltakit.ops import OutputMap, like
from support.kind_methods import registered
from support.models import WIDTH, Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build

MARK = 3


def observers(model):
    held = [getattr(hook, "__self__", hook) for hook in model._forward_pre_hooks.values()]
    return [hook for hook in held if isinstance(hook, CallObserver)]


class AtMarkDelta(OutputMap):
    """Adds a vector where the id is `MARK` and the mask, if there is one, is not 0; notes what it saw."""

    reads_call: ClassVar[bool] = True

    def __init__(self, target):
        super().__init__(target)
        self.vector = nn.Parameter(torch.zeros(self.size, **like(target)))
        self.seen = []

    def forward(self, x, y):
        call = current_call()
        self.seen.append((None if call.ids is None else call.ids.tolist(), call.start))
        here = call.ids == MARK
        if call.mask is not None:
            here = here & (call.mask[:, -call.ids.shape[1] :] != 0)
        return y + here.unsqueeze(-1) * self.vector


@dataclass(frozen=True, kw_only=True)
class AtMark(dk.Method):
    name: ClassVar[str] = "test_reads_call"
    kind: ClassVar[type[DeltaModule]] = AtMarkDelta


@pytest.fixture(autouse=True)
def methods():
    with registered(AtMark):
        yield


class Tagger(Transformer):
    """A vector for each token, and its ids under a name of its own."""

    def forward(self, tokens, attention_mask=None):
        return self.layers[0].mlp.up_proj(self.embed(tokens))


def marked(rows=3, length=7):
    tokens = ids(rows, length)
    tokens[tokens == MARK] = MARK + 1
    tokens[0, 2] = tokens[1, 0] = tokens[1, 6] = MARK
    return tokens


def tagger():
    model = Tagger().double().eval()
    delta = randomize(dk.attach(model, AtMark(at="layers.0.mlp.up_proj")))
    return model, delta, delta.modules["layers.0.mlp.up_proj"][0]


class TestCalls:
    @pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword"])
    def test_ids_and_mask(self, keyword):
        model, delta, module = tagger()
        tokens, mask = marked(), torch.ones(3, 7)
        mask[1, 6] = 0
        with delta.detached():
            bare = model(tokens)
        found = model(tokens, attention_mask=mask) if keyword else model(tokens, mask)
        here = (tokens == MARK) & (mask != 0)
        assert here.sum() == 2
        torch.testing.assert_close(found, bare + here[..., None] * module.vector, rtol=1e-12, atol=1e-12)
        assert torch.equal(found[~here], bare[~here])
        assert module.seen[-1] == (tokens.tolist(), 0)

    @pytest.mark.parametrize("way", ["positional", "keyword"])
    def test_of_transformers(self, way):
        model = build("gpt2").double()
        delta = randomize(dk.attach(model, AtMark(at="h.1.mlp.c_proj")))
        (module,) = delta.modules["h.1.mlp.c_proj"]
        tokens = marked()
        with delta.detached():
            bare = model(tokens).last_hidden_state
        found = (model(tokens) if way == "positional" else model(input_ids=tokens)).last_hidden_state
        assert module.seen == [(tokens.tolist(), 0)]
        here = tokens == MARK
        assert torch.equal(found[~here], bare[~here])
        assert not torch.isclose(found[here], bare[here]).all()

    def test_without_ids(self):
        model = build("gpt2")
        delta = dk.attach(model, AtMark(at="h.1.mlp.c_proj"))
        (module,) = delta.modules["h.1.mlp.c_proj"]
        module.forward = lambda x, y: (module.seen.append(current_call()), y)[1]
        model(inputs_embeds=torch.randn(1, 2, 24))
        assert module.seen[0].ids is None

    def test_decoder_ids_of_an_encoder_decoder(self):
        model = build("t5")
        delta = dk.attach(model, AtMark(at="encoder.block.0.layer.1.DenseReluDense.wo"))
        (module,) = delta.modules["encoder.block.0.layer.1.DenseReluDense.wo"]
        tokens = marked()
        model(input_ids=tokens, decoder_input_ids=tokens[:, :2])
        assert module.seen == [(tokens.tolist(), 0)]

    @pytest.mark.parametrize("cached", [True, False])
    def test_generation(self, cached):
        model = build("llama", tf.AutoModelForCausalLM).double()
        path = "model.layers.1.mlp.down_proj"
        delta = randomize(dk.attach(model, AtMark(at=path)), 2.0)
        (module,) = delta.modules[path]
        tokens = marked()[:2, :5]
        tokens[0] = torch.tensor([0, 0, MARK, 7, 9])
        options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        mask = (tokens != 0).long()
        found = model.generate(input_ids=tokens, attention_mask=mask, use_cache=cached, **options)
        starts = [start for _, start in module.seen]
        lengths = [len(ids[0]) for ids, _ in module.seen]
        if cached:
            assert starts == [0, 5, 6, 7, 8, 9]
            assert lengths == [5, 1, 1, 1, 1, 1]
        else:
            assert starts == [0] * 6
            assert lengths == [5, 6, 7, 8, 9, 10]
        other = model.generate(input_ids=tokens, attention_mask=mask, use_cache=not cached, **options)
        assert torch.equal(found, other)

    def test_a_mixed_batch_is_not_sliced(self):
        """The ids of the call are those of the whole batch; the module acts on its own examples alone."""
        model, delta, module = tagger()
        with delta.detached():
            bare = model(marked())
        with dk.rows(model, ["delta", "delta", "delta"]):
            whole = model(marked())
        torch.testing.assert_close(whole, bare + (marked() == MARK)[..., None] * module.vector)


class TestThreads:
    def test_each_sees_its_own_call(self):
        model, delta, module = tagger()
        barrier = Barrier(2)
        plain = module.forward

        def forward(x, y):
            barrier.wait()
            result = plain(x, y)
            barrier.wait()
            return result

        batches = [marked(), marked().flip(1)]
        with delta.detached():
            bare = [model(tokens) for tokens in batches]
        # The first forward is watched by one thread.
        model(batches[0])
        module.forward = forward
        with torch.no_grad(), ThreadPoolExecutor(2) as pool:
            found = list(pool.map(model, batches))
        for tokens, one, y in zip(batches, bare, found, strict=True):
            torch.testing.assert_close(y, one + (tokens == MARK)[..., None] * module.vector)


class TestOutside:
    MESSAGE = "the ids and the mask of the call are not known here"

    def test_there_is_no_call(self):
        model, _, _ = tagger()
        model(marked())
        with pytest.raises(dk.StateError, match=self.MESSAGE):
            current_call()
        with pytest.raises(dk.StateError, match="a part of the backbone was called alone"):
            model.layers[0].mlp.up_proj(torch.randn(2, WIDTH, dtype=torch.float64))

    def test_behind_an_exception(self):
        model, _, _ = tagger()
        model(marked())
        with pytest.raises(IndexError):
            model(marked() + 100)
        with pytest.raises(dk.StateError, match=self.MESSAGE):
            current_call()
        plain = model.layers[0].mlp.up_proj.forward
        model.layers[0].mlp.up_proj.forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            model(marked())
        with pytest.raises(dk.StateError, match=self.MESSAGE):
            current_call()
        model.layers[0].mlp.up_proj.forward = plain
        model(marked())

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, reentrant):
        model = build("gpt2").train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        delta = randomize(dk.attach(model, AtMark(at="h.1.mlp.c_proj")))
        (module,) = delta.modules["h.1.mlp.c_proj"]
        direction = torch.randn(3, 7, 24)
        (model(input_ids=marked()).last_hidden_state * direction).sum().backward()
        expected, module.vector.grad = module.vector.grad, None
        # Older releases of transformers have the second name alone.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": reentrant})
        first = (model(input_ids=marked()).last_hidden_state * direction).sum()
        # A call that comes in between has other ids.
        model(input_ids=marked().flip(1))
        seen = len(module.seen)
        first.backward()
        assert module.seen[seen:] == [(marked().tolist(), 0)]
        assert expected.any()
        torch.testing.assert_close(module.vector.grad, expected)

    def test_a_backbone_inside_another_keeps_the_outer_call(self):
        """Deltas on a model and on a part of it: when the part returns, the model's call still runs."""

        class Outer(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = Tagger()
                self.head = nn.Linear(28, 5)

            def forward(self, tokens):
                return self.head(self.inner(tokens[:, :4]))

        model = Outer().double().eval()
        delta = dk.attach(model, AtMark(at="head"), name="outer")
        dk.attach(model.inner, AtMark(at="layers.0.mlp.up_proj"))
        (module,) = delta.modules["head"]
        module.forward = lambda x, y: (module.seen.append(current_call().ids), y)[1]
        model(marked())
        assert torch.equal(module.seen[0], marked())
        with pytest.raises(dk.StateError, match=self.MESSAGE):
            current_call()

    def test_an_interrupted_call_is_forgotten_by_the_next(self):
        model, _, module = tagger()
        model(marked())
        layer = model.layers[0].mlp.up_proj
        plain = layer.forward

        def interrupted(x):
            raise KeyboardInterrupt

        layer.forward = interrupted
        with pytest.raises(KeyboardInterrupt):
            model(marked())
        layer.forward = plain
        model(marked(2))
        assert module.seen[-1] == (marked(2).tolist(), 0)
        with pytest.raises(dk.StateError, match=self.MESSAGE):
            current_call()


class TestObserver:
    def test_a_call_that_cannot_be_told_to_run_ends_with_the_next_of_its_backbone(self):
        """A compiled forward has no frame to ask. If it was interrupted, the next one is not inside it."""
        backbone, other = 1, 2
        for _ in range(2):
            begin_call(CurrentCall(None, None, backbone=backbone))
        begin_call(CurrentCall(None, None, backbone=other))
        assert current_call().backbone == other
        end_call()
        assert current_call().backbone == backbone
        end_call()
        with pytest.raises(dk.StateError, match="are not known here"):
            current_call()

    def test_detach_removes_its_hooks(self):
        model = Tagger().eval()
        before = snapshot(model)
        delta = dk.attach(model, AtMark(at="layers.0.mlp.up_proj"))
        model(marked())
        other = dk.attach(model, AtMark(at="layers.0.mlp.up_proj"), name="other")
        model(marked())
        with_two = len(model._forward_pre_hooks)
        other.detach()
        model(marked())
        assert len(model._forward_pre_hooks) == with_two
        assert len(observers(model)) == 1
        delta.detach()
        same(before, snapshot(model))
        delta.attach()
        model(marked())
        delta.detach()
        same(before, snapshot(model))

    def test_what_does_not_read_the_call_has_none(self):
        model = Tagger().eval()
        dk.attach(model, dk.LoRA(r=2, at="layers.0.mlp.up_proj"))
        model(marked())
        assert not observers(model)

    def test_copies(self):
        model, _, _ = tagger()
        output = model(marked())
        before = copy.deepcopy(model)
        dk.deltas(before)[0].detach()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(marked()), output)
            dk.deltas(twin)[0].detach()
            assert not twin._forward_pre_hooks
            assert not twin._forward_hooks
            assert torch.equal(twin(marked()), before(marked()))
        assert torch.equal(model(marked()), output)
