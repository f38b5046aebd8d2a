"""Times an AdamW step on all of a delta's parameters: torch's default, foreach and fused.

    python benchmarks/optimizer.py [--out optimizer.json]

It takes less than a minute.
"""

import argparse

import harness
import rounds
import torch

import deltakit as dk


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    harness.add_options(parser, rounds.Bound(25, 201, 60))
    options = parser.parse_args()
    bound = harness.begin(options)
    model = harness.backbone("Llama 150 M", device=options.device)
    delta = dk.attach(model, dk.LoRA(r=8, at=["^" + p for p in harness.targets(model, harness.LINEARS["Llama 150 M"])]))
    for parameter in delta.parameters():
        parameter.grad = torch.randn_like(parameter)
    kinds = {"default": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
    optimizers = {name: torch.optim.AdamW(delta.parameters(), lr=1e-3, **kind) for name, kind in kinds.items()}
    cases = {name: optimizer.step for name, optimizer in optimizers.items()}
    enough = rounds.both(*(rounds.ratio_known(name, "default", 0.05) for name in ("foreach", "fused")))
    row = rounds.compared(rounds.interleaved(cases, bound, enough), "default")
    print(f"AdamW, {len(list(delta.parameters()))} tensors\n    {rounds.said(row, 'default')}")
    harness.write(options.out, "optimizer", [row])


if __name__ == "__main__":
    main()
