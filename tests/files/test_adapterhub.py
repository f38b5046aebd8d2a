"""Adapters that AdapterHub's library saved give its own outputs; what deltakit does not have is refused by name.

`benchmarks/adapterhub_files.py` made the files.
"""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import deltakit as dk
from deltakit.files import read_saved
from support.models import same, snapshot

FOLDER = Path(__file__).parent.parent / "checkpoints" / "adapterhub"
CLASSES = {
    "bert": (tf.BertConfig, tf.BertModel, tf.BertForSequenceClassification),
    "llama": (tf.LlamaConfig, tf.LlamaModel, tf.LlamaForCausalLM),
}
CASES = ["seq_bn", "double_seq_bn", "layers", "par_bn", "par_bn_learned", "plus", "compacter", "compacterpp", "lora", "ia3", "prefix", "prefix_flat", "loreft", "loreft_tied", "gated", "par_bn_gated", "compacter_gated", "lora_gated", "prefix_gated", "unipelt", "mam", "union", "inv"]  # fmt: skip


def backbone(kind, *, headed=False):
    config, base, with_head = CLASSES[kind]
    torch.manual_seed(0)
    model = (with_head if headed else base)(config.from_pretrained(FOLDER / kind)).double().eval()
    state = load_file(FOLDER / kind / "backbone.safetensors")
    prefix = f"{model.base_model_prefix}."
    state = {key if headed else key.removeprefix(prefix): value.double() for key, value in state.items()}
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert all(key.startswith(("classifier", "lm_head", "embeddings.position_ids")) for key in found.missing_keys)
    return model


def outputs(model, **given):
    ids = torch.randint(3, 37, (2, 7), generator=torch.Generator().manual_seed(4))
    return model.base_model(ids, **given).last_hidden_state


def expected_all(kind):
    return load_file(FOLDER / kind / "expected.safetensors")


def expected(kind, case):
    return expected_all(kind)[case]


def close(found, wanted):
    # The library computed in float64 from adapters in float32.
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_backbone_is_the_one_of_the_library(kind):
    close(outputs(backbone(kind)), expected(kind, "plain"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CLASSES)
def test_adapters(kind, case, tmp_path):
    model = backbone(kind)
    before, bare = snapshot(model), outputs(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = dk.load(FOLDER / kind / case, model)
    wanted = expected(kind, case)
    assert (bare - wanted).abs().max() > 1e-2
    close(outputs(model), wanted)
    delta.save(tmp_path)
    delta.detach()
    same(before, snapshot(model))
    dk.load(tmp_path, model)
    close(outputs(model), wanted)


class TestReFT:
    @pytest.mark.parametrize("kind", CLASSES)
    def test_without_orthogonal_rows(self, kind):
        """AdapterHub's config lacks what tells NoReFT and DiReFT apart: its own load makes a NoReFT of a DiReFT."""
        model = backbone(kind)
        with pytest.warns(
            dk.DeltaWarning, match="does not say whether this is a NoReFT or a DiReFT; it is read as a NoReFT"
        ):
            delta = dk.load(FOLDER / kind / "noreft", model)
        assert delta.methods[0].variant == "noreft"
        close(outputs(model), expected(kind, "noreft"))

    def test_sides_that_are_not_used(self, tmp_path):
        model = backbone("bert")
        delta = dk.load(copied(tmp_path, "loreft", prefix_positions=0), model)
        assert {module.rotate.shape for (module,) in delta.modules.values()} == {(1, 2, 12)}
        bare = outputs(backbone("bert"))
        assert (outputs(model) - bare).abs().amax(2).argmax(1).tolist() == [6, 6]

    def test_rows_that_are_not_orthonormal_are_those_of_a_noreft(self, tmp_path):
        """The signs of torch's parametrization are truncated: after some weight decay a sign of 1 is none."""
        file = copied(tmp_path, "loreft") / "adapter.safetensors"
        tensors = load_file(file)
        name = next(key for key in tensors if "layer.1" in key and key.endswith("original"))
        tensors[name] *= 0.99
        save_file(tensors, file)
        delta = dk.load(tmp_path, backbone("bert"))
        assert [method.variant for method in delta.methods] == ["loreft", "noreft"]
        (module,) = delta.modules["encoder.layer.1"]
        assert not module.rotate[0].any()
        assert module.rotate[1].any()

    def test_dropout_is_said(self, tmp_path):
        folder = copied(tmp_path, "loreft", dropout=0.1)
        with pytest.warns(dk.DeltaWarning, match="it was trained with a dropout of 0.1 in the adapters"):
            dk.load(folder, backbone("bert"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"non_linearity": "relu"}, r"this ReFT of AdapterHub has an activation \(non_linearity\)"),
            ({"tied_weights": True, "r": 3}, "loreft"),
        ],
    )
    def test_what_does_not_fit(self, options, message, tmp_path):
        with pytest.raises(dk.DeltaError, match=message):
            dk.load(copied(tmp_path / "loreft", "loreft", **options), backbone("bert"))

    def test_a_missing_unit(self, tmp_path):
        folder = copied(tmp_path, "loreft_tied", tied_weights=False)
        with pytest.raises(
            dk.CheckpointError, match="its ReFT at bert.encoder.layer.1.reft_layer is not what its config says"
        ):
            dk.load(folder, backbone("bert"))


