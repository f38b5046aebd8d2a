"""LoRAs of diffusers, kohya and LyCORIS: the outputs are those of the formula; what deltakit does not have is refused."""

import json
import math
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from deltakit.files import read_saved
from support.image_models import ATTENTION, TEXT, UNET, Layers, close, expected, factors, text, unet
from support.models import randomize, same, snapshot

FILE = "pytorch_lora_weights.safetensors"
LINEAR = [path for path, build in UNET.items() if isinstance(build(), nn.Linear)]
QUERY, OUT = f"down_blocks.1.{ATTENTION}.to_q", f"down_blocks.1.{ATTENTION}.to_out.0"
SHORTCUT = "down_blocks.0.resnets.1.conv_shortcut"


def write(file, tensors, **metadata):
    # No two tensors may share memory.
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, file, metadata=metadata or None)
    return file


def dotted(pairs, prefix="", down=".lora_A.weight", up=".lora_B.weight"):
    return {f"{prefix}{path}{end}": t for path, pair in pairs.items() for end, t in zip((down, up), pair, strict=True)}


def flat(pairs, prefix, alphas=None):
    found = dotted(
        {f"{prefix}_{path.replace('.', '_')}": pair for path, pair in pairs.items()},
        "",
        ".lora_down.weight",
        ".lora_up.weight",
    )
    for path, alpha in (alphas or {}).items():
        found[f"{prefix}_{path.replace('.', '_')}.alpha"] = torch.tensor(alpha)
    return found


def loads_as(build, place, wanted):
    model = build()
    before, bare = snapshot(model), model()
    assert (bare - wanted).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta = dk.load(place, model)
    close(model(), wanted)
    delta.detach()
    same(before, snapshot(model))
    return delta


def only(pairs, *parts):
    return {path: pair for path, pair in pairs.items() if any(part in path for part in parts)}


@pytest.mark.parametrize("prefix", ["unet.", "", "base_model.model.", "base_model.model.unet."])
def test_diffusers(prefix, tmp_path):
    pairs = factors(unet())
    write(tmp_path / FILE, dotted(pairs, prefix))
    delta = loads_as(unet, tmp_path, expected(unet, pairs))
    assert [(method.r, method.alpha) for method in delta.methods] == [(3, 3)]
    loads_as(unet, tmp_path / FILE, expected(unet, pairs))


def test_a_pickle(tmp_path):
    pairs = factors(unet())
    torch.save(dotted(pairs, "unet."), tmp_path / "pytorch_lora_weights.bin")
    loads_as(unet, tmp_path, expected(unet, pairs))


OLD = {
    "2023": {QUERY: f"{QUERY}.lora", OUT: f"{OUT}.lora"},
    "processors": {
        QUERY: f"down_blocks.1.{ATTENTION}.processor.to_q_lora",
        OUT: f"down_blocks.1.{ATTENTION}.processor.to_out_lora",
    },
}
OLD_TEXT = {
    "lora_linear_layer": {path: f"{path}.lora_linear_layer" for path in TEXT},
    "with text_model": {path: f"text_model.{path}.lora_linear_layer" for path in TEXT},
    "to_q": {
        path: f"text_model.{path.replace('q_proj', 'to_q').replace('out_proj', 'to_out')}_lora"
        if "attn" in path
        else f"{path}.lora_linear_layer"
        for path in TEXT
    },
}


@pytest.mark.parametrize("era", [*OLD, *OLD_TEXT])
def test_old_spellings_of_diffusers(era, tmp_path):
    """Files of 2023 mix them with new ones."""
    build, component, names = (unet, "unet", OLD[era]) if era in OLD else (text, "text_encoder", OLD_TEXT[era])
    pairs = factors(build())
    old = {f"{component}.{names[path]}": pairs[path] for path in names}
    tensors = dotted(old, "", ".down.weight", ".up.weight")
    tensors |= dotted({path: pair for path, pair in pairs.items() if path not in names}, f"{component}.")
    write(tmp_path / "old.safetensors", tensors)
    loads_as(build, tmp_path / "old.safetensors", expected(build, pairs))


@pytest.mark.parametrize("rslora", [False, True])
def test_the_metadata_have_the_scale(rslora, tmp_path):
    pairs = factors(unet())
    config = {"r": 3, "lora_alpha": 7, "alpha_pattern": {"to_q": 2}, "use_rslora": rslora, "lora_dropout": 0.1}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    write(tmp_path / FILE, dotted(pairs, "unet."), **metadata)
    root = math.sqrt(3) if rslora else 3
    delta = loads_as(unet, tmp_path, expected(unet, pairs, lambda path: (2 if "to_q" in path else 7) / root))
    assert {method.dropout for method in delta.methods} == {0.1}


