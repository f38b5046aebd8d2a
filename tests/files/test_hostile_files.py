"""Files that a stranger has written: whatever is in them, loading gives a delta or a `CheckpointError` that names the field."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from deltakit.delta.rebuilding import SizeLimit
from deltakit.methods.bitfit import BitFitDelta
from deltakit.ops import Seeded, normal
from deltakit.selection import BackboneIndex
from support.damaged_files import CONFIG, DAMAGED, FORGED, TENSORS, backbone, made, outcome, result
from support.forged_files import forge
from support.kind_methods import registered
from support.models import attached, same, snapshot
from support.paths import CHECKPOINTS
from support.tiny_transformers import build

pytestmark = pytest.mark.usefixtures("unchecked")


@pytest.fixture
def folder(tmp_path):
    made(5).save(tmp_path / "saved")
    return tmp_path / "saved"


def refuse(folder, message, model=None):
    model = backbone() if model is None else model
    before = snapshot(model)
    with pytest.raises(dk.CheckpointError, match=message) as caught:
        dk.load(folder, model)
    assert str(folder) in str(caught.value)
    same(before, snapshot(model))


@pytest.mark.parametrize("kinds", [DAMAGED, FORGED], ids=["damaged", "forged"])
def test_damaged_files_are_refused_or_load_what_was_saved(tmp_path, kinds):
    """A small sample of what `benchmarks/damage.py` does by the thousand."""
    deltas = [made(5), made(7)]
    saved, wanted = (
        [delta.save(tmp_path / str(n)) for n, delta in enumerate(deltas)],
        [result(delta) for delta in deltas],
    )
    found, errors = Counter(), []
    for number in range(180):
        got, error = outcome(kinds, number, "tests", saved, tmp_path / "damaged", wanted)
        found[got] += 1
        errors += [error] if error is not None else []
    assert errors == []
    assert found.keys() <= {"equal load", "CheckpointError"} | ({"other load"} if kinds is FORGED else set())
    assert min(found["equal load"], found["CheckpointError"]) > 20


def test_each_bit_of_the_tensors_counts(folder):
    file = folder / TENSORS
    good = file.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for place in range(start, len(good), 19):
        file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises(
            dk.CheckpointError, match="damaged: its tensors are not what was saved; save or download it again"
        ):
            dk.load(folder, backbone())


def test_a_delta_without_its_config_is_refused(folder):
    save_file({name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}, folder / TENSORS)
    refuse(folder, "delta_config.json and delta_model.safetensors come from two different saves")
    (folder / CONFIG).unlink()
    refuse(folder, "no delta in this folder: expected delta_config.json, found README.md, delta_model.safetensors")


# Types and values of fields


def put(*path, value):
    """A change of a config: the value at a path of keys."""

    def change(config):
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


FIELDS = {
    "a list of methods is none": (put("methods", value=[]), "methods: expected `array` of length >= 1"),
    "methods": (put("methods", value={}), "methods: expected `array`, got `object`"),
    "method": (put("methods", 0, "method", value=7), r"methods\[0\].method: expected `str`, got `int`"),
    "targets": (put("methods", 1, "targets", value="norm"), r"methods\[1\].targets: expected `array`, got `str`"),
    "no targets": (put("methods", 1, "targets", value=[]), r"methods\[1\].targets: expected `array` of length >= 1"),
    "a target": (put("methods", 1, "targets", value=["norm", None]), r"methods\[1\].targets\[1\]: expected `str`, got `null`"),
    "backwards": (put("methods", 1, "targets", value=["{5-1}"]), r"methods\[1\].targets: '{5-1}': the range '5-1' runs backw"),
    "option": (put("methods", 0, "r", value="3"), r"methods\[0\].r: expected `int`, got `str`"),
    "an option that is almost right": (put("methods", 0, "r", value=3.0), r"methods\[0\].r: expected `int`, got `float`"),
    "a number for a switch": (put("methods", 0, "rslora", value=1), r"methods\[0\].rslora: expected `bool`, got `int`"),
    "a switch for a number": (put("methods", 0, "r", value=True), r"methods\[0\].r: expected `int`, got `bool`"),
    "at": (put("methods", 0, "at", value=[1]), r"methods\[0\].at\[0\]: expected `str`, got `int`"),
    "of": (put("methods", 0, "of", value={}), r"methods\[0\].of: expected `str | array | null`, got `object`"),
    "range": (put("methods", 0, "dropout", value=2.0), r"methods\[0\]: LoRA\(dropout=2.0\): expected a probability in \[0, 1\)"),
    "too strong": (put("methods", 0, "alpha", value=1e308), r"methods\[0\]: LoRA\(alpha=1e\+308\): expected a finite number"),
    "train": (put("train", value=None), "train: expected `object`, got `null`"),
    "names": (put("train", "names", value=[0]), r"train.names\[0\]: expected `str`, got `int`"),
    "selectors": (put("train", "selectors", value=None), "train.selectors: expected `array`, got `null`"),
    "name": (put("name", value=3), "name: expected `str | null`, got `int`"),
    "a name": (put("name", value="a.b"), "name: name='a.b': expected a word without dots, spaces and control"),
    "an empty name": (put("name", value=""), "name: name='': expected a word without dots"),
    "fingerprint": (put("backbone", "fingerprint", value=[]), "backbone.fingerprint: expected `object`, got `array`"),
    "values": (put("backbone", "fingerprint", "values", value={"x": [1.0]}), r"backbone.fingerprint.values\[\.\.\.\]: expected `array` of"),
    "three values": (put("backbone", "fingerprint", "values", value={"x": [1.0] * 3}), r"backbone.fingerprint.values\[\.\.\.\]: expected `array` of"),
    "numbers too large to compare": (
        lambda config: config["backbone"]["fingerprint"].update(values={}, rounded={"first.weight": [1e308, -1e308]}),
        "backbone.fingerprint: OverflowError",
    ),
    "structure": (lambda config: config["backbone"]["fingerprint"].pop("structure"), "fingerprint: object missing required field `structure`"),
    "infinite": (put("num_parameters", value=float("inf")), "damaged: expected finite numbers, found Infinity"),
    "not a number": (put("methods", 0, "alpha", value=float("nan")), "damaged: expected finite numbers, found NaN"),
    "large": (put("num_parameters", value=10**30), "damaged: expected integers of at most 18 digits, found 1000"),
    "version 0": (put("format_version", value=0), "found format version 0, this deltakit reads versions up to 2; the file is damaged: save or"),
    "version True": (put("format_version", value=True), "found format version True, this"),
    "version 1.0": (put("format_version", value=1.0), "found format version 1.0, this"),
    "no version": (lambda config: config.pop("format_version"), "found format version None, this"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_each_field_is_read_strictly(folder, case):
    change, message = FIELDS[case]
    forge(folder, config=change)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format_version": 1, "format_version": 1}', "it has the key 'format_version' twice"),
        ('{"format_version": 1e999}', "expected finite numbers, found 1e999"),
        ('{"format_version": -Infinity}', "expected finite numbers, found -Infinity"),
        ("[" * 100_000, "its brackets are nested too deeply"),
        ('{"format_version": ' + "9" * 100_000 + "}", "expected integers of at most 18 digits"),
        ("7", "found format version None"),
        ("[]", "found format version None"),
        ('"' + "x" * 2**24 + '"', "it has 16,777,218 characters, and a config has at most 16,777,216"),
        (b"\xff\xfe", "'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_json_is_read_strictly(tmp_path, text, message):
    shutil.copytree(CHECKPOINTS / "format_1", tmp_path / "saved")
    (tmp_path / "saved" / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refuse(tmp_path / "saved", f"delta_config.json.*{message}")


def test_long_names_in_a_file_do_not_fill_the_screen(folder):
    forge(folder, config=put("methods", 0, "method", value="x" * 10**6))
    with pytest.raises(dk.CheckpointError, match=r"unknown method 'x+\.\.\. and [0-9,]+ more characters$") as caught:
        dk.load(folder, backbone())
    assert len(str(caught.value)) < 5_000


# A method of the user's own


@dataclass(frozen=True, kw_only=True)
class Options(dk.Method):
    """Options of every kind."""

    name = "options"
    kind = BitFitDelta

    blocks: tuple[int, ...] = (1, 2)
    names: Sequence[str] | None = None
    by_name: dict[str, float] | None = None
    pair: "list[int] | tuple[str, ...]" = ()
    unknown: Any = None


def test_options_of_a_user_s_method_are_read_by_their_annotations(tmp_path):
    with registered(Options):
        method = Options(at="norm", blocks=(3, 5), names=["a"], by_name={"a": 7}, pair=[1])
        folder = attached(backbone(), method).save(tmp_path)
        (again,) = dk.load(folder, backbone()).methods
        assert again == method
        for value, message in (
            ({"blocks": ["3"]}, r"methods\[0\].blocks\[0\]: expected `int`, got `str`"),
            ({"by_name": {"a": None}}, r"methods\[0\].by_name\[\.\.\.\]: expected `float`, got `null`"),
        ):
            forge(
                folder,
                config=lambda config, value=value: (
                    config["methods"][0].update(blocks=[1], by_name={}) or config["methods"][0].update(value)
                ),
            )
            refuse(folder, message)


def test_an_option_that_is_no_plain_data_is_refused_when_it_is_saved(tmp_path):
    with registered(Options):
        for value, message in ((torch.float32, "dtype is not JSON serializable"), (float("nan"), "not JSON compliant")):
            delta = attached(backbone(), Options(at="norm", unknown=value))
            with pytest.raises(
                dk.CheckpointError,
                match=f"an option of this delta cannot be written to a file: .*{message}.*; options must",
            ):
                delta.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# Sizes


@pytest.mark.parametrize(
    "targets",
    [
        ["{0-99999999999}"],
        ["{0-99999}.{0-99999}.{0-99999}"],
        ["first", "{0-999999999!1-999999999}"],
        ["{" + ",".join(["0-999!0-999"] * 10_000) + "}"],
        ["{0-9" + "!0-9" * 100_000 + "}"],
        ["{" + "a," * 100_000 + "a}"],
        ["." * 100_000],
        ["{0-1}"] * 100_000,
    ],
)
def test_ranges_are_never_expanded_beyond_the_backbone(folder, targets):
    message = "stands for more paths than the backbone has; load the backbone"
    forge(folder, config=put("methods", 0, "targets", value=targets))
    refuse(folder, rf"methods\[0\].targets: .*{message}")
    forge(
        folder,
        config=lambda config: (
            put("methods", 0, "targets", value=["first", "last"])(config)
            or put("train", "names", value=targets)(config)
        ),
    )
    refuse(folder, rf"train.names: .*{message}")


@pytest.mark.parametrize(
    ("entry", "sizes"),
    [
        ({"method": "vera", "r": 10**9}, "13,000,000,000"),
        ({"method": "vera", "r": 10**17}, "1,300,000,000,000,000,000"),
        ({"method": "adapter", "size": 10**9}, "17,000,000,000"),
    ],
)
def test_no_memory_is_taken_for_sizes_that_the_file_does_not_have(folder, entry, sizes):
    forge(folder, config=put("methods", value=[{**entry, "targets": ["first"]}]))
    refuse(
        folder,
        f"{entry['method']}: its options ask for a tensor of {sizes} values, but the file and the backbone have none above 1,048,576",
    )


@pytest.mark.parametrize(
    ("method", "change"),
    [
        (dk.Prefix(tokens=3), {"tokens": 10**10}),
        (dk.Prefix(tokens=3), {"reparam": True, "hidden": 10**10}),
        (dk.SoftPrompt(tokens=3), {"tokens": 10**10}),
    ],
)
def test_no_memory_is_taken_for_prompts_that_the_file_does_not_have(tmp_path, method, change):
    folder = attached(build("bert"), method).save(tmp_path)
    forge(folder, config=lambda config: config["methods"][0].update(change))
    refuse(folder, f"{method.name}: its options ask for a tensor of [0-9,]+ values", build("bert"))


def test_all_tensors_together_are_limited_too():
    index = BackboneIndex(nn.Linear(7, 5))
    with (
        SizeLimit({"x": torch.zeros(3)}, index),
        pytest.raises(dk.CheckpointError, match="ask for a tensor of 1,000,000 values"),
    ):
        kept = [torch.empty(1_000_000) for _ in range(5)]
    with SizeLimit({"x": torch.zeros(3_000_000)}, index):
        kept = [torch.empty(3_000_000), torch.zeros(3, 1_000_000), torch.zeros(3).new_ones(1, 3_000_000)]
    assert len(kept) == 3


@pytest.mark.parametrize("make", [torch.empty_like, torch.zeros_like, torch.randn_like])
def test_tensors_like_others_are_limited_too(make):
    like = torch.zeros(1_000_000)
    with (
        SizeLimit({"x": torch.zeros(3)}, BackboneIndex(nn.Linear(7, 5))),
        pytest.raises(dk.CheckpointError, match="ask for a tensor of 1,000,000 values"),
    ):
        kept = [make(like) for _ in range(5)]
        assert len(kept) == 5


def test_copies_for_layers_of_one_size_are_limited_too():
    model = nn.Sequential(*(nn.Linear(3_000, 3_000, bias=False) for _ in range(9)))
    index = BackboneIndex(model)
    targets = [index.target(str(number)) for number in range(9)]
    limit = SizeLimit({"x": torch.zeros(3)}, index)
    limit.left = 15_000_000
    with limit, pytest.raises(dk.CheckpointError, match="ask for a tensor of 900,000 values"):
        dk.LoRA(r=300).build(index, targets)


def test_many_layers_alike_are_limited_by_what_they_need_together():
    model = nn.Sequential(*(nn.Linear(3_000, 3_000, bias=False) for _ in range(9)), nn.Linear(7, 5))
    index, method = BackboneIndex(model), dk.LoRA(r=300, at="*")
    targets = [index.target(str(number)) for number in range(9)]
    limit = SizeLimit({"x": torch.zeros(3)}, index)
    before = limit.left
    assert limit.admits(index, method, targets)
    limit.left = 15_000_000
    assert not limit.admits(index, method, targets)
    assert limit.admits(index, method, targets[:8])
    # What one of them needs is what it does not say: then all are built under the limit, which names the first one.
    assert not limit.admits(index, dk.LoRA(r=3_001, at="*"), targets)
    assert (limit.left, before > 15_000_000) == (15_000_000, True)


def test_frozen_tensors_from_a_seed_are_not_in_the_file_and_load():
    index = BackboneIndex(nn.Linear(3_000, 1_000))
    with SizeLimit({"x": torch.zeros(3)}, index):
        seeded = Seeded(3, {"A": ((5, 3_000), normal()), "B": ((1_000, 5), normal())}, dtype=torch.float32)
    assert seeded.A.shape == (5, 3_000)


# Tensors


def test_a_backbone_with_infinite_weights(tmp_path):
    model = backbone()
    with torch.no_grad():
        model.first.weight.fill_(-torch.inf)
    delta = attached(model, dk.LoRA(r=1, at="last"))
    folder = delta.save(tmp_path)
    delta.detach()
    dk.load(folder, model).detach()
    with torch.no_grad():
        model.last.weight.mul_(2)
    with pytest.raises(dk.BackboneMismatch, match=r"such as last\.weight"):
        dk.load(folder, model)


def change_first(change):
    return lambda tensors: tensors.update({"first.lora.A": change(tensors["first.lora.A"])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda t, dtype=dtype: t.to(dtype), f"1 of its tensors does not fit: first.lora.A: the file has {dtype}, the backbone needs torch.float32")
          for dtype in (torch.bool, torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn)),
        *((lambda t, value=value: t.clone().index_fill_(0, torch.tensor([1]), value), "1 tensor has values that are infinite or not a number: first.lora.A; save")
          for value in (torch.nan, torch.inf, -torch.inf)),
    ],
)  # fmt: skip
def test_foreign_dtypes_and_values_that_are_not_finite(folder, change, message):
    forge(folder, tensors=change_first(change))
    refuse(folder, message)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_load(folder, dtype):
    forge(folder, tensors=lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    delta = dk.load(folder, backbone())
    assert {parameter.dtype for parameter in delta.parameters()} == {torch.float32}


class Masked(nn.Module):
    """A part with a count and a mask of -inf among what it saves, as attention and batch norms have them."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 5), nn.Linear(5, 2)
        self.last.register_buffer("steps", torch.tensor(7))
        self.last.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))


