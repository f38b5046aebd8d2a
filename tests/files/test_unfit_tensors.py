"""Tensors of other libraries' files that are no numbers of a delta, or do not fit each other: refused with and without a backbone."""

import re
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import deltakit as dk
from deltakit.files import check_tensors, is_finite, read_tensors, values
from support import image_models
from support.models import same, snapshot
from support.opendelta_files import CASES, FILES, backbone
from support.paths import CHECKPOINTS
from support.peft_models import adapted, peft, wide

HUB = CHECKPOINTS / "adapterhub"
OF_HUB = ["seq_bn", "par_bn_learned", "compacter", "compacterpp", "lora", "ia3", "prefix", "prefix_flat"]
OF_OPENDELTA = [
    case for name, case in CASES if name == "bert" and case not in ("never_frozen", "lora_head", "bitfit_head")
]


def read(folder):
    """The name of the file of tensors, and what is in it."""
    for name in (
        "adapter_model.safetensors",
        "adapter.safetensors",
        "pytorch_lora_weights.safetensors",
        "kohya.safetensors",
    ):
        if (folder / name).is_file():
            return folder / name, load_file(folder / name)
    name = next(name for name in ("pytorch_model.bin", "pytorch_adapter.bin") if (folder / name).is_file())
    return folder / name, torch.load(folder / name, weights_only=True)


def changed(folder, name, change):
    """The folder with another tensor in it; returns what dk.load gets."""
    file, tensors = read(folder)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()} | {name: change(tensors[name])}
    if file.suffix == ".bin":
        torch.save(tensors, file)
    else:
        save_file(tensors, file, {"format": "pt"})
    return file if file.name == "kohya.safetensors" else folder


