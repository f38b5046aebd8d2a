"""AdapterFusion and Average: their formulas in float64, which deltas they can weigh, and what they say where they cannot."""

import copy

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import STYLES, Calls, Transformer, ids, randomize, same, snapshot
from support.tiny_transformers import build

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
NAMES = ("a", "b")


def layer(d_in=7, d_out=5, *more):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(d_in, d_out), *more).double().eval()


def frozen(model, *methods, names=NAMES):
    """Deltas of these methods with values, attached, neither active nor trained."""
    found = []
    for name, method in zip(names, methods, strict=True):
        delta = randomize(dk.attach(model, method, name=name))
        delta.active = delta.trainable = False
        found.append(delta)
    return found


def parameters(delta):
    return {name.rpartition("adapter_fusion.")[2]: value for name, value in delta.named_parameters()}


def alone(model, x, *names):
    with dk.use(model, *names):
        return model(x)


def fused(h, changes, p):
    """The paper's formula, one token and one delta at a time."""
    output = torch.empty_like(h)
    for token in range(len(h)):
        query = p["query.weight"] @ h[token] + p["query.bias"]
        scores = [query @ (p["key.weight"] @ change[token] + p["key.bias"]) for change in changes]
        total = sum(score.exp() for score in scores)
        output[token] = sum(
            score.exp() / total * (p["value"] @ change[token] if "value" in p else change[token])
            for score, change in zip(scores, changes, strict=True)
        )
    return output


@pytest.mark.parametrize("value", [True, False])
def test_the_formula(value):
    model, x = layer(), torch.randn(11, 7, dtype=torch.float64)
    y = model(x)
    frozen(model, dk.Adapter(size=3, at="0"), dk.LoRA(r=2, at="0"), dk.BitFit(at="0"), names="abc")
    changes = [alone(model, x, name) - y for name in "abc"]
    delta = randomize(dk.attach(model, dk.AdapterFusion(deltas=("a", "b", "c"), value=value)))
    torch.testing.assert_close(model(x), y + fused(y, changes, parameters(delta)), **CLOSE)
    assert delta.num_parameters == 2 * (25 + 5) + 25 * value
    delta.scale = 0.3
    torch.testing.assert_close(model(x), y + 0.3 * fused(y, changes, parameters(delta)), **CLOSE)


def test_on_norms_the_input_gets_the_sum():
    """The place of Pfeiffer et al.: the query is the norm's output, and what is added to is its input."""
    model, x = layer(7, 5, nn.LayerNorm(5)), torch.randn(11, 7, dtype=torch.float64)
    norm, z = model[1], model[0](x)
    deltas = frozen(model, *(dk.Adapter(size=3, at="1", add_to="input") for _ in NAMES))
    changes = [delta.modules["1"][0].change(norm(z)) for delta in deltas]
    delta = randomize(dk.attach(model, dk.AdapterFusion(deltas=NAMES)))
    torch.testing.assert_close(model(x), norm.forward(z + fused(norm.forward(z), changes, parameters(delta))), **CLOSE)
    average = dk.attach(model, dk.Average(deltas=NAMES, weights=(3, 1)), name="average")
    dk.use(model, "average")
    torch.testing.assert_close(model(x), norm.forward(z + 0.75 * changes[0] + 0.25 * changes[1]), **CLOSE)
    assert average.num_parameters == 0


def test_start_values_and_penalty():
    model = layer(7, 5, nn.Linear(5, 3).double())
    frozen(model, *(dk.Adapter(size=3, at=["0", "1"]) for _ in NAMES))
    delta = dk.attach(model, dk.AdapterFusion(deltas=NAMES))
    (first,), (second,) = delta.modules["0"], delta.modules["1"]
    assert first.value.diagonal().eq(1).all()
    assert (first.value - torch.eye(5)).sum().item() == pytest.approx(20e-6)
    assert not first.query.bias.any()
    assert first.key.weight.std().item() == pytest.approx(0.02, rel=0.5)
    randomize(delta)
    wanted = sum(((m.value - torch.eye(len(m.value))) ** 2).sum() for m in (first, second))
    torch.testing.assert_close(delta.penalty(), 0.01 * wanted, **CLOSE)
    delta.penalty().backward()
    torch.testing.assert_close(first.value.grad, 0.02 * (first.value - torch.eye(5)), **CLOSE)
    for options in ({"value": False}, {"regularization": 0.0}):
        delta.detach()
        delta = dk.attach(model, dk.AdapterFusion(deltas=NAMES, **options))
        assert delta.penalty() == 0


