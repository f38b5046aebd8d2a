"""Structure search: gates by their formula, their effect and their gradient, budgets, and a net with planted deltas."""

import copy
import random

import pytest
import torch
import transformers as tf
from torch import nn

import deltakit as dk
from deltakit.searching.gated import Gated
from deltakit.searching.gates import Gates
from deltakit.searching.loop import _gated
from deltakit.searching.structure import candidates_of, fitting, methods_at
from support.models import Transformer, ids, method_of, randomize, same, snapshot
from support.tiny_transformers import build

REFUSED = {
    *(
        "intrinsic_prompt",
        "llama_adapter",
        "lst",
        "multitask_prompt",
        "p_tuning",
        "p_tuning_v2",
        "prefix",
        "soft_prompt",
    ),
    *("compacter", "invertible_adapter", "miss", "randlora", "said", "vblora", "vera"),
    *("gpt2: trainable_tokens", "ln_tuning"),
}
"""Methods that act on whole calls or patch weights, or whose targets share tensors or work together. GPT-2 ties its head."""

MIX = (dk.LoRA(r=1, at=["@attn.{q,k,v,o}", "@ff.up"]), dk.BitFit(), dk.IA3(), dk.LowRankAdapter(reduction=5))


class TestGates:
    SIZES = (3, 40, 7, 19, 500)

    def gates(self, budget=100, beta=0.7):
        gates = Gates(list(self.SIZES), budget, beta=beta, seed=3)
        with torch.no_grad():
            gates.alpha.copy_(torch.tensor([0.3, -20.0, 4.0, 0.0, 1.1]))
        return gates

    @pytest.mark.parametrize("budget", [1, 17, 100, 300])
    def test_the_mean_size_is_the_budget(self, budget):
        gates = self.gates(budget)
        p = gates.probabilities().detach()
        torch.testing.assert_close(
            (gates.sizes * p).sum(), torch.tensor(float(budget), dtype=torch.float64), rtol=1e-9, atol=0
        )
        # One shift for all: log-odds differ as alphas do.
        odds = torch.logit(p) * gates.beta - gates.alpha.detach()
        torch.testing.assert_close(odds, odds[:1].expand(5), rtol=1e-6, atol=1e-6)

    def test_the_gradient_moves_no_probability_on_average(self):
        gates = self.gates()
        p = gates.probabilities()
        (total,) = torch.autograd.grad(p.sum(), gates.alpha, retain_graph=True)
        torch.testing.assert_close(total, torch.zeros_like(total), rtol=0, atol=1e-12)
        (one,) = torch.autograd.grad(p[3], gates.alpha)
        slope = (p * (1 - p) / gates.beta).detach()
        expected = -p[3] / p.sum() * slope
        expected[3] += slope[3]
        torch.testing.assert_close(one, expected.detach(), rtol=1e-10, atol=1e-12)

    def test_samples_are_open_as_often_as_the_probability_says(self):
        gates = self.gates()
        drawn = torch.stack([gates.draw().detach() for _ in range(600)])
        assert ((drawn >= 0) & (drawn <= 1)).all()
        torch.testing.assert_close((drawn > 0.5).double().mean(0), gates.probabilities().detach(), rtol=0, atol=0.06)

    def test_a_sample_is_binary_concrete(self):
        gates = self.gates()
        state = gates.generator.get_state()
        drawn = gates.draw()
        u = torch.rand(5, generator=gates.generator.set_state(state), dtype=torch.float64)
        p = gates.probabilities()
        odds = u * p / ((1 - u) * (1 - p))
        torch.testing.assert_close(drawn, odds / (1 + odds), rtol=1e-8, atol=1e-9)

    def test_all_fit(self):
        assert self.gates(569).probabilities().eq(1).all()


