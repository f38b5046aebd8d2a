"""IA3 against the paper's formula in float64, against PEFT, its default positions, sides and merging."""

import copy
from typing import ClassVar

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.methods.ia3 import IA3, IA3Delta, IA3InputDelta
from support.models import Transformer, attached, ids, randomize, same, snapshot
from support.tiny_transformers import build

CLOSE = {"rtol": 1e-12, "atol": 1e-12}


class TestFormula:
    def test_an_output_with_its_bias(self):
        layer = nn.Linear(5, 7).double()
        model = nn.Sequential(layer)
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        (module,) = attached(model, IA3(at="0")).modules["0"]
        assert type(module) is IA3Delta
        assert module.scale.shape == (7,)
        with torch.no_grad():
            assert not torch.allclose(module.scale, torch.ones(7, dtype=torch.float64))
        torch.testing.assert_close(model(x), (x @ layer.weight.T + layer.bias) * module.scale, **CLOSE)

    def test_an_input(self):
        layer = nn.Linear(5, 7).double()
        model = nn.Sequential(layer)
        x = torch.randn(2, 3, 5, dtype=torch.float64)
        (module,) = attached(model, IA3(at="0", side="input")).modules["0"]
        assert type(module) is IA3InputDelta
        assert module.scale.shape == (5,)
        torch.testing.assert_close(model(x), (x * module.scale) @ layer.weight.T + layer.bias, **CLOSE)

    def test_a_block_written_out(self):
        """softmax(q (l_k * k)^T) (l_v * v) W_o, and (l_ff * relu(W_1 x)) W_2: equation of section 3.3."""
        model = Transformer(blocks=1).double().eval()
        delta = attached(model, IA3())
        block = model.layers[0]
        scales = {path.rpartition(".")[2]: held[0].scale for path, held in delta.modules.items()}
        assert scales.keys() == {"k_proj", "v_proj", "down_proj"}
        with delta.detached():
            x = model.embed(ids())
            h = block.norm_1(x)
            attention, feed = block.self_attn, block.mlp
            q, k, v = (
                attention.q_proj(h),
                attention.k_proj(h) * scales["k_proj"],
                attention.v_proj(h) * scales["v_proj"],
            )
            heads = [attention.heads(part) for part in (q, k, v)]
            weights = torch.softmax(heads[0] @ heads[1].mT / 5**0.5, -1)
            x = x + attention.o_proj((weights @ heads[2]).transpose(1, 2).flatten(2))
            x = x + feed.down_proj(torch.relu(feed.up_proj(block.norm_2(x))) * scales["down_proj"])
            wanted = model.classifier(model.norm(x).mean(1))
        torch.testing.assert_close(model(ids()), wanted, **CLOSE)


class TestPositions:
    PLACES: ClassVar = {
        "bert": (["attention.self.key", "attention.self.value"], "output.dense"),
        "llama": (["self_attn.k_proj", "self_attn.v_proj"], "mlp.down_proj"),
        "gpt2": (["attn.c_attn[k]", "attn.c_attn[v]"], "mlp.c_proj"),
        "t5": (["SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"], "DenseReluDense.wo"),
    }

    @pytest.mark.parametrize("kind", PLACES)
    def test_keys_values_and_the_input_of_the_output_projection(self, kind):
        outputs, into = self.PLACES[kind]
        delta = dk.attach(build(kind), IA3())
        assert delta.modules
        for path, (module,) in delta.modules.items():
            if any(path.endswith(end) for end in outputs):
                assert type(module) is IA3Delta
            else:
                assert path.endswith(into)
                assert not path.endswith("attention.output.dense")
                assert type(module) is IA3InputDelta
                assert module.scale.shape == (52,)
        ends = [end for end in (*outputs, into) if any(path.endswith(end) for path in delta.modules)]
        assert ends == [*outputs, into]

    @pytest.mark.parametrize(("side", "sizes"), [("auto", (20, 28)), ("output", (20, 20)), ("input", (20, 28))])
    def test_side(self, side, sizes):
        delta = dk.attach(Transformer(), IA3(at=["*.v_proj", "*.down_proj"], side=side))
        for end, size in zip(("v_proj", "down_proj"), sizes, strict=True):
            for path in [path for path in delta.modules if path.endswith(end)]:
                (module,) = delta.modules[path]
                into = side == "input" or (side == "auto" and end == "down_proj")
                assert isinstance(module, IA3InputDelta if into else IA3Delta)
                assert module.scale.numel() == size

    def test_bad_sides(self):
        with pytest.raises(dk.OptionError, match=r"IA3\(side='both'\): expected 'auto', 'input' or 'output'"):
            IA3(side="both")
        with pytest.raises(dk.TargetError, match=r"c_attn\[k\]: IA3Input changes the input, which all parts"):
            dk.attach(build("gpt2"), IA3(at="h.0.attn.c_attn[k]", side="input"))

    def test_it_is_public(self):
        assert dk.IA3 is IA3