def test_dropout_of_scores_is_that_of_training_alone():
    model, x = layer(), torch.randn(11, 7, dtype=torch.float64)
    frozen(model, *(dk.Adapter(size=3, at="0") for _ in NAMES))
    delta = randomize(dk.attach(model, dk.AdapterFusion(deltas=NAMES, dropout=0.5)))
    plain = model(x)
    model.train()
    assert not torch.equal(model(x), plain)
    model.eval()
    assert torch.equal(model(x), plain)
    assert delta.methods[0].dropout == 0.5


KINDS = {
    "adapter": dk.Adapter(size=3, at="0"),
    "lora": dk.LoRA(r=2, at="0"),
    "dora": dk.LoRA(r=2, dora=True, at="0"),
    "gated": dk.LoRA(r=2, gate=True, at="0"),
    "vera": dk.VeRA(r=3, at="0"),
    "loha": dk.LoHa(r=2, at="0"),
    "hira": dk.HiRA(r=2, at="0"),
    "ia3": dk.IA3(side="output", at="0"),
    "bitfit": dk.BitFit(at="0"),
    "parallel_adapter": dk.ParallelAdapter(size=3, source="0", at="0"),
}


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_output_map_can_be_weighed(kind, tokens):
    """A quarter of one delta adds a quarter of what this delta adds alone, beside another one that is active."""
    model, x = layer(), torch.randn(tokens, 7, dtype=torch.float64)
    # Where the first one does not look at the output, the order says nothing: it stands first, as its own hook would expect.
    first = kind in ("lora", "dora", "gated", "vera", "loha", "hira", "bitfit")
    other = None if first else randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="other"))
    one, _ = frozen(model, KINDS[kind], dk.Adapter(size=2, at="0"))
    other = other or randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="other"))
    one.scale = 0.7
    whole, without = alone(model, x, "other", "a"), alone(model, x, "other")
    assert not torch.allclose(whole, without)
    # Not 1: an output that was changed in place would have all of it.
    dk.attach(model, dk.Average(deltas=NAMES, weights=(0.25, 0), normalize=False), name="mean")
    dk.use(model, "other", "mean")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(model(x), without + 0.25 * (whole - without), **CLOSE)


def test_average_is_the_weighted_mean_of_the_outputs():
    model, x = layer(), torch.randn(11, 7, dtype=torch.float64)
    frozen(model, *(dk.Adapter(size=3, at="0") for _ in range(3)), names="abc")
    outputs = [alone(model, x, name) for name in "abc"]
    for number, (options, weights) in enumerate(
        {
            None: (1 / 3, 1 / 3, 1 / 3),
            (1, 2, 5): (1 / 8, 2 / 8, 5 / 8),
            (0.5, -1.0, 1.5): (0.5, -1.0, 1.5),
        }.items()
    ):
        dk.attach(model, dk.Average(deltas=("a", "b", "c"), weights=options), name=f"mean_{number}")
        dk.use(model, f"mean_{number}")
        torch.testing.assert_close(
            model(x), sum(w * output for w, output in zip(weights, outputs, strict=True)), **CLOSE
        )
    # Weights that are not divided by their sum weigh what is added, and never the target's own output.
    y = alone(model, x, None)
    raw = dk.attach(model, dk.Average(deltas=("a", "b"), weights=(2, 3), normalize=False), name="raw")
    dk.use(model, "raw")
    torch.testing.assert_close(model(x), y + 2 * (outputs[0] - y) + 3 * (outputs[1] - y), **CLOSE)
    assert "average of 2 a, 3 b" in repr(raw)


def test_average_has_no_parameters_and_is_attached_saved_and_loaded(tmp_path):
    model = Transformer().eval()
    frozen(model, dk.LoRA(r=3), dk.LoRA(r=2))
    fresh = copy.deepcopy(model)
    delta = dk.attach(model, dk.Average(deltas=NAMES, weights=(1, 3)), name="mean")
    assert list(delta.parameters()) == delta.parameter_groups() == []
    assert delta.state_dict() == {}
    assert repr(delta).splitlines()[1].split() == ["average", "of", "0.25", "a,", "0.75", "b", "4", "targets", "+0"]
    model.train()
    model(ids())
    delta.save(tmp_path)
    loaded = dk.load(tmp_path, fresh)
    assert loaded.methods == delta.methods
    assert torch.equal(fresh.eval()(ids()), model.eval()(ids()))