def of_delta(tensors, kind):
    """One tensor for each end of a name, without those of the backbone and the alphas."""
    own = ("classifier.", ".alpha", "base_layer.")
    names = [name for name in tensors if not any(part in name for part in own)]
    if kind.startswith("opendelta"):
        marks = ("lora", "adapter", "compactor", "prefix", "reparams", "soft_prompt", ".bias")
        names = [name for name in names if any(mark in name for mark in marks)]
    return list({tuple(re.sub(r"\d", "", name).split(".")[-2:]): name for name in names}.values())


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], lora_bias=False),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9, init_r=4),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["embed_tokens"]),
    "vera": lambda: peft.VeraConfig(r=3, target_modules=["q_proj"]),
    "loha": lambda: peft.LoHaConfig(r=3, target_modules=["q_proj"]),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules=["q_proj"]),
    "lokr, both": lambda: peft.LoKrConfig(r=1, target_modules=["q_proj"], decompose_both=True),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, hybrid_r=2, target_modules=["q_proj"]),
    "glora": lambda: peft.GloraConfig(r=3, target_modules=["q_proj"]),
    "glora, vectors": lambda: peft.GloraConfig(config_A_B="vector", target_modules=["q_proj"]),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=9, target_modules=["q_proj"]),
    "adaption": lambda: peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1, task_type="CAUSAL_LM"),
    "hira": lambda: peft.HiraConfig(r=3, target_modules=["q_proj"]),
    "delora": lambda: peft.DeloraConfig(r=3, target_modules=["q_proj"]),
    "hra": lambda: peft.HRAConfig(r=4, target_modules=["q_proj"]),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=["q_proj"]),
    "road": lambda: peft.RoadConfig(group_size=8, target_modules=["q_proj"]),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=9, target_modules=["q_proj"]),
    "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=["q_proj"]),
    "shira": lambda: peft.ShiraConfig(r=2, target_modules=["q_proj"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm"]),
    "vblora": lambda: peft.VBLoRAConfig(r=3, topk=2, num_vectors=7, vector_length=4, target_modules=["q_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
}
KINDS = [
    *(f"opendelta {case}" for case in OF_OPENDELTA),
    *(f"adapterhub {case}" for case in OF_HUB),
    *(f"peft {case}" for case in CONFIGS),
    "diffusers",
    "kohya",
]


def made(kind, folder):
    """Writes a delta of another library, and returns what builds its backbone."""
    library, _, case = kind.partition(" ")
    if library == "opendelta":
        shutil.copytree(FILES / "bert" / case, folder)
        return lambda: backbone("bert")
    if library == "adapterhub":
        shutil.copytree(HUB / "bert" / case, folder)
        return lambda: tf.BertModel(tf.BertConfig.from_pretrained(HUB / "bert")).eval()
    if library == "peft":
        adapted(wide("llama"), CONFIGS[case](), folder)
        return lambda: wide("llama")
    folder.mkdir()
    pairs = image_models.factors(image_models.unet())
    names = {path: path.replace(".", "_") for path in pairs}
    if library == "kohya":
        tensors = {f"lora_unet_{names[path]}.lora_{end}.weight": t for path, pair in pairs.items() for end, t in zip(("down", "up"), pair, strict=True)}  # fmt: skip
    else:
        tensors = {f"unet.{path}.lora_{end}.weight": t for path, pair in pairs.items() for end, t in zip("AB", pair, strict=True)}  # fmt: skip
    file = "kohya.safetensors" if library == "kohya" else "pytorch_lora_weights.safetensors"
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})
    return image_models.unet


CHANGES = {
    "int8": lambda tensor: (tensor * 10).to(torch.int8),
    "bool": lambda tensor: tensor > 0,
    "deeper": lambda tensor: tensor[None].contiguous(),
    "longer": lambda tensor: torch.cat([tensor, tensor[:1]]),
}
UNSEEN = {
    "int8": None,
    "bool": None,
    # A vector stays one, a bias is added to all rows, and frozen matrices are drawn again.
    "deeper": r"ia3_l$|loras\.task\.lora_B$|control_trans\.0\.bias$|vera_[AB]$|boft_s$",
    # The backbone alone knows how many outputs a layer has.
    "longer": r"glora_[A-E]\.zeros$|lokr_w1(_a)?$|lokr_w2_a$|gralora_B_general\.weight$|lora_(embedding_)?B(\.weight)?$|lora_up\.weight$|ia3_l$|\.bias$|hira_B$|hra_u$|vblora_logits_B$|vera_(lambda_b|[AB])$|oft_R\.weight$|boft_(R|s)$|fourierft_spectrum$|c3a_kernel$|ln_tuning_layers\.weight$",
}
"""What fits without a backbone, by the change."""


def copied(folder):
    shutil.rmtree(folder / "bad", ignore_errors=True)
    return shutil.copytree(folder / "good", folder / "bad")


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_refused(kind, tmp_path):
    build = made(kind, tmp_path / "good")
    names = of_delta(read(tmp_path / "good")[1], kind)
    assert names
    dk.inspect(changed(tmp_path / "good", names[0], torch.clone))
    for change, function in CHANGES.items():
        accepted = []
        for name in names:
            place = changed(copied(tmp_path), name, function)
            try:
                dk.inspect(place)
                accepted.append(name)
            except dk.CheckpointError as error:
                assert str(error).startswith(str(tmp_path / "bad")), error
        assert not [name for name in accepted if not UNSEEN[change] or not re.search(UNSEEN[change], name)], change
        if change != "deeper":
            # What fits itself does not fit the backbone.
            place = changed(copied(tmp_path), (accepted or names)[-1], function)
            model = build()
            before = snapshot(model)
            with pytest.raises(dk.CheckpointError, match=f"^{re.escape(str(place))}.*; "):
                dk.load(place, model)
            same(before, snapshot(model))


@pytest.mark.parametrize("broken", [None, "a", "b"])
def test_all_values_of_a_file_are_looked_at_in_one_go(broken, tmp_path, monkeypatch):
    """Only if one is not finite each tensor is looked at, to say which it is."""
    tensors = {name: torch.full((3,), float("nan") if name == broken else 1.0) for name in "abc"}
    save_file(tensors, tmp_path / "a.safetensors")
    found, looks = read_tensors(tmp_path / "a.safetensors"), []
    monkeypatch.setattr(values, "is_finite", lambda tensor: looks.append(tensor) or is_finite(tensor))
    expected = {name: torch.zeros(3) for name in found}
    if broken is None:
        check_tensors(found, expected, own=(), where="here")
        assert len(looks) == 1
        return
    with pytest.raises(dk.CheckpointError, match=f"here: 1 tensor has values .* not a number: {broken};"):
        check_tensors(found, expected, own=(), where="here")


def test_values_that_are_too_large_for_the_backbone_s_precision_are_found_in_a_file(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.full((3,), 1e6)}, tmp_path / "a.safetensors")
    found = read_tensors(tmp_path / "a.safetensors")
    with pytest.raises(dk.CheckpointError, match="b has values that torch.float16 cannot hold"):
        check_tensors(found, {name: torch.zeros(3).half() for name in found}, own=(), where="here")
