"""Times the life of a delta on thousands of linear layers, and of the last of many deltas on one backbone.

    python benchmarks/scale.py [--targets 10000] [--deltas 200] [--rounds 3] [--out scale.json]

The first table compares the CPU time for each target at a quarter, at half and at all of the targets: about 1 says that a
call takes as long as its targets say. The second compares the last delta with the first. Medians of all rounds.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harness
import torch
from torch import nn

import deltakit as dk

Times = dict[str, list[float]]


class Chain(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@contextmanager
def timed(times: Times, name: str) -> Iterator[None]:
    start = time.process_time()
    yield
    times.setdefault(name, []).append(time.process_time() - start)


def life(model: nn.Module, times: Times, folder: str) -> None:
    """Notes the CPU seconds of each call in the life of a delta."""
    x, method = torch.ones(2, 8), dk.LoRA(r=2, at="layers.*")
    with timed(times, "plan"):
        dk.plan(model, method)
    with timed(times, "attach"):
        delta = dk.attach(model, method)
    for name in ("first forward", "second forward"):
        with torch.no_grad(), timed(times, name):
            model(x)
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.normal_(std=0.01)
    with timed(times, "draw"):
        str(dk.show(model))
    with timed(times, "save"):
        delta.save(folder)
    with timed(times, "detach"):
        delta.detach()
    with timed(times, "attach again"):
        delta.attach()
    delta.detach()
    with timed(times, "load"):
        loaded = dk.load(folder, model)
    loaded.detach()


def targets(most: int, rounds: int) -> dict[int, Times]:
    """Returns the CPU seconds of each call with a quarter, half and all of the targets."""
    counts = (most // 4, most // 2, most)
    found: dict[int, Times] = {count: {} for count in counts}
    with tempfile.TemporaryDirectory() as folder:
        life(Chain(64), {}, folder)
        for _ in range(rounds):
            for count in counts:
                life(Chain(count), found[count], folder)
    return found


def many(count: int, rounds: int) -> dict[str, Times]:
    """Returns the CPU seconds of the first and the last delta; of forwards, for each delta."""
    found: dict[str, Times] = {"first": {}, "last": {}}
    x, method = torch.ones(2, 8), dk.LoRA(r=2, at="layers.*")
    for _ in range(rounds):
        model = Chain(56)
        made = []
        for k in range(count):
            times = found["last" if k == count - 1 else "first"] if k in (0, 1, count - 1) else {}
            with timed(times, "attach"):
                made.append(dk.attach(model, method, name=f"d{k}"))
            for name in ("first forward", "second forward") if times else ():
                with torch.no_grad(), timed(times, name):
                    model(x)
                times[name][-1] /= k + 1
        for delta, times in ((made[-1], found["last"]), (made[0], found["first"])):
            with timed(times, "detach"):
                delta.detach()
            with timed(times, "attach again"):
                delta.attach()
            if times is found["last"]:
                for other in made[1:]:
                    other.detach()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", type=int, default=10000)
    parser.add_argument("--deltas", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(harness.machine())
    rows: dict[str, Any] = {"targets": {}, "deltas": {"count": options.deltas}}
    found = targets(options.targets, options.rounds)
    least = min(found)
    for name in found[least]:
        each = {count: statistics.median(times[name]) / count for count, times in found.items()}
        rows["targets"][name] = {
            "seconds": {count: times[name] for count, times in found.items()},
            "ratios": {count: seconds / each[least] for count, seconds in each.items()},
        }
        print(
            f"{name:15} {statistics.median(found[options.targets][name]):6.2f} s for {options.targets} targets; for each, "
            + ", ".join(f"{count}: {ratio:.2f}" for count, ratio in rows["targets"][name]["ratios"].items())
        )
    ends = many(options.deltas, options.rounds)
    for name, first in ends["first"].items():
        ratio = statistics.median(ends["last"][name]) / statistics.median(first)
        rows["deltas"][name] = {"first": first, "last": ends["last"][name], "ratio": ratio}
        print(f"{name:15} the last of {options.deltas} deltas: {ratio:.2f} times the first")
    harness.write(options.out, "scale", rows)


if __name__ == "__main__":
    main()
