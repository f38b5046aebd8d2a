"""`dk.inspect` and `deltakit inspect`, `deltakit convert`: what a saved delta is, and the same delta in another format."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn

import deltakit as dk
from deltakit.cli import main
from deltakit.files.formats.peft import writer
from support.models import Transformer, method_of, randomize
from support.opendelta_files import backbone
from support.peft_models import close, outputs, peft, read_by_peft, saved, wide
from support.tiny_transformers import build


def test_an_own_delta(tmp_path):
    delta = randomize(dk.attach(Transformer(), dk.LoRA(r=3), dk.BitFit(), name="topic", train="@head"))
    found = dk.inspect(delta.save(tmp_path / "saved"))
    assert [method.name for method in found.methods] == ["lora", "bitfit"]
    assert found.methods[0].options == {"r": 3, "alpha": 16, "keep": "exact"} | {
        key: found.methods[0].options[key]
        for key in ("dropout", "rslora", "dora", "invocation", "frozen_a", "gate", "untie", "start")
    }
    for method in found.methods:
        assert sorted(method.targets) == sorted(delta.modules_of(method.name))
        assert method.num_values == sum(
            p.numel() for modules in delta.modules_of(method.name).values() for m in modules for p in m.parameters()
        )
    assert list(found.fully_trained) == delta.fully_trained
    assert (found.format, found.name, found.base, found.base_class) == ("deltakit", "topic", None, "Transformer")
    assert found.num_values == delta.num_parameters
    assert found.num_bytes == 4 * found.num_values
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tensor.shape for name, tensor in delta.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in found.tensors.values())
    assert repr(found).splitlines()[0] == f"delta 'topic' in {tmp_path / 'saved'}, format deltakit, for Transformer"
    line = repr(found).splitlines()[1].split()
    # Sizes, and options that are not as they are by default.
    assert line == ["lora", "r=3", "alpha=16", "4", "targets", "+480"]
    assert dict(found.methods[0].options)["keep"] == "exact"
    again = dk.attach(Transformer(), dk.LoRA(r=8, keep="int8", dropout=0.5, at="q_proj"), dk.IA3())
    randomize(again).save(tmp_path / "again")
    assert [
        " ".join(line.split()) for line in repr(dk.inspect(tmp_path / "again")).splitlines() if "target" in line
    ] == [
        "lora r=8 alpha=16 dropout=0.5 keep=int8 2 targets +640",
        "ia3 6 targets +136",
    ]


def test_an_adapter_of_peft(tmp_path):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["query", "word_embeddings"], modules_to_save=["classifier"], use_rslora=True
    )
    saved("bert", config, tmp_path)
    found = dk.inspect(tmp_path)
    delta = dk.load(tmp_path, wide("bert"))
    assert found.format == "peft"
    assert sorted(path for method in found.methods for path in method.targets) == sorted(delta.modules)
    assert found.fully_trained == delta.fully_trained == ["classifier.bias", "classifier.weight"]
    assert found.num_values == delta.num_parameters
    assert "lora r=3 alpha=5.0 rslora=True" in repr(found)


def test_files_and_the_hub(hub, tmp_path, capsys):
    delta = randomize(dk.attach(Transformer(), dk.LoRA(r=3)))
    delta.push("me/lora", token=hub.TOKEN)
    folder = delta.save(tmp_path / "saved")
    assert dk.inspect("me/lora").methods == dk.inspect(folder / "delta_model.safetensors").methods
    assert main(["inspect", "me/lora"]) == 0
    assert capsys.readouterr().out.startswith("a delta in me/lora, format deltakit, for Transformer\n  lora")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "there is no delta here" in capsys.readouterr().err


def test_a_damaged_config_is_refused(tmp_path):
    folder = randomize(dk.attach(Transformer(), dk.LoRA(r=3))).save(tmp_path / "saved")
    config = json.loads((folder / "delta_config.json").read_text())
    (folder / "delta_config.json").write_text(json.dumps(config | {"name": "other"}))
    with pytest.raises(dk.CheckpointError, match=r"delta_config\.json"):
        dk.inspect(folder)


def test_to_peft_and_back_without_weights(tmp_path, capsys):
    model = wide("bert")
    model.save_pretrained(tmp_path / "bert")
    delta = randomize(dk.attach(model, dk.LoRA(r=3, alpha=5), train="@head"), 0.3)
    expected = outputs("bert", model)
    delta.save(tmp_path / "own")
    options = ["--model", str(tmp_path / "bert"), "--to"]
    # Only the config of the backbone is read.
    (tmp_path / "bert" / "model.safetensors").unlink()
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "peft"), *options, "peft"]) == 0
    assert f"{tmp_path / 'own'} (deltakit) is now in {tmp_path / 'peft'} (peft)" in capsys.readouterr().out
    close("bert", read_by_peft("bert", tmp_path / "peft"), expected)
    assert main(["convert", str(tmp_path / "peft"), str(tmp_path / "again"), *options, "deltakit"]) == 0
    again = wide("bert")
    dk.load(tmp_path / "again", again)
    close("bert", outputs("bert", again), expected)


def test_what_cannot_be_converted(tmp_path, capsys):
    randomize(dk.attach(Transformer(), dk.LoRA(r=3))).save(tmp_path / "own")
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "peft"), "--to", "peft"]) == 1
    assert "does not say which model it is for; add --model with a folder or Hub id" in capsys.readouterr().err
    wide("llama").save_pretrained(tmp_path / "llama")
    options = ["--model", str(tmp_path / "llama"), "--to", "peft"]
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "peft"), *options]) == 1
    error = capsys.readouterr().err
    assert "this is not the backbone the delta was trained on" in error
    assert error.endswith("; name that one as the model (--model)\n")
    assert not (tmp_path / "peft").exists()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 0}')
    wide("bert").config.save_pretrained(tmp_path / "bert")
    for folder, kind, what in (
        ("bert", "LlamaModel", "its config is a BertConfig, and LlamaModel needs a LlamaConfig; pass the delta's own"),
        ("damaged", "LlamaModel", "transformers cannot build a model from it: "),
    ):
        options = ["--model", str(tmp_path / folder), "--class", kind, "--to", "peft"]
        assert main(["convert", str(tmp_path / "own"), str(tmp_path / "peft"), *options]) == 1
        assert what in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "peft"), "--to", "onnx"]) == 2


def test_what_only_the_values_or_the_backbone_show_is_said(tmp_path):
    """Ranks that are padded, and tensors that are the backbone's own."""
    delta = randomize(dk.attach(wide("llama"), dk.LoRA(r=2, at="q_proj"), dk.LoRA(r=5, at="v_proj")))
    delta.save(tmp_path / "padded", format="peft")
    found = dk.inspect(tmp_path / "padded")
    assert {method.options["r"] for method in found.methods} == {5}
    assert {method.r for method in dk.load(tmp_path / "padded", wide("llama")).methods} == {2, 5}
    assert repr(found).endswith("\n(r is the rank in the file: loading leaves out ranks whose values are all zero)")
    assert dk.inspect(delta.save(tmp_path / "own")).notes == []