def test_counts_and_masks_that_the_backbone_has_are_saved_and_loaded(tmp_path):
    model = Masked()
    delta = attached(model, dk.LoRA(r=2, at="first"), train="last")
    folder = delta.save(tmp_path / "saved")
    delta.detach()
    dk.load(folder, model)
    assert model.last.steps.dtype == torch.int64
    forge(folder, tensors=lambda tensors: tensors.update({"last.steps": torch.tensor(7.0)}))
    dk.deltas(model)[0].detach()
    refuse(folder, "last.steps: the file has torch.float32, the backbone needs torch.int64", model)


@pytest.mark.parametrize("name", ["first.lora.B", "last.weight"])
def test_a_delta_whose_training_has_failed_is_not_saved_over_a_good_one(folder, name):
    delta = made(7)
    with torch.no_grad():
        dict(delta.named_parameters())[name].view(-1)[3] = torch.nan
    for detached in (False, True):
        if detached:
            delta.detach()
        with pytest.raises(
            dk.StateError, match=f"{name} has values that are infinite or not a number, so its training has failed"
        ):
            delta.save(folder)
    assert torch.equal(result(dk.load(folder, backbone())), result(made(5)))
    with pytest.raises(dk.CheckpointError, match=f"infinite or not a number: {name}; save"):
        made(5).load_state_dict(delta.state_dict())


