"""The same with diffusers itself, on a UNet and a text encoder. diffusers is no dependency of the tests.

To run it: `pip install -c constraints.txt diffusers==0.42.1`, then `python -m pytest tests/files/test_diffusers.py`.
"""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from deltakit.files import read_saved
from support.models import randomize

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")

FILE = "pytorch_lora_weights.safetensors"
SIZES = {
    "sample_size": 8,
    "layers_per_block": 2,
    "block_out_channels": (8, 16, 20),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
}


def unet(**more):
    torch.manual_seed(1)
    return diffusers.UNet2DConditionModel(**SIZES, **more).eval().double()


def text():
    torch.manual_seed(2)
    sizes = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return (
        tf.CLIPTextModel(
            tf.CLIPTextConfig(vocab_size=99, max_position_embeddings=16, bos_token_id=1, eos_token_id=2, **sizes)
        )
        .eval()
        .double()
    )


@torch.no_grad()
def outputs(model):
    generator = torch.Generator().manual_seed(3)
    if isinstance(model, tf.CLIPTextModel):
        return model(torch.randint(3, 90, (2, 7), generator=generator)).last_hidden_state
    pixels, words = (torch.randn(shape, generator=generator).double() for shape in ((2, 4, 8, 8), (2, 5, 12)))
    return model(pixels, torch.tensor([3, 7]), words).sample


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def loads_as(build, place, wanted):
    model = build()
    assert (outputs(model) - wanted).abs().max() > 1e-4
    dk.load(place, model)
    close(outputs(model), wanted)


