"""AdaLoRA against the paper's formula in float64 and against PEFT step by step; its schedule, its files and its checkpoints."""

import copy
import json
import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.core import TRAINING
from support.models import Transformer, ids, randomize
from support.peft_models import close, opened, outputs, wide

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
PLAN = {"init_r": 4, "target_r": 2, "total_steps": 12, "tinit": 2, "tfinal": 3, "delta_t": 2}
TARGETS = ["q_proj", "v_proj"]


def values(delta):
    return {name: parameter.detach().clone() for name, parameter in delta.named_parameters()}


def a_step(model, delta, optimizer, name="llama"):
    loss = outputs(name, model).square().mean() + delta.penalty()
    loss.backward()
    optimizer.step()
    delta.step()
    optimizer.zero_grad()
    return loss.detach()


class TestFormula:
    def test_the_output_and_the_merged_weight(self):
        layer = nn.Linear(5, 7).double()
        model, x = nn.Sequential(layer).eval(), torch.randn(2, 3, 5, dtype=torch.float64)
        delta = randomize(dk.attach(model, dk.AdaLoRA(at="0", alpha=11, **{**PLAN, "init_r": 3})))
        (module,) = delta.modules["0"]
        assert (module.A.shape, module.E.shape, module.B.shape) == ((3, 5), (3, 1), (7, 3))
        change = 11 / (3 + 1e-5) * module.B @ torch.diag(module.E[:, 0]) @ module.A
        wanted = x @ (layer.weight + change).T + layer.bias
        assert (change.abs() > 1e-3).any()
        torch.testing.assert_close(model(x), wanted, **CLOSE)
        torch.testing.assert_close(delta.merge().backbone(x), wanted, **CLOSE)

    def test_the_penalty_and_its_gradient(self):
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 11)).double()
        delta = randomize(dk.attach(model, dk.AdaLoRA(at=["0", "1"], orthogonality=0.7, **{**PLAN, "init_r": 3})))
        norms = [
            (p @ p.T - torch.eye(3)).square().sum().sqrt()
            for (module,) in delta.modules.values()
            for p in (module.A, module.B.T)
        ]
        torch.testing.assert_close(delta.penalty(), 0.7 * sum(norms) / 4, **CLOSE)
        delta.penalty().backward()
        assert all(p.grad.any() for name, p in delta.named_parameters() if not name.endswith("E"))

    def test_the_budget_falls_as_a_cube(self):
        method = dk.AdaLoRA(**PLAN)
        found = [method.budget(step, 40) for step in range(1, 13)]
        assert found[:2] == [40, 40]
        assert found[2:8] == [int(20 * (1 - step / 7) ** 3 + 20) for step in range(1, 7)]
        assert found[8:] == [20] * 4
        assert all(one >= other for one, other in pairwise(found))


# PEFT's own call of what transformers renames.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_every_step_is_that_of_peft(optimizer):
    peft = pytest.importorskip("peft")
    options = {("deltaT" if key == "delta_t" else key.replace("steps", "step")): value for key, value in PLAN.items()}
    ours = wide("llama")
    config = peft.AdaLoraConfig(target_modules=TARGETS, lora_alpha=7, orth_reg_weight=0.3, **options)
    theirs = peft.get_peft_model(copy.deepcopy(ours), config)
    delta = dk.attach(ours, dk.AdaLoRA(at=TARGETS, alpha=7, orthogonality=0.3, **PLAN))
    # PEFT also trains its divisor, by accident.
    own = {
        re.sub(r"^base_model\.model\.|lora_|\.default", "", name).rpartition(".")[::2]: parameter
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }
    pairs = {f"{path}.adalora.{name}": parameter for (path, name), parameter in own.items()}
    delta.load_state_dict({name: parameter.detach() for name, parameter in pairs.items()})
    steps = [getattr(torch.optim, optimizer)(found, lr=0.05) for found in (delta.parameters(), own.values())]
    ranks = set()
    for step in range(1, 13):
        loss = a_step(ours, delta, steps[0])
        norms = [
            torch.linalg.matrix_norm((p @ p.T if name.endswith("A") else p.T @ p) - torch.eye(4))
            for name, p in pairs.items()
            if not name.endswith("E")
        ]
        expected = outputs("llama", theirs).square().mean() + 0.3 * sum(norms) / len(norms)
        expected.backward()
        steps[1].step()
        theirs.base_model.update_and_allocate(step)
        steps[1].zero_grad()
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=1e-10)
        for name, parameter in delta.named_parameters():
            torch.testing.assert_close(parameter, pairs[name], rtol=1e-8, atol=1e-10)
        ranks.add(sum(module.rank for (module,) in delta.modules.values()))
    assert len(ranks) > 2
    assert sum(module.rank for (module,) in delta.modules.values()) == 2 * len(delta.modules)


