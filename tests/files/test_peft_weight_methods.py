"""PEFT's files of methods that change weights, in both directions, with PEFT's own outputs."""

import copy
import json
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from support.models import Transformer, ids, randomize
from support.peft_models import adapted, opened, peft
from support.weight_methods import CASES, Chain, chain


class Convolutions(nn.Module):
    """A 1d convolution, a 2d one, and one with a kernel of size 1."""

    def __init__(self):
        super().__init__()
        self.flat = nn.Conv1d(6, 20, 3, padding=1)
        self.image = nn.Conv2d(20, 21, (3, 2), stride=(2, 1), padding=(1, 0))
        self.point = nn.Conv2d(21, 10, 1)
        self.grouped = nn.Conv2d(10, 6, 3, groups=2)

    def forward(self, x):
        x = torch.tanh(self.flat(x.flatten(2))).unflatten(2, x.shape[2:])
        return self.grouped(self.point(torch.tanh(self.image(x))))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.up = nn.Embedding(13, 6), nn.Linear(6, 7)

    def forward(self, x):
        return self.up(self.words(x))


def built(kind):
    torch.manual_seed(3)
    return {"convolutions": Convolutions, "words": Words}[kind]().double().eval()


def given(kind):
    torch.manual_seed(4)
    return torch.randint(13, (2, 5)) if kind == "words" else torch.randn(2, 6, 8, 7).double()


IMAGES = ["flat", "image", "point", "grouped"]
ON_MODULES = {
    "loha": ("convolutions", peft.LoHaConfig(r=3, alpha=6, target_modules=IMAGES)),
    "loha, tucker": ("convolutions", peft.LoHaConfig(r=3, alpha=6, target_modules=IMAGES, use_effective_conv2d=True)),
    "lokr": ("convolutions", peft.LoKrConfig(r=2, alpha=6, target_modules=IMAGES[:3])),
    "lokr, tucker": (
        "convolutions",
        peft.LoKrConfig(r=2, alpha=6, target_modules=IMAGES[:3], use_effective_conv2d=True, decompose_both=True),
    ),
    "lokr, full": ("convolutions", peft.LoKrConfig(r=9, alpha=6, target_modules=IMAGES[1:])),
    "hira": ("convolutions", peft.HiraConfig(r=3, target_modules=IMAGES[:3])),
    "hira of words": ("words", peft.HiraConfig(r=3, target_modules=["words", "up"])),
}


def theirs(model, config, folder):
    """PEFT's model with random values, saved."""
    return adapted(model, copy.deepcopy(config), folder)


def same(found, expected):
    # PEFT keeps frozen matrices and scales in float32.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ON_MODULES)
def test_convolutions_and_embeddings(name, tmp_path):
    kind, config = ON_MODULES[name]
    x, model = given(kind), built(kind)
    bare = model(x)
    expected = theirs(built(kind), config, tmp_path / "theirs")(x)
    delta = dk.load(tmp_path / "theirs", model)
    same(model(x), expected)
    assert (bare - expected).abs().max() > 1e-3
    if kind == "words":
        with pytest.raises(dk.CheckpointError, match="words is an Embedding, for which deltakit writes no HiRA"):
            delta.save(tmp_path / "ours", format="peft")
        return
    randomize(delta)
    delta.save(tmp_path / "ours", format="peft")
    same(opened(built(kind), tmp_path / "ours")(x), model(x))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.theirs is not None])