def adapted(build, **config):
    """A model with a random LoRA of PEFT, and its outputs."""
    model = build()
    model.add_adapter(peft.LoraConfig(r=4, **config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, outputs(model)


LAYERS = ["to_q", "to_v", "to_out.0", "conv1", "proj_in", "conv_shortcut", "linear_1", "conv"]
CONFIGS = {
    "plain": {},
    "scaled": {"lora_alpha": 6},
    "patterns": {"lora_alpha": 6, "alpha_pattern": {"to_q": 3}, "rank_pattern": {"conv1": 2}},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("linear", [False, True])
def test_what_diffusers_saves(case, linear, tmp_path):
    def build():
        return unet(use_linear_projection=linear)

    model, wanted = adapted(build, target_modules=LAYERS, **CONFIGS[case])
    model.save_lora_adapter(tmp_path)
    loads_as(build, tmp_path, wanted)


def test_a_pipeline_saves_both(tmp_path):
    models, wanted, saved = {}, {}, {}
    for component, build, layers in (("unet", unet, LAYERS), ("text_encoder", text, ["q_proj", "fc1"])):
        models[component], wanted[component] = adapted(build, target_modules=layers, lora_alpha=7)
        saved[f"{component}_lora_layers"] = peft.get_peft_model_state_dict(models[component])
        saved[f"{component}_lora_adapter_metadata"] = models[component].peft_config["default"].to_dict()
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **saved)
    for component, build in (("unet", unet), ("text_encoder", text)):
        loads_as(build, tmp_path, wanted[component])


def test_old_spellings(tmp_path):
    model, wanted = adapted(unet, target_modules=["to_q", "to_k", "to_out.0"], lora_alpha=4)
    state = diffusers.utils.convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(model))
    assert any(".lora.down." in key for key in state)
    save_file({f"unet.{key}": value.contiguous() for key, value in state.items()}, tmp_path / FILE)
    loads_as(unet, tmp_path, wanted)
    loaded = unet()
    state = load_file(tmp_path / FILE)
    loaded.load_lora_adapter(state, prefix="unet")
    close(outputs(loaded), wanted)


def test_kohya(tmp_path):
    """diffusers converts names and alphas: they are right if all of a component are the same."""
    model, _ = adapted(unet, target_modules=LAYERS)
    factors = peft.get_peft_model_state_dict(model)
    state = {}
    for key, value in factors.items():
        path, _, factor = key.removesuffix(".weight").rpartition(".lora_")
        name = f"lora_unet_{path.replace('.', '_')}"
        state[f"{name}.lora_{'down' if factor == 'A' else 'up'}.weight"] = value.contiguous()
        state[f"{name}.alpha"] = torch.tensor(3.0)
    save_file(state, tmp_path / "style.safetensors")
    wanted = unet()
    converted, alphas = diffusers.StableDiffusionPipeline.lora_state_dict(dict(state), unet_config=wanted.config)
    wanted.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    loads_as(unet, tmp_path / "style.safetensors", outputs(wanted))


def sdxl_names(model):
    """The flat names of the original UNet for all linear layers and convolutions in its blocks, by diffusers' names."""
    found = {}
    count = 3
    parts = {
        "conv1": "in_layers_2",
        "conv2": "out_layers_3",
        "time_emb_proj": "emb_layers_1",
        "conv_shortcut": "skip_connection",
    }
    for path, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not path.startswith(
            ("down_blocks", "up_blocks", "mid_block")
        ):
            continue
        if path.startswith("mid_block"):
            _, kind, layer, *rest = path.split(".")
            number = 1 if kind == "attentions" else 2 * int(layer)
            found[path] = f"middle_block_{number}_{'_'.join(parts.get(name, name) for name in rest)}"
            continue
        side, number, kind, layer, *rest = path.split(".")
        tail = "_".join(parts.get(name, name) for name in rest)
        if kind in ("downsamplers", "upsamplers"):
            block = int(number) * count + (3 if kind == "downsamplers" else 2)
            name = f"input_blocks_{block}_0_op" if kind == "downsamplers" else f"output_blocks_{block}_2_conv"
        else:
            block = int(number) * count + int(layer) + (side == "down_blocks")
            name = f"{'input' if side == 'down_blocks' else 'output'}_blocks_{block}_{int(kind == 'attentions')}_{tail}"
        found[path] = name
    return found


def test_sdxl_names_are_those_that_diffusers_knows(tmp_path):
    def build():
        return unet(use_linear_projection=True)

    names = sdxl_names(build())
    assert len(names) > 100
    model, _ = adapted(build, target_modules=list(names))
    factors = peft.get_peft_model_state_dict(model)
    state = {}
    for path, name in names.items():
        state[f"lora_unet_{name}.lora_down.weight"] = factors[f"{path}.lora_A.weight"]
        state[f"lora_unet_{name}.lora_up.weight"] = factors[f"{path}.lora_B.weight"]
        state[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "xl.safetensors")
    wanted = build()
    converted, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(dict(state), unet_config=wanted.config)
    wanted.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    loads_as(build, tmp_path / "xl.safetensors", outputs(wanted))


def test_kohya_of_flux(tmp_path):
    """diffusers' converter knows the true sizes alone, so the backbone has them, without values."""
    inputs = {"in_channels": 64, "joint_attention_dim": 4096, "pooled_projection_dim": 768}
    with torch.device("meta"):
        model = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=2, **inputs)
    generator, state, width, inner = torch.Generator().manual_seed(5), {}, 3072, 4 * 3072
    fused = {
        **{f"double_blocks_0_{side}_attn_qkv": (width, 3 * width) for side in ("img", "txt")},
        **{f"double_blocks_0_{side}_attn_proj": (width, width) for side in ("img", "txt")},
        **{f"double_blocks_0_{side}_mlp_0": (width, inner) for side in ("img", "txt")},
        **{f"double_blocks_0_{side}_mlp_2": (inner, width) for side in ("img", "txt")},
        **{f"double_blocks_0_{side}_mod_lin": (width, 6 * width) for side in ("img", "txt")},
        "single_blocks_1_linear1": (width, 3 * width + inner),
        "single_blocks_1_linear2": (width + inner, width),
        "single_blocks_1_modulation_lin": (width, 3 * width),
    }
    for name, (d_in, d_out) in fused.items():
        state[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, d_in, generator=generator)
        state[f"lora_unet_{name}.lora_up.weight"] = torch.randn(d_out, 2, generator=generator)
        state[f"lora_unet_{name}.alpha"] = torch.tensor(3.0)
    save_file(state, tmp_path / "flux.safetensors")
    found = read_saved(tmp_path / "flux.safetensors", model, "there")
    wanted = diffusers.FluxPipeline.lora_state_dict(dict(state))
    (method,) = found.methods
    assert {f"transformer.{path}.lora_{factor}.weight" for path in method["targets"] for factor in "AB"} == set(wanted)
    for path in method["targets"]:
        ours, theirs = ((found.tensors[f"{path}.lora.A"], found.tensors[f"{path}.lora.B"]), (wanted[f"transformer.{path}.lora_A.weight"], wanted[f"transformer.{path}.lora_B.weight"]))  # fmt: skip
        update, expected = (b[::97] @ a[:, ::97] for a, b in (ours, theirs))
        torch.testing.assert_close(method["alpha"] / method["r"] * update, expected)


def test_diffusers_opens_what_is_written(tmp_path):
    model = unet()
    delta = dk.attach(
        model,
        dk.LoRA(r=2, alpha=5, at=["to_q", "conv1", "proj_in"]),
        dk.LoRA(r=3, alpha=4, at=["to_v", "conv_shortcut"]),
    )
    randomize(delta, 0.3).save(tmp_path, format="diffusers")
    loaded = unet()
    loaded.load_lora_adapter(str(tmp_path), prefix="unet", weight_name=FILE, use_safetensors=True)
    close(outputs(loaded), outputs(model))


def test_a_pipeline_opens_what_is_written(tmp_path):
    scheduler = diffusers.DDIMScheduler()
    parts = {"vae": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    for component, build in (("unet", unet), ("text_encoder", text)):
        model = build()
        at = ["to_q", "conv1"] if component == "unet" else ["q_proj", "fc1"]
        randomize(dk.attach(model, dk.LoRA(r=2, alpha=5, at=at)), 0.3).save(tmp_path / component, format="diffusers")
        pipe = diffusers.StableDiffusionPipeline(unet=unet(), text_encoder=text(), scheduler=scheduler, **parts)
        pipe.load_lora_weights(str(tmp_path / component), weight_name=FILE)
        close(outputs(getattr(pipe, component)), outputs(model))
