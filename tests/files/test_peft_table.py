"""Methods of PEFT that are a row in a table: read and written with PEFT's own outputs, and what is refused.

The methods here are small ones of the tests: one that shares matrices, and one with options by patterns.
"""

import json
import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from deltakit.core import DeltaModule, PerTarget, Target, one_value
from deltakit.files.formats.layers import Layers
from deltakit.files.formats.peft import reader, writer
from deltakit.files.formats.peft.row import Field, Row, Stored
from deltakit.ops import LowRank, WeightMap, like
from deltakit.ops.sizes import sizes
from support.kind_methods import registered
from support.models import randomize
from support.peft_models import adapted, opened, outputs, peft, wide


class VectorsDelta(LowRank):
    """VeRA: B_0 and A_0 for all targets, and a vector for each side."""

    def __init__(self, target: Target, r: int) -> None:
        super().__init__(target, scaling=1.0)
        self.b = nn.Parameter(torch.zeros(self.d_out, **like(target)))
        self.d = nn.Parameter(torch.ones(r, **like(target)))

    def factors(self):
        return self.d[:, None] * self.shared.A[:, : self.d_in], self.b[:, None] * self.shared.B[: self.d_out]


class Matrices(nn.Module):
    def __init__(self, r: int, targets) -> None:
        super().__init__()
        d_in, d_out = (max(d) for d in zip(*(sizes(target, "") for target in targets), strict=True))
        self.A = nn.Parameter(torch.zeros(r, d_in, **like(targets[0])))
        self.B = nn.Parameter(torch.zeros(d_out, r, **like(targets[0])))


@dataclass(frozen=True, kw_only=True)
class Vectors(dk.Method):
    name: ClassVar[str] = "test_vectors"
    kind: ClassVar[type[DeltaModule]] = VectorsDelta
    r: int = 3
    dropout: float = 0.0

    def build_at(self, target):
        return VectorsDelta(target, self.r)

    def build_shared(self, index, targets):
        return Matrices(self.r, targets)


class HadamardDelta(WeightMap):
    """LoHa: the product of two low-rank matrices, element by element."""

    def __init__(self, target: Target, r: int, alpha: float) -> None:
        super().__init__(target)
        d_in, d_out = sizes(target, self.word())
        self.scaling = alpha / r
        self.a, self.c = (nn.Parameter(torch.zeros(r, d_out, **like(target))) for _ in range(2))
        self.b, self.d = (nn.Parameter(torch.zeros(r, d_in, **like(target))) for _ in range(2))

    def weight_update(self, weight):
        return self.scaling * (self.a.T @ self.b) * (self.c.T @ self.d)


@dataclass(frozen=True, kw_only=True)
class Hadamard(dk.Method):
    name: ClassVar[str] = "test_hadamard"
    kind: ClassVar[type[DeltaModule]] = HadamardDelta
    per_target: ClassVar = ("r", "alpha")
    r: PerTarget[int] = 8
    alpha: PerTarget[float] = 8.0
    half: bool = False

    def build_at(self, target):
        return HadamardDelta(target, one_value(self.r), one_value(self.alpha))


def turned(tensor, _=None):
    return tensor.mT.contiguous()


VERA = Row(
    peft_type="VERA",
    method="test_vectors",
    tensors={
        ".vera_lambda_b": Stored("b"),
        ".vera_lambda_d": Stored("d"),
        "vera_A": Stored("shared.A"),
        "vera_B": Stored("shared.B"),
    },
    fields={"r": Field("r", int, 256), "vera_dropout": Field("dropout", float, 0.0)},
    layers=Layers(),
    refuses=lambda config: "" if config.get("save_projection", True) else "no matrices in its file (save_projection)",
    training_only=("layers_pattern",),
    known=("d_initial", "init_weights", "projection_prng_key", "save_projection"),
)
LOHA = Row(
    peft_type="LOHA",
    method="test_hadamard",
    tensors={
        ".hada_w1_a": Stored("a", turned, turned),
        ".hada_w1_b": Stored("b"),
        ".hada_w2_a": Stored("c", turned, turned),
        ".hada_w2_b": Stored("d"),
    },
    fields={
        "r": Field("r", int, 8, "rank_pattern"),
        "alpha": Field("alpha", float, 8, "alpha_pattern"),
        "use_half": Field("half", bool, False),
    },
    layers=Layers((nn.Conv2d,), conv1d=False),
    differs=lambda module: "is dilated" if getattr(module, "dilation", (1, 1)) != (1, 1) else "",
    training_only=("rank_dropout", "module_dropout"),
    known=("init_weights", "use_effective_conv2d"),
)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    with registered(Vectors, Hadamard):
        for row in (VERA, LOHA):
            monkeypatch.setitem(reader.KINDS, row.peft_type, reader.by_row(row))
            monkeypatch.setitem(writer.KINDS, row.method, writer.by_row(row))
        yield