def peft_pair(kind, targets, feed):
    """A backbone with PEFT's IA3 and random values in float64, and the bare backbone."""
    peft = pytest.importorskip("peft")
    ours = build(kind).double()
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feed, fan_in_fan_out=kind == "gpt2")
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "ia3_l" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return ours, theirs


def values_of_peft(theirs):
    return {
        name.removeprefix("base_model.model.").partition(".ia3_l")[0]: parameter.detach().flatten()
        for name, parameter in theirs.named_parameters()
        if "ia3_l" in name
    }


# PEFT's own call of what transformers renames.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
class TestPEFT:
    CASES: ClassVar = {
        "bert": (["key", "value", "output.dense"], ["output.dense"]),
        "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    }

    @pytest.mark.parametrize("kind", CASES)
    def test_the_same_outputs(self, kind):
        targets, feed = self.CASES[kind]
        ours, theirs = peft_pair(kind, targets, feed)
        given = values_of_peft(theirs)
        # PEFT's names also match the output projection of BERT's attention.
        extra = [path for path in given if path.endswith("attention.output.dense")]
        methods = [IA3()]
        delta = dk.attach(ours, *methods)
        if extra:
            other = dk.attach(ours, IA3(at=extra, side="input"), name="extra")
            other.load_state_dict({f"{path}.ia3.scale": given.pop(path) for path in extra})
        bare = theirs(input_ids=ids(3, 7))
        delta.load_state_dict({f"{path}.ia3.scale": value for path, value in given.items()})
        found = ours(input_ids=ids(3, 7))
        torch.testing.assert_close(found.last_hidden_state, bare.last_hidden_state, **CLOSE)
        for one in dk.deltas(ours):
            one.detach()
        assert not torch.allclose(ours(input_ids=ids(3, 7)).last_hidden_state, bare.last_hidden_state)

    def test_a_fused_projection(self):
        """PEFT scales all of c_attn; with ones on the queries that is our c_attn[k] and c_attn[v]."""
        ours, theirs = peft_pair("gpt2", ["c_attn", "mlp.c_proj"], ["mlp.c_proj"])
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if "c_attn" in name and "ia3_l" in name:
                    parameter.flatten()[:24] = 1
        state = {}
        for path, value in values_of_peft(theirs).items():
            if path.endswith("c_attn"):
                state |= {
                    f"{path}[{letter}].ia3.scale": value[place : place + 24] for letter, place in (("k", 24), ("v", 48))
                }
            else:
                state[f"{path}.ia3.scale"] = value
        delta = dk.attach(ours, IA3())
        delta.load_state_dict(state)
        wanted = theirs(input_ids=ids(3, 7)).last_hidden_state
        torch.testing.assert_close(ours(input_ids=ids(3, 7)).last_hidden_state, wanted, **CLOSE)
        torch.testing.assert_close(
            delta.merge().backbone(input_ids=ids(3, 7)).last_hidden_state, wanted, rtol=1e-11, atol=1e-11
        )

    def test_a_gradient_step(self):
        ours, theirs = peft_pair("llama", *self.CASES["llama"])
        delta = dk.attach(ours, IA3())
        delta.load_state_dict({f"{path}.ia3.scale": value for path, value in values_of_peft(theirs).items()})
        for model in (ours, theirs):
            model(input_ids=ids(3, 7)).last_hidden_state.square().sum().backward()
        wanted = {
            name.removeprefix("base_model.model.").partition(".ia3_l")[0]: parameter.grad.flatten()
            for name, parameter in theirs.named_parameters()
            if "ia3_l" in name
        }
        for name, parameter in delta.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name.removesuffix(".ia3.scale")], rtol=1e-10, atol=1e-10)


