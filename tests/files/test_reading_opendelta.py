"""Deltas that OpenDelta itself saved give OpenDelta's own logits.

The files are those of `benchmarks/opendelta_files.py`, with the logits that OpenDelta computed in transformers 4.30.
"""

import json
import shutil

import pytest
import torch

import deltakit as dk
from support.models import same, snapshot
from support.opendelta_files import CASES, FILES, backbone, known, logits


def test_there_is_a_file_of_each_type():
    types = {json.loads((FILES / name / case / "config.json").read_text())["delta_type"] for name, case in CASES}
    assert types == {
        *("lora", "adapter", "low_rank_adapter", "compacter", "parallel_adapter", "bitfit", "prefix", "soft_prompt"),
    }


@pytest.mark.parametrize(("name", "case"), CASES)
def test_logits_are_opendelta_s(name, case, tmp_path):
    model = backbone(name)
    before, (call, expected) = snapshot(model), known(name)
    bare = logits(model, call)
    torch.testing.assert_close(bare, expected["bare"], rtol=1e-5, atol=1e-5)
    delta = dk.load(FILES / name / case, model)
    found = logits(model, call)
    torch.testing.assert_close(found, expected[case], rtol=1e-5, atol=1e-5)
    # With the soft prompt's own rows before the text's.
    text = found[:, -bare.shape[1] :] if found.ndim == 3 else found
    assert (bare - text).abs().max() > 1e-5
    assert any(parameter.requires_grad for parameter in delta.parameters())
    delta.save(tmp_path)
    delta.detach()
    same(before, snapshot(model))
    dk.load(tmp_path, model)
    assert torch.equal(logits(model, call), found)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_they_are_inspected_without_a_backbone(name, case):
    seen = dk.inspect(FILES / name / case)
    assert seen.format == "opendelta"
    assert len(seen.methods) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", ["prefix", "prefix_plain", "prefix_somewhere"])
def test_prefixes_of_t5_without_a_mask_and_in_generation(case, attention):
    """OpenDelta takes the relative positions from all blocks but the first; with a cache as without."""
    model = backbone("t5")
    model.set_attn_implementation(attention)
    call, expected = known("t5")
    dk.load(FILES / "t5" / case, model)
    mask = call.pop("attention_mask")
    torch.testing.assert_close(logits(model, call), expected[f"{case}.unmasked"], rtol=1e-5, atol=1e-5)
    tokens = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
    runs = [
        model.generate(
            call["input_ids"], attention_mask=mask, **tokens, **cache, output_scores=True, return_dict_in_generate=True
        )
        for cache in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"})
    ]
    # OpenDelta itself fails with a cache if only some of the blocks have a prefix.
    known_scores = expected.get(f"{case}.generated", torch.stack(runs[0].scores))
    for run in runs:
        torch.testing.assert_close(torch.stack(run.scores), known_scores, rtol=1e-5, atol=1e-5)


def test_a_prefix_of_t5_is_trained_further_and_saved(tmp_path):
    model = backbone("t5")
    before = snapshot(model)
    delta = dk.load(FILES / "t5" / "prefix", model)
    assert "relative_positions=first_block" in repr(delta)
    call, expected = known("t5")
    model(**call).logits.square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in delta.parameters())
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter -= parameter.grad
    trained = logits(model, call)
    assert (trained - expected["prefix"]).abs().max() > 1e-3
    delta.save(tmp_path)
    delta.detach()
    same(before, snapshot(model))
    assert dk.inspect(tmp_path).methods[0].options["relative_positions"] == "first_block"
    dk.load(tmp_path, model)
    assert torch.equal(logits(model, call), trained)


def test_a_prefix_in_attention_to_the_encoder(tmp_path):
    """OpenDelta's has no effect there: it was seen to give the bare model's logits."""
    folder = changed(
        "t5", "prefix_plain", tmp_path, rename=lambda key: key.replace("0.SelfAttention", "1.EncDecAttention")
    )
    with pytest.raises(dk.CheckpointError, match=r"EncDecAttention, in attention to the encoder, .* train a Prefix"):
        dk.load(folder, backbone("t5"))


def test_what_was_trained_beside_the_delta():
    """The head and the biases; of a whole backbone that nobody froze, what differs from this one."""
    for case, names in (("lora_head", ["classifier.bias", "classifier.weight"]), ("never_frozen", []), ("bitfit", [])):
        assert sorted(dk.load(FILES / "bert" / case, backbone("bert")).fully_trained) == names
    model = backbone("bert")
    with torch.no_grad():
        model.classifier.bias.add_(1)
    delta = dk.load(FILES / "bert" / "never_frozen", model)
    assert delta.fully_trained == ["classifier.bias"]
    call, expected = known("bert")
    torch.testing.assert_close(logits(model, call), expected["never_frozen"], rtol=1e-5, atol=1e-5)


def test_a_trained_weight_that_is_tied(tmp_path):
    """OpenDelta saves it under one of its names."""
    folder = changed("gpt2", "adapter", tmp_path, add={"transformer.wte.weight": torch.ones(19, 12)})
    delta = dk.load(folder, backbone("gpt2"))
    assert sorted(delta.fully_trained) == ["lm_head.weight", "transformer.wte.weight"]


