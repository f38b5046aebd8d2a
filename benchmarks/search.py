"""Compares structures that dk.search finds with random ones of the same budget, on SNIPS and the demo's encoder.

python benchmarks/search.py [--budget 6000] [--seeds 3] [--examples 128] [--valid 200] [--out benchmarks/results/search.json]
    [--table benchmarks/search.md]

Every structure is trained from the start on the same few examples, with the head; two learning rates are tried, and the best
mean counts. All candidates together, at the same places, are trained beside them.
"""

import argparse
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
import torch
from rich.console import Console
from rich.table import Table

import deltakit as dk
from deltakit.core import Method
from deltakit.demo.data import Example, batches
from deltakit.demo.run import Task, bundled_model, prepare
from deltakit.demo.training import accuracy, train
from deltakit.searching.structure import candidates_of, fitting, methods_at

RATES = (3e-3, 1e-2)
LINEARS = ["@attn.{q,k,v,o}", "@ff.up", "@ff.down"]
COLUMNS = ("structure", "parameters", "learning rate", "mean accuracy", "lowest", "highest")
CANDIDATES: tuple[Method, ...] = (dk.LoRA(r=1, at=LINEARS), dk.BitFit(), dk.LowRankAdapter(size=12, r=1))
"""The paper's "Mix", with the norms among BitFit's targets."""


def halves(examples: Sequence[Example], pad: int, seed: int) -> dict[str, Iterator[dict[str, Any]]]:
    """Endless batches for the weights and for the gates, from two halves of the training data."""

    def endless(own: Sequence[Example]) -> Iterator[dict[str, Any]]:
        epoch = seed
        while True:
            yield from batches(own, 16, pad, seed=epoch)
            epoch += 1

    order = random.Random(seed).sample(list(examples), len(examples))
    middle = len(order) // 2
    return {"weights": endless(order[:middle]), "gates": endless(order[middle:])}


def searched(task: Task, budget: int, seed: int, steps: int) -> tuple[Method, ...]:
    torch.manual_seed(seed)
    model, own = task.fresh().train(), halves(task.train, task.pad, seed)
    found = dk.search(
        model,
        CANDIDATES,
        budget=budget,
        train_step=lambda part: model(**next(own[part])).loss,
        steps=steps,
        train="@head",
        lr=3e-3,
        seed=seed,
    )
    return found.methods


def random_structure(task: Task, budget: int, seed: int) -> tuple[Method, ...]:
    sites = candidates_of(task.fresh(), CANDIDATES, None)
    order = random.Random(seed).sample(range(len(sites)), len(sites))
    return methods_at(fitting(sites, order, budget), sites)


def score(task: Task, methods: Sequence[Method], rate: float, seed: int, epochs: int) -> tuple[float, int]:
    """Returns the accuracy after training, and the number of parameters of the methods."""
    model = task.fresh()
    torch.manual_seed(seed)
    delta = dk.attach(model, *methods, train="@head")
    size = dk.plan(task.fresh(), *methods).num_parameters
    train(model, delta.parameters(), task.train, task.pad, lr=rate, epochs=epochs)
    return accuracy(model, task.valid, task.pad), size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--budget", type=int, default=6000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--valid", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    console = Console()
    rows = []
    for seed in range(options.seeds):
        task = prepare(bundled_model(), 4000)
        # Other examples for each seed: with few of them the choice matters.
        task.train = random.Random(seed).sample(list(task.train), options.examples)
        task.valid = random.Random(0).sample(list(task.valid), options.valid)
        structures = {
            "searched": searched(task, options.budget, seed, options.steps),
            "random": random_structure(task, options.budget, seed),
            "all candidates": CANDIDATES,
        }
        for name, methods in structures.items():
            for rate in RATES:
                value, size = score(task, methods, rate, seed, options.epochs)
                rows.append({"structure": name, "seed": seed, "rate": rate, "accuracy": value, "parameters": size})
                console.print(f"seed {seed}  {name:<15} lr {rate:<6} {size:>7,} parameters  {value:.1%}")
    report(rows, console, options)


def report(rows: list[dict[str, Any]], console: Console, options: argparse.Namespace) -> None:
    table = Table(*COLUMNS)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    best = {name: best_rate(rows, name) for name in dict.fromkeys(row["structure"] for row in rows)}
    for name, own in best.items():
        values, sizes = [row["accuracy"] for row in own], sorted({row["parameters"] for row in own})
        counts = " to ".join(f"{size:,}" for size in dict.fromkeys((sizes[0], sizes[-1])))
        cells = (name, counts, f"{own[0]['rate']:g}", *(f"{f(values):.1%}" for f in (statistics.mean, min, max)))
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    pairs = zip(best["searched"], best["random"], strict=True)
    won = sum(one["accuracy"] > other["accuracy"] for one, other in pairs)
    said = f"The searched structure was better than the random one in {won} of {options.seeds} seeds."
    console.print(table, said)
    harness.write(options.out, "search", rows)
    if options.table is not None:
        head = (
            f"SNIPS, MiniLM, {options.examples} training requests, {options.valid} others for the accuracy, a budget of "
            f"{options.budget:,} parameters, {options.seeds} seeds (other requests, start values and samples of the gates), "
            f"{options.steps} steps of search, the better of {len(RATES)} learning rates. Made by "
            "`python benchmarks/search.py`."
        )
        options.table.write_text("\n\n".join(("# Searched and random structures", head, "\n".join(lines), said)) + "\n")


def best_rate(rows: list[dict[str, Any]], structure: str) -> list[dict[str, Any]]:
    """Returns the rows of a structure at the learning rate with the best mean accuracy, by seed."""
    by_rate = [[row for row in rows if (row["structure"], row["rate"]) == (structure, rate)] for rate in RATES]
    return max(by_rate, key=lambda own: statistics.mean(row["accuracy"] for row in own))


if __name__ == "__main__":
    main()
