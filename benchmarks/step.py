"""Times a training step against the frozen backbone (the floor), full fine-tuning and PEFT, as ratios to the floor.

    python benchmarks/step.py [--models "BERT base" ...] [--dtypes float32 bfloat16] [--rounds 9] [--out step.json]

The floor is the frozen backbone's forward, and its backward through the activations. The limit is the floor plus the six
thin products of each LoRA target, on tensors that exist before and stay in the cache. All take turns in one process.
"""

import argparse
import copy
from typing import Any

import harness
import peft
import torch

import deltakit as dk


def step(model: Any, inputs: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer | None) -> None:
    """Runs one step. The embeddings require gradients in every contestant, so all backward passes are equally long."""
    output = model(**inputs)[0]
    output.float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
    model.zero_grad()


def require_gradients(model: Any) -> None:
    """Makes the output of the backbone's embeddings require gradients, as PEFT's users do for checkpointing."""
    table = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and module.weight is table:
            module.register_forward_hook(lambda *call: call[2].requires_grad_())


def contestants(name: str, dtype: torch.dtype, names: list[str], device: str, *, full: bool) -> dict[str, Any]:
    """Returns each contestant's model, all of them copies of one backbone."""
    floor = harness.backbone(name, dtype, device)
    paths = harness.targets(floor, names)
    models = {"floor": floor}
    if full:
        models["full"] = copy.deepcopy(floor)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=paths)
    models["PEFT"] = peft.get_peft_model(copy.deepcopy(floor), config)
    models["deltakit"] = copy.deepcopy(floor)
    dk.attach(models["deltakit"], dk.LoRA(r=8, at=["^" + path for path in paths]))
    floor.requires_grad_(False)
    for model in models.values():
        require_gradients(model)
    return models


def products(model: Any, paths: list[str], tokens: int, dtype: torch.dtype) -> harness.Call:
    """Returns a call with the least arithmetic of LoRA: two products in each target's forward, four in its backward."""
    sizes = []
    for path in paths:
        layer = model.get_submodule(path)
        d_in, d_out = layer.weight.shape if type(layer).__name__ == "Conv1D" else layer.weight.shape[::-1]
        sizes.append((d_in, d_out))
    held = {}
    for d_in, d_out in set(sizes):
        shapes = ((tokens, d_in), (tokens, d_out), (tokens, d_in), (tokens, d_out), (8, d_in), (d_out, 8))
        held[d_in, d_out] = [torch.randn(shape).mul(1e-3).to(model.device, dtype) for shape in shapes]

    def run() -> None:
        for size in sizes:
            x, y, gx, g, a, b = held[size]
            h = a @ x.mT
            y.mT.addmm_(b, h)
            gh = b.mT @ g.mT
            gx.addmm_(gh.mT, a)
            _ = gh @ x, h @ g

    return run


def measure(name: str, dtype: torch.dtype, which: str, rounds: int, device: str, full: bool) -> dict[str, Any]:
    names = (harness.LINEARS if which == "all linear" else harness.QUERY_VALUE)[name]
    models = contestants(name, dtype, names, device, full=full)
    inputs = harness.batch(models["floor"])
    cases: dict[str, harness.Call] = {k: lambda m=m: step(m, inputs, None) for k, m in models.items()}
    alone = products(models["floor"], harness.targets(models["floor"], names), inputs["input_ids"].numel(), dtype)
    times = harness.interleaved({**cases, "limit": alone}, rounds)
    times["limit"] = [floor + more for floor, more in zip(times["floor"], times["limit"], strict=True)]
    found = harness.ratios(times, "floor")
    ours, theirs = found["deltakit"][0] - 1, found["PEFT"][0] - 1
    return {"model": name, "dtype": str(dtype), "targets": which, "ratios": found, "share": ours / theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", help="by default all that the device is meant for")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--targets", nargs="*", default=["all linear", "query and value"])
    parser.add_argument("--no-full", action="store_true")
    harness.add_options(parser, rounds=9)
    options = parser.parse_args()
    print(harness.machine())
    results = []
    for dtype in options.dtypes:
        for which in options.targets:
            for name in options.models or harness.models_for(options.device):
                row = measure(name, getattr(torch, dtype), which, options.rounds, options.device, not options.no_full)
                results.append(row)
                shown = "  ".join(f"{k} {harness.spread(v)}" for k, v in row["ratios"].items() if k != "floor")
                print(f"{name:<12} {dtype:<9} {which:<16} {shown}  share of PEFT's overhead {row['share']:.2f}")
                # Written after each case, because all of them together take long.
                harness.write(options.out, "step", results)


if __name__ == "__main__":
    main()
