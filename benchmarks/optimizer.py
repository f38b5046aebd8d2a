"""Times an AdamW step on all of a delta's parameters: torch's default, foreach and fused.

python benchmarks/optimizer.py [--rounds 25] [--out optimizer.json]
"""

import argparse

import harness
import torch

import deltakit as dk


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    harness.add_options(parser, rounds=25)
    options = parser.parse_args()
    print(harness.machine())
    model = harness.backbone("Llama 150 M", device=options.device)
    delta = dk.attach(model, dk.LoRA(r=8, at=["^" + p for p in harness.targets(model, harness.LINEARS["Llama 150 M"])]))
    for parameter in delta.parameters():
        parameter.grad = torch.randn_like(parameter)
    kinds = {"default": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    optimizers = {name: torch.optim.AdamW(delta.parameters(), lr=1e-3, **kind) for name, kind in kinds.items()}
    found = harness.ratios(
        harness.interleaved({name: optimizer.step for name, optimizer in optimizers.items()}, options.rounds), "default"
    )
    for name, ratio in found.items():
        print(f"AdamW, {len(list(delta.parameters()))} tensors, {name:<8} {harness.spread(ratio)}")
    harness.write(options.out, "optimizer", [{"ratios": found}])


if __name__ == "__main__":
    main()
