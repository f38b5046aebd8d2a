"""Measures the memory of a training step: bytes kept for the backward pass, and the peak of a separate process.

    python benchmarks/memory.py [--models "Llama 150 M" ...] [--processes 3] [--out memory.json]

The limit is what any LoRA must keep: the input of each target, once if several share it, and its product with A. Bytes kept
are counted, so they have no spread; peaks are those of several processes: the median, the lowest and the highest. All take
about twenty minutes.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import harness
import peft
import rounds
import torch
from step import require_gradients
from torch import nn

import deltakit as dk

CONTESTANTS = ("floor", "PEFT", "deltakit", "deltakit int8", "deltakit frozen A")


def contestant(name: str, dtype: torch.dtype, who: str, device: str = "cpu") -> Any:
    """Returns a backbone with LoRA r=8 on all its linear layers, attached by one of the contestants."""
    model = harness.backbone(name, dtype, device)
    paths = harness.targets(model, harness.LINEARS[name])
    if who == "PEFT":
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=paths))
    elif who != "floor":
        keep, frozen = "int8" if "int8" in who else "exact", "frozen" in who
        dk.attach(model, dk.LoRA(r=8, at=["^" + p for p in paths], keep=keep, frozen_a=frozen))
    else:
        model.requires_grad_(False)
    require_gradients(model)
    return model


def kept(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """Returns the bytes that a forward keeps for its backward, beyond the model's parameters and buffers.

    Each storage counts once.
    """
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        # A sparse tensor has no storage of its own.
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own:
                storages[storage.data_ptr()] = storage.nbytes()
        # Detached, because the graph refers to this function: with tensors of its own in `held`, it would never be freed.
        held.append(tensor.detach())
        return held[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(**inputs)[0]
    del output
    return sum(storages.values())


def limit(name: str, dtype: torch.dtype, device: str, inputs: dict[str, torch.Tensor]) -> int:
    """Returns the bytes of the targets' inputs that the floor does not keep, and of their products with A.

    Inputs that several targets share count once.
    """
    model = contestant(name, dtype, "floor", device)
    inputs_seen: dict[int, torch.Tensor] = {}
    products = 0

    def see(_: nn.Module, args: Any) -> None:
        nonlocal products
        inputs_seen[args[0].untyped_storage().data_ptr()] = args[0]
        products += args[0].numel() // args[0].shape[-1] * 8 * args[0].element_size()

    for path in harness.targets(model, harness.LINEARS[name]):
        model.get_submodule(path).register_forward_pre_hook(see)
    floor: set[int] = set()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (floor.add(t.untyped_storage().data_ptr()), t.detach())[1], lambda t: t
    ):
        output = model(**inputs)[0]
    extra = [t.untyped_storage().nbytes() for key, t in inputs_seen.items() if key not in floor]
    del output
    return sum(extra) + products


def peak(name: str, dtype: str, who: str, processes: int) -> rounds.Estimate:
    """Returns the peak resident memory of a step in fresh processes, in bytes, without what the model itself takes."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", name, dtype, who]
    found = []
    for _ in range(processes):
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found.append(int(run.stdout.strip().splitlines()[-1]))
    return rounds.Estimate(statistics.median(found), min(found), max(found))


def peak_on_gpu(name: str, dtype: torch.dtype, who: str) -> rounds.Estimate:
    """Returns the peak of what torch allocates on the GPU in a step, in bytes, without what the model itself takes."""
    gc.collect()
    model = contestant(name, dtype, who, "cuda")
    inputs = harness.batch(model)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        model(**inputs)[0].float().square().mean().backward()
        model.zero_grad()
    return rounds.Estimate(*[torch.cuda.max_memory_allocated() - before] * 3)


def one(name: str, dtype: str, who: str) -> None:
    model = contestant(name, getattr(torch, dtype), who)
    inputs = harness.batch(model)
    # Resets the peak, because a child process inherits that of its parent.
    Path("/proc/self/clear_refs").write_text("5")
    before = harness.status("VmRSS")
    for _ in range(2):
        model(**inputs)[0].float().square().mean().backward()
        model.zero_grad()
    print(harness.status("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", default=["Llama 150 M", "BERT base"])
    parser.add_argument("--processes", type=int, default=3, help="for each peak on a CPU")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "DTYPE", "CONTESTANT"), help="used by itself")
    harness.add_options(parser)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        one(*options.one)
        return
    harness.begin(options)
    results = []
    for name in options.models:
        for dtype in ("float32", "bfloat16"):
            kind = getattr(torch, dtype)
            inputs = harness.batch(contestant(name, kind, "floor", options.device))
            bytes_kept = {who: kept(contestant(name, kind, who, options.device), inputs) for who in CONTESTANTS}
            on_gpu = options.device == "cuda"
            peaks = {
                w: peak_on_gpu(name, kind, w) if on_gpu else peak(name, dtype, w, options.processes)
                for w in CONTESTANTS
            }
            least = limit(name, kind, options.device, inputs)
            row = {"model": name, "dtype": dtype, "kept": bytes_kept, "limit": least, "peak": peaks}
            results.append(row)
            beyond = {who: round((value - bytes_kept["floor"]) / 1e6, 2) for who, value in bytes_kept.items()}
            megabytes = {who: rounds.text([value / 1e6 for value in found], 0) for who, found in peaks.items()}
            print(f"{name}, {dtype}: MB kept beyond the floor {json.dumps(beyond)}, limit {least / 1e6:.2f};")
            print(f"  MB of memory at the peak {json.dumps(megabytes)}", flush=True)
            harness.write(options.out, "memory", results)


if __name__ == "__main__":
    main()
