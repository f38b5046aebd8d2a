"""A training step of deltakit's LoRA beside the same step of PEFT's, where PEFT is installed."""

import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import Method
from deltakit.delta import attach
from deltakit.demo.data import batches
from deltakit.demo.task import Task
from deltakit.demo.training import BATCH

_STEPS = 5


def beside_peft(task: Task, methods: Sequence[Method]) -> list[str]:
    """Returns lines with the time of a training step and what it keeps for the backward pass, here and in PEFT.

    Both have a LoRA of the same rank on the same modules, train nothing else, and take turns.

    Args:
        methods: one LoRA.
    """
    if find_spec("peft") is None:
        return ["PEFT is not installed, so there are no figures beside it (pip install peft)."]
    batch = next(batches(task.train, BATCH, task.pad, seed=0))
    ours = task.fresh()
    delta = attach(ours, *methods, train=())
    if any(path.endswith("]") for path in delta.modules):
        return [
            "PEFT has no LoRA on the queries or values of a fused projection alone, so there are no figures beside it."
        ]
    theirs = _of_peft(task.fresh(), list(delta.modules), methods[0])
    seconds: dict[str, list[float]] = {"deltakit": [], "PEFT": []}
    kept = {}
    for number in range(1 + _STEPS):
        for name, model in (("deltakit", ours), ("PEFT", theirs)):
            if number == 0:
                # It also warms up.
                kept[name] = _kept(model, batch) / 1e6
            else:
                seconds[name].append(_step(model, batch))
    here, there = (1000 * median(times) for times in seconds.values())
    return [
        f"A training step of LoRA takes {here:.0f} ms, in PEFT {there:.0f} ms (medians of {_STEPS}), and keeps "
        f"{kept['deltakit']:.1f} MB for the backward pass, in PEFT {kept['PEFT']:.1f} MB."
    ]


def _of_peft(backbone: nn.Module, paths: Sequence[str], method: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        config = peft.LoraConfig(r=method.r, lora_alpha=method.alpha, target_modules=list(paths))
        model: nn.Module = peft.get_peft_model(backbone, config)
    return model


def _step(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Returns the seconds of a forward and a backward pass."""
    start = time.perf_counter()
    model.train()(**batch).loss.backward()
    return time.perf_counter() - start


def _kept(model: nn.Module, batch: dict[str, Tensor]) -> int:
    """Returns the bytes that a forward keeps for its backward. Each storage counts once, and parameters do not count."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    # Held, so that no other tensor gets the same address.
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(tensor)
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(**batch).loss.backward()
    return sum(sizes.values())