QUERIES = {"bert": ["query", "output.dense"], "gpt2": ["c_attn", "mlp.c_proj"], "llama": ["q_proj", "v_proj"]}
CASES = {
    **{f"vera {name}": peft.VeraConfig(r=3, target_modules=QUERIES[name]) for name in QUERIES},
    "loha llama": peft.LoHaConfig(r=3, alpha=5, target_modules=QUERIES["llama"]),
    "loha bert": peft.LoHaConfig(
        r=3,
        alpha=5,
        target_modules=QUERIES["bert"],
        rank_pattern={"layer.0.attention.self.query": 2, "query": 1},
        alpha_pattern={"1.output.dense": 7},
        modules_to_save=["classifier"],
    ),
}


def same(found, expected):
    # PEFT keeps these two in float32.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", CASES)
def test_read_and_written_again(case, tmp_path):
    name = case.split()[-1]
    theirs = adapted(wide(name), CASES[case], tmp_path / "theirs")
    shared = getattr(theirs.base_model, "vera_A", None)
    assert shared is None or shared["default"].shape[0] == 3
    expected, model = outputs(name, theirs), wide(name)
    bare = outputs(name, model)
    delta = dk.load(tmp_path / "theirs", model)
    same(outputs(name, model), expected)
    assert (expected - bare).abs().max() > 1e-4
    # And back, with other values.
    randomize(delta, 0.3)
    delta.save(tmp_path / "ours", format="peft")
    same(outputs(name, opened(wide(name), tmp_path / "ours")), outputs(name, model))
    again = wide(name)
    dk.load(tmp_path / "ours", again)
    assert torch.equal(outputs(name, again), outputs(name, model))
    assert dk.inspect(tmp_path / "ours").num_values == delta.num_parameters


def test_options_by_patterns(tmp_path):
    delta = randomize(dk.attach(wide("llama"), Hadamard(r={"layers.0": 2, "*": 5}, alpha=3.0, at="q_proj")))
    delta.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["alpha"], "alpha_pattern" in config, "fan_in_fan_out" in config) == (3.0, False, False)
    assert {config["r"], *config["rank_pattern"].values()} == {2, 5}
    found = dk.inspect(tmp_path)
    assert {method.options["r"]: len(method.targets) for method in found.methods} == {2: 1, 5: 1}


REFUSED = {
    "two methods that share": ("llama", (Vectors(r=2, at="q_proj"), Vectors(r=3, at="v_proj")), "it has two test_vectors that share vera_A among others"),
    "two options": ("llama", (Hadamard(r=2, at="q_proj"), Hadamard(r=2, half=True, at="v_proj")), "its targets differ in half, and PEFT has one use_half for all"),
    "a slice": ("gpt2", (Vectors(at="c_attn[q]"),), "is a part of a module, and VERA of PEFT has all of it"),
    "a layer": ("gpt2", (Hadamard(at="c_attn"),), "c_attn is a Conv1D, for which PEFT has no test_hadamard"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_express(case, tmp_path):
    name, methods, message = REFUSED[case]
    delta = randomize(dk.attach(wide(name), *methods, train=()))
    with pytest.raises(dk.CheckpointError, match=f"cannot be saved as an adapter of PEFT: .*{re.escape(message)}"):
        delta.save(tmp_path / "adapter", format="peft")


DAMAGED = {
    "a refused option": ("vera", {"save_projection": False}, (), "this VERA of PEFT no matrices in its file"),
    "a wrong type": ("vera", {"r": "3"}, (), r"adapter_config.json is damaged at r: expected `int`, got `str`"),
    "a wrong pattern": ("loha", {"rank_pattern": {"query": "x"}}, (), "is damaged at rank_pattern"),
    "no vector": ("vera", {}, ("vera_lambda_d",), "it has no bert.encoder.layer.0.attention.*.vera_lambda_d; save"),
    "no matrix": ("vera", {}, ("vera_B",), "it has no vera_B; save or download it again"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_what_cannot_be_read(case, tmp_path):
    kind, config, dropped, message = DAMAGED[case]
    adapted(wide("bert"), CASES[f"{kind} bert"], tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    left = {key: tensor for key, tensor in tensors.items() if not key.endswith(dropped or ("-",))}
    save_file(left, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    for read in (dk.inspect, lambda folder: dk.load(folder, wide("bert"))):
        with pytest.raises(dk.CheckpointError, match=message):
            read(tmp_path)


def test_what_changes_the_training_alone_is_said(tmp_path):
    adapted(wide("llama"), peft.LoHaConfig(r=2, target_modules=["q_proj"], rank_dropout=0.2), tmp_path)
    with pytest.warns(
        dk.DeltaWarning, match="it was trained with rank_dropout, which deltakit does not have: outputs are"
    ):
        dk.load(tmp_path, wide("llama"))


def test_too_many_patterns_are_refused(tmp_path):
    many = {f"layers.{number}.q_proj": 2.0 for number in range(10_001)}
    adapted(wide("llama"), peft.LoHaConfig(r=2, alpha=2, target_modules=["q_proj"]), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "alpha_pattern": many}))
    with pytest.raises(
        dk.CheckpointError, match="alpha_pattern: it has 10,001 patterns, and deltakit reads at most 10,000"
    ):
        dk.load(tmp_path, wide("llama"))