# Names that look like selectors


def test_regular_expressions_in_a_file_are_not_run(folder):
    """A hostile one can take hours. What was selected stands in the file as paths."""
    trap = "re:((((((((x*)*)*)*)*)*)*)*)*$"
    forge(
        folder,
        config=lambda config: (
            config["methods"][0].update(at=trap, exclude=[trap]) or config["train"].update(selectors=[trap])
        ),
    )
    assert dk.load(folder, backbone()).methods[0].at == trap


def test_modules_whose_names_look_like_ranges(tmp_path):
    names = ["{0-99999999999}", "{}", "{5-1}", "a,b", "0-9", "{a,b}"]
    model = nn.ModuleDict({name: nn.Linear(3, 2) for name in names})
    delta = attached(model, dk.LoRA(r=1, at="*"), train="re:a,b")
    folder = delta.save(tmp_path)
    delta.detach()
    assert list(dk.load(folder, model).modules) == names


def test_what_is_written_can_be_read(folder):
    """The readable copy is JSON that any program reads, and holds what the safetensors file holds."""
    config = json.loads((folder / CONFIG).read_text())
    with contextlib.ExitStack() as stack:
        from safetensors import safe_open

        metadata = stack.enter_context(safe_open(folder / TENSORS, "pt")).metadata()
    assert list(metadata) == ["delta"]
    assert json.loads(metadata["delta"]) == config