def test_kohya(tmp_path):
    """Each module has an alpha of its own; without one, and with 0, it is the rank. Linear and 1x1 factors are the same."""
    pairs = factors(unet(), flatten=(SHORTCUT,))
    alphas = {path: 1.0 + number for number, path in enumerate(pairs)}
    alphas[QUERY] = 0.0
    del alphas[OUT]
    file = write(tmp_path / "style.safetensors", flat(pairs, "lora_unet", alphas))
    loads_as(unet, file, expected(unet, pairs, lambda path: (alphas.get(path) or 3) / 3))


SDXL = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding.linear_1",
    "input_blocks_1_0_in_layers_2": "down_blocks.0.resnets.0.conv1",
    "input_blocks_2_0_skip_connection": SHORTCUT,
    "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks_4_1_transformer_blocks_0_attn1_to_q": QUERY,
    "input_blocks_5_1_proj_in": "down_blocks.1.attentions.1.proj_in",
    "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
    "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    "output_blocks_2_0_out_layers_3": "up_blocks.0.resnets.2.conv2",
    "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
}


def test_kohya_of_sdxl(tmp_path):
    """The names are those of the original UNet."""
    pairs = {path: pair for path, pair in factors(unet()).items() if path in SDXL.values()}
    tensors = flat({name: pairs[path] for name, path in SDXL.items()}, "lora_unet")
    file = write(tmp_path / "xl.safetensors", tensors)
    loads_as(unet, file, expected(unet, pairs))


FLUX = {
    "transformer_blocks.0.attn.add_q_proj": lambda: nn.Linear(6, 7),
    "transformer_blocks.0.attn.add_k_proj": lambda: nn.Linear(6, 5),
    "transformer_blocks.0.attn.add_v_proj": lambda: nn.Linear(6, 4),
    "transformer_blocks.0.norm1_context.linear": lambda: nn.Linear(6, 11),
    **{
        f"single_transformer_blocks.12.{part}": lambda: nn.Linear(6, 6)
        for part in ("attn.to_q", "attn.to_k", "attn.to_v")
    },
    "single_transformer_blocks.12.proj_mlp": lambda: nn.Linear(6, 13),
}
FUSED = {
    "double_blocks_0_txt_attn_qkv": [*FLUX][:3],
    "double_blocks_0_txt_mod_lin": [*FLUX][3:4],
    "single_blocks_12_linear1": [*FLUX][4:],
}


def test_kohya_of_flux(tmp_path):
    """One layer of the original transformer is several here, which share A and have the rows of B in turn."""

    def build():
        return Layers(FLUX)

    generator, pairs, tensors = torch.Generator().manual_seed(2), {}, {}
    for name, paths in FUSED.items():
        sizes = [build().get_submodule(path).out_features for path in paths]
        a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 6), (sum(sizes), 2)))
        tensors |= flat({name: (a, b)}, "lora_unet", {name: 5.0})
        pairs |= {path: (a, rows) for path, rows in zip(paths, b.split(sizes), strict=True)}
    file = write(tmp_path / "flux.safetensors", tensors)
    loads_as(build, file, expected(build, pairs, lambda path: 2.5))
    tensors["lora_unet_single_blocks_12_linear1.lora_up.weight"] = torch.ones(30, 2)
    with pytest.raises(dk.CheckpointError, match="not in this backbone, such as single_blocks_12_linear1"):
        dk.load(write(file, tensors), build())