def trained(steps, **options):
    torch.manual_seed(3)
    model = wide("llama")
    delta = dk.attach(model, dk.AdaLoRA(at=TARGETS, **{**PLAN, **options}))
    optimizer = torch.optim.AdamW(delta.parameters(), lr=0.05)
    for _ in range(steps):
        a_step(model, delta, optimizer)
    return model, delta, optimizer


def test_the_file_has_no_training_state_and_a_checkpoint_continues_exactly(tmp_path):
    from deltakit.delta.training_state import checkpoint_tensors, load_checkpoint

    model, delta, optimizer = trained(5)
    (module,) = next(iter(delta.modules.values()))
    state = {name: b for name, b in module.named_buffers() if module.tag_of(name) == TRAINING}
    assert len(state) == 8
    assert state["steps"] == 5
    assert all(name.rpartition(".")[2] in "AEB" for name in delta.state_dict())
    held = checkpoint_tensors(model)
    assert sum(name.endswith("_importance") for name in held) == 3 * len(delta.modules)
    again, other, second = trained(0)
    load_checkpoint(again, held)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(6):
        a_step(model, delta, optimizer)
        a_step(again, other, second)
    for name, value in values(delta).items():
        assert torch.equal(values(other)[name], value)
    delta.save(tmp_path)
    fresh = wide("llama")
    dk.load(tmp_path, fresh)
    assert torch.equal(outputs("llama", fresh), outputs("llama", model))


def test_a_swap_takes_the_training_state_along():
    model, delta, _ = trained(5)
    other = dk.attach(model, dk.AdaLoRA(at=TARGETS, **PLAN), name="other").detach()
    delta.swap(other)
    assert [int(module.steps) for (module,) in other.modules.values()] == [5] * len(other.modules)
    assert not any(module.A_importance.any() for (module,) in delta.modules.values())


