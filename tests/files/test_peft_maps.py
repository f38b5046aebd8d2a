"""PEFT's files of rotations, tuned norms and sparse updates, in both directions, with PEFT's own outputs."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from support.models import attached, randomize
from support.peft_models import adapted, opened, outputs, peft, wide

LLAMA, BERT, GPT2 = ["q_proj", "down_proj"], ["query", "output.dense"], ["c_attn", "mlp.c_proj"]
CASES = {
    "oft": ("llama", peft.OFTConfig(target_modules=LLAMA, oft_block_size=4)),
    "oft, exact": ("llama", peft.OFTConfig(target_modules=LLAMA, oft_block_size=4, use_cayley_neumann=False)),
    "oft, three terms": ("bert", peft.OFTConfig(target_modules=BERT, oft_block_size=4, num_cayley_neumann_terms=3)),
    "oft, seven terms": ("bert", peft.OFTConfig(target_modules=BERT, oft_block_size=2, num_cayley_neumann_terms=7)),
    "oft, one block": ("llama", peft.OFTConfig(target_modules=LLAMA, oft_block_size=2, block_share=True)),
    "oft, blocks": ("llama", peft.OFTConfig(target_modules=["q_proj"], r=6, oft_block_size=0)),
    "boft": ("llama", peft.BOFTConfig(target_modules=LLAMA, boft_block_size=2)),
    "hra": ("bert", peft.HRAConfig(target_modules=BERT, r=4, modules_to_save=["classifier"])),
    "hra, orthogonal": ("llama", peft.HRAConfig(target_modules=LLAMA, r=4, apply_GS=True, init_weights=False)),
    "road": ("llama", peft.RoadConfig(target_modules=LLAMA, group_size=8)),
    "road_2": ("bert", peft.RoadConfig(target_modules=BERT, group_size=4, variant="road_2")),
    "road_4": ("bert", peft.RoadConfig(target_modules=BERT, group_size=8, variant="road_4")),
    "fourierft": ("llama", peft.FourierFTConfig(target_modules=LLAMA, n_frequency=40, random_loc_seed=5)),
    "fourierft, conv1d": ("gpt2", peft.FourierFTConfig(target_modules=GPT2, n_frequency=40, scaling=20.0)),
    "waveft": ("llama", peft.WaveFTConfig(target_modules=LLAMA, n_frequency=40, random_loc_seed=5, scaling=3.0)),
    "waveft, conv1d": ("gpt2", peft.WaveFTConfig(target_modules=GPT2, n_frequency=40, fan_in_fan_out=True)),
    "waveft, by size": (
        "llama",
        peft.WaveFTConfig(target_modules=["q_proj"], n_frequency=40, proportional_parameters=True),
    ),
    "glora": ("bert", peft.GloraConfig(target_modules=BERT, r=3)),
    "glora, without biases": ("llama", peft.GloraConfig(target_modules=LLAMA, r=3, config_A_B="vector")),
    "glora, numbers": ("bert", peft.GloraConfig(target_modules=BERT, config_A_B="constant", config_C="vector")),
    "glora, biases": ("bert", peft.GloraConfig(target_modules=BERT, config_A_B="none", config_D_E="vector")),
    "c3a": ("llama", peft.C3AConfig(target_modules=LLAMA, block_size=4)),
    "shira": ("llama", peft.ShiraConfig(target_modules=LLAMA, r=3)),
    "ln_tuning": ("llama", peft.LNTuningConfig()),
    "ln_tuning, biases": ("gpt2", peft.LNTuningConfig(target_modules=["ln_1", "ln_f"])),
}
# PEFT's transforms are in float32.
SINGLE = {"fourierft": 1e-4, "c3a": 1e-5}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning"),
]


def same(case, found, expected):
    tolerance = SINGLE.get(case.split(",")[0], 1e-10)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def double(request):
    """PEFT builds HRA's reflections in torch's default dtype, and FourierFT's matrices."""
    torch.set_default_dtype(torch.float32 if "fourierft" in request.node.name else torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", CASES)
def test_read_and_written_again(case, tmp_path):
    name, config = CASES[case]
    expected = outputs(name, adapted(wide(name), config, tmp_path / "theirs"))
    model = wide(name)
    bare = outputs(name, model)
    delta = dk.load(tmp_path / "theirs", model)
    same(case, outputs(name, model), expected)
    assert (expected - bare).abs().max() > 3e-5
    assert delta.methods[0].name == case.split(",")[0].split("_")[0] or case.startswith("ln")
    # And back, with other values.
    randomize(delta, 0.1)
    delta.save(tmp_path / "ours", format="peft")
    same(case, outputs(name, opened(wide(name), tmp_path / "ours")), outputs(name, model))
    again = wide(name)
    dk.load(tmp_path / "ours", again)
    same("", outputs(name, again), outputs(name, model))
    assert dk.inspect(tmp_path / "ours").methods[0].name == delta.methods[0].name


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.pixel, self.patch = nn.Conv2d(6, 10, 1), nn.Conv2d(10, 5, 3, stride=2, padding=1)

    def forward(self, x):
        return self.patch(torch.tanh(self.pixel(x)))


def images():
    torch.manual_seed(3)
    return Images().eval(), torch.randn(2, 6, 7, 9)


@pytest.mark.parametrize(
    "config",
    [
        peft.OFTConfig(target_modules=["pixel"], oft_block_size=3),
        peft.HRAConfig(target_modules=["pixel"], r=2),
        peft.BOFTConfig(target_modules=["pixel", "patch"], boft_block_size=2),
    ],
    ids=["oft", "hra", "boft"],
)
def test_convolutions(config, tmp_path):
    (theirs, x), (model, _) = images(), images()
    bare, expected = model(x), adapted(theirs, config, tmp_path / "theirs")(x)
    assert not torch.allclose(bare, expected, atol=1e-3)
    delta = dk.load(tmp_path / "theirs", model)
    same("", model(x), expected)
    randomize(delta).save(tmp_path / "ours", format="peft")
    same("", opened(images()[0], tmp_path / "ours")(x), model(x))


@pytest.mark.parametrize(
    "config",
    [peft.OFTConfig(target_modules=["patch"], oft_block_size=3), peft.HRAConfig(target_modules=["patch"], r=2)],
    ids=["oft", "hra"],
)
def test_convolutions_of_which_peft_turns_other_things_than_channels(config, tmp_path):
    adapted(images()[0], config, tmp_path)
    with pytest.raises(
        dk.CheckpointError, match="patch is a convolution over several pixels, where the .* of PEFT comp"
    ):
        dk.load(tmp_path, images()[0])
    method = dk.OFT(at="patch") if config.peft_type == "OFT" else dk.HRA(at="patch")
    delta = attached(images()[0], method)
    with pytest.raises(
        dk.CheckpointError, match="patch is a convolution over several pixels, where PEFT's .* something"
    ):
        delta.save(tmp_path / "ours", format="peft")


REFUSED_CONFIGS = {
    "constrained": (peft.OFTConfig(target_modules=LLAMA, oft_block_size=4, coft=True), "this OFT of PEFT has constrained rotations"),
    "two terms": (peft.OFTConfig(target_modules=LLAMA, oft_block_size=4, num_cayley_neumann_terms=2), "OFT of PEFT has a series of 2 terms"),
    "odd": (peft.HRAConfig(target_modules=LLAMA, r=3), r"HRA of PEFT has an odd number of reflections \(r=3\)"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The symmetric initialization:UserWarning")
@pytest.mark.parametrize("case", REFUSED_CONFIGS)
def test_what_deltakit_does_not_have(case, tmp_path):
    config, message = REFUSED_CONFIGS[case]
    adapted(wide("llama"), config, tmp_path)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, wide("llama"))


REFUSED = {
    "oft": (lambda: [dk.OFT(at="q_proj", block_size=4), dk.OFT(at="k_proj", block_size=2)], "targets have 2 and 4 as oft_block_size"),
    "shira": (lambda: [dk.SHiRA(at="v_proj")], "v_proj has 384 trained entries, and PEFT has a multiple of its 40 inputs"),
    "fourierft": (lambda: [dk.FourierFT(at=["q_proj", "v_proj"])], "its targets have 384 and 768 as n_frequency"),
    "road": (lambda: [dk.RoAd(at="q_proj", group_size=4), dk.RoAd(at="k_proj", group_size=2)], "targets have 2 and 4 as group_size"),
    "norms": (lambda: [dk.LNTuning(), dk.RoAd(group_size=4)], "this delta is ln_tuning and road"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_express(case, tmp_path):
    methods, message = REFUSED[case]
    delta = attached(wide("llama"), *methods())
    with pytest.raises(dk.CheckpointError, match=message):
        delta.save(tmp_path, format="peft")


class TestNorms:
    def test_what_is_not_trained_has_the_backbones_values(self, tmp_path):
        model = wide("gpt2")
        delta = attached(model, dk.LNTuning(at="ln_f", exclude="ln_f.bias"))
        delta.save(tmp_path, format="peft")
        tensors = load_file(tmp_path / "adapter_model.safetensors")
        (bias,) = [value for key, value in tensors.items() if key.endswith("bias")]
        assert torch.equal(bias, model.transformer.ln_f.bias)
        same("", outputs("gpt2", opened(wide("gpt2"), tmp_path)), outputs("gpt2", model))

    @pytest.mark.parametrize("method", [dk.LNTuning(), dk.TrainableTokens(ids=[3, 5])], ids=["norms", "tokens"])
    def test_values_are_not_those_of_a_merged_weight(self, method, tmp_path):
        """The files have the values themselves: a merged delta would count twice."""
        model = wide("llama")
        delta = attached(model, method)
        delta.save(tmp_path / "theirs", format="peft")
        delta.merge()
        message = "its format stores .* with the .* of model.*weight, and delta 'delta' is merged into that; unmerge"
        with pytest.raises(
            dk.CheckpointError, match=f"^delta 'delta' cannot be saved as an adapter of PEFT: {message}"
        ):
            delta.save(tmp_path / "ours", format="peft")
        with pytest.raises(dk.CheckpointError, match=message):
            dk.load(tmp_path / "theirs", model, name="other")

    def test_another_backbone(self, tmp_path):
        adapted(wide("llama"), peft.LNTuningConfig(), tmp_path)
        with pytest.raises(
            dk.CheckpointError, match=r"input_layernorm.weight of shape \(24,\), and this backbone has none"
        ):
            dk.load(tmp_path, wide("gpt2"))

    def test_a_meta_backbone(self, tmp_path):
        adapted(wide("llama"), peft.LNTuningConfig(), tmp_path)
        with pytest.raises(dk.CheckpointError, match="unknown here .meta device"):
            dk.load(tmp_path, wide("llama").to("meta"))
        assert dk.inspect(tmp_path).num_values == 24 * 5


def test_places_outside_of_the_weight(tmp_path):
    adapted(wide("llama"), peft.ShiraConfig(target_modules=LLAMA, r=3), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    next(value for key, value in tensors.items() if key.endswith("indices"))[0, 0] = 100
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(dk.CheckpointError, match="SHiRA has places outside of a weight"):
        dk.load(tmp_path, wide("llama"))


def test_training_alone_is_said(tmp_path):
    adapted(wide("llama"), peft.OFTConfig(target_modules=LLAMA, oft_block_size=4, module_dropout=0.1), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["module_dropout"] == 0.1
    with pytest.warns(dk.DeltaWarning, match="it was trained with module_dropout"):
        dk.load(tmp_path, wide("llama"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft.WaveFTConfig(wavelet_family="db2"),
            "this WAVEFT of PEFT has the wavelet 'db2', which deltakit does not have",
        ),
        (
            peft.WaveFTConfig(use_idwt=False),
            r"this WAVEFT of PEFT has no wavelet \(use_idwt\), which deltakit does not have",
        ),
    ],
)
def test_other_wavelets(config, message, tmp_path):
    config.target_modules, config.n_frequency = ["q_proj"], 40
    adapted(wide("llama"), config, tmp_path)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, wide("llama"))


def test_parts_that_are_left_out_hold_zeros(tmp_path):
    """PEFT adds what stands there."""
    adapted(wide("llama"), peft.GloraConfig(target_modules=["q_proj"], r=3), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("glora_D.zeros"))
    save_file({**tensors, name: tensors[name] + 1}, file)
    with pytest.raises(
        dk.CheckpointError, match=r"glora_D\.zeros should be zeros, where a part is left out, and has other"
    ):
        dk.load(tmp_path, wide("llama"))


def test_the_same_forms_for_all_of_gloras_targets(tmp_path):
    delta = attached(wide("llama"), dk.GLoRA(at=["q_proj", "v_proj"], r=2, ab={"q_proj": "vector", "*": "lora"}))
    with pytest.raises(dk.CheckpointError, match="its targets differ in ab, and PEFT has one config_A_B for all"):
        delta.save(tmp_path, format="peft")