@pytest.mark.parametrize("method", [dk.LoRA(r=3), dk.BitFit(at="v_proj"), dk.IA3(), dk.LowRankAdapter(reduction=5)])
def test_a_gate_is_a_scale_and_its_gradient_that_of_the_scale(method):
    model = Transformer().double().eval()
    plain = randomize(dk.attach(model, method))
    paths, state = list(plain.modules), plain.state_dict()

    def loss_at(scale):
        plain.scale = scale
        return model(ids()).square().sum()

    expected, slope = loss_at(0.3), (loss_at(0.3 + 1e-5) - loss_at(0.3 - 1e-5)) / 2e-5
    plain.detach()
    gates = Gates([1] * len(paths), 1, beta=1.0, seed=0)
    gated = dk.attach(model, Gated(inner=method, gates=gates, numbers={p: n for n, p in enumerate(paths)}, at=paths))
    for name, parameter in gated.named_parameters():
        parameter.data.copy_(state[name.replace(".inner.", ".")])
    gates.values = torch.full((len(paths),), 0.3, dtype=torch.float64, requires_grad=True)
    loss = model(ids()).square().sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    (gradient,) = torch.autograd.grad(loss, gates.values)
    assert gradient.all()
    torch.testing.assert_close(gradient.sum(), slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(set(dk.METHODS) - {"adapter_fusion", "average"}))
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_what_a_search_accepts_has_its_effect_times_the_gate(kind, name):
    model, method = build(kind, tf.AutoModelForCausalLM).eval(), method_of(name)
    try:
        candidates = candidates_of(model, [method], ())
    except (dk.OptionError, dk.TargetError, dk.RoleError) as refused:
        assert {name, f"{kind}: {name}"} & REFUSED, refused
        return
    assert not {name, f"{kind}: {name}"} & REFUSED
    before = model(ids()).logits
    torch.manual_seed(3)
    plain = randomize(dk.attach(model, method))
    state, output = {key: value.clone() for key, value in plain.state_dict().items()}, model(ids()).logits
    assert not torch.allclose(output, before)
    plain.detach()
    gates = Gates([candidate.size for candidate in candidates], 1, beta=1.0, seed=0)
    # Some start values are frozen.
    torch.manual_seed(3)
    gated = dk.attach(model, *_gated(candidates, gates))
    for key, parameter in gated.named_parameters():
        parameter.data.copy_(state[key.replace(".inner.", ".")])
    torch.testing.assert_close(model(ids()).logits, output)
    gates.values = torch.zeros(len(candidates), dtype=torch.float64)
    torch.testing.assert_close(model(ids()).logits, before)


def test_modules_that_hand_inputs_over_are_no_candidates():
    model = build("bert", tf.AutoModelForMaskedLM).eval()
    structure = dk.search(
        model,
        [dk.ParallelAdapter(size=2)],
        budget=200,
        train_step=lambda part: model(ids()).logits.square().mean(),
        steps=2,
    )
    assert all(candidate.size for candidate in candidates_of(model, [dk.ParallelAdapter(size=2)], ()))
    assert dk.attach(model, *structure.methods).num_parameters == structure.num_parameters <= 200


class TestBudget:
    @pytest.mark.parametrize("budget", [20, 63, 150, 1000])
    def test_it_is_never_exceeded(self, budget):
        model = Transformer()
        before = snapshot(model)
        structure = dk.search(model, MIX, budget=budget, train_step=lambda part: model(ids()).square().mean(), steps=3)
        same(before, snapshot(model))
        delta = dk.attach(model, *structure.methods)
        assert 0 < delta.num_parameters == structure.num_parameters <= budget
        # As many as fit: no candidate that was left out does.
        left = [c for c in candidates_of(Transformer(), MIX, None) if (c.method.name, c.path) not in attached(delta)]
        assert all(candidate.size > budget - structure.num_parameters for candidate in left)
        assert f"structure of {structure.num_parameters:,} parameters" in repr(structure)

    def test_if_all_fit_nothing_is_trained(self):
        model = Transformer()
        structure = dk.search(model, MIX, budget=10**6, train_step=lambda part: 1 / 0)
        assert dk.plan(model, *structure.methods).num_parameters == dk.plan(model, *MIX).num_parameters


def attached(delta):
    return {(method.name, path) for method in delta.methods for path in delta.modules_of(method.name)}


class Deep(nn.Module):
    """Six layers, of which two have planted deltas in `plant`."""

    WIDTH, PLANTED = 7, (1, 4)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(self.WIDTH, self.WIDTH) for _ in range(6))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x

    def plant(self):
        """Itself with planted updates of rank one."""
        found = copy.deepcopy(self)
        with torch.no_grad():
            for number in self.PLANTED:
                u, v = torch.randn(2, self.WIDTH)
                found.layers[number].weight += 1.5 * torch.outer(u, v) / v.norm()
        return found