def changed(name, case, folder, *, config=None, add=None, rename=None):
    """A copy of a saved delta with other options, more tensors or other names."""
    shutil.copytree(FILES / name / case, folder, dirs_exist_ok=True)
    options = json.loads((folder / "config.json").read_text()) | (config or {})
    (folder / "config.json").write_text(json.dumps(options))
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    tensors = {rename(key) if rename else key: value for key, value in tensors.items()} | (add or {})
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_names_of_older_versions(tmp_path):
    """In February 2022 the factors of a LoRA stood at the layer itself; the second delta at a module has a number."""
    call, expected = known("bert")
    for rename in (lambda key: key.replace(".lora.", "."), lambda key: key.replace(".lora.", ".lora_1.")):
        model = backbone("bert")
        dk.load(changed("bert", "lora", tmp_path, rename=rename), model)
        torch.testing.assert_close(logits(model, call), expected["lora"], rtol=1e-5, atol=1e-5)


QUERY = "bert.encoder.layer.0.attention.self.query"
DENSE = "bert.encoder.layer.0.output.dense"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("lora", {"config": {"delta_type": "split"}}, "delta of OpenDelta of the type 'split', which .* it reads lora, "),
        ("lora", {"config": {"lora_alpha": "x"}}, "damaged at lora_alpha"),
        ("adapter", {"config": {"non_linearity": "mish"}}, "activation 'mish', which deltakit does not have; it has gelu, "),
        ("lora", {"add": {f"{QUERY}.lora_1.lora_A": torch.ones(2, 12)}}, f"it has two deltas at {QUERY}"),
        ("lora", {"add": {f"{DENSE}.adapter.modulelist.up_proj.bias": torch.ones(12)}}, "no part of the lora delta"),
        ("lora", {"add": {f"{DENSE}.lora.lora_A": torch.ones(2, 20)}}, f"it has no B at {DENSE}"),
        ("lora", {"rename": lambda key: key.replace("lora", "other")}, "no tensor of a lora delta. .* matched nothing"),
        ("lora", {"rename": lambda key: key.replace("bert.", "")}, "4 of its 4 targets are not in this backbone"),
        ("low_rank", {"add": {f"{DENSE}.low_rank_adapter.down_sampler.W_left": torch.ones(12, 2)}}, "low-rank adapters have rank 2"),
        ("parallel_by_name", {"config": {"modified_modules": ["intermediate.dense", "w2"]}}, "named 'w2' behind it"),
        ("prefix", {"config": {"modified_modules": ["attention", "intermediate", "0.output"]}}, "48 features together, .* the 5 attention"),
        ("lora", {"add": {f"{DENSE}.lora.lora_A": torch.ones(0, 20)}}, "lora_A has no values; save or download it again"),
        ("lora", {"add": {f"{DENSE}.lora.lora_A": torch.ones(1).expand(10**9, 20)}}, "lora_A has 20,000,000,000 values, and the"),
        ("prefix", {"config": {"modified_modules": ["output"]}}, "has a prefix at .* no attention there"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_by_name(tmp_path, case, change, message):
    model = backbone("bert")
    before = snapshot(model)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(changed("bert", case, tmp_path, **change), model)
    same(before, snapshot(model))


def test_a_model_is_no_delta_and_a_delta_needs_its_tensors(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(dk.CheckpointError, match="this is a whole model, which deltakit does not read"):
        dk.load(tmp_path, backbone("bert"))
    (tmp_path / "config.json").write_text('{"delta_type": "lora"}')
    with pytest.raises(dk.CheckpointError, match="is damaged, or holds more than tensors"):
        dk.load(tmp_path, backbone("bert"))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(dk.CheckpointError, match="it has config.json of OpenDelta, and no pytorch_model.bin"):
        dk.load(tmp_path, backbone("bert"))


def test_from_the_hub(hub):
    files = {path.name: path.read_bytes() for path in (FILES / "bert" / "adapter").iterdir()}
    hub.add_repo("me/theirs", files)
    hub.add_repo("me/model", {"config.json": b"{}", "pytorch_model.bin": b"x" * 9})
    model, (call, expected) = backbone("bert"), known("bert")
    dk.load("me/theirs", model)
    torch.testing.assert_close(logits(model, call), expected["adapter"], rtol=1e-5, atol=1e-5)
    with pytest.raises(dk.HubError, match="this is a whole model"):
        dk.load("me/model", model)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_inspect_shows_the_targets_or_says_that_only_the_backbone_does(name, case):
    found, delta = dk.inspect(FILES / name / case), dk.load(FILES / name / case, backbone(name))
    # A file of a delta that froze nothing has the whole backbone, too.
    assert sum(method.num_values for method in found.methods) == sum(
        parameter.numel()
        for modules in delta.modules.values()
        for module in modules
        for parameter in module.parameters()
    )
    assert {method.name for method in found.methods} == {method.name for method in delta.methods}
    shown = {path for method in found.methods for path in method.targets}
    if shown != delta.modules.keys() or len(found.methods) != len(delta.methods):
        assert ("? targets" in repr(found)) == (not shown) == ("does not name the targets" in repr(found))
        assert "loading finds" in found.notes[-1]