def test_average_of_what_can_be_merged_is_merged():
    model = Transformer().double().eval()
    frozen(model, dk.LoRA(r=3), dk.LoHa(r=2))
    before, plain = snapshot(model), model(ids())
    delta = dk.attach(model, dk.Average(deltas=NAMES, weights=(1, 3)))
    output = model(ids())
    assert not torch.allclose(output, plain)
    torch.testing.assert_close(delta.merge().backbone(ids()), output, **CLOSE)
    delta.detach()
    same(before, snapshot(model))
    fusion = dk.attach(model, dk.AdapterFusion(deltas=NAMES))
    with pytest.raises(dk.TargetError, match="AdapterFusionDelta does not change weights, so it cannot be merged"):
        fusion.merge()


def test_targets_are_those_of_the_weighed_deltas_or_some_of_them():
    model = Transformer().eval()
    frozen(model, *(dk.Adapter(size=3) for _ in NAMES))
    every = list(dk.plan(model, dk.Adapter(size=3)).built[0])

    def at(**options):
        (built,) = dk.plan(model, dk.AdapterFusion(deltas=NAMES, **options)).built
        return list(built)

    assert at() == every
    assert at(at="layers.1") == at(at="layers.1.{self_attn,mlp}") == every[2:]
    assert at(at=every[:1]) == at(exclude=every[1:]) == every[:1]
    assert at(exclude="mlp/**") == [every[0], every[2]]
    with pytest.raises(dk.TargetError, match=r"norm_1: none of the deltas a, b has a delta module here; .* at='"):
        at(at="norm_1")


def test_slices_of_a_fused_projection_and_layers_with_channels_first():
    model = build("gpt2").double()
    methods = [dk.LoRA(r=2, at="@attn.{q,v}") for _ in NAMES]
    frozen(model, *methods)
    x = ids()
    outputs = [alone(model, x, name).last_hidden_state for name in NAMES]
    for own, weights in zip(outputs, ((1, 0), (0, 1)), strict=True):
        delta = dk.attach(model, dk.Average(deltas=NAMES, weights=weights))
        assert all(path.endswith(("[q]", "[v]")) for path in delta.modules)
        torch.testing.assert_close(model(x).last_hidden_state, own, **CLOSE)
        delta.detach()
    conv, image = nn.Sequential(nn.Conv2d(3, 5, (2, 3))).double().eval(), torch.randn(2, 3, 7, 11, dtype=torch.float64)
    plain = conv(image)
    frozen(conv, dk.Adapter(size=2, at="0"), dk.LoRA(r=2, at="0"))
    changes = [(alone(conv, image, name) - plain).movedim(1, -1).flatten(0, 2) for name in NAMES]
    p = parameters(randomize(dk.attach(conv, dk.AdapterFusion(deltas=NAMES))))
    wanted = fused(plain.movedim(1, -1).flatten(0, 2), changes, p)
    torch.testing.assert_close((conv(image) - plain).movedim(1, -1).flatten(0, 2), wanted, **CLOSE)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("method", [dk.AdapterFusion(deltas=NAMES), dk.Average(deltas=NAMES)])
def test_every_way_of_calling_and_returning(method, style):
    model, x = Calls(style), torch.randn(2, 3, 7)
    before = model(x)
    frozen(model, dk.Adapter(size=2, at="target"), dk.LoRA(r=2, at="target"))
    kind = type(model.target(x))
    delta = randomize(dk.attach(model, method))
    assert not torch.equal(model(x), before)
    assert type(model.target(x)) is kind
    delta.detach()
    assert torch.equal(model(x), before)


def attached(model, **options):
    return dk.attach(model, dk.AdapterFusion(deltas=NAMES, **options), name="fusion")


def test_an_active_delta_would_count_twice():
    model, x = layer(), torch.randn(3, 7, dtype=torch.float64)
    deltas = [randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name=name)) for name in NAMES]
    attached(model)
    with pytest.raises(
        dk.StateError, match=r"0: AdapterFusion weighs the delta 'a', which is active .* use\(model, 'fusion'\)"
    ):
        model(x)
    dk.use(model, "fusion")
    output = model(x)
    deltas[1].active = True
    with pytest.raises(dk.StateError, match="weighs the delta 'b', which is active and so would count twice"):
        model(x)
    deltas[1].merge()
    with pytest.raises(dk.StateError, match=r"'b', which is active .* unmerge\(\) it if it is merged, and"):
        model(x)
    deltas[1].unmerge()
    dk.use(model, "fusion")
    assert torch.equal(model(x), output)
    dk.use(model, "a", "b")
    model(x)


def test_in_a_mixed_batch_the_weighed_deltas_may_have_examples_of_their_own():
    model = Transformer().double().eval()
    for name in NAMES:
        randomize(dk.attach(model, dk.LoRA(r=2), name=name))
    randomize(attached(model))
    names = ["fusion", "a", None, "fusion", "b"]
    together = dk.rows(model, names)(ids(5))
    singles = [alone(model, ids(5)[row : row + 1], name) for row, name in enumerate(names)]
    torch.testing.assert_close(together, torch.cat(singles), **CLOSE)