def trained_loss(model, teacher, methods):
    """The loss that is left when these methods are trained."""
    torch.manual_seed(7)
    model = copy.deepcopy(model)
    delta = dk.attach(model, *methods)
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.05)
    x = torch.randn(128, Deep.WIDTH)
    for _ in range(60):
        loss = (model(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def test_planted_sites_are_found_and_random_structures_are_worse():
    candidates = (dk.LoRA(r=1, at="layers.*"), dk.BitFit(at="layers.*"))
    found, better = 0, 0
    for seed in (2, 7):
        torch.manual_seed(seed)
        model = Deep()
        teacher, planted = model.plant(), {("lora", f"layers.{number}") for number in Deep.PLANTED}

        def train_step(part, model=model, teacher=teacher):
            x = torch.randn(64, Deep.WIDTH)
            return (model(x) - teacher(x).detach()).square().mean()

        structure = dk.search(model, candidates, budget=28, train_step=train_step, steps=150, lr=0.05, seed=seed)
        assert structure.num_parameters <= 28
        chosen = {(method.name, path) for method in structure.methods for path in method.at}
        found += len(chosen & planted)
        sites = candidates_of(model, candidates, None)
        order = random.Random(seed).sample(range(len(sites)), len(sites))
        other = methods_at(fitting(sites, order, 28), sites)
        better += trained_loss(model, teacher, structure.methods) < trained_loss(model, teacher, other)
    # By chance it would be one of four.
    assert found >= 3
    assert better == 2


def test_a_head_is_trained_during_the_search_and_restored():
    model = Transformer()
    before = snapshot(model)
    heads = []

    def train_step(part):
        heads.append(model.classifier.weight.detach().clone())
        return model(ids()).square().mean()

    dk.search(model, [dk.LoRA(r=1)], budget=50, train_step=train_step, train="@head", steps=2, lr=0.1)
    assert not torch.equal(heads[0], heads[-1])
    same(before, snapshot(model))


class TestErrors:
    @pytest.mark.parametrize(
        ("candidates", "options", "error", "text"),
        [
            ((), {}, dk.OptionError, r"search\(candidates=\[\]\): expected at least one method"),
            ((dk.LoRA(r=1),), {"budget": 39}, dk.OptionError, r"search\(budget=39\): expected .* of at least 40"),
            ((dk.LoRA(r=1),), {"steps": 0}, dk.OptionError, r"search\(steps=0\): expected a positive number"),
            ((dk.LoRA(r=1),), {"lr": -1.0}, dk.OptionError, r"search\(lr=-1.0\): expected a positive number"),
            ((dk.LoRA(r=1),), {"seed": -1}, dk.OptionError, r"search\(seed=-1\): expected a seed of at least 0"),
            (
                (dk.LoRA(r=1),),
                {"train_step": lambda: 1},
                dk.OptionError,
                "expected a function that takes 'weights' or 'gates'",
            ),
            ((dk.LST(),), {}, dk.OptionError, "the targets of lst work together, so a gate cannot close one alone"),
            (
                (dk.LlamaAdapter(),),
                {},
                dk.OptionError,
                "the effect of llama_adapter cannot be multiplied by a gate; leave it out",
            ),
            ((dk.Prefix(),), {}, dk.OptionError, "the effect of prefix cannot be multiplied by a gate; leave it out"),
            (
                (dk.Compacter(reduction=5, shared_rule=True),),
                {},
                dk.OptionError,
                "the targets of compacter share tensors, so none",
            ),
            ((dk.LoRA(r=1, at="q_proj.weight"),), {}, dk.TargetError, "lora patches a weight that is read directly"),
            ((dk.LoRA(r=1), dk.LoRA(r=2)), {}, dk.OptionError, "two of the given methods are lora"),
        ],
    )
    def test_options_and_candidates(self, candidates, options, error, text):
        model = Transformer()
        before = snapshot(model)
        with pytest.raises(error, match=text):
            dk.search(model, candidates, **{"budget": 100, "train_step": lambda part: model(ids()).mean(), **options})
        same(before, snapshot(model))

    @pytest.mark.parametrize(
        ("loss", "text"),
        [
            (lambda model: 3.0, r"train_step\('weights'\) returned 3.0; expected the loss of a batch"),
            (lambda model: model(ids()), "expected the loss of a batch, a finite tensor of one value"),
            (lambda model: model(ids()).mean() * float("nan"), "a finite tensor of one value"),
            (lambda model: torch.zeros(()), r"the loss of train_step\('weights'\) does not depend on the candidates"),
        ],
    )
    def test_losses(self, loss, text):
        model = Transformer()
        before = snapshot(model)
        with pytest.raises(dk.StateError, match=text):
            dk.search(model, [dk.LoRA(r=1)], budget=50, train_step=lambda part: loss(model))
        same(before, snapshot(model))