def test_lycoris(tmp_path):
    """Convolutions with a split kernel, differences of weights and biases, and those of norms."""
    model, generator = unet(), torch.Generator().manual_seed(8)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    conv, norm, linear = (
        "up_blocks.0.resnets.2.conv2",
        "down_blocks.0.resnets.0.norm1",
        "mid_block.attentions.0.proj_in",
    )
    down, mid, up = normal(3, 14, 1, 1), normal(3, 3, 3, 5), normal(10, 3, 1, 1)
    updates = {
        f"{path}.{name}": normal(*getattr(model.get_submodule(path), name).shape)
        for path in (norm, linear)
        for name in ("weight", "bias")
    }
    ends = {norm: ("w_norm", "b_norm"), linear: ("diff", "diff_b")}
    tensors = {
        f"lycoris_{path.replace('.', '_')}.{ends[path][name == 'bias']}": value
        for full, value in updates.items()
        for path, _, name in [full.rpartition(".")]
    }
    head = f"lycoris_{conv.replace('.', '_')}"
    tensors |= {
        f"{head}.lora_down.weight": down,
        f"{head}.lora_mid.weight": mid,
        f"{head}.lora_up.weight": up,
        f"{head}.alpha": torch.tensor(5.0),
    }
    updates[f"{conv}.weight"] = 5 / 3 * torch.einsum("mnkl,im,nj->ijkl", mid, up.flatten(1), down.flatten(1))
    file = write(tmp_path / "full.safetensors", tensors)
    delta = loads_as(unet, file, expected(unet, {}, updates=updates))
    assert delta.fully_trained == sorted(set(updates) - {f"{conv}.weight"})


@pytest.mark.parametrize("spelled", ["diffusers", "kohya"])
def test_a_file_for_several_components(spelled, tmp_path):
    """Each backbone gets the part that fits it, by names and shapes, and nothing is said of the others."""
    small = {path: (lambda build=build: build()) for path, build in TEXT.items()}
    large = {path.replace("encoder", "text_model.encoder"): lambda: nn.Linear(8, 8) for path in TEXT}
    builds = {"unet": unet, "text_encoder": lambda: Layers(small), "text_encoder_2": lambda: Layers(large)}
    ours = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    pairs = {component: factors(build(), r) for r, (component, build) in enumerate(builds.items(), 2)}
    tensors = {}
    for component, its in pairs.items():
        if component == "text_encoder":
            its = {f"text_model.{path}": pair for path, pair in its.items()}
        tensors |= dotted(its, f"{component}.") if spelled == "diffusers" else flat(its, ours[component])
    file = write(tmp_path / "all.safetensors", tensors)
    for component, build in builds.items():
        loads_as(build, file, expected(build, pairs[component]))
    found = read_saved(file, None, "there", values=False)
    assert len(found.methods) == 3
    assert sum(len(method["targets"]) for method in found.methods) == sum(map(len, pairs.values()))
    assert all(tensor.is_meta for tensor in found.tensors.values())


def test_what_the_file_alone_says(tmp_path):
    pairs = only(factors(unet()), "to_q")
    file = write(tmp_path / "a.safetensors", flat(pairs, "lora_unet", {QUERY: 2.0}))
    (method,) = read_saved(file, None, "there", values=False).methods
    assert method == {"method": "lora", "targets": [f"lora_unet_{QUERY.replace('.', '_')}"], "r": 3, "alpha": 2.0, "rslora": False, "dropout": 0.0, "untie": False}  # fmt: skip


def test_dora_of_lycoris(tmp_path):
    """W' = (W + s dW) dora_scale / (||W + s dW|| + eps), one norm per row. LyCORIS adds the eps of the dtype to the norm."""
    pairs, generator = factors(unet()), torch.Generator().manual_seed(8)
    tensors, model = flat(pairs, "lora_unet", dict.fromkeys(pairs, 2.0)), unet()
    with torch.no_grad():
        for path, (a, b) in pairs.items():
            weight = model.get_submodule(path).weight
            scale = 1 + torch.rand(len(weight), *[1] * (weight.ndim - 1), generator=generator, dtype=torch.float64)
            new = weight + 2 / 3 * torch.einsum("or,r...->o...", b.flatten(1), a).reshape(weight.shape)
            norm = new.flatten(1).norm(dim=1).view_as(scale)
            weight.copy_(new * scale / norm)
            tensors[f"lora_unet_{path.replace('.', '_')}.dora_scale"] = scale
    delta = loads_as(unet, write(tmp_path / "a.safetensors", tensors), model())
    assert all(method.dora for method in delta.methods)


def several(**more):
    return flat(only(factors(unet()), "to_q"), "lora_unet") | {key: torch.ones(2, 2) for key in more}


