"""aLoRA: the tokens that it acts on, against the formula; caches, generation, gradients, and what it refuses."""

import copy
import inspect
import json
import pickle

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
import test_contract as contract
from deltakit.core.cached_text import MovesText
from support.models import NEEDED, Calls, Kinds, Transformer, a_layer_of_each_kind, attached, ids
from support.peft_layers import CLOSE
from support.tiny_transformers import build

CALL = (7, 5)
"""The invocation."""


class Echo(nn.Module):
    """One linear layer over vectors of the ids, called as a language model is."""

    def __init__(self, layer=None):
        super().__init__()
        self.table = nn.Embedding(100, 11)
        self.layer = layer or nn.Linear(11, 7)

    def forward(self, input_ids, attention_mask=None, inputs_embeds=None):
        return self.layer(self.table(input_ids) if inputs_embeds is None else inputs_embeds)


def echo(**options):
    torch.manual_seed(1)
    model = Echo().double().eval()
    delta = attached(model, dk.LoRA(at="layer", r=3, alpha=5, invocation=CALL, **options))
    return model, delta, delta.modules["layer"][0]


TEXTS = torch.tensor([
    [3, 7, 5, 9, 8, 2],
    [7, 5, 3, 7, 5, 2],
    [5, 7, 9, 5, 5, 7],
    [3, 4, 9, 9, 7, 5],
    [7, 5, 7, 7, 9, 1],
])  # fmt: skip
STARTS = [1, 3, 6, 4, 0]
"""Where the last invocation starts in each text; 6 if there is none."""


def changed(model, delta, tokens, mask=None):
    """Which positions differ from the backbone's; all others are the same to the last bit."""
    found = model(tokens, attention_mask=mask)
    with delta.detached():
        return (found != model(tokens, attention_mask=mask)).any(-1)


class TestTokens:
    @torch.no_grad()
    def test_it_is_its_formula(self):
        model, delta, module = echo()
        with delta.detached():
            wanted = model(TEXTS)
        x = model.table(TEXTS)
        for row, start in enumerate(STARTS):
            wanted[row, start:] += 5 / 3 * x[row, start:] @ module.A.T @ module.B.T
        torch.testing.assert_close(model(TEXTS), wanted, **CLOSE)
        delta.scale = -0.5
        with delta.detached():
            bare = model(TEXTS)
        torch.testing.assert_close(model(TEXTS), bare - 0.5 * (wanted - bare), **CLOSE)

    @torch.no_grad()
    def test_the_last_occurrence_counts(self):
        model, delta, _ = echo()
        assert torch.equal(changed(model, delta, TEXTS), torch.arange(6) >= torch.tensor(STARTS)[:, None])
        # It may overlap itself, and be as long as the text, or longer.
        for call, start in (((5, 5), 3), ((5, 7, 9, 5, 5, 7), 0)):
            other = Echo().double().eval()
            delta = attached(other, dk.LoRA(at="layer", r=3, invocation=call))
            assert changed(other, delta, TEXTS[2:3])[0].tolist() == [place >= start for place in range(6)]
        delta = attached(other, dk.LoRA(at="layer", r=3, invocation=[1] * 7), name="longer")
        with pytest.warns(
            dk.DeltaWarning, match=r"no example of this batch has the invocation \[1, 1, 1, 1, 1, 1, 1\] in"
        ):
            assert not changed(other, delta, TEXTS[2:3]).any()

    @torch.no_grad()
    def test_an_occurrence_in_padding_is_none(self):
        """PEFT takes it for one: the padding may have the ids of the invocation."""
        model, delta, _ = echo()
        tokens = torch.tensor([[7, 5, 3, 7, 5, 7, 5], [7, 5, 7, 5, 3, 2, 2], [7, 5, 3, 7, 5, 5, 5]])
        mask = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
        found = changed(model, delta, tokens, mask)
        assert torch.equal(found, torch.arange(7) >= torch.tensor([0, 2, 0])[:, None])
        # A mask that tells nothing about padding is not used.
        found = changed(model, delta, tokens, torch.ones(3, 1, 7, 7))
        assert torch.equal(found, torch.arange(7) >= torch.tensor([5, 2, 3])[:, None])

    @torch.no_grad()
    def test_where_the_plain_formula_runs(self):
        model, delta, _ = echo()
        wanted = model(TEXTS)
        model.float()
        with torch.autocast("cpu", torch.bfloat16):
            found = model(TEXTS)
            with delta.detached():
                bare = model(TEXTS)
        torch.testing.assert_close(found.double(), wanted, rtol=0.05, atol=0.05)
        assert torch.equal((found != bare).any(-1), torch.arange(6) >= torch.tensor(STARTS)[:, None])

    @pytest.mark.parametrize("keep", ["exact", "int8"])
    def test_gradients_come_from_these_tokens_alone(self, keep):
        model, _, module = echo(keep=keep)
        model.table.requires_grad_(True)
        g = torch.randn(5, 6, 7, dtype=torch.float64)
        inputs = [module.A, module.B, model.table.weight]
        found = torch.autograd.grad(model(TEXTS), inputs, g)
        here = (torch.arange(6) >= torch.tensor(STARTS)[:, None])[..., None]
        x = model.table(TEXTS)
        wanted = torch.nn.functional.linear(x, model.layer.weight) + 5 / 3 * (here * x) @ module.A.T @ module.B.T
        wanted = torch.autograd.grad(wanted, inputs, g)
        close = CLOSE if keep == "exact" else {"rtol": 0.02, "atol": 0.05}
        torch.testing.assert_close(found, wanted, **close)

    def test_second_derivatives(self):
        model, _, module = echo()
        x = torch.randn(1, 6, 11, dtype=torch.float64, requires_grad=True)
        model.table.forward = lambda _: x
        assert torch.autograd.gradgradcheck(lambda *_: model(TEXTS[:1]), (x, module.A, module.B))

    def test_a_batch_without_it_trains_nothing_and_says_so(self):
        model, _, module = echo()
        with pytest.warns(
            dk.DeltaWarning, match="has the invocation .* so aLoRA changes nothing here; check that the tok"
        ):
            model(TEXTS[2:3]).square().sum().backward()
        assert not module.A.grad.any()
        assert not module.B.grad.any()