@pytest.mark.parametrize("case", ["seq_bn", "par_bn", "lora", "compacter", "prefix"])
def test_a_model_with_a_head(case):
    model = backbone("bert", headed=True)
    dk.load(FOLDER / "bert" / case, model)
    close(outputs(model), expected("bert", case))


@pytest.mark.parametrize("case", CASES)
def test_what_the_files_alone_say(case):
    saved = read_saved(FOLDER / "bert" / case, None, "there", values=False)
    assert saved.methods
    assert saved.tensors
    assert all(tensor.is_meta for tensor in saved.tensors.values())


def copied(folder, case="seq_bn", kind="bert", top=None, **options):
    shutil.copytree(FOLDER / kind / case, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config = {**config, **(top or {}), "config": {**config["config"], **options}}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


REFUSED = {
    "another invertible adapter": ({"case": "inv", "inv_adapter": "glow"}, r"has an invertible adapter with inv_adapter='glow' and inv_adapter_reduction_factor=3, and deltakit has the kind 'nice'"),
    "a broken factor": ({"case": "inv", "inv_adapter_reduction_factor": 1.5}, "whole factors of at least 1"),
    "no invertible adapter": ({"inv_adapter": "nice", "inv_adapter_reduction_factor": 2}, "the tensors of its invertible adapter are not those of two bottlenecks"),
    "an invertible adapter too many": ({"case": "inv", "inv_adapter": False}, "F.0.bias is an invertible adapter, which deltakit does not read"),
    "no gate": ({"use_gating": True}, "lacks its gate; save or download it again"),
    "a norm": ({"ln_after": True}, r"has a norm of its own after the bottleneck"),
    "another place": ({"residual_before_ln": "post_add"}, "residual_before_ln='post_add', which puts it where deltakit has no adapter"),
    "an activation": ({"non_linearity": "mish"}, "have the activation 'mish', which deltakit does not have; it has gelu, gelu_tanh, leaky_relu"),
    "prompts": ({"architecture": "prompt_tuning"}, "this is prompt tuning of AdapterHub, which deltakit does not read"),
    "a LoRA of several tasks": ({"architecture": "mtl_lora"}, "this is a LoRA of several tasks of AdapterHub"),
    "a union of nothing": ({"architecture": "union"}, "its config is a union of nothing"),
    "a union of odd things": ({"architecture": "union", "configs": [{}, 3]}, "its config is a union of nothing"),
    "a union of two": ({"architecture": "union", "configs": [{}, {}]}, "this is a union of two bottleneck configs of AdapterHub"),
    "a union with prompts": ({"architecture": "union", "configs": [{}, {"architecture": "prompt_tuning"}]}, "this is a union with prompt tuning of AdapterHub"),
    "another name": ({"top": {"name": "other"}}, "adapter_down.0.* is no part of the adapter 'other'"),
    "no gate of LoRA": ({"case": "lora", "use_gating": True}, "its LoRA at .* lacks its gate; save or download it again"),
    "gates of scales": ({"case": "ia3", "use_gating": True}, r"has gates on scales \(use_gating\), which deltakit does not have"),
    "a gate too many": ({"case": "lora_gated", "use_gating": False}, "it has gate.bias, gate.weight, lora_A, lora_B at"),
    "another rank": ({"case": "lora", "r": 3}, r"are \(2, 12\) and \(\d+, 2\), and its config has r=3"),
    "no gate of prefixes": ({"case": "prefix", "use_gating": True}, "its prefix at .* lacks its gate; save or download it again"),
    "two gates of prefixes": ({"case": "prefix_gated", "shared_gating": False}, r"a gate for keys and another one for values \(shared_gating\)"),
    "a gate of a prefix too many": ({"case": "prefix_gated", "use_gating": False}, "prefix_gates.task.* is no part of the adapter 'task'"),
    "the residual of Llama's attention": ({"kind": "llama", "case": "double_seq_bn", "original_ln_before": True}, "attention_adapters reads the residual after attention"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    options, message = REFUSED[case]
    model = backbone(options.get("kind", "bert"))
    before = snapshot(model)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(copied(tmp_path, **options), model)
    same(before, snapshot(model))


def test_another_architecture(tmp_path):
    sizes = {"vocab_size": 37, "n_embd": 12, "n_layer": 1, "n_head": 3}
    with pytest.raises(
        dk.CheckpointError, match=r"needs .*, which this GPT2Model does not have; .* like BERT and like Llama"
    ):
        dk.load(FOLDER / "bert" / "seq_bn", tf.GPT2Model(tf.GPT2Config(**sizes)))
    with pytest.raises(dk.CheckpointError, match=r"has lora_A, lora_B at .*, where this backbone has no module"):
        dk.load(FOLDER / "bert" / "lora", tf.GPT2Model(tf.GPT2Config(**sizes)))


def test_the_first_names(tmp_path):
    """Ahead of version 2 the adapters had other names, gelu was the approximate one, and there was no version."""
    folder = copied(tmp_path / "old", top={"version": None}, non_linearity="gelu")
    tensors = torch.load(folder / "pytorch_adapter.bin", weights_only=True)
    old = {key.replace(".adapters.", ".layer_text_task_adapters."): value for key, value in tensors.items()}
    torch.save(old, folder / "pytorch_adapter.bin")
    delta = dk.load(folder, backbone("bert"))
    assert [method.activation for method in delta.methods] == ["gelu_tanh"]


def test_the_scale_ahead_of_1_1(tmp_path):
    """The library divided alpha by nothing then, so that LoRAs were trained with a scale of one."""
    delta = dk.load(copied(tmp_path, "lora", top={"version": "adapters.1.0.1"}), backbone("bert"))
    assert [(method.r, method.alpha) for method in delta.methods] == [(2, 2)]


def test_what_is_left_out_is_said(tmp_path):
    folder = copied(tmp_path, dropout=0.1)
    (folder / "head_config.json").write_text("{}")
    with pytest.warns(dk.DeltaWarning) as warned:
        dk.load(folder, backbone("bert"))
    said = [str(one.message) for one in warned]
    assert "was trained with a dropout of 0.1 in the adapters" in said[0]
    assert "saved with a prediction head (head_config.json), which deltakit does not read" in said[1]


def test_a_compacter_without_its_rule(tmp_path):
    """The library leaves it out if the model has no head."""
    folder = copied(tmp_path, "compacter")
    file = folder / "adapter.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "shared" not in key}, file)
    with pytest.raises(dk.CheckpointError, match=r"lacks phm_rule; save it again, from a model with a head"):
        dk.load(folder, backbone("bert"))


def test_tensors_that_are_missing_or_strange(tmp_path):
    lacks = {"par_bn_learned": "lacks its trained scaling", "layers": "lacks its trained scaling"}
    gates = dict.fromkeys(["compacter", "double_seq_bn"], "also has adapter_up.gate")
    for case, message in {**lacks, **gates}.items():
        file = copied(tmp_path / case, case) / "adapter.safetensors"
        tensors = {key: value for key, value in load_file(file).items() if not key.endswith("scaling")}
        more = {"bert.encoder.layer.0.output.adapters.task.adapter_up.gate": torch.ones(1)} if case in gates else {}
        save_file(tensors | more, file)
        with pytest.raises(dk.CheckpointError, match=message):
            dk.load(tmp_path / case, backbone("bert"))


def test_damaged(tmp_path):
    folder = copied(tmp_path)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(
        dk.CheckpointError, match=r"an adapter of AdapterHub has adapter_config.json, and it is missing"
    ):
        dk.load(folder, backbone("bert"))
    (copied(tmp_path) / "pytorch_adapter.bin").unlink()
    with pytest.raises(dk.CheckpointError, match=r"neither adapter.safetensors nor pytorch_adapter.bin"):
        dk.load(folder, backbone("bert"))


def test_from_the_hub(hub):
    folder = FOLDER / "llama" / "lora"
    hub.add_repo("me/theirs", {path.name: path.read_bytes() for path in folder.iterdir()})
    model = backbone("llama")
    dk.load("me/theirs", model)
    close(outputs(model), expected("llama", "lora"))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CLASSES)
def test_inspect_shows_the_targets_or_says_that_only_the_backbone_does(kind, case):
    found, delta = dk.inspect(FOLDER / kind / case), dk.load(FOLDER / kind / case, backbone(kind, headed=True))
    assert found.num_values == delta.num_parameters
    shown = {path for method in found.methods for path in method.targets}
    if shown != delta.modules.keys() or len(found.methods) != len(delta.methods):
        note = found.notes[-1]
        assert note.startswith("the targets of ")
        assert "are the names in the file" in note


@pytest.mark.parametrize("kind", CLASSES)
def test_the_inverse_precedes_the_output_embedding(kind):
    """As in AdapterHub's own heads, whose logits these are."""
    head = {key.removeprefix("head."): value.double() for key, value in expected_all(kind).items() if "head." in key}
    torch.manual_seed(0)
    config = CLASSES[kind][0].from_pretrained(FOLDER / kind)
    model = (tf.BertForMaskedLM if kind == "bert" else tf.LlamaForCausalLM)(config).double().eval()
    if kind == "bert":
        transform = model.cls.predictions.transform
        parts = {"0": transform.dense, "2": transform.LayerNorm, "3": model.cls.predictions.decoder}
    else:
        parts = {"0": model.lm_head}
    model.load_state_dict(load_file(FOLDER / kind / "backbone.safetensors"), strict=False)
    for number, part in parts.items():
        part.weight.data = head[f"{number}.weight"]
        part.bias = torch.nn.Parameter(head[f"{number}.bias"])
    ids = torch.randint(3, 37, (2, 7), generator=torch.Generator().manual_seed(4))
    bare = model(ids).logits
    delta = dk.load(FOLDER / kind / "inv", model)
    close(model(ids).logits, expected(kind, "logits"))
    assert not torch.allclose(bare, expected(kind, "logits"))
    assert len(delta.modules_of("invertible_adapter")) == 2


@pytest.mark.parametrize("kind", CLASSES)
def test_gates_count_padding(kind):
    model, mask = backbone(kind), torch.tensor([[1, 1, 1, 1, 0, 0, 0], [1] * 7])
    dk.load(FOLDER / kind / "unipelt", model)
    found, wanted = outputs(model, attention_mask=mask), expected(kind, "unipelt_padded")
    close(found[mask.bool()], wanted[mask.bool()])
