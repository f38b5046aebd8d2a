"""Runs some or all benchmarks against PEFT, and writes a table of their results.

    python benchmarks/run.py [step forward ...] [--device cuda] [--folder benchmarks/results] [--table benchmarks/results.md]

Each part runs in a separate process and writes JSON. The table is made from all JSON files in the folder. All parts of a CPU
take about two hours on an idle machine; the parts say how long each takes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import harness
import rounds

HERE = Path(__file__).resolve().parent
ON_GPU = ("gpu", "step", "memory", "forward", "many", "optimizer")
PARTS = ("step", "memory", "forward", "attach", "scale", "many", "optimizer", "compiled", "gpu")


ABOUT = """\
CPU time on one thread, or wall time on a GPU, taken turn by turn in one process. Ratios are medians with the quartiles of the
rounds. A share is our overhead as a part of PEFT's, and its quartiles, over resampled rounds, say how far it is known. The
share of a second copy of deltakit's contestant (null) shows the noise: without it both were equal. Rounds go on until the
quartiles of the share are within 0.1, or to the bound that is named; a share whose quartiles are further apart than 0.25 is
unknown. The overheads in a share are means of the middle half of the rounds, so it may differ a little from what the medians
beside it give. PEFT 0.21.2 where nothing else is said."""


def ratio(found: Any) -> str:
    return rounds.text(found) if found else ""


def share(row: Any, key: str = "share", clock: str = "") -> str:
    found = row[clock or row["clock"]]
    return rounds.share_text(found[key]) if key in found else ""


def lined(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns a table in Markdown."""
    return [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]


def beside(row: Any, *names: str) -> list[str]:
    """Returns the cells of a row of rounds: the ratios of these contestants, the shares and the number of rounds."""
    ratios = [ratio(row[row["clock"]]["ratios"].get(who)) for who in names]
    return [*ratios, share(row), share(row, "null"), share(row, clock="wall"), rounds.counted(row)]


SHARES = ("share of PEFT's overhead", "of a second copy (null)", "by wall time", "rounds")


def step(rows: Any) -> list[str]:
    names = ("full", "PEFT", "deltakit", "limit")
    each = []
    for row in rows:
        layers = f", {row['layers']} layers" if row["layers"] else ""
        name = f"{row['model']}{layers}, {row['dtype'].removeprefix('torch.')}, {row['targets']}"
        each.append([name, *beside(row, *names)])
    heads = ("model, dtype, targets", "full fine-tuning", "PEFT", "deltakit", "limit", *SHARES)
    return [
        "A training step, as a ratio to the frozen backbone's forward and backward. The limit: these, and the six products of",
        "LoRA at each target alone.",
        "",
        *lined(heads, each),
    ]


def memory(rows: Any) -> list[str]:
    who = ("PEFT", "deltakit", "deltakit int8")
    each = []
    for row in rows:
        kept, peak = row["kept"], row["peak"]
        beyond = [f"{(kept[name] - kept['floor']) / 1e6:.1f}" for name in who]
        tops = {name: rounds.text([value / 1e6 for value in peak[name]], 0) for name in (*who, "floor")}
        name = f"{row['model']}, {row['dtype']}"
        each.append([name, "MB kept for backward beyond the floor", *beyond, f"{row['limit'] / 1e6:.1f}"])
        each.append(["", f"MB at the peak beyond the model; floor {tops['floor']}", *(tops[name] for name in who), ""])
    heads = ("model, dtype", "", "PEFT", "deltakit", '`keep="int8"`', "limit")
    return [
        "Memory of a training step, LoRA r=8 on all linear layers. Peaks: the median, the lowest and the highest process.",
        "",
        *lined(heads, each),
    ]


def forward(rows: Any) -> list[str]:
    names = ("PEFT", "deltakit", "products alone", "merged")
    return [
        "A forward without gradients, as a ratio to the bare backbone's. Products alone: hooks that do nothing else.",
        "",
        *lined(("case", *names, *SHARES), ([row["case"], *beside(row, *names)] for row in rows)),
    ]


def attach(rows: Any) -> list[str]:
    each = []
    for row in rows:
        cpu, wall = row["ms"]["cpu"], row["ms"]["wall"]
        own = [ratio_ms(cpu["deltakit"]), ratio_ms(cpu.get("PEFT"))]
        compared = ratio(row["cpu"]["ratios"]["deltakit"]) if "PEFT" in cpu else ""
        walls = [f"{wall[who][0]:.1f}" if who in wall else "" for who in ("deltakit", "PEFT")]
        each.append([f"{7 * row['layers']}", row["what"], *own, compared, *walls, rounds.counted(row)])
    heads = ("targets", "what", "deltakit, ms", "PEFT, ms", "ratio", "deltakit, wall", "PEFT, wall", "rounds")
    return ["Llama shapes: 560 targets without weights, and 56 with them.", "", *lined(heads, each)]


def ratio_ms(found: Any) -> str:
    return rounds.text(found, 2) if found else ""