def test_a_prompt_of_a_classifier_holds_the_head_and_so_needs_its_values(tmp_path, capsys):
    model = wide("bert")
    model.save_pretrained(tmp_path / "bert")
    with pytest.warns(dk.DeltaWarning, match="classifier: new in this"):
        delta = randomize(dk.attach(model, dk.SoftPrompt(tokens=3, where="start")))
    delta.save(tmp_path / "own")
    options = ["--model", str(tmp_path / "bert"), "--to", "peft"]
    assert main(["convert", str(tmp_path / "own"), str(tmp_path / "peft"), *options]) == 1
    assert "prompts of classifiers with the values of classifier.weight, which are unknown" in capsys.readouterr().err
    delta.detach()
    # A delta that trains the head has its values.
    randomize(dk.attach(model, dk.SoftPrompt(tokens=3, where="start"), train="@head")).save(tmp_path / "both")
    assert main(["convert", str(tmp_path / "both"), str(tmp_path / "peft"), *options]) == 0


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_targets_that_only_the_backbone_shows(kind, tmp_path):
    configs = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}
    saved("gpt2", configs[kind](num_virtual_tokens=5, task_type="CAUSAL_LM"), tmp_path)
    found = dk.inspect(tmp_path)
    delta = dk.load(tmp_path, wide("gpt2"))
    assert [method.name for method in found.methods] == [method.name for method in delta.methods]
    assert found.num_values == delta.num_parameters
    assert repr(found).splitlines()[1].split()[-3:-1] == ["?", "targets"]
    assert f"targets of {found.methods[0].name}: loading finds them in the backbone" in repr(found)