def test_a_delta_that_leaves_is_missed_and_its_return_changes_nothing():
    model, x = layer(), torch.randn(3, 7, dtype=torch.float64)
    one, other = frozen(model, dk.LoRA(r=2, at="0"), dk.Adapter(size=3, at="0"))
    delta = randomize(attached(model))
    output = model(x)
    one.detach()
    with pytest.raises(
        dk.StateError, match=r"0: AdapterFusion weighs the delta 'a', which has no delta module here; attach\(\)"
    ):
        model(x)
    delta.active = False
    model(x)
    delta.active = True
    one.attach()
    assert torch.equal(model(x), output)
    # Its values may change, also by those of another delta.
    with one.detached():
        values = randomize(dk.attach(model, dk.LoRA(r=2, at="0"), name="values")).detach()
    one.swap(values)
    changed = model(x)
    assert not torch.allclose(changed, output)
    one.swap(values)
    assert torch.equal(model(x), output)
    # Another one under the name is looked at again.
    one.detach()
    dk.attach(model, dk.IA3(side="input", at="0"), name="a").active = False
    with pytest.raises(dk.TargetError, match="cannot weigh the IA3Input of delta 'a', which changes or reads more"):
        model(x)
    other.detach()


def test_a_saved_fusion_wants_its_deltas(tmp_path):
    model = Transformer().eval()
    fresh = copy.deepcopy(model)
    deltas = frozen(model, dk.Adapter(size=3), dk.Adapter(size=2))
    for delta in deltas:
        delta.save(tmp_path / delta.name)
    randomize(attached(model)).save(tmp_path / "fusion")
    before = snapshot(fresh)
    with pytest.raises(
        dk.CheckpointError, match="adapter_fusion: .*no delta named 'a' is attached; none is: attach or load one first"
    ):
        dk.load(tmp_path / "fusion", fresh)
    same(before, snapshot(fresh))
    dk.load(tmp_path / "a", fresh)
    with pytest.raises(dk.CheckpointError, match="no delta named 'b' is attached; the attached deltas are 'a'"):
        dk.load(tmp_path / "fusion", fresh)
    dk.attach(fresh, dk.Adapter(size=2, exclude="mlp/**"), name="b")
    with pytest.raises(dk.CheckpointError, match="weighs the delta 'b', which has no delta module here"):
        dk.load(tmp_path / "fusion", fresh)
    dk.deltas(fresh)[1].detach()
    dk.load(tmp_path / "b", fresh)
    dk.load(tmp_path / "fusion", fresh)
    dk.use(fresh, "fusion")
    assert torch.equal(fresh(ids()), model(ids()))


def test_save_pretrained_writes_a_mean_beside_what_it_weighs(tmp_path):
    """With a state dict that the caller gathered, in which a mean has no tensors."""
    model = build("bert")
    frozen(model, dk.Adapter(size=3), dk.Adapter(size=2))
    dk.attach(model, dk.Average(deltas=NAMES), name="mean")
    model.save_pretrained(tmp_path, state_dict=model.state_dict())
    fresh = type(model).from_pretrained(tmp_path).eval()
    for name in (*NAMES, "mean"):
        dk.load(tmp_path / name, fresh)
    dk.use(fresh, "mean")
    assert torch.equal(fresh(ids()).last_hidden_state, model(ids()).last_hidden_state)


def test_what_is_trained():
    """The second stage trains the weights alone. A weighed delta that is trainable gets gradients, and a warning says so."""
    model = Transformer().train()
    one, other = frozen(model, dk.Adapter(size=3), dk.Adapter(size=2))
    delta = attached(model)
    model(ids()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in delta.parameters())
    assert all(parameter.grad is None for parameter in (*one.parameters(), *other.parameters()))
    one.trainable = True
    with pytest.warns(
        dk.DeltaWarning, match="delta 'a' is trainable, and AdapterFusion weighs it: .* trainable = False"
    ) as seen:
        model(ids()).square().sum().backward()
    assert len(seen) == 1
    model(ids())
    assert all(parameter.grad is not None for parameter in one.parameters())
    assert all(parameter.grad is None for parameter in other.parameters())
    # Through a mean nothing else can be trained, so that this is what is meant.
    delta.detach()
    dk.attach(model, dk.Average(deltas=NAMES))
    other.trainable = True
    model(ids()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in other.parameters())