FORMS = {"alora": {"invocation": (int(ids()[1, 4]),)}, "lora_fa": {"frozen_a": True}}
CHECKS = [
    contract.test_attached_and_untrained_is_the_identity,
    contract.test_all_parameters_get_gradients_and_nothing_else_does,
    contract.test_detach_is_exact,
    contract.test_attach_again_gives_the_same_outputs,
    contract.test_attached_active_and_trainable_are_independent,
    contract.test_deepcopy_is_independent_both_ways,
    contract.test_pickle_and_torch_save,
    contract.test_save_and_load_onto_a_fresh_backbone,
    contract.test_base_checkpoint_loads_strictly_while_attached,
    contract.test_dtype_follows_the_backbone,
    contract.test_meta_backbones,
    contract.test_round_trip_as_plain_data,
    contract.test_merge_is_the_delta_or_an_error,
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract_of_methods(check, form, monkeypatch, tmp_path):
    monkeypatch.setitem(NEEDED, "lora", FORMS[form])
    given = {"name": "lora", "model": Transformer().eval(), "tmp_path": tmp_path}
    check(**{name: given[name] for name in inspect.signature(check).parameters})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(form, reentrant, monkeypatch):
    """PEFT's were zero (its issue 2826)."""
    monkeypatch.setitem(NEEDED, "lora", FORMS[form])
    contract.test_gradients_under_checkpointing(Transformer().eval(), "lora", reentrant)


def llama(**options):
    """A language model with an aLoRA that changes its answers."""
    model = build("llama", tf.AutoModelForCausalLM).double()
    return model, attached(model, dk.LoRA(r=3, alpha=60, invocation=CALL, **options))


PROMPTS = torch.tensor([[0, 0, 9, 8, 7, 5, 4], [0, 9, 3, 8, 4, 4, 2], [7, 5, 9, 8, 7, 5, 6], [9, 8, 7, 6, 5, 4, 3]])
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}