def test_combined_deltas_are_a_lora():
    model, delta, _ = trained(4)
    expected = outputs("llama", model)
    both, error = dk.combine(model, {delta: 1.0})
    assert {method.name for method in both.methods} == {"lora"}
    assert error < 1e-7
    delta.detach()
    both.attach()
    torch.testing.assert_close(outputs("llama", model), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_of_peft_is_a_lora_of_the_ranks_that_are_left(tmp_path):
    model, delta, _ = trained(11)
    delta.freeze(train="lm_head")
    expected = outputs("llama", model)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    delta.save(tmp_path, format="peft")
    largest = max(module.rank for (module,) in delta.modules.values())
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == largest
    assert largest < 4 * len(delta.modules)
    close("llama", outputs("llama", opened(wide("llama"), tmp_path)), 1.5 * expected)
    again = wide("llama")
    loaded = dk.load(tmp_path, again)
    assert {method.name for method in loaded.methods} == {"lora"}
    close("llama", outputs("llama", again), 1.5 * expected)


class TestStepsAndPenalties:
    def test_most_methods_have_none(self):
        delta = dk.attach(Transformer(), dk.LoRA(r=2))
        penalty = delta.penalty()
        assert penalty.shape == ()
        assert penalty == 0
        assert delta.step() is None

    def test_a_step_without_gradients_changes_nothing(self):
        model, delta, _ = trained(2)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            dk.StateError, match=r"there are none; call it after backward\(\) and before optimizer.zero_grad"
        ):
            delta.step()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("how", ["detached", "inactive", "merged", "not trainable"])
    def test_a_delta_that_is_not_trained_has_no_penalty_and_no_step(self, how):
        _model, delta, _ = trained(2)
        assert delta.penalty() > 0
        if how == "detached":
            delta.detach()
        elif how == "merged":
            delta.merge()
        else:
            setattr(delta, {"inactive": "active", "not trainable": "trainable"}[how], False)
        assert delta.penalty() == 0
        delta.step()
        assert all(int(module.steps) == 2 for (module,) in delta.modules.values())

    def test_saving_says_that_no_step_was_taken(self, tmp_path):
        model = Transformer()
        delta = randomize(randomize(dk.attach(model, dk.AdaLoRA(total_steps=3, init_r=3, target_r=2))))
        with pytest.warns(
            dk.DeltaWarning, match=r"delta 'delta': it was trained without delta.step\(\), so AdaLoRA chose no"
        ):
            delta.save(tmp_path / "a")
        model(ids()).sum().backward()
        delta.step()
        delta.save(tmp_path / "b")

    def test_ranks_of_a_file_stay(self, tmp_path):
        model = Transformer()
        delta = randomize(dk.attach(model, dk.AdaLoRA(**PLAN)))
        (first,), *_, (last,) = delta.modules.values()
        with torch.no_grad():
            first.E[1:3] = 0
            last.E.zero_()
        with pytest.warns(dk.DeltaWarning, match="it was trained without"):
            delta.save(tmp_path / "a")
        delta.detach()
        delta = dk.load(tmp_path / "a", model)
        ranks = [module.rank for (module,) in delta.modules.values()]
        assert (ranks[0], ranks[-1], max(ranks)) == (2, 0, 4)
        optimizer = torch.optim.AdamW(delta.parameters(), lr=0.1)

        def train(step):
            (model(ids()).square().mean() + delta.penalty()).backward()
            optimizer.step()
            if step:
                delta.step()
            optimizer.zero_grad()

        train(step=False)
        assert min(module.rank for (module,) in delta.modules.values()) == 4
        with pytest.warns(
            dk.DeltaWarning, match="values that AdaLoRA had dropped have been trained again, so its ranks"
        ):
            delta.save(tmp_path / "b")
        for _ in range(3):
            train(step=True)
            assert [module.rank for (module,) in delta.modules.values()] == ranks
        delta.save(tmp_path / "c")

    def test_a_file_of_an_untrained_one_is_untrained(self, tmp_path):
        model = Transformer()
        with pytest.warns(dk.DeltaWarning, match="is saved as it was attached"):
            dk.attach(model, dk.AdaLoRA(**PLAN)).save(tmp_path)
        dk.deltas(model)[0].detach()
        delta = dk.load(tmp_path, model)
        delta.save(tmp_path / "again")
        model(ids()).square().mean().backward()
        delta.step()
        assert all(module.kept.all() and int(module.steps) == 1 for (module,) in delta.modules.values())

    def test_targets_without_gradients_lose_their_ranks(self):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 11))
        delta = dk.attach(model, dk.AdaLoRA(at=["0", "1"], total_steps=2, init_r=3, target_r=1))
        randomize(delta)
        for _ in range(2):
            delta.modules["1"][0](torch.ones(2, 7), torch.ones(2, 11)).sum().backward()
            delta.step()
        assert delta.modules["0"][0].rank == 0
        assert delta.modules["1"][0].rank == 2


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"init_r": 0, "target_r": 0}, r"AdaLoRA\(init_r=0\): expected a rank of at least 1; 12 is usual"),
        ({"target_r": 5}, r"AdaLoRA\(target_r=5\): expected a rank from 1 to init_r=4"),
        ({"alpha": -1}, r"AdaLoRA\(alpha=-1\): expected a finite number of at least 0"),
        ({"tinit": -1}, r"AdaLoRA\(tinit=-1\): expected a number of steps of at least 0"),
        ({"delta_t": 0}, r"AdaLoRA\(delta_t=0\): expected a number of steps of at least 1"),
        ({"beta2": 1}, r"AdaLoRA\(beta2=1\): expected a decay in \(0, 1\)"),
        ({"orthogonality": -0.1}, r"AdaLoRA\(orthogonality=-0.1\): expected a finite number of at least 0"),
        ({"total_steps": 5}, r"AdaLoRA\(total_steps=5\): expected .*, more than tinit=2 and tfinal=3 together"),
        ({"dropout": 1}, r"AdaLoRA\(dropout=1\): expected a probability in \[0, 1\)"),
    ],
)
def test_bad_options(options, text):
    with pytest.raises(dk.OptionError, match=text):
        dk.AdaLoRA(**{**PLAN, **options})


def test_a_rank_above_the_layers_size_and_the_names_of_peft():
    with pytest.raises(
        dk.OptionError, match=r"0: rank 4 is above the layer's size 3 to 5; use AdaLoRA\(init_r=3\) or less"
    ):
        dk.attach(nn.Sequential(nn.Linear(3, 5)), dk.AdaLoRA(at="0", **PLAN))
    with pytest.raises(dk.OptionError, match="write total_steps= for total_step, write delta_t= for deltaT"):
        dk.AdaLoRA(total_step=3, deltaT=2)
