"""Backbones inside what DataParallel, FSDP, ZeRO and torch.compile make of them."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer, attached, same, snapshot


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: type("FSDPModule", (nn.Module,), {})()])
def test_attaching_to_what_is_wrapped_is_an_error(wrap):
    wrapped = wrap(Transformer())
    before = snapshot(wrapped)
    with pytest.raises(
        dk.StateError, match=r"the backbone is wrapped in \w+ already, .* attach to the plain model first"
    ):
        dk.attach(wrapped, dk.LoRA(r=3, at="**"))
    same(before, snapshot(wrapped))


@pytest.mark.parametrize(
    ("train", "part", "message"),
    [
        ((), "layers.0.self_attn.q_proj.delta_lora.A", r"q_proj\.lora\.A: expected shape \(3, 20\) .* found \(0,\), because an engine"),
        ("norm", "norm.weight", r"norm\.weight: expected shape \(20,\) as when it was attached, found \(0,\), because an engine"),
    ],
)  # fmt: skip
def test_a_part_of_a_delta_is_not_saved_as_the_whole(train, part, message, tmp_path, monkeypatch):
    # Without a process group no engine keeps parts: then the user has resized it.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    model = Transformer()
    delta = attached(model, train=train)
    whole = model.get_parameter(part).data
    # ZeRO-3 and FSDP1 leave a process its part under the same parameter.
    model.get_parameter(part).data = torch.empty(0)
    with pytest.raises(dk.StateError, match=message):
        delta.save(tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
    model.get_parameter(part).data = whole
    delta.save(tmp_path / "delta")


def test_attaching_to_a_compiled_model_is_attaching_to_the_model():
    torch.compiler.reset()
    model = Transformer().eval()
    delta = dk.attach(torch.compile(model, backend="eager"), dk.LoRA(r=3))
    assert delta.backbone is model
    assert not any("_orig_mod" in path for path in delta.modules)
