"""What a call costs grows with the number of targets and not faster, and not with the number of other deltas.

Costs are counted in lines that Python runs, so the tests do not depend on the machine.
"""

import pytest
import torch
from torch import nn

import deltakit as dk
from deltakit.picking.picker import Picker
from support.steps import bend, steps

SIZES = (5, 10, 15)


class Chain(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


METHODS = {
    "outputs": lambda: (dk.LoRA(r=1, at="layers.*"), dk.BitFit(at="layers.*")),
    "inputs and outputs": lambda: (dk.IA3(at="layers.*"), dk.Adapter(size=1, at="layers.*")),
    "weights": lambda: (dk.LoRA(r=1, at="layers.*.weight"),),
}


def counted(count, method, folder):
    """The lines of each call on a chain of `count` layers."""
    model, x = Chain(count), torch.ones(2, 3)
    methods = METHODS[method]()
    found, made = {}, []
    found["plan"] = steps(lambda: dk.plan(model, *methods))
    found["attach"] = steps(lambda: made.append(dk.attach(model, *methods)))
    delta = made[0]
    for name in ("first forward", "second forward"):
        found[name] = steps(lambda: model(x))
    found["print"] = steps(lambda: str(delta))
    found["show"] = steps(lambda: str(dk.show(model)))
    with torch.no_grad():
        for value in delta.parameters():
            value.normal_()
    found["save"] = steps(lambda: delta.save(folder / "saved"))
    if method != "inputs and outputs":
        found["merge"], found["unmerge"] = steps(delta.merge), steps(delta.unmerge)
    found["detach"] = steps(delta.detach)
    found["attach again"] = steps(delta.attach)
    delta.detach()
    found["load"] = steps(lambda: dk.load(folder / "saved", model))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_costs_grow_as_the_number_of_targets(method, tmp_path):
    counted(2, method, tmp_path)
    at = [counted(count, method, tmp_path / str(count)) for count in SIZES]
    bends = {name: bend([found[name] for found in at]) for name in at[0]}
    assert not {name: value for name, value in bends.items() if value > 0.005}


@pytest.mark.parametrize("method", ["outputs", "inputs and outputs"])
def test_one_of_many_deltas_costs_what_it_costs_alone(method):
    at = {others: beside(others, method) for others in (2, 30)}
    ratios = {name: count / at[2][name] for name, count in at[30].items()}
    assert not {name: ratio for name, ratio in ratios.items() if ratio > 1.5}


def test_weight_patches_of_many_deltas_cost_what_their_number_says():
    """All are hooks of one module, which attach and detach sort."""
    at = [beside(others, "weights") for others in (10, 20, 30)]
    bends = {name: bend([found[name] for found in at]) for name in at[0]}
    # A forward shows one sum for each delta, of all those before it.
    forwards = bends.pop("first forward"), bends.pop("second forward")
    assert not {name: value for name, value in bends.items() if value > 0.005}
    assert max(forwards) < 1
    assert at[2]["first forward"] < 1.5 * at[2]["second forward"]


PRINTED = {
    "show": lambda model: str(dk.show(model)),
    "pick": Picker,
    "targets": lambda model: str(dk.targets(model)),
    "account": lambda model: str(dk.account(model)),
    "roles": lambda model: str(dk.roles(model)),
    "plan": lambda model: str(dk.plan(model, dk.LoRA(r=1))),
    "scope": lambda model: dk.select(model, "{0-999}/weight"),
}


def of_blocks_that_differ(count, name):
    """The lines of a call on a model with no two equal blocks."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.Sequential(nn.Linear(1, n), nn.LayerNorm(n)) for n in range(1, count + 1))
    # The smaller of two: `regex` clears its cache of patterns once in a while, which is thousands of lines.
    return min(steps(lambda: PRINTED[name](model)) for _ in range(2))


@pytest.mark.parametrize("name", PRINTED)
def test_what_is_printed_of_blocks_that_differ_grows_as_their_number(name):
    of_blocks_that_differ(5, name)
    assert bend([of_blocks_that_differ(count, name) for count in (20, 40, 60)]) < 0.005


@pytest.mark.parametrize(("name", "most"), [("show", 480), ("pick", 470)])
def test_a_module_of_a_tree_costs_few_lines(name, most):
    """58,000 modules that all differ took 2.5 seconds of processor time with 464 lines for each of them."""
    of_blocks_that_differ(5, name)
    assert of_blocks_that_differ(60, name) / 181 < most


def beside(others, method):
    """The lines of each call of a delta, of which there are others on the same targets; of forwards for each delta."""
    model, x, methods = Chain(4 if method == "weights" else 12), torch.ones(2, 3), METHODS[method]()
    made = [dk.attach(model, *methods, name=f"d{k}") for k in range(others)]
    found = {"attach": steps(lambda: made.append(dk.attach(model, *methods, name="last")))}
    found["detach"] = steps(made[-1].detach)
    found["attach again"] = steps(made[-1].attach)
    with torch.no_grad():
        found["first forward"] = steps(lambda: model(x))
        found["second forward"] = steps(lambda: model(x))
    share = 1 if method == "weights" else len(made)
    return {name: count // (share if "forward" in name else 1) for name, count in found.items()}