class TestCaches:
    @torch.no_grad()
    def test_cached_keys_before_it_are_those_of_the_backbone(self):
        model, delta = llama(at=["k_proj", "v_proj", "up_proj"])
        tokens = torch.tensor([[9, 8, 4, 7, 5, 3, 2]])
        (keys, values), (bare_keys, bare_values) = (
            (cache.layers[1].keys, cache.layers[1].values)
            for cache in (model(tokens).past_key_values, delta.detach().backbone(tokens).past_key_values)
        )
        assert torch.equal(keys[:, :, :3], bare_keys[:, :, :3])
        assert torch.equal(values[:, :, :3], bare_values[:, :, :3])
        assert not torch.isclose(keys[:, :, 3:], bare_keys[:, :, 3:]).all()

    @torch.no_grad()
    def test_a_cache_of_the_backbone_serves_it(self):
        """The purpose of the method: nothing before the invocation is computed again."""
        model, delta = llama()
        tokens, more = torch.tensor([[9, 8, 4, 7, 5, 3, 2], [9, 8, 4, 1, 7, 5, 2]]), torch.tensor([[6], [8]])
        whole = model(torch.cat([tokens, more], 1)).logits
        with delta.detached():
            cache = model(tokens[:, :3]).past_key_values
        found = model(tokens[:, 3:], past_key_values=cache)
        torch.testing.assert_close(found.logits, whole[:, 3:-1], **CLOSE)
        found = model(more, past_key_values=found.past_key_values)
        torch.testing.assert_close(found.logits, whole[:, -1:], **CLOSE)

    @torch.no_grad()
    def test_an_invocation_over_the_border_of_two_calls(self):
        model, delta = llama()
        tokens = torch.tensor([[9, 8, 4, 7, 5, 3, 2]])
        with delta.detached():
            bare = model(tokens).logits
        cache = model(torch.tensor([[9, 7, 5]])).past_key_values
        cache.crop(-3)
        with pytest.warns(dk.DeltaWarning, match="no example of this batch"):
            cache = model(tokens[:, :4], past_key_values=cache).past_key_values
        found = model(tokens[:, 4:], past_key_values=cache).logits
        assert (found - bare[:, 4:]).abs().amax(-1).min() > 1e-3

    @torch.no_grad()
    def test_what_was_cached_in_between_without_it_is_other_text(self):
        model, delta = llama()
        cache = model(torch.tensor([[9, 7, 5, 4]])).past_key_values
        with delta.detached():
            cache = model(torch.tensor([[3, 2]]), past_key_values=cache).past_key_values
            bare = model(torch.tensor([[8]]), past_key_values=copy.deepcopy(cache)).logits
        found = model(torch.tensor([[8]]), past_key_values=cache)
        assert (found.logits - bare).abs().max() > 1e-3
        assert vars(found.past_key_values)["_deltakit_text"].tolist() == [[9, 7, 5, 4, -1, -1, 8]]
        cache.crop(-4)
        found = model(torch.tensor([[6]]), past_key_values=cache)
        assert vars(found.past_key_values)["_deltakit_text"].tolist() == [[9, 7, 5, 6]]

    @torch.no_grad()
    def test_examples_of_a_cache_move_with_their_texts(self):
        model, _ = llama()
        texts = [[9, 8, 7, 5], [3, 7, 5, 8], [1, 2, 3, 4]]
        cache = model(torch.tensor(texts)).past_key_values
        for how in (lambda cache: cache, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))):
            moved = how(copy.deepcopy(cache))
            moved.reorder_cache(torch.tensor([2, 0, 0]))
            moved.batch_repeat_interleave(2)
            moved.batch_select_indices(torch.tensor([0, 2, 5]))
            assert vars(moved)["_deltakit_text"].tolist() == [texts[2], texts[0], texts[0]]
            assert isinstance(moved.reorder_cache, MovesText)
            assert moved.reorder_cache.cache is moved
            found = model(torch.tensor([[6]] * 3), past_key_values=moved).logits
            again = model(torch.tensor([[*texts[row], 6] for row in (2, 0, 0)])).logits[:, -1:]
            torch.testing.assert_close(found, again, **CLOSE)

    @torch.no_grad()
    def test_another_number_of_examples_than_the_cache_is_refused(self):
        model, _ = llama()
        cache = model(PROMPTS).past_key_values
        with pytest.raises(dk.StateError, match=r"holds 4 texts, and the call has 2; change .*batch_repeat_interleave"):
            model(torch.tensor([[6], [7]]), past_key_values=cache)