FLAT_QUERY = f"lora_unet_{QUERY.replace('.', '_')}"
REFUSED = {
    "OFT": ({"lora_unet_conv_in.oft_blocks": 0}, r"it has OFT \(lora_unet_conv_in.oft_blocks\), which deltakit does not have"),
    "GLoRA": ({"lora_unet_conv_in.a1.weight": 0}, "it has GLoRA"),
    "DoRA of inputs": ({f"{FLAT_QUERY}.dora_scale": 0}, r"magnitudes of shape \(2, 2\), and deltakit's has one for each of the 22 outputs"),
    "DoRA without factors": ({"lora_unet_conv_in.dora_scale": 0}, "conv_in has no two factors"),
    "DoRA of PEFT": ({f"{FLAT_QUERY}.lora_magnitude_vector": 0}, "it has DoRA of PEFT"),
    "an unknown end": ({f"{FLAT_QUERY}.lora_middle": 0}, "lora_middle is in no format of LoRA"),
    "no such module": ({"lora_unet_conv_9.lora_down.weight": 0}, "1 of the 2 layers that its part for lora_unet has are not in this backbone, such as conv_9"),
    "one factor": ({"lora_unet_conv_in.lora_down.weight": 0}, "conv_in has no two factors"),
    "no difference of a bias": ({f"{FLAT_QUERY}.diff_b": 0}, "for the bias of .*to_q, and this backbone has none"),
    "two alphas": ({f"{FLAT_QUERY}.alpha": 0}, "alpha of down_blocks_1_.* is no number"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    more, message = REFUSED[case]
    model = unet()
    before = snapshot(model)
    file = write(tmp_path / "a.safetensors", several(**more))
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(file, model)
    same(before, snapshot(model))


def test_what_is_wrong_with_other_parts_is_theirs(tmp_path):
    pairs = only(factors(unet()), "to_q")
    file = write(tmp_path / "a.safetensors", {**flat(pairs, "lora_unet"), "lora_te_x.oft_blocks": torch.ones(2, 2)})
    loads_as(unet, file, expected(unet, pairs))


METADATA = {
    "DoRA": ({"use_dora": True}, r"this LoRA of diffusers has DoRA \(use_dora\), .* diffusers' fuse_lora"),
    "a changed start": (
        {"init_lora_weights": "pissa"},
        "this LoRA of diffusers started by changing .* diffusers' fuse_lora",
    ),
    "a wrong type": ({"lora_alpha": "x"}, r"lora_adapter_metadata is damaged at lora_alpha"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_are_refused_are_those_of_diffusers(case, tmp_path):
    config, message = METADATA[case]
    entry = json.dumps({f"unet.{key}": value for key, value in ({"lora_alpha": 3} | config).items()})
    write(tmp_path / FILE, dotted(only(factors(unet()), "to_q"), "unet."), lora_adapter_metadata=entry)
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, unet())


def test_another_backbone(tmp_path):
    file = write(
        tmp_path / "a.safetensors", dotted(factors(unet()), "unet.") | dotted(factors(text()), "text_encoder.")
    )
    with pytest.raises(dk.CheckpointError, match=r"none of its parts \(text_encoder, unet\) fits this Layers"):
        dk.load(file, Layers({"other": lambda: nn.Linear(3, 3)}))
    wide = {path: lambda: nn.Linear(8, 8) for path in TEXT}
    with pytest.raises(
        dk.CheckpointError, match=r"the file has a LoRA of 6 to 6 features, and the backbone needs 8 to 8"
    ):
        dk.load(file, Layers(wide))
    norms = {path: lambda: nn.LayerNorm(6) for path in TEXT}
    with pytest.raises(dk.CheckpointError, match=r"it has a LoRA at .*, which is a LayerNorm"):
        dk.load(file, Layers(norms))


def test_two_parts_that_fit(tmp_path):
    tensors = dotted(factors(unet()), "transformer.") | dotted(factors(unet()), "transformer_2.")
    with pytest.raises(dk.CheckpointError, match="its parts for transformer and transformer_2 both fit this Layers"):
        dk.load(write(tmp_path / "a.safetensors", tensors), unet())


def test_a_name_of_two_modules(tmp_path):
    build = {"a.b_c": lambda: nn.Linear(3, 3), "a_b.c": lambda: nn.Linear(3, 3)}
    tensors = flat({"a_b_c": factors(Layers(build), 1)["a_b.c"]}, "lycoris")
    with pytest.raises(dk.CheckpointError, match=r"a_b_c is the name of two modules of this backbone: a.b_c and a_b.c"):
        dk.load(write(tmp_path / "a.safetensors", tensors), Layers(build))


def test_a_tied_weight_in_full(tmp_path):
    model = text()
    model.encoder.layers._modules["1"].mlp.other = nn.Linear(6, 11).double()
    model.encoder.layers._modules["1"].mlp.other.weight = model.encoder.layers._modules["1"].mlp.fc1.weight
    file = write(tmp_path / "a.safetensors", {"lycoris_encoder_layers_1_mlp_fc1.diff": torch.ones(11, 6)})
    with pytest.raises(dk.CheckpointError, match=r"fc1.weight trained in full, and in this backbone that is tied to"):
        dk.load(file, model)


def test_one_module_twice(tmp_path):
    pairs = only(factors(text()), "fc1")
    file = write(
        tmp_path / "a.safetensors", dotted(pairs) | dotted({f"text_model.{path}": pair for path, pair in pairs.items()})
    )
    with pytest.raises(
        dk.CheckpointError, match=r"text_model.* and .* are both encoder.layers.1.mlp.fc1 of this backbone"
    ):
        dk.load(file, text())
    tensors = dotted(pairs) | dotted(pairs, down=".lora_down.weight", up=".lora_up.weight")
    with pytest.raises(dk.CheckpointError, match=r"encoder.layers.1.mlp.fc1.lora_.*.weight in two spellings"):
        dk.load(write(tmp_path / "a.safetensors", tensors), text())


def test_layers_where_the_formula_is_another(tmp_path):
    build = {"conv": lambda: nn.Conv2d(4, 6, 3, dilation=2)}
    tensors = dotted(factors(Layers(build)))
    with pytest.raises(dk.CheckpointError, match="conv is a convolution with dilation"):
        dk.load(write(tmp_path / "a.safetensors", tensors), Layers(build))


class CLIPTextModel(Layers):
    pass


@pytest.mark.parametrize("kind", [Layers, CLIPTextModel])
def test_written(kind, tmp_path):
    """Other ranks are padded, and the metadata say the scale. `test_diffusers.py` opens such files in diffusers."""
    model = kind(TEXT)
    delta = randomize(dk.attach(model, dk.LoRA(r=2, alpha=5, at="q_proj"), dk.LoRA(r=3, alpha=4, at="fc1"), train=()))
    assert delta.save(tmp_path, format="diffusers") == tmp_path
    prefix = "text_encoder." if kind is CLIPTextModel else ""
    tensors, own = load_file(tmp_path / FILE), delta.state_dict()
    q = f"{prefix}encoder.layers.0.self_attn.q_proj"
    assert set(tensors) == {
        f"{path}.lora_{factor}.weight" for path in (q, f"{prefix}encoder.layers.1.mlp.fc1") for factor in "AB"
    }
    padded = torch.zeros(6, 3, dtype=torch.float64)
    padded[:, :2] = own["encoder.layers.0.self_attn.q_proj.lora.B"] * 2.5
    assert torch.equal(tensors[f"{q}.lora_B.weight"], padded)
    with safe_open(tmp_path / FILE, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert (config[f"{prefix}r"], config[f"{prefix}lora_alpha"]) == (3, 3)
    assert set(config[f"{prefix}target_modules"]) == {"encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"}
    loads_as(lambda: kind(TEXT), tmp_path, model())


def test_convolutions_are_written_whole(tmp_path):
    model = unet()
    randomize(dk.attach(model, dk.LoRA(r=3, alpha=7, at="**", of=(nn.Conv2d, nn.Linear)))).save(
        tmp_path, format="diffusers"
    )
    tensors = load_file(tmp_path / FILE)
    assert tensors["up_blocks.0.resnets.2.conv2.lora_A.weight"].shape == (3, 14, 3, 5)
    assert tensors["up_blocks.0.resnets.2.conv2.lora_B.weight"].shape == (10, 3, 1, 1)
    loads_as(unet, tmp_path, model())


UNWRITTEN = {
    "another method": (dk.BitFit(at="fc1"), (), "diffusers has LoRA, and this delta is bitfit"),
    "modules in full": (dk.LoRA(r=2, at="q_proj"), "fc1", r"it trains encoder.layers.1.mlp.fc1.weight in full"),
    "an embedding": (dk.LoRA(r=2, at="words"), (), "words is an embedding, where diffusers loads no LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITTEN)
def test_what_diffusers_does_not_have(case, tmp_path):
    method, train, message = UNWRITTEN[case]
    delta = randomize(dk.attach(Layers(TEXT | {"words": lambda: nn.Embedding(9, 6)}), method, train=train))
    message = f"delta 'delta' cannot be saved as a LoRA of diffusers: .*{message}.*; save it in the format 'deltakit'"
    with pytest.raises(dk.CheckpointError, match=message):
        delta.save(tmp_path, format="diffusers")
    assert not any(tmp_path.iterdir())