def test_linear_layers(name, tmp_path):
    case = CASES[name]
    model, x = chain(case)
    bare, config = model(x), copy.deepcopy(case.theirs)
    config.target_modules = model.targets
    expected = theirs(chain(case)[0], config, tmp_path / "theirs")(x)
    delta = dk.load(tmp_path / "theirs", model)
    same(model(x), expected)
    assert (bare - expected).abs().max() > 1e-3
    randomize(delta)
    delta.save(tmp_path / "ours", format="peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same(opened(chain(case)[0], tmp_path / "ours")(x), model(x))
    again, _ = chain(case)
    dk.load(tmp_path / "ours", again)
    same(again(x), model(x))
    assert dk.inspect(tmp_path / "ours").num_values >= delta.num_parameters


def saved(name, folder, **options):
    """A file of PEFT for a case of linear layers, and its config with other options."""
    case = CASES[name]
    config = copy.deepcopy(case.theirs)
    config.target_modules = Chain(case.sizes).targets
    for option, value in options.items():
        setattr(config, option, value)
    return theirs(chain(case)[0], config, folder)


@pytest.mark.parametrize("name", ["VeRA", "RandLoRA, sparse"])
def test_without_the_frozen_matrices_they_are_drawn(name, tmp_path):
    case = CASES[name]
    expected = saved(name, tmp_path, save_projection=False)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if key.endswith(("_A", "_B"))]
    model, x = chain(case)
    dk.load(tmp_path, model)
    same(model(x), expected(x))


@pytest.mark.parametrize("name", ["VeRA", "RandLoRA, uniform"])
def test_frozen_matrices_that_no_seed_gives_are_refused(name, tmp_path):
    saved(name, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    held = next(key for key in tensors if re.fullmatch(r"base_model\.\w+_B", key))
    tensors[held][1] += 0.5
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(dk.CheckpointError, match="_B is not what the seed 4 gives here: .* merge the adapter into"):
        dk.load(tmp_path, chain(CASES[name])[0])


def test_a_bank_with_chosen_logits_alone(tmp_path):
    expected = saved("VBLoRA", tmp_path, save_only_topk_weights=True)
    assert [key for key in load_file(tmp_path / "adapter_model.safetensors") if "topk_weights" in key]
    model, x = chain(CASES["VBLoRA"])
    delta = dk.load(tmp_path, model)
    same(model(x), expected(x))
    # Unlike PEFT's, whose logits are infinite, it can be trained on.
    model(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in delta.parameters())
    delta.save(tmp_path / "own")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, key: tensors.pop(key.replace("indices", "weights")), "it has no weights for first.vblora_logits_A_topk"),
        (lambda tensors, key: tensors[key].fill_(200), "first.vblora_logits_A_topk_indices chooses vectors that its bank does not"),
    ],
)  # fmt: skip
def test_a_damaged_choice_is_refused(change, message, tmp_path):
    saved("VBLoRA", tmp_path, save_only_topk_weights=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors, "base_model.model.first.vblora_logits_A_topk_indices")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, chain(CASES["VBLoRA"])[0])


def test_a_kronecker_product_that_peft_computes_wrongly_is_refused(tmp_path):
    """torch.kron of a matrix and a kernel [q, n, k] takes the matrix for [1, p, m]."""
    config = peft.LoKrConfig(r=9, alpha=9, target_modules=["flat"])
    model = theirs(built("convolutions"), config, tmp_path).base_model.model.flat
    left, right = model.lokr_w1["default"], model.lokr_w2["default"]
    update = torch.kron(left, right.flatten(1)).view(20, 6, 3)
    assert not torch.allclose(model.get_delta_weight("default"), update)
    with pytest.raises(dk.CheckpointError, match="flat is a 1d convolution whose right matrix has its full rank"):
        dk.load(tmp_path, built("convolutions"))
    delta = randomize(dk.attach(built("convolutions"), dk.LoKr(r=9, at="flat")))
    with pytest.raises(dk.CheckpointError, match="flat has a right matrix of full rank, which PEFT computes wrongly"):
        delta.save(tmp_path / "ours", format="peft")