def scale(rows: Any) -> list[str]:
    counts = list(next(iter(rows["targets"].values()))["cpu"]["ratios"])
    each = []
    for name, row in rows["targets"].items():
        seconds = [f"{row[clock]['seconds'][counts[-1]] * int(counts[-1]):.2f}" for clock in ("cpu", "wall")]
        each.append(
            [name, *seconds, *(ratio(row["cpu"]["ratios"][count]) for count in counts[1:]), rounds.counted(row)]
        )
    last = [
        [name, ratio(row["cpu"]["ratios"]["last"]), f"{1000 * row['cpu']['seconds']['last']:.2f}", rounds.counted(row)]
        for name, row in rows["last"].items()
    ]
    heads = ("what", f"CPU seconds, {counts[-1]} targets", "wall", *(f"for each, of {count}" for count in counts[1:]))
    return [
        f"The calls of one LoRA on a chain of linear layers; for each target, as a ratio to a chain of {counts[0]}.",
        "",
        *lined((*heads, "rounds"), each),
        "",
        f"The last of {rows['deltas']} deltas on 56 layers, as a ratio to the first; forwards for each delta.",
        "",
        *lined(("what", "ratio", "ms of the last", "rounds"), last),
    ]


def many(rows: Any) -> list[str]:
    loading, *batches = rows
    loads = ([k, ratio_ms(v["cpu"]), ratio_ms(v["wall"])] for k, v in loading["ms"].items())
    lines = lined(("what", "CPU, ms", "wall, ms"), loads)
    facts = [f"{name} {value:.3g}" for name, value in loading.items() if name != "ms"]
    each = []
    for row in batches:
        apart = row["apart"][row["apart"]["clock"]]["ratios"]["one after another"]
        name = f"{row['batch']}, {row['distinct']}, {row['tokens']}"
        each.append([name, ratio(apart), *beside(row, "PEFT", "deltakit")])
    heads = ("rows, distinct deltas, tokens", "one delta after another", "PEFT", "deltakit", *SHARES)
    return [
        f"Many deltas on one backbone ({', '.join(facts)}).",
        "Then a forward whose rows have their own, as a ratio to the bare one's.",
        "",
        *lines,
        "",
        *lined(heads, each),
    ]


def optimizer(rows: Any) -> list[str]:
    (row,) = rows
    each = (
        [name, ratio(value), ratio(row["wall"]["ratios"][name]), rounds.counted(row)]
        for name, value in row["cpu"]["ratios"].items()
    )
    return [
        "An AdamW step on all of a delta's parameters, as a ratio to torch's default.",
        "",
        *lined(("", "CPU time", "wall time", "rounds"), each),
    ]


def compiled(rows: Any) -> list[str]:
    events = [
        [who, shapes, what, str(graphs), "right" if right else "WRONG"]
        for who, shapes, what, graphs, right in rows["graphs"]
    ]
    timed = [[row["case"], *beside(row, "PEFT", "deltakit")] for row in rows["times"]]
    made = [
        [row["case"], who, str(found["graphs"]), f"{found['cpu']:.1f}", f"{found['wall']:.1f}"]
        for row in rows["times"]
        for who, found in row["compiling"].items()
    ]
    return [
        "Compiled by inductor, as a ratio to the compiled bare backbone.",
        "",
        *lined(("case", "PEFT", "deltakit", *SHARES), timed),
        "",
        "Until the first two calls are done: the graphs, and the seconds of one compilation.",
        "",
        *lined(("case", "", "graphs", "CPU seconds", "wall"), made),
        "",
        "Compilations while deltas come, go and change; deltakit's with `fullgraph=True`.",
        "",
        *lined(("", "shapes", "what", "graphs compiled", "output"), events),
    ]


def gpu(rows: Any) -> list[str]:
    each = []
    for row in rows:
        base = row["base"]
        more = [
            f"{row['measures'][who]:.4g}" if who in row.get("measures", {}) else ""
            for who in (base, "PEFT", "deltakit")
        ]
        cells = beside(row, "PEFT", "deltakit") if "clock" in row else [""] * 6
        each.append([row["model"], row["what"], row.get("unit", ""), *more, *cells])
    heads = ("model", "what", "unit", "bare", "PEFT", "deltakit", "PEFT, ratio", "deltakit, ratio", *SHARES)
    return ["Llama shapes with random weights, LoRA r=16 on all linear layers.", "", *lined(heads, each)]


def table(folder: Path) -> str:
    """Returns the tables of all results in the folder, with the machine of each part."""
    lines = ["<!-- written by benchmarks/run.py -->", "# Benchmarks", ""]
    lines += [ABOUT, ""]
    for part in PARTS:
        path = folder / f"{part}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        if found.get("form") != harness.FORM:
            print(f"{path} is left out: run benchmarks/{part}.py again, because its figures are of an older form")
            continue
        machine = found["machine"]
        lines += [
            f"## {part}",
            "",
            f"`python benchmarks/{part}.py`; {', '.join(f'{k} {v}' for k, v in machine.items())}.",
            "",
        ]
        lines += [*globals()[part](found["rows"]), ""]
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
    for part in options.parts or (ON_GPU if on_gpu else PARTS[:-1]):
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
