"""Saved deltas of a small model, and ways to damage them; `benchmarks/damage.py` counts what comes of thousands."""

import copy
import json
import random
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import deltakit as dk
from support.forged_files import forge

TENSORS, CONFIG = "delta_model.safetensors", "delta_config.json"
HUGE_RANGES = ["{" + ",".join("0-9!0-9" for _ in range(2000)) + "}", "{0-9999999}.{0-9999999}", "{0-99999999999}"]
STRANGE = (
    *(None, True, False, 0, -1, 1, 7, 10**9, 10**17, 10**30, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *("", "x", "\x1b[2J", "a\nb", "\u202e", "{a", "{}", "re:(a+)+$", "..", "x" * 100_000, *HUGE_RANGES),
    *([], [[]], [None], ["x"], [0] * 3, HUGE_RANGES),
    *({}, {"a": 1}, {"method": "lora"}, {"method": "soft_prompt", "targets": [""], "tokens": 10**7}),
)


class Small(nn.Module):
    """Two linear layers and a norm."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(13, 17), nn.LayerNorm(17), nn.Linear(17, 5)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def backbone():
    torch.manual_seed(0)
    return Small().eval()


def made(alpha):
    """A delta of its own for each alpha: equal names and shapes, but other values and another strength."""
    delta = dk.attach(backbone(), dk.LoRA(r=3, alpha=alpha, at=["first", "last"]), dk.BitFit(at="norm"), train="last")
    torch.manual_seed(alpha)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_()
    return delta


def result(delta):
    return delta.backbone(torch.linspace(-1, 1, 26).reshape(2, 13)).detach()


def flipped(chance, folder, _other):
    """Some bits are others."""
    file = folder / chance.choice([TENSORS, CONFIG])
    data = bytearray(file.read_bytes())
    for _ in range(chance.choice([1, 1, 1, 2, 20])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def cut(chance, folder, _other):
    """A piece is missing, or there twice."""
    file = folder / chance.choice([TENSORS, CONFIG])
    data = file.read_bytes()
    start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    file.write_bytes(chance.choice([data[:start], data[end:], data[:start] + data[end:], data + data[start:end], b""]))


def swapped(chance, folder, other):
    """One file is that of another delta."""
    name = chance.choice([TENSORS, CONFIG])
    shutil.copy(other / name, folder / name)


def removed(chance, folder, _other):
    """One file is missing, or something else is in its place."""
    file = folder / chance.choice([TENSORS, CONFIG])
    file.unlink()
    chance.choice([lambda: None, file.mkdir, lambda: file.symlink_to(folder / "nowhere")])()


def edited(chance, folder, _other):
    """The readable copy of the config says something else."""
    config = json.loads((folder / CONFIG).read_text())
    mutate(chance, config)
    (folder / CONFIG).write_text(json.dumps(config))


def forged(chance, folder, _other):
    """The config or a tensor is another one, with right seals."""
    if chance.random() < 0.8:
        forge(folder, config=lambda config: [mutate(chance, config) for _ in range(chance.choice([1, 1, 2, 5]))])
    else:
        forge(folder, tensors=lambda tensors: tensors.update(_strange_tensor(chance, tensors)))


def first_format(chance, folder, _other):
    """The config of the first format, which has no seals, says something else."""
    config = json.loads((folder / CONFIG).read_text()) | {"format_version": 1}
    save_file({name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}, folder / TENSORS)
    mutate(chance, config)
    (folder / CONFIG).write_text(json.dumps(config))


DAMAGED, FORGED = (flipped, cut, swapped, edited, flipped, removed), (forged, first_format)


def mutate(chance, config):
    """Changes one place of plain data: removes it, replaces it, doubles it, or puts it elsewhere."""
    places = list(_places(config))
    holder, key = chance.choice(places)
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, name = chance.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif kind == 2 and isinstance(holder, list):
        holder.insert(key, copy.deepcopy(chance.choice(STRANGE)))
    elif kind == 3 and isinstance(holder, dict):
        holder[chance.choice(["x", "method", "targets", "r", "tokens", "size"])] = copy.deepcopy(chance.choice(STRANGE))
    else:
        holder[key] = copy.deepcopy(chance.choice(STRANGE))


def _places(data):
    for key, value in list(data.items() if isinstance(data, dict) else enumerate(data)):
        yield data, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _strange_tensor(chance, tensors):
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    bad = tensor.clone()
    bad.view(-1)[0] = chance.choice([torch.nan, torch.inf, -torch.inf])
    kinds = [tensor.to(kind) for kind in (torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn)]
    shapes = [
        tensor[:0],
        tensor[None],
        torch.cat([tensor, tensor]),
        tensor.mT.contiguous() if tensor.ndim > 1 else tensor[1:],
    ]
    return {name: chance.choice([*kinds, *shapes, bad]).clone()}


def outcome(kinds, number, seed, saved, scratch, wanted):
    """Damages a copy of a saved delta in one way of many, and returns what loading it gives.

    Args:
        saved: the folders of two deltas. A copy of the first is damaged.
        wanted: what a backbone returns with each of the two.

    Returns:
        "equal load", "other load" or "CheckpointError", and the error if there was another one.
    """
    chance = random.Random(f"{seed} {number}")
    kind = kinds[number % len(kinds)]
    folder = Path(scratch)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(saved[0], folder)
    kind(chance, folder, saved[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dk.DeltaWarning)
        try:
            got = result(dk.load(folder, backbone()))
        except dk.CheckpointError as error:
            return ("CheckpointError", None) if str(error).isprintable() else ("unprintable", error)
        except Exception as error:
            return f"raw {type(error).__name__} after {kind.__name__}", error
    return ("equal load" if any(torch.equal(got, want) for want in wanted) else "other load"), None
