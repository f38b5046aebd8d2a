"""Times a forward of one token, of many, and generation, against the bare backbone and PEFT.

Three more cases are a merged delta, hooks that compute nothing but the two products of LoRA, and `null`, a second copy of
deltakit's contestant, which shows the noise. All but the merged one have the same weights in memory.

    python benchmarks/forward.py [--models "BERT base" ...] [--out forward.json]

On a CPU, models have four layers of their shape where they get many tokens. A row takes as long as its share needs, and at
most two minutes; all nine take about ten minutes.
"""

import argparse
import copy
from typing import Any

import harness
import peft
import rounds
import torch
import torch.nn.functional as F

import deltakit as dk


class Products:
    """A hook with LoRA's two products and the addition only: the least that any hook must do."""

    def __init__(self, d_in: int, d_out: int, device: torch.device) -> None:
        self.a, self.b = torch.randn(8, d_in, device=device), torch.zeros(d_out, 8, device=device)

    def __call__(self, layer: Any, args: Any, y: torch.Tensor) -> torch.Tensor:
        return y.add_(F.linear(F.linear(args[0], self.a), self.b), alpha=2.0)


def contestants(model: Any, paths: list[str]) -> dict[str, Any]:
    """Returns the bare backbone, and copies of it with LoRA r=8 at these paths."""
    models = {"bare": model.requires_grad_(False), "merged": copy.deepcopy(model)}
    method = dk.LoRA(r=8, at=["^" + path for path in paths])
    dk.attach(models["merged"], method).merge()
    for own in ("deltakit", "null"):
        models[own] = harness.twin(model)
        dk.attach(models[own], method)
    models["products alone"] = harness.twin(model)
    for path in paths:
        layer = models["products alone"].get_submodule(path)
        sizes = layer.weight.shape if type(layer).__name__ == "Conv1D" else layer.weight.shape[::-1]
        layer.register_forward_hook(Products(*sizes, model.device))
    models["PEFT"] = peft.get_peft_model(harness.twin(model), peft.LoraConfig(r=8, target_modules=paths)).eval()
    return models


def launch_bound() -> Any:
    """Returns a model of many small layers, on which calls cost more than arithmetic."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 24, "num_attention_heads": 4}
    return harness.llama(**sizes, num_key_value_heads=4, vocab_size=500)


def measure(name: str, models: dict[str, Any], call: Any, bound: rounds.Bound) -> dict[str, Any]:
    def run(model: Any) -> None:
        with torch.no_grad():
            call(model)

    cases = {who: lambda m=m: run(m) for who, m in models.items()}
    times = rounds.interleaved(cases, bound, rounds.share_known("bare", 0.05), warm=3)
    row = {"case": name, **rounds.compared(times, "bare")}
    print(f"{name}\n    {rounds.said(row, 'bare')}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="*", help="by default all that the device is meant for, and launch-bound")
    harness.add_options(parser, rounds.Bound(21, 301, 120))
    options = parser.parse_args()
    bound = harness.begin(options)
    results = []
    for name in options.models or harness.models_for(options.device):
        if name == "launch-bound":
            continue
        for length in (1, 128):
            # As in step.py: shorter calls take turns more often, which makes the share narrower in the same time.
            layers = 4 if length > 1 and options.device == "cpu" else 0
            model = harness.backbone(name, device=options.device, layers=layers)
            models = contestants(model, harness.targets(model, harness.LINEARS[name]))
            inputs = harness.batch(model, 1 if length == 1 else 4, length)
            case = f"{name}, 1 token" if length == 1 else f"{name}, 4 x {length} tokens" + ", 4 layers" * bool(layers)
            results.append(measure(case, models, lambda m, i=inputs: m(**i), bound))
            harness.write(options.out, "forward", results)
    if not options.models or "launch-bound" in options.models:
        model = launch_bound().to(options.device)
        models = contestants(model, harness.targets(model, harness.LINEARS["Llama 150 M"]))
        ids = torch.randint(5, 400, (1, 4)).to(options.device)
        how = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        results.append(measure("launch-bound, generate", models, lambda m: m.generate(input_ids=ids, **how), bound))
    harness.write(options.out, "forward", results)


if __name__ == "__main__":
    main()
