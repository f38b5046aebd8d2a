"""DoRA of PEFT: its files give its outputs and its gradients, and it opens those of deltakit."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import deltakit as dk
from support.models import randomize, same, snapshot
from support.peft_models import adapted, close, outputs, read_by_peft, wide

peft = pytest.importorskip("peft")

TARGETS = {
    "bert": ["query", "value"],
    "gpt2": ["c_attn", "wte"],
    "llama": ["q_proj", "v_proj", "embed_tokens"],
    "resnet": ["convolution"],
}


def config(name, **options):
    return peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS[name], use_dora=True, **options)


@pytest.mark.parametrize("name", TARGETS)
def test_outputs_and_gradients_are_those_of_peft(name, tmp_path):
    theirs = adapted(wide(name), config(name), tmp_path)
    model = wide(name)
    before, bare = snapshot(model), outputs(name, model)
    delta = dk.load(tmp_path, model)
    for _ in range(3):
        expected, found = outputs(name, theirs), outputs(name, model)
        assert (bare - expected).abs().max() > 1e-5
        close(name, found, expected)
        gradients = [{}, {}]
        for own, output, named in zip(gradients, (found, expected), (delta, theirs), strict=True):
            output.square().mean().backward()
            with torch.no_grad():
                for key, parameter in named.named_parameters():
                    if parameter.grad is not None:
                        own[_as_ours(key)] = parameter.grad.flatten().clone()
                        parameter.sub_(parameter.grad, alpha=0.1)
                        parameter.grad = None
        assert gradients[0].keys() == gradients[1].keys()
        assert len(gradients[0]) == len(list(delta.parameters()))
        for key, value in gradients[0].items():
            torch.testing.assert_close(value, gradients[1][key], rtol=1e-8, atol=1e-12)
            assert value.any()
    delta.detach()
    same(before, snapshot(model))


def _as_ours(key):
    """The name in deltakit of a parameter of PEFT or of deltakit."""
    for pattern, name in {
        # Tied embeddings are a method of their own.
        r"\.lora_2\.": ".lora.",
        r"\.lora_(embedding_)?([AB])\.default(\.weight)?$": r".lora.\2",
        r"\.lora_magnitude_vector\.default\.weight$": ".lora.m",
    }.items():
        key = re.sub(pattern, name, key)
    return key.removeprefix("base_model.model.")


DELTAS = {
    "bert": (dk.LoRA(r=3, alpha=5, dora=True),),
    "gpt2": (dk.LoRA(r=3, alpha=5, dora=True),),
    "llama": (dk.LoRA(r=3, alpha=5, rslora=True, dora=True), dk.LoRA(r=2, dora=True, at="embed_tokens")),
    "resnet": (dk.LoRA(r=3, alpha=5, dora=True),),
    "slices gpt2": (dk.LoRA(r=2, at="c_attn[q]", dora=True), dk.LoRA(r=3, at="c_attn[v]", alpha=7, dora=True)),
}


@pytest.mark.parametrize("case", DELTAS)
def test_peft_opens_it(case, tmp_path):
    name, model = case.split()[-1], wide(case.split()[-1])
    bare = outputs(name, model)
    delta = randomize(dk.attach(model, *DELTAS[case], train=()), 0.3)
    expected = outputs(name, model)
    assert (bare - expected).abs().max() > 1e-5
    delta.save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"] is True
    close(name, read_by_peft(name, tmp_path), expected)
    again = wide(name)
    dk.load(tmp_path, again)
    close(name, outputs(name, again), expected)


DORA, PLAIN = dk.LoRA(r=2, at="q_proj", dora=True), dk.LoRA(r=2, at="v_proj")
REFUSED = {
    "some": ((DORA, PLAIN), "has DoRA everywhere or nowhere, and .*v_proj has none"),
    "two": ((DORA, dk.LoRA(r=2, at="q_proj.weight", dora=True)), "two DoRAs on the same features of .*q_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_does_not_have_is_refused(case, tmp_path):
    methods, why = REFUSED[case]
    delta = randomize(dk.attach(wide("llama"), *methods))
    with pytest.raises(dk.CheckpointError, match=why):
        delta.save(tmp_path / "new", format="peft")
    assert not (tmp_path / "new").exists()


def test_a_merged_delta_is_not_written(tmp_path):
    """The weight that PEFT's magnitudes are relative to is not the backbone's own then."""
    delta = randomize(dk.attach(wide("llama"), DORA))
    delta.merge()
    with pytest.raises(dk.CheckpointError, match=r"delta 'delta' is merged into that; unmerge\(\) it first"):
        delta.save(tmp_path, format="peft")


def _without(tensors, _):
    del tensors[next(name for name in tensors if "magnitude" in name)]


def _longer(tensors, _):
    name = next(name for name in tensors if "magnitude" in name)
    tensors[name] = torch.ones(len(tensors[name]) + 1)


DAMAGED = {
    "no magnitudes": (_without, "use_dora=True does not fit its tensors: .* has none"),
    "not said": (
        lambda _, said: said.update(use_dora=False),
        "use_dora=False does not fit its tensors: .* has magnitudes",
    ),
    "another size": (_longer, r"has magnitudes of shape \(\d+,\), and the backbone's weight has \d+ rows"),
    "parameters": (
        lambda _, said: said.update(target_parameters=["q_proj.weight"]),
        "DoRA together with lora_bias, target_parameters or",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(case, tmp_path):
    damage, why = DAMAGED[case]
    adapted(wide("llama"), config("llama"), tmp_path)
    tensors, said = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    damage(tensors, said)
    save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(dk.CheckpointError, match=why):
        dk.load(tmp_path, wide("llama"))


def test_a_backbone_without_values(tmp_path):
    adapted(wide("llama"), config("llama"), tmp_path)
    with pytest.raises(
        dk.CheckpointError,
        match="its format stores DoRA with the norms of .*, which are unknown here .* whose weights are in memory",
    ):
        dk.load(tmp_path, wide("llama").to("meta"))


def test_it_can_be_inspected(tmp_path):
    adapted(wide("bert"), config("bert"), tmp_path)
    assert "dora" in str(dk.inspect(tmp_path)) + str(dk.inspect(tmp_path).methods)