class TestGeneration:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"num_beams": 3},
            {"num_beams": 2, "num_return_sequences": 2},
            {"use_cache": True, "renormalize_logits": True},
        ],
        ids=["greedy", "beams", "several", "options"],
    )
    @torch.no_grad()
    def test_with_a_cache_it_is_that_without(self, options):
        model, delta = llama()
        given = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long(), **GREEDY, **options}
        found = model.generate(**{"use_cache": True, **given})
        assert torch.equal(found, model.generate(**{**given, "use_cache": False}))
        with delta.detached():
            bare = model.generate(**{"use_cache": True, **given})
        every = len(found) // len(PROMPTS)
        differs = (found != bare).any(1).view(-1, every).any(1)
        assert differs.tolist() == [True, False, True, False]

    @torch.no_grad()
    def test_candidates_that_are_rejected_leave_the_cache(self):
        model, _ = llama()
        given = {"input_ids": PROMPTS[2:3], **GREEDY}
        assert torch.equal(model.generate(**given), model.generate(**given, prompt_lookup_num_tokens=3))

    @torch.no_grad()
    def test_each_example_with_its_own_delta(self):
        model, delta = llama()
        other = attached(model, dk.LoRA(r=2), name="other")
        with dk.use(model, "delta"):
            one = model(PROMPTS).logits
        with dk.use(model, "other"):
            two = model(PROMPTS).logits
        with dk.use(model, None):
            bare = model(PROMPTS).logits
        with dk.rows(model, [delta.name, other.name, None, delta.name]):
            found = model(PROMPTS).logits
        torch.testing.assert_close(found, torch.stack([one[0], two[1], bare[2], one[3]]), **CLOSE)
        with dk.rows(model, [None, "other", None, "other"]):
            assert torch.equal(model(PROMPTS).logits[0], bare[0])
        given = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long(), **GREEDY, "num_beams": 2}
        with dk.rows(model, [delta.name, None, None, delta.name]):
            found, again = (model.generate(**given, use_cache=cached) for cached in (True, False))
        assert torch.equal(found, again)
        other.detach()
        delta.detach()
        assert torch.equal(found[1:], model.generate(**given)[1:])

    @torch.no_grad()
    def test_two_of_them_with_an_invocation_each(self):
        model, _ = llama()
        attached(model, dk.LoRA(r=2, alpha=40, invocation=(4, 4)), name="other")
        given = {"input_ids": PROMPTS, "attention_mask": (PROMPTS != 0).long(), **GREEDY}
        found = [model.generate(**given, use_cache=cached) for cached in (True, False)]
        assert torch.equal(*found)