IMPOSSIBLE = {
    "left": ((dk.LoKr(r=2, left=(5, 5), at="q_proj"),), "PEFT has neither left= nor full= of LoKr"),
    "a start": ((dk.DeLoRA(r=2, at="q_proj"),), "DELORA of PEFT has no start of random factors; use DeLoRA(start='zero')"),
    "two forms": ((dk.MiSS(r=4, at="q_proj"), dk.MiSS(r=4, mini=5, at="v_proj")), "its targets differ in bat or mini"),
    "two seeds": ((dk.VeRA(r=2, at="q_proj"), dk.VeRA(r=2, start=0.3, at="v_proj")), "its targets have different options"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_peft_cannot_express(name, tmp_path):
    methods, message = IMPOSSIBLE[name]
    delta = randomize(dk.attach(Transformer(), *methods))
    with pytest.raises(dk.CheckpointError, match=re.escape(message)):
        delta.save(tmp_path, format="peft")


def test_the_advice_for_a_start_that_peft_lacks_works(tmp_path):
    model = Transformer().double()
    delta = randomize(dk.attach(model, dk.DeLoRA(r=2, at=["v_proj", "up_proj"])))
    expected = model(ids())
    delta.detach()
    dk.combine(model, {delta: 1.0}).delta.save(tmp_path, format="peft")
    torch.testing.assert_close(opened(model, tmp_path)(ids()), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", ["pissa", "orthogonal", "mica"])
@pytest.mark.parametrize("dora", [False, True])
def test_starts_of_lora_are_written_as_what_they_add_up_to(start, dora, tmp_path):
    model = Transformer().double().eval()
    twin = copy.deepcopy(model)
    delta = randomize(dk.attach(model, dk.LoRA(r=4, start=start, rslora=True, dora=dora, at=["v_proj", "up_proj"])))
    delta.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == (4 if start == "mica" else 8)
    same(opened(copy.deepcopy(twin), tmp_path)(ids()), model(ids()))
    dk.load(tmp_path, twin)
    same(twin(ids()), model(ids()))


def halved(tensors, key):
    tensors[key] = tensors[key].flatten()[: tensors[key].numel() // 2].clone()


DAMAGED = {
    "VeRA": ("vera_A", {}, "vera_A and vera_B have the shapes .* which do not fit the rank 3 of its config"),
    "VeRA, its rank": ("", {"r": 2**40}, "do not fit the rank 1099511627776 of its config"),
    "RandLoRA, uniform": ("randlora_B", {}, "randlora_A and randlora_B have the shapes"),
    "MiSS": ("model.first.miss_block", {}, "miss"),
    "GraLoRA": ("model.first.gralora_A", {}, "gralora"),
    "LoKr": ("model.first.lokr_w2_b", {}, "lokr"),
    "MiSS, mini": ("", {"mini_r": "x"}, "mini"),
    "DeLoRA": ("", {"delora_lambda": -3}, "strength"),
    "VBLoRA": ("", {"topk": 2**40}, "top"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name, tmp_path):
    key, options, message = DAMAGED[name]
    case = CASES.get(name) or CASES[name.partition(",")[0]]
    saved(name if name in CASES else name.partition(",")[0], tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if key:
        halved(tensors, f"base_model.{key}")
    save_file(tensors, file, {"format": "pt"})
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **options}))
    with pytest.raises(dk.CheckpointError, match=message):
        dk.load(tmp_path, chain(case)[0])


def test_a_choice_of_far_too_many_vectors_is_refused(tmp_path):
    saved("VBLoRA", tmp_path, save_only_topk_weights=True)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.vblora_vector_bank"] = torch.zeros(30_000, 5)
    key = "base_model.model.first.vblora_logits_A_topk"
    tensors[f"{key}_indices"] = torch.zeros(3, 30_000, 2, dtype=torch.uint8)
    tensors[f"{key}_weights"] = torch.zeros(3, 30_000, 1)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        dk.CheckpointError, match="is damaged: its logits would have far more values than it has itself"
    ):
        dk.load(tmp_path, chain(CASES["VBLoRA"])[0])
