"""LyCORIS's LoHa and LoKr: the outputs are those of its formula; what does not fit is refused."""

import math

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import deltakit as dk
from support.image_models import ATTENTION, Layers, close, expected, unet
from support.models import same, snapshot

CONV, POINT = "up_blocks.0.resnets.2.conv2", "down_blocks.1.attentions.1.proj_in"
LINEAR, WIDE = "mid_block.attentions.0.proj_in", f"down_blocks.1.{ATTENTION}.to_q"


def normal(*shape):
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def seed():
    GENERATOR.manual_seed(6)


def loha(weight, r, tucker=False):
    """The tensors of a LoHa and its update."""
    out, into, *kernel = weight.shape
    if tucker:
        own = {f"hada_t{n}": normal(r, r, *kernel) for n in "12"}
        own |= {f"hada_w{n}_{side}": normal(r, size) for n in "12" for side, size in (("a", out), ("b", into))}
        parts = [
            torch.einsum("ijkl,jr,ip->prkl", own[f"hada_t{n}"], own[f"hada_w{n}_b"], own[f"hada_w{n}_a"]) for n in "12"
        ]
    else:
        own = {f"hada_w{n}_a": normal(out, r) for n in "12"}
        own |= {f"hada_w{n}_b": normal(r, into * math.prod(kernel)) for n in "12"}
        parts = [own[f"hada_w{n}_a"] @ own[f"hada_w{n}_b"] for n in "12"]
    return own, (parts[0] * parts[1]).reshape(weight.shape)


def lokr(weight, left, r=None, left_r=None, tucker=False):
    """The tensors of a LoKr and its update."""
    out, into, *kernel = weight.shape
    p, m = left
    q, n = out // p, into // m
    if left_r is None:
        own = {"lokr_w1": normal(p, m)}
        first = own["lokr_w1"]
    else:
        own = {"lokr_w1_a": normal(p, left_r), "lokr_w1_b": normal(left_r, m)}
        first = own["lokr_w1_a"] @ own["lokr_w1_b"]
    if r is None:
        own["lokr_w2"] = normal(q, n, *kernel)
        second = own["lokr_w2"]
    elif tucker:
        own |= {"lokr_t2": normal(r, r, *kernel), "lokr_w2_a": normal(r, q), "lokr_w2_b": normal(r, n)}
        second = torch.einsum("ijkl,jr,ip->prkl", own["lokr_t2"], own["lokr_w2_b"], own["lokr_w2_a"])
    else:
        own |= {"lokr_w2_a": normal(q, r), "lokr_w2_b": normal(r, n * math.prod(kernel))}
        second = (own["lokr_w2_a"] @ own["lokr_w2_b"]).view(q, n, *kernel)
    first = first[(..., *[None] * len(kernel))]
    return own, torch.kron(first.contiguous(), second.contiguous())


FORMS = {
    "loha": (loha, {"r": 3}, 3),
    "loha, tucker": (loha, {"r": 3, "tucker": True}, 3),
    "lokr, full": (lokr, {"left": (2, 7)}, None),
    "lokr": (lokr, {"left": (2, 2), "r": 2}, 2),
    "lokr of a high rank": (lokr, {"left": (2, 2), "r": 5}, 5),
    "lokr, left of a rank": (lokr, {"left": (2, 7), "left_r": 2}, 2),
    "lokr, left of a high rank": (lokr, {"left": (2, 7), "r": 1, "left_r": 1}, 1),
    "lokr, left of a rank above its size": (lokr, {"left": (2, 2), "r": 2, "left_r": 2}, 2),
    "lokr, tucker": (lokr, {"left": (2, 2), "r": 2, "tucker": True}, 2),
    "lokr, tucker of a high rank": (lokr, {"left": (2, 2), "r": 4, "tucker": True}, 4),
}
CASES = [(form, path) for form in FORMS for path in (CONV, POINT, LINEAR, WIDE) if path == CONV or "tucker" not in form]


def save(place, path, own, alpha=None):
    head = f"lora_unet_{path.replace('.', '_')}"
    tensors = {f"{head}.{name}": tensor.contiguous() for name, tensor in own.items()}
    if alpha is not None:
        tensors[f"{head}.alpha"] = torch.tensor(alpha)
    save_file(tensors, place)
    return place


@pytest.mark.parametrize("alpha", [None, 5.0])
@pytest.mark.parametrize(("form", "path"), CASES)
def test_the_outputs_are_those_of_the_formula(form, path, alpha, tmp_path):
    make, options, r = FORMS[form]
    model = unet()
    own, update = make(model.get_submodule(path).weight, **options)
    file = save(tmp_path / "style.safetensors", path, own, alpha)
    # With both matrices full, LyCORIS has the scale 1 whatever the alpha is.
    scale = 1 if alpha is None or r is None else alpha / r
    before = snapshot(model)
    delta = dk.load(file, model)
    close(model(), expected(unet, {}, updates={f"{path}.weight": scale * update}))
    assert dk.inspect(file).methods[0].name == delta.methods[0].name == form.partition(",")[0].partition(" ")[0]
    delta.detach()
    same(before, snapshot(model))


