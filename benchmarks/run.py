"""Runs some or all benchmarks against PEFT, and writes a table of their results.

    python benchmarks/run.py [step forward ...] [--device cuda] [--folder benchmarks/results] [--table benchmarks/results.md]

Each part runs in a separate process and writes JSON. The table is made from all JSON files in the folder.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ON_GPU = ("step", "memory", "forward", "many", "optimizer")
PARTS = ("step", "memory", "forward", "attach", "scale", "many", "optimizer", "compiled")


def ratio(found: list[float]) -> str:
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"


def step(rows: Any) -> list[str]:
    lines = [
        "| model, dtype, targets | full fine-tuning | PEFT | deltakit | limit | share of PEFT's overhead |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        full, theirs, ours, limit = (
            ratio(row["ratios"][w]) if w in row["ratios"] else "" for w in ("full", "PEFT", "deltakit", "limit")
        )
        name = f"{row['model']}, {row['dtype'].removeprefix('torch.')}, {row['targets']}"
        lines.append(f"| {name} | {full} | {theirs} | {ours} | {limit} | {row['share']:.2f} |")
    return [
        "A training step, as a ratio to the frozen backbone's forward and backward. The limit: these, and the six products of",
        "LoRA at each target alone.",
        "",
        *lines,
    ]


def memory(rows: Any) -> list[str]:
    lines = ['| model, dtype | | PEFT | deltakit | `keep="int8"` | limit |', "|---|---|---|---|---|---|"]
    for row in rows:
        kept, peak = row["kept"], row["peak"]
        beyond = [f"{(kept[who] - kept['floor']) / 1e6:.1f}" for who in ("PEFT", "deltakit", "deltakit int8")]
        name = f"{row['model']}, {row['dtype']}"
        lines.append(
            f"| {name} | MB kept for backward beyond the floor | {' | '.join(beyond)} | {row['limit'] / 1e6:.1f} |"
        )
        tops = [f"{peak[who] / 1e6:.0f}" for who in ("PEFT", "deltakit", "deltakit int8")]
        lines.append(f"| | MB at the peak beyond the model; floor {peak['floor'] / 1e6:.0f} | {' | '.join(tops)} | |")
    return ["Memory of a training step, LoRA r=8 on all linear layers.", "", *lines]


def forward(rows: Any) -> list[str]:
    lines = [
        "| case | PEFT | deltakit | products alone | merged | share of PEFT's overhead |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        found = " | ".join(ratio(row["ratios"][who]) for who in ("PEFT", "deltakit", "products alone", "merged"))
        lines.append(f"| {row['case']} | {found} | {row['share']:.2f} |")
    return [
        "A forward without gradients, as a ratio to the bare backbone's. Products alone: hooks that do nothing else.",
        "",
        *lines,
    ]


def attach(found: Any) -> list[str]:
    lines = ["| what | deltakit, ms | PEFT, ms | times |", "|---|---|---|---|"]
    for name, own in found["milliseconds"]["deltakit"].items():
        other = found["milliseconds"]["PEFT"].get(name)
        mine = sorted(own)[len(own) // 2]
        theirs = sorted(other)[len(other) // 2] if other else None
        more = f"{theirs:.1f} | {theirs / mine:.0f}" if theirs else " | "
        lines.append(f"| {name} | {mine:.2f} | {more} |")
    return [f"A Llama shape of {found['layers']} layers, {7 * found['layers']} targets, without weights.", "", *lines]


def scale(rows: Any) -> list[str]:
    counts = list(next(iter(rows["targets"].values()))["ratios"])
    lines = [
        f"| what | seconds, {counts[-1]} targets | {' | '.join(f'for each, of {count}' for count in counts)} |",
        "|---|---|" + "---|" * len(counts),
    ]
    for name, row in rows["targets"].items():
        own = sorted(row["seconds"][counts[-1]])
        each = " | ".join(f"{row['ratios'][count]:.2f}" for count in counts)
        lines.append(f"| {name} | {own[len(own) // 2]:.2f} | {each} |")
    last = {name: row["ratio"] for name, row in rows["deltas"].items() if name != "count"}
    return [
        "CPU time of the calls of one LoRA on a chain of linear layers, and for each target as a ratio to the shortest chain.",
        "",
        *lines,
        "",
        f"The last of {rows['deltas']['count']} deltas on 56 layers, as a ratio to the first; forwards for each delta.",
        "",
        f"| {' | '.join(last)} |",
        "|" + "---|" * len(last),
        f"| {' | '.join(f'{value:.2f}' for value in last.values())} |",
    ]


def many(rows: Any) -> list[str]:
    loading, *batches = rows
    lines = ["| | |", "|---|---|", *(f"| {name} | {value:.3g} |" for name, value in loading.items()), ""]
    lines += [
        "| rows, distinct deltas, tokens | PEFT | deltakit | one delta after another |",
        "|---|---|---|---|",
    ]
    for row in batches:
        theirs, ours, apart = (ratio(row["ratios"][who]) for who in ("PEFT", "deltakit", "one after another"))
        lines.append(f"| {row['batch']}, {row['distinct']}, {row['tokens']} | {theirs} | {ours} | {apart} |")
    return [
        "Many deltas on one backbone; then a forward whose rows have their own, as a ratio to the bare one's.",
        "",
        *lines,
    ]


def optimizer(rows: Any) -> list[str]:
    found = rows[0]["ratios"]
    lines = [f"| {name} | {ratio(value)} |" for name, value in found.items()]
    return [
        "An AdamW step on all of a delta's parameters, as a ratio to torch's default.",
        "",
        "| | |",
        "|---|---|",
        *lines,
    ]


def compiled(rows: Any) -> list[str]:
    lines = ["| | what | graphs compiled | output |", "|---|---|---|---|"]
    for who, steps in rows.items():
        lines += [f"| {who} | {what} | {n} | {'right' if right else 'WRONG'} |" for what, n, right in steps]
    return ["Compilations while deltas come, go and change; deltakit's with `fullgraph=True`.", "", *lines]


def table(folder: Path) -> str:
    """Returns the tables of all results in the folder, with the machine of each part."""
    lines = ["<!-- written by benchmarks/run.py -->", "# Benchmarks", ""]
    lines += [
        "Ratios are medians with quartiles, taken turn by turn in one process. PEFT 0.21.2 where nothing else is said.",
        "",
    ]
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        machine = found.get("machine") or found.get("versions")
        lines += [
            f"## {part}",
            "",
            f"`python benchmarks/{part}.py`; {', '.join(f'{k} {v}' for k, v in machine.items())}.",
            "",
        ]
        lines += [*globals()[part](found.get("rows", found)), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    options.folder = options.folder or HERE / ("results_gpu" if on_gpu else "results")
    options.table = options.table or HERE / ("results_gpu.md" if on_gpu else "results.md")
    options.folder.mkdir(parents=True, exist_ok=True)
    for part in options.parts or (ON_GPU if on_gpu else PARTS):
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(HERE / f"{part}.py"),
            "--out",
            str(options.folder / f"{part}.json"),
            *(["--device", options.device] if on_gpu else []),
        ]
        print("+", " ".join(command[3:]), flush=True)
        subprocess.run(command, check=True)
    options.table.write_text(table(options.folder))


if __name__ == "__main__":
    main()