@pytest.mark.parametrize("first", [0, 1])
def test_ranks_of_experts_by_patterns(first, tmp_path):
    names = ["experts.gate_up_proj", "experts.down_proj"]
    pattern = {"layers.1.mlp.experts.down_proj": 2}
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=names, rank_pattern=pattern)
    saved("mixtral", config, tmp_path)
    file = tmp_path / "adapter_config.json"
    # PEFT writes them in any order.
    written = {**json.loads(file.read_text()), "target_parameters": names[first:] + names[:first]}
    file.write_text(json.dumps(written))
    delta = dk.load(tmp_path, wide("mixtral"))
    found = dk.inspect(tmp_path)
    assert {method.options["r"]: set(method.targets) for method in found.methods} == {
        method.r: {
            path for path, modules in delta.modules.items() for module in modules if module.A.shape[-2] == method.r
        }
        for method in delta.methods
    }
    assert {name: tensor.shape for name, tensor in found.tensors.items()} == {
        name: tensor.shape for name, tensor in delta.state_dict().items()
    }
    assert "does not say which parameter each LoRA is on: loading finds out" in repr(found)


def test_biases_of_opendelta_beside_the_whole_backbone(tmp_path):
    """OpenDelta saves all of it where `freeze_module` was never called."""
    model = backbone("bert")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    biases = [name for name in state if name.endswith("query.bias")]
    state |= {name: state[name] + 1 for name in biases}
    (tmp_path / "config.json").write_text(json.dumps({"delta_type": "bitfit"}))
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = dk.inspect(tmp_path)
    assert found.methods[0].name == "bitfit"
    assert {f"{path}.bias" for path in found.methods[0].targets} == {name for name in state if name.endswith(".bias")}
    assert found.notes == ["fully trained tensors that are equal to the backbone's are left out on loading"]
    delta = dk.load(tmp_path, model)
    assert delta.fully_trained == []
    assert {path for path, (module,) in delta.modules.items() if module.bias.any()} == {
        name.removesuffix(".bias") for name in biases
    }


_NEED_WEIGHTS = {"ln_tuning", "trainable_tokens"}
"""The methods whose files in PEFT hold the backbone's values plus what was trained."""

_WRITABLE = {
    "delora": {"start": "zero"},
    "fourierft": {"n": 11},
    "p_tuning_v2": {"shift": True},
    "prefix": {"shift": True},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "waveft": {"n": 11},
}
"""The options without which PEFT has no such adapter."""


def _llama(name):
    # PEFT counts the heads of adaption prompts by the sizes of layers, which is right only for heads of this size.
    sizes = {"head_dim": 6} if name == "llama_adapter" else {}
    return build("llama", tf.AutoModelForCausalLM, **sizes)


@pytest.mark.parametrize("name", sorted(writer.KINDS))
def test_convert_does_for_each_method_what_saving_does_or_says_why_not(name, tmp_path, capsys):
    """The oracle is the file that is saved with the weights in memory."""
    model = _llama(name)
    model.save_pretrained(tmp_path / "model")
    delta = randomize(dk.attach(model, method_of(name, **_WRITABLE.get(name, {}))), 0.3)
    delta.save(tmp_path / "own")
    delta.save(tmp_path / "expected", format="peft")

    def converted(source, to):
        arguments = ["convert", str(tmp_path / source), str(tmp_path / to), "--model", str(tmp_path / "model")]
        return main([*arguments, "--to", "peft" if to == "peft" else "deltakit"])

    if name in _NEED_WEIGHTS:
        for source, to in (("own", "peft"), ("expected", "again")):
            assert converted(source, to) == 1
            assert "weights are in memory" in capsys.readouterr().err
        return
    assert converted("own", "peft") == 0
    expected, found = (load_file(tmp_path / f"{one}/adapter_model.safetensors") for one in ("expected", "peft"))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert converted("expected", "again") == 0
    again = dk.load(tmp_path / "again", _llama(name), check="warn")
    torch.testing.assert_close(outputs("llama", again.backbone), outputs("llama", model), rtol=1e-5, atol=1e-5)


def test_options_without_a_default_are_shown(tmp_path):
    """Also with the values of the example that documents the method."""
    model = nn.Sequential(nn.Embedding(20, 3))
    randomize(dk.attach(model, dk.TrainableTokens(**dk.TrainableTokens.example))).save(tmp_path)
    assert f"ids={list(dk.TrainableTokens.example['ids'])}" in str(dk.inspect(tmp_path)).replace("(", "[").replace(
        ")", "]"
    )