def test_several_in_one_file_beside_lora(tmp_path):
    model, updates, tensors = unet(), {}, {}
    for path, (make, options) in {CONV: (loha, {"r": 2}), LINEAR: (lokr, {"left": (2, 2), "r": 2})}.items():
        own, updates[f"{path}.weight"] = make(model.get_submodule(path).weight, **options)
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{name}": value.contiguous() for name, value in own.items()}
    a, b = normal(2, 14), normal(22, 2)
    head = f"lora_unet_{WIDE.replace('.', '_')}"
    tensors |= {f"{head}.lora_down.weight": a, f"{head}.lora_up.weight": b}
    updates[f"{WIDE}.weight"] = b @ a
    save_file(tensors, tmp_path / "a.safetensors")
    delta = dk.load(tmp_path / "a.safetensors", model)
    close(model(), expected(unet, {}, updates=updates))
    assert sorted(method.name for method in delta.methods) == ["loha", "lokr", "lora"]


def test_a_fused_layer_of_flux(tmp_path):
    """The rows of the first matrices are those of three layers."""
    paths = [f"transformer_blocks.0.attn.add_{part}_proj" for part in "qkv"]

    def build():
        return Layers({path: lambda size=size: nn.Linear(6, size) for path, size in zip(paths, (7, 5, 4), strict=True)})

    own, update = loha(torch.empty(16, 6), 2)
    save(tmp_path / "flux.safetensors", "double_blocks_0_txt_attn_qkv", own)
    model = build()
    dk.load(tmp_path / "flux.safetensors", model)
    close(
        model(),
        expected(build, {}, updates={f"{p}.weight": u for p, u in zip(paths, update.split((7, 5, 4)), strict=True)}),
    )


def without(own, name):
    return {key: tensor for key, tensor in own.items() if key != name}


REFUSED = {
    "no second matrix": (lambda own: without(own, "hada_w2_a"), "it has no hada_w2_a; save it again"),
    "one core": (lambda own: {**own, "hada_t1": normal(2, 2, 3, 5)}, "the file has a LoRA of .* features, and the backbone needs 14 to 18"),
    "no first factor": (lambda own: without(own, "hada_w1_b"), "is a LoHa or LoKr, and its tensors do not fit each other"),
    "a vector": (lambda own: {**own, "hada_w1_b": normal(2)}, "its tensors do not fit each other"),
    "DoRA": (lambda own: {**own, "dora_scale": normal(18, 1)}, "it has dora_scale, which deltakit does not have; use it in LyCORIS"),
    "LoRA, too": (lambda own: {**own, "lora_up.weight": normal(18, 1)}, "it has B, which deltakit does not have; use it in LyCORIS"),
    "two alphas": (lambda own: {**own, "alpha": normal(2)}, "the alpha of .* is no number"),
    "another size": (lambda own: {**own, "hada_w1_b": normal(2, 13)}, "has a LoRA of 13 to 18 features, and the backbone needs 14 to 18"),
    "no values": (lambda own: {**own, "hada_w2_b": normal(2, 0)}, "its tensors do not fit each other"),
    "a vector of the second": (lambda own: {**own, "hada_w2_a": normal(2)}, "its tensors do not fit each other"),
    "another rank": (lambda own: {**own, "hada_w2_b": normal(3, 14)}, "the tensors of loha at .* do not fit each other"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    change, message = REFUSED[case]
    model = unet()
    own, _ = loha(model.get_submodule(LINEAR).weight, 2)
    before = snapshot(model)
    file = save(tmp_path / "a.safetensors", LINEAR, change(own))
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(file, model)
    same(before, snapshot(model))


def test_a_convolution_that_pads_otherwise_is_refused(tmp_path):
    def build():
        return Layers({"conv": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")})

    own, _ = loha(build().conv.weight, 2)
    file = save(tmp_path / "a.safetensors", "conv", own)
    with pytest.raises(
        dk.CheckpointError, match="conv is a convolution that is padded by other than zeros, where LyCORIS"
    ):
        dk.load(file, build())


def test_a_file_of_an_unknown_method_alone_has_one_error_with_and_without_a_backbone(tmp_path):
    names = {f"lycoris_{LINEAR.replace('.', '_')}.{name}": normal(1) for name in ("on_input", "weight")}
    save_file(names, tmp_path / "ia3.safetensors")
    for read in (dk.inspect, lambda file: dk.load(file, unet())):
        with pytest.raises(dk.CheckpointError, match="it has IA3 of LyCORIS .*on_input., which deltakit does not have"):
            read(tmp_path / "ia3.safetensors")
