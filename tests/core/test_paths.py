"""Walking the modules of a backbone."""

import pytest
from torch import nn

from deltakit.core import own_modules, own_parameters


@pytest.mark.parametrize("every_name", [True, False])
def test_a_module_that_holds_one_around_it(every_name):
    backbone = nn.Sequential(nn.Linear(2, 2))
    backbone[0].__dict__["_modules"] = {"owner": backbone}
    assert [path for path, _ in own_modules(backbone, every_name=every_name)] == ["", "0"]


def test_each_parameter_has_its_first_name():
    backbone = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2, bias=False)})
    backbone["two"].weight = backbone["one"].weight
    backbone["three"] = backbone["one"]
    assert [name for name, _ in own_parameters(backbone)] == ["one.weight", "one.bias"]
