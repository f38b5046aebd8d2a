"""`interactive_modify`: modules are picked by hand, and exactly these are modified."""

import pytest
import torch

import deltakit as dk
from deltakit.opendelta import AdapterModel, LoraModel, ParallelAdapterModel
from deltakit.picking import front_ends
from support.tiny_transformers import build


@pytest.fixture
def picks(monkeypatch):
    """The labels of the rows that a user ticks, and the places and ports where the picker was shown."""
    ticked, shown = [], []

    def show(place, picker, port):
        shown.append((place, port))
        for row in picker.rows:
            if row.label.split(" ")[0] in ticked:
                picker.tick(row.number)
        return True

    monkeypatch.setattr(front_ends, "_submitted", show)
    monkeypatch.setattr(front_ends, "_usual", lambda: "terminal")
    return ticked, shown


def test_what_is_picked_is_modified(picks):
    ticked, shown = picks
    ticked += ["q", "wo"]
    model = build("t5")
    delta = LoraModel(model, lora_r=3, interactive_modify=True, modified_modules=["k"], common_structure=True)
    assert shown == [("terminal", 0)]
    paths = set(delta.delta.modules)
    assert paths == {path for path, _ in model.named_modules() if path.endswith((".q", ".wo"))}
    assert delta.modified_modules == list(delta.config.modified_modules)
    # Without the page: the names that were picked are those of the config.
    again = LoraModel(build("t5"), lora_r=3, modified_modules=delta.modified_modules)
    assert set(again.delta.modules) == paths


def test_a_number_is_the_port_of_the_page(picks):
    ticked, shown = picks
    ticked += ["query"]
    AdapterModel(build("bert"), bottleneck_dim=3, interactive_modify=8123)
    assert shown == [("browser", 8123)]


def test_a_notebook_waits_for_the_page(picks, monkeypatch):
    """A widget could not be waited for."""
    ticked, shown = picks
    ticked += ["query"]
    monkeypatch.setattr(front_ends, "_usual", lambda: "notebook")
    LoraModel(build("bert"), interactive_modify=True)
    assert shown == [("browser", 0)]


def test_each_module_is_a_pair_of_a_parallel_adapter(picks):
    picks[0].append("intermediate")
    delta = ParallelAdapterModel(build("bert"), bottleneck_dim=3, interactive_modify=True)
    assert set(delta.delta.modules) == {f"encoder.layer.{n}.intermediate" for n in range(2)}


def test_a_path_that_is_the_end_of_another_is_alone(picks):
    inner = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 5))
    model = torch.nn.Sequential(torch.nn.Linear(5, 2), inner)
    picks[0].append("0")
    delta = LoraModel(model, lora_r=1, interactive_modify=True)
    assert sorted(delta.delta.modules) == ["0", "1.0"]
    assert delta.modified_modules == ["[r]^0", "1.0"]
    delta.detach()
    alone = LoraModel(model, lora_r=1, modified_modules=["[r]^0"])
    assert sorted(alone.delta.modules) == ["0"]


def test_nothing_picked_is_an_error_and_attaches_nothing(picks):
    model = build("bert")
    keys = list(model.state_dict())
    with pytest.raises(
        dk.OptionError, match=r"LoraModel\(interactive_modify=True\): nothing was picked, so nothing is attached"
    ):
        LoraModel(model, interactive_modify=True)
    assert list(model.state_dict()) == keys
    assert dk.deltas(model) == []