class TestRefusals:
    def test_it_cannot_be_merged(self):
        model, delta, _ = echo()
        with pytest.raises(
            dk.TargetError, match="of some tokens alone, and a weight is for all, so it cannot be merged; leave"
        ):
            delta.merge()
        with pytest.raises(dk.TargetError, match="cannot be merged"):
            dk.merged_state_dict(model)

    def test_inputs_without_ids(self):
        model, _, _ = echo()
        x = torch.randn(2, 3, 11, dtype=torch.float64)
        with pytest.raises(
            dk.StateError, match=r"expected input_ids \[batch, tokens\], found a call without them; pass input"
        ):
            model(None, inputs_embeds=x)
        model = nn.Sequential(nn.Embedding(9, 7), nn.Linear(7, 5))
        dk.attach(model, dk.LoRA(at="1", r=2, invocation=CALL))
        with pytest.raises(dk.StateError, match=r"expected input_ids \[batch, tokens\], found the shape \(4,\); pass"):
            model(torch.tensor([1, 2, 3, 4]))

    def test_a_layer_that_gets_other_tokens(self):
        model, delta = llama()
        delta.detach()
        dk.attach(model, dk.LoRA(r=2, at="lm_head", invocation=CALL, untie=True))
        with pytest.raises(
            dk.StateError, match=r"expected \(4, 7\) and the features, found the shape \(4, 1, 97\); leave"
        ):
            model(PROMPTS, logits_to_keep=1)

    def test_a_part_that_is_called_alone(self):
        model, _, _ = echo()
        with pytest.raises(dk.StateError, match="a part of the backbone was called alone; call the backbone itself"):
            model.layer(torch.randn(2, 3, 11).double())

    @pytest.mark.parametrize("name", ["embedding", "conv"])
    def test_other_layers(self, name):
        model, _ = a_layer_of_each_kind()
        with pytest.raises(
            dk.TargetError, match=rf"^{name}: LoRA\(invocation=...\) acts on the tokens of linear layers, found"
        ):
            dk.attach(model, dk.LoRA(r=2, at=name, invocation=CALL))
        assert Kinds.NAMES[3] == "conv1d"
        dk.attach(model, dk.LoRA(r=2, at=["linear", "conv1d"], invocation=CALL))

    def test_weights_that_are_not_called(self):
        model = nn.MultiheadAttention(8, 2, batch_first=True)
        for at in ("in_proj_weight", "out_proj"):
            with pytest.raises(dk.TargetError, match="lora has nothing to patch|lora"):
                dk.attach(model, dk.LoRA(r=2, at=at, invocation=CALL))

    def test_an_encoder_with_a_decoder(self):
        with pytest.raises(
            dk.TargetError, match=r"an encoder and a decoder, and LoRA\(invocation=...\) looks for its tokens"
        ):
            dk.attach(build("t5"), dk.LoRA(invocation=CALL))
        encoder = build("t5").encoder
        attached(encoder, dk.LoRA(r=2, invocation=CALL))
        assert encoder(input_ids=PROMPTS).last_hidden_state.isfinite().all()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"invocation": [3, -1]}, r"LoRA\(invocation=\[3, -1\]\): expected token ids of at least 0"),
            (
                {"invocation": [3], "dora": True},
                r"LoRA\(dora=..., invocation=...\): omit one of the two; dora= changes the weight for all tokens",
            ),
            ({"invocation": [3], "gate": True}, r"LoRA\(gate=..., invocation=...\): omit one of the two"),
            ({"invocation": ["a"]}, r"LoRA\(invocation=...\): expected a list of whole numbers, found a list with"),
        ],
    )
    def test_bad_options(self, options, message):
        with pytest.raises(dk.OptionError, match=message):
            dk.LoRA(**options)


def test_sums():
    """Of one invocation they are exact; of several there are none."""
    model, delta, _ = echo()
    delta.active = False
    other = attached(model, dk.LoRA(at="layer", r=2, invocation=CALL), name="other")
    other.active = False
    plain = attached(model, dk.LoRA(at="layer", r=2), name="plain")
    plain.detach()
    with torch.no_grad():
        bare, parts = model(TEXTS), []
        for name in ("delta", "other"):
            with dk.use(model, name):
                parts.append(model(TEXTS) - bare)
        mix, error = dk.combine(model, {"delta": 0.5, "other": -2.0})
        delta.detach()
        other.detach()
        mix.attach()
        torch.testing.assert_close(model(TEXTS), bare + 0.5 * parts[0] - 2 * parts[1], **CLOSE)
    assert error == 0
    assert mix.methods[0].invocation == CALL
    with pytest.raises(
        dk.TargetError, match=r"act on different tokens have no sum: found the invocations \[\[\], \[7, 5\]\]; run"
    ):
        dk.combine(model, {delta: 1.0, plain: 1.0})


def test_the_file_has_the_invocation(tmp_path):
    model, delta, _ = echo()
    delta.save(tmp_path)
    (method,) = json.loads((tmp_path / "delta_config.json").read_text())["methods"]
    assert method["invocation"] == [7, 5]
    assert "r=3 alpha=5 after 2 ids" in repr(delta)
    fresh = Echo().double().eval()
    fresh.load_state_dict(dk.base_state_dict(model))
    dk.load(tmp_path, fresh)
    assert torch.equal(fresh(TEXTS), model(TEXTS))


class Inside(nn.Module):
    """A target that returns more than a tensor, in a model that is called with ids."""

    def __init__(self, style):
        super().__init__()
        self.table, self.inner = nn.Embedding(10, 7), Calls(style)

    def forward(self, input_ids, attention_mask=None):
        return self.inner(self.table(input_ids))


@pytest.mark.parametrize("style", ["tuple", "dict"])
@torch.no_grad()
def test_a_layer_that_returns_more_than_a_tensor(style):
    model = Inside(style).double()
    delta = attached(model, dk.LoRA(r=2, at="inner.target", invocation=CALL))
    assert torch.equal(changed(model, delta, TEXTS), torch.arange(6) >= torch.tensor(STARTS)[:, None])
