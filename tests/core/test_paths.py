"""Walking the modules of a backbone."""

import pytest
from torch import nn

import deltakit as dk
from deltakit.core import one_walk, own_modules, own_parameters, paths, records_in
from deltakit.core.paths import noted


@pytest.mark.parametrize("every_name", [True, False])
def test_a_module_that_holds_one_around_it(every_name):
    backbone = nn.Sequential(nn.Linear(2, 2))
    backbone[0].__dict__["_modules"] = {"owner": backbone}
    assert [path for path, _ in own_modules(backbone, every_name=every_name)] == ["", "0"]


def test_a_walk_that_was_left_behind_is_not_used():
    """As Ctrl-C may leave it: the call that began it is over, and the one around it goes on."""

    def left_behind():
        walk = one_walk(backbone)
        walk.__enter__()
        return walk

    backbone = nn.ModuleDict({"one": nn.Linear(2, 2)})
    walk = left_behind()
    backbone["two"] = nn.Linear(2, 2)
    assert [path for path, _ in own_modules(backbone)] == ["", "one", "two"]
    walk.__exit__(None, None, None)
    with one_walk(backbone):
        assert [path for path, _ in own_modules(backbone)] == ["", "one", "two"]


def test_what_is_noted_of_a_walk_follows_each_change():
    backbone, finds = nn.Sequential(nn.Linear(2, 2)), []

    def find(module):
        finds.append(module)
        return len(finds)

    # Outside of a walk nothing is noted.
    assert [noted(backbone, "finds", find) for _ in range(2)] == [1, 2]
    with one_walk(backbone):
        assert [noted(backbone, "finds", find) for _ in range(2)] == [3, 3]
        assert noted(backbone[0], "finds", find) == 4
        assert not records_in(backbone)
        delta = dk.attach(backbone, dk.BitFit(at="0"))
        second = dk.attach(backbone, dk.BitFit(at="0"), name="second")
        assert [record.name for record in records_in(backbone)] == [delta.name, second.name]
        # The records are known without another look. With a delta that goes, all is forgotten.
        assert noted(backbone, "finds", find) == 3
        delta.detach()
        assert [record.name for record in records_in(backbone)] == [second.name]
        assert noted(backbone, "finds", find) == 5
        second.detach()
        assert not records_in(backbone)


def test_a_load_walks_the_backbone_once(tmp_path, monkeypatch):
    backbone = nn.Sequential(nn.Linear(2, 2))
    delta = dk.attach(backbone, dk.BitFit(at="0"))
    nn.init.ones_(next(delta.parameters()))
    delta.save(tmp_path)
    delta.detach()
    walked, walks = paths._walked, []

    def counted(module, every_name):
        walks.append((module is backbone, every_name))
        return walked(module, every_name)

    monkeypatch.setattr(paths, "_walked", counted)
    dk.load(tmp_path, backbone)
    # Before the walk is kept, it is asked whether this is a plain backbone.
    assert walks.count((True, True)) == 1
    assert walks.count((True, False)) == 2


def test_each_parameter_has_its_first_name():
    backbone = nn.ModuleDict({"one": nn.Linear(2, 2), "two": nn.Linear(2, 2, bias=False)})
    backbone["two"].weight = backbone["one"].weight
    backbone["three"] = backbone["one"]
    assert [name for name, _ in own_parameters(backbone)] == ["one.weight", "one.bias"]
