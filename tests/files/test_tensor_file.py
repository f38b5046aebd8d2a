"""Reading safetensors files: the same tensors as safetensors gives, in one pass."""

import json
import pickle

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file

from deltakit.errors import CheckpointError
from deltakit.files.tensor_file import read_metadata, read_tensors

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 3),
    "double": torch.arange(3.0).double(),
    "half": torch.arange(3.0).half(),
    "brain": torch.arange(5.0).bfloat16(),
    "long": torch.arange(3),
    "bytes": torch.arange(3).to(torch.uint8),
    "flags": torch.tensor([True, False]),
    "quarter": torch.arange(4.0).to(torch.float8_e4m3fn),
}


def equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].float(), tensor.float()), name


@pytest.fixture
def file(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"what": "a test"})
    return tmp_path / "a.safetensors"


def test_all_types_are_those_of_safetensors(file):
    equal(read_tensors(file), load_file(file))
    assert read_metadata(file) == {"what": "a test"}


def test_without_values(file):
    found = read_tensors(file, values=False)
    assert all(tensor.is_meta for tensor in found.values())
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in TENSORS.items()}


@pytest.mark.parametrize("odd", range(1, 9))
def test_headers_of_any_size(tmp_path, odd):
    """Other writers do not fill the header up, so that values lie at odd places."""
    values = torch.arange(7.0)
    header = json.dumps({"x" * odd: {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]}}).encode()
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + values.numpy().tobytes())
    equal(read_tensors(file), {"x" * odd: values})


@pytest.mark.parametrize("order", [("b", "none", "a"), ("a", "b", "none"), ("none", "b", "a")])
def test_tensors_of_one_type_in_any_order(tmp_path, order):
    """The header may name them in another order than they lie in."""
    wanted = {"b": torch.arange(6.0).view(2, 3), "none": torch.empty(0, 5), "a": torch.tensor(7.0)}
    places = {"b": (0, 24), "none": (24, 24), "a": (24, 28)}
    entries = {
        name: {"dtype": "F32", "shape": list(wanted[name].shape), "data_offsets": places[name]} for name in order
    }
    header = json.dumps({"__metadata__": {"what": "a test"}, **entries})
    header += " " * (-len(header) % 8)
    file = tmp_path / "ordered.safetensors"
    values = torch.cat([wanted["b"].view(-1), wanted["a"].view(-1)]).numpy().tobytes()
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + values)
    found = read_tensors(file)
    equal(found, wanted)
    equal(found, load_file(file))
    assert torch.equal(found.joined, torch.tensor([0.0, 1, 2, 3, 4, 5, 7]))


def written(folder, tensors):
    save_file(tensors, folder / "b.safetensors")
    return read_tensors(folder / "b.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_floats_of_one_type_are_one_tensor_too(tmp_path, dtype):
    found = written(tmp_path, {"a": torch.arange(5).to(dtype), "b": torch.ones(2, 3, dtype=dtype)})
    assert found.joined.dtype == dtype
    assert sorted(found.joined.tolist()) == sorted([0, 1, 2, 3, 4, 1, 1, 1, 1, 1, 1])


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"none": torch.empty(0, 3)},
        {"float": torch.ones(2), "half": torch.ones(2).half()},
        {"long": torch.arange(3)},
        {"quarter": torch.arange(4.0).to(torch.float8_e4m3fn)},
        {"complex": torch.ones(2, dtype=torch.complex64)},
    ],
    ids=str,
)
def test_others_are_not(tmp_path, tensors):
    found = written(tmp_path, tensors)
    assert found.keys() == tensors.keys()
    assert found.joined is None


def test_values_at_odd_places_are_not(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (5 - len(header) % 4)
    file = tmp_path / "odd.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + torch.ones(2).numpy().tobytes())
    found = read_tensors(file)
    equal(found, {"a": torch.ones(2)})
    assert found.joined is None


def test_one_tensor_of_a_file_does_not_hold_the_others(tmp_path):
    """A copy or a pickle of it would be one of the whole file."""
    found = written(tmp_path, {"large": torch.zeros(10_000), "small": torch.ones(2)})
    assert found["small"].untyped_storage().nbytes() == 8
    assert len(pickle.dumps(found["small"])) < 1_000


def test_what_is_written_into_the_tensors_changes_no_file(file):
    before = file.read_bytes()
    for tensor in read_tensors(file).values():
        if tensor.dtype != torch.float8_e4m3fn:
            tensor.fill_(1)
    assert file.read_bytes() == before


def test_no_tensor_is_asked_of_safetensors_one_by_one(file, monkeypatch):
    """It took most of the time to read a delta."""
    save_file({name: TENSORS[name] for name in ("matrix", "brain")}, file)
    opened = safetensors.safe_open

    class Opened:
        def __init__(self, *args):
            self.handle = opened(*args)
            self.metadata, self.keys = self.handle.metadata, self.handle.keys

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return self.handle.__exit__(*error)

    monkeypatch.setattr(safetensors, "safe_open", Opened)
    equal(read_tensors(file), {name: TENSORS[name] for name in ("matrix", "brain")})


def test_a_file_that_is_cut_off(file):
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="is damaged or cut off"):
        read_tensors(file)