class TestMerging:
    @pytest.mark.parametrize("kind", ["bert", "llama", "gpt2", "t5"])
    def test_default_positions(self, kind):
        model = build(kind).double()
        call = {"input_ids": ids(3, 7)} | ({"decoder_input_ids": ids(3, 5)} if kind == "t5" else {})
        delta = randomize(dk.attach(model, IA3()))
        delta.scale = 0.5
        output = model(**call).last_hidden_state
        before = snapshot(model)
        torch.testing.assert_close(delta.merge().backbone(**call).last_hidden_state, output, rtol=1e-11, atol=1e-11)
        same(before, snapshot(delta.unmerge().backbone))
        assert torch.equal(model(**call).last_hidden_state, output)

    LAYERS: ClassVar = {
        "conv2d": (lambda: nn.Conv2d(3, 7, (2, 3)), (2, 3, 5, 11)),
        "conv1d": (lambda: nn.Conv1d(3, 7, 5), (2, 3, 11)),
        "layer_norm": (lambda: nn.LayerNorm(7), (2, 3, 7)),
        "batch_norm": (lambda: nn.BatchNorm2d(3), (2, 3, 5, 7)),
        "transposed": (lambda: nn.ConvTranspose2d(3, 7, (2, 3)), (2, 3, 5, 11)),
        "transposed square": (lambda: nn.ConvTranspose2d(3, 3, 3), (2, 3, 5, 11)),
    }

    @pytest.mark.parametrize("side", ["input", "output"])
    @pytest.mark.parametrize("layer", LAYERS)
    def test_other_layers_merge_to_the_forward_or_not_at_all(self, layer, side):
        make, shape = self.LAYERS[layer]
        model = nn.Sequential(make()).double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
        x = torch.randn(shape, dtype=torch.float64)
        before = snapshot(model)
        delta = randomize(dk.attach(model, IA3(at="0", side=side)))
        output = model(x)
        if not layer.startswith("conv"):
            with pytest.raises(dk.TargetError, match="^0: .*leave the delta attached"):
                delta.merge()
            assert torch.equal(model(x), output)
        else:
            torch.testing.assert_close(delta.merge().backbone(x), output, rtol=1e-11, atol=1e-11)
        delta.detach()
        same(before, snapshot(model))

    def test_an_input_in_groups(self):
        model = nn.Sequential(nn.Conv2d(6, 10, 3, groups=2))
        delta = dk.attach(model, IA3(at="0", side="input"))
        with pytest.raises(
            dk.TargetError,
            match="0: IA3Input on the input of a Conv2d in groups cannot be merged; leave the delta attached",
        ):
            delta.merge()

    def test_an_input_in_groups_with_a_kernel_as_long_as_the_groups_are_many(self):
        """Its rows have as many columns as a convolution without groups."""
        model = nn.Sequential(nn.Conv1d(6, 10, 2, groups=2)).double()
        x = torch.randn(2, 6, 11, dtype=torch.float64)
        delta = randomize(dk.attach(model, IA3(at="0", side="input")))
        output = model(x)
        with pytest.raises(dk.TargetError, match="in groups cannot be merged"):
            delta.merge()
        assert torch.equal(model(x), output)


def test_a_file_keeps_side_and_values(tmp_path):
    model = Transformer().eval()
    fresh = copy.deepcopy(model)
    attached(model, IA3(at="*.up_proj", side="input")).save(tmp_path)
    (loaded,) = dk.load(tmp_path, fresh).methods
    assert loaded.side == "input"
    assert torch.equal(fresh(ids()), model(ids()))


class TestSums:
    def test_a_sum_of_changes(self):
        model = Transformer(blocks=1).double().eval()
        parts = [attached(model, IA3(), name=name).detach() for name in "ab"]
        delta = dk.combine(model, {parts[0]: 0.5, parts[1]: -2.0}).delta
        for path, (module,) in delta.modules.items():
            one, two = (part.modules[path][0].scale for part in parts)
            torch.testing.assert_close(module.scale, 1 + 0.5 * (one - 1) - 2 * (two - 1), **CLOSE)
            assert type(module) is type(parts[0].modules[path][0])

    def test_where_only_one_of_them_is(self):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).double()
        x = torch.randn(2, 5, dtype=torch.float64)
        parts = [attached(model, IA3(at=at, side="input"), name=f"d{at}") for at in "01"]
        wanted = model(x)
        for part in parts:
            part.detach()
        dk.combine(model, dict.fromkeys(parts, 1.0)).delta.attach()
        torch.testing.assert_close(model(x), wanted, **CLOSE)

    def test_two_sides_have_none(self):
        model = nn.Sequential(nn.Linear(5, 7))
        parts = [attached(model, IA3(at="0", side=side), name=side).detach() for side in ("input", "output")]
        with pytest.raises(
            dk.TargetError, match="IA3 has no sum of a scale on the input of a layer and one on its output"
        ):
            dk.combine(model, dict.fromkeys(parts, 1.0))