LAYERS, PATCH = dk.LoRA(r=2, at="0"), dk.LoRA(r=2, at="0.weight")


@pytest.mark.parametrize(
    ("methods", "options", "error", "text"),
    [
        ((LAYERS,), {}, dk.OptionError, "AdapterFusion: no delta named 'b' is attached; the attached deltas are 'a'"),
        ((LAYERS, dk.LoRA(r=2, at="1")), {}, dk.StateError, "0: AdapterFusion weighs the delta 'b', which has no delta module here; .* exclude="),
        ((LAYERS, dk.HRA(r=2, at="0")), {}, dk.TargetError, "0: AdapterFusion cannot weigh the HRA of delta 'b', which changes or reads more"),
        ((PATCH, PATCH), {}, dk.TargetError, r"0\.weight: AdapterFusion cannot weigh the LoRA of delta 'a', which patches the weight; leave"),
    ],
)  # fmt: skip
def test_what_cannot_be_weighed_changes_nothing(methods, options, error, text):
    model = layer(7, 5, nn.Linear(5, 3).double())
    frozen(model, *methods, names=NAMES[: len(methods)])
    before = snapshot(model)
    with pytest.raises(error, match=text):
        attached(model, **options)
    same(before, snapshot(model))


def test_the_advice_for_deltas_at_different_targets_works():
    model = layer(7, 5, nn.Linear(5, 3).double())
    frozen(model, dk.LoRA(r=2, at=["0", "1"]), LAYERS)
    with pytest.raises(dk.StateError, match="1: .*leave this target out with exclude="):
        attached(model)
    assert list(attached(model, exclude="1").modules) == ["0"]


def test_two_modules_of_one_delta_and_weighings_of_weighings():
    model = layer()
    both = dk.attach(model, dk.LoRA(r=2, at="0"), dk.Adapter(size=2, at="0"), name="a")
    frozen(model, LAYERS, names="b")
    with pytest.raises(
        dk.TargetError, match="delta 'a' has LoRA and Adapter here; attach its methods as deltas of their own"
    ):
        attached(model)
    both.detach()
    frozen(model, dk.Adapter(size=2, at="0"), names="a")
    dk.attach(model, dk.Average(deltas=NAMES), name="mean")
    with pytest.raises(dk.TargetError, match="cannot weigh the Average of delta 'mean'"):
        dk.attach(model, dk.Average(deltas=("mean", "a")), name="more")


def test_a_name_that_may_change_is_refused():
    model = layer()
    dk.attach(model, LAYERS)
    frozen(model, LAYERS, names="b")
    with pytest.raises(
        dk.OptionError, match="delta 'delta' was attached without name=, .* attach or load it with a name="
    ):
        dk.attach(model, dk.Average(deltas=("delta", "b")))


def test_norms_with_adapters_on_both_sides():
    model = layer(7, 5, nn.LayerNorm(5))
    frozen(model, dk.Adapter(size=3, at="1", add_to="input"), dk.Adapter(size=3, at="1"))
    with pytest.raises(dk.TargetError, match="add to the input and to the output of this norm"):
        attached(model)
    one, other = dk.deltas(model)
    other.detach()
    (again,) = frozen(model, dk.Adapter(size=3, at="1", add_to="input"), names="b")
    attached(model)
    x = torch.randn(3, 7, dtype=torch.float64)
    model(x)
    for delta in (one, again):
        delta.detach()
    frozen(model, *(dk.Adapter(size=3, at="1") for _ in NAMES))
    with pytest.raises(
        dk.StateError, match="was attached to weigh deltas that add to the input of this norm, and others"
    ):
        model(x)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: dk.AdapterFusion(deltas=["a"]), r"AdapterFusion\(deltas=\['a'\]\): expected the names of at least two deltas"),
        (lambda: dk.Average(deltas=["a", "a"]), r"Average\(deltas=\['a', 'a'\]\): expected .*, each once"),
        (lambda: dk.AdapterFusion(deltas=NAMES, regularization=-1), r"regularization=-1\): expected a finite number of at least 0"),
        (lambda: dk.AdapterFusion(deltas=NAMES, dropout=1.0), r"AdapterFusion\(dropout=1.0\): expected a probability"),
        (lambda: dk.Average(deltas=NAMES, weights=[1]), r"Average\(weights=\[1\]\): expected one for each of the 2 deltas"),
        (lambda: dk.Average(deltas=NAMES, weights=[1, -1]), r"their sum is 0, .* normalize=False"),
    ],
)  # fmt: skip
def test_bad_options(make, text):
    with pytest.raises(dk.OptionError, match=text):
        make()
