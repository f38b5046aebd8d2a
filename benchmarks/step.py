"""Times a training step against the frozen backbone (the floor), full fine-tuning and PEFT, as ratios to the floor.

    python benchmarks/step.py [--models "BERT base" ...] [--dtypes float32 bfloat16] [--layers 4] [--out step.json]

The floor is the frozen backbone's forward, and its backward through the activations. The limit is the floor plus the six
thin products of each LoRA target, on tensors that exist before and stay in the cache. `null` is a second copy of deltakit's
contestant. All take turns in one process and, except for full fine-tuning, have the same weights in memory. On a CPU they have
four layers of each shape: shorter calls take turns more often, which makes the share narrower in the same time.

A row takes as long as its share needs, and at most three minutes; all sixteen of a CPU take about 40 minutes.
"""

import argparse
import copy
from typing import Any

import harness
import peft
import rounds
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


def contestants(
    name: str, dtype: torch.dtype, names: list[str], device: str, layers: int, *, full: bool
) -> dict[str, Any]:
    """Returns each contestant's model, all of them with the weights of one backbone."""
    floor = harness.backbone(name, dtype, device, layers).requires_grad_(False)
    paths = harness.targets(floor, names)
    models = {"floor": floor}
    if full:
        models["full"] = copy.deepcopy(floor).requires_grad_(True)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=paths)
    models["PEFT"] = peft.get_peft_model(harness.twin(floor), config).eval()
    for own in ("deltakit", "null"):
        models[own] = harness.twin(floor)
        dk.attach(models[own], dk.LoRA(r=8, at=["^" + path for path in paths]))
    for model in models.values():
        require_gradients(model)
    return models


def products(model: Any, paths: list[str], tokens: int, dtype: torch.dtype) -> rounds.Call:
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


def measure(
    name: str, dtype: torch.dtype, which: str, options: argparse.Namespace, bound: rounds.Bound
) -> dict[str, Any]:
    names = (harness.LINEARS if which == "all linear" else harness.QUERY_VALUE)[name]
    full = not options.no_full and which == "all linear"
    models = contestants(name, dtype, names, options.device, options.layers, full=full)
    inputs = harness.batch(models["floor"])
    cases: dict[str, rounds.Call] = {k: lambda m=m: step(m, inputs, None) for k, m in models.items()}
    alone = products(models["floor"], harness.targets(models["floor"], names), inputs["input_ids"].numel(), dtype)
    times = rounds.interleaved({**cases, "limit": alone}, bound, rounds.share_known("floor"))
    for seconds in (times.cpu, times.wall):
        seconds["limit"] = [floor + more for floor, more in zip(seconds["floor"], seconds["limit"], strict=True)]
    found = rounds.compared(times, "floor")
    return {"model": name, "layers": options.layers, "dtype": str(dtype), "targets": which, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", help="by default all that the device is meant for")
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--targets", nargs="*", default=["all linear", "query and value"])
    parser.add_argument("--layers", type=int, help="of each shape; 0 for all; by default 4 on a CPU")
    parser.add_argument("--no-full", action="store_true")
    harness.add_options(parser, rounds.Bound(9, 61, 180))
    options = parser.parse_args()
    if options.layers is None:
        options.layers = 4 if options.device == "cpu" else 0
    bound = harness.begin(options)
    results = []
    for dtype in options.dtypes:
        for which in options.targets:
            for name in options.models or harness.models_for(options.device):
                row = measure(name, getattr(torch, dtype), which, options, bound)
                results.append(row)
                print(f"{name}, {dtype}, {which}\n    {rounds.said(row, 'floor')}", flush=True)
                # Written after each case, because all of them together take long.
                harness.write(options.out, "step", results)


if __name__ == "__main__":
    main()
