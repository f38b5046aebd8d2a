"""Times the life of a delta on thousands of linear layers, and of the last of many deltas on one backbone.

    python benchmarks/scale.py [--targets 10000] [--deltas 200] [--out scale.json]

The first table compares the CPU time for each target at a quarter, at half and at all of the targets: about 1 says that a
call takes as long as its targets say. The second compares the last delta with the first. All are ratios within a round:
medians with quartiles. Garbage is collected before each call and not in it. Rounds end when all medians are known within a
tenth of themselves, or after five minutes for each table.
"""

import argparse
import gc
import tempfile
from typing import Any

import harness
import rounds
import torch
from torch import nn

import deltakit as dk


class Chain(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def life(model: nn.Module, calls: rounds.Calls, folder: str) -> None:
    """Notes the time of each call in the life of a delta, for each target."""
    x, method = torch.ones(2, 8), dk.LoRA(r=2, at="layers.*")
    count = len(model.layers)

    def timed(what: str, call: rounds.Call) -> Any:
        gc.collect()
        return calls.run(what, str(count), call, times=count)

    timed("plan", lambda: dk.plan(model, method))
    delta = timed("attach", lambda: dk.attach(model, method))
    with torch.no_grad():
        for name in ("first forward", "second forward"):
            timed(name, lambda: model(x))
        for parameter in delta.parameters():
            parameter.normal_(std=0.01)
    timed("draw", lambda: str(dk.show(model)))
    timed("save", lambda: delta.save(folder))
    timed("detach", delta.detach)
    timed("attach again", delta.attach)
    delta.detach()
    timed("load", lambda: dk.load(folder, model)).detach()


def targets(most: int, bound: rounds.Bound) -> tuple[rounds.Calls, str]:
    """Returns the times of each call for each of a quarter, half and all of the targets, and what ended the rounds."""
    counts, calls = (most // 4, most // 2, most), rounds.Calls()
    with tempfile.TemporaryDirectory() as folder:
        life(Chain(64), rounds.Calls(), folder)

        def one() -> None:
            for count in counts:
                life(Chain(count), calls, folder)

        return calls, rounds.repeated(one, bound, lambda: calls.known(str(counts[0])))


def many(count: int, bound: rounds.Bound) -> tuple[rounds.Calls, str]:
    """Returns the times of the first and the last delta, and what ended the rounds; of forwards, for each delta."""
    calls, x, method = rounds.Calls(), torch.ones(2, 8), dk.LoRA(r=2, at="layers.*")

    def one() -> None:
        model = Chain(56)
        made: list[dk.Delta] = []
        for k in range(count):
            case = {0: "first", count - 1: "last"}.get(k)
            add = lambda k=k: made.append(dk.attach(model, method, name=f"d{k}"))  # noqa: E731
            if case is None:
                add()
                continue
            gc.collect()
            calls.run("attach", case, add)
            with torch.no_grad():
                for name in ("first forward", "second forward"):
                    calls.run(name, case, lambda: model(x), times=k + 1)
        for case, delta in (("last", made[-1]), ("first", made[0])):
            # The first call after all that was freed before would give the allocator's time to it (malloc_consolidate).
            delta.detach().attach()
            gc.collect()
            calls.run("detach", case, delta.detach)
            calls.run("attach again", case, delta.attach)
            if case == "last":
                for other in made[1:]:
                    other.detach()

    return calls, rounds.repeated(one, bound, lambda: calls.known("first"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", type=int, default=10000)
    parser.add_argument("--deltas", type=int, default=200)
    harness.add_options(parser, rounds.Bound(5, 41, 300))
    options = parser.parse_args()
    bound = harness.begin(options)
    rows: dict[str, Any] = {"count": options.targets, "deltas": options.deltas}
    for part, base, (calls, ended) in (
        ("targets", str(options.targets // 4), targets(options.targets, bound)),
        ("last", "first", many(options.deltas, bound)),
    ):
        rows[part] = {}
        for what, times in calls.of.items():
            times.bound = ended
            rows[part][what] = rounds.compared(times, base)
            print(f"{what}: {part}, for each\n    {rounds.said(rows[part][what], base)}", flush=True)
        harness.write(options.out, "scale", rows)


if __name__ == "__main__":
    main()
