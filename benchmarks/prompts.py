"""Does prompt learning help? Few-shot intents with a classification head, and with prompts read by words or prototypes.

    python benchmarks/prompts.py [--shots 4 8 16 32] [--seeds 5] [--tasks SNIPS CLINC150] [--readers ...] [--tunings ...]
                                 [--steps 30] [--growth 0.5] [--test 200] [--workers 2] [--out benchmarks/results/prompts.json]
                                 [--table benchmarks/prompts.md] [--measured]

First the demo's encoder becomes a masked-language model: a LoRA delta and a new head are trained on the requests of both tasks
without their labels, and saved in `build/prompts`. Then each reader is trained in each of three ways. Each pair chooses one of
three learning rates for each task on its validation split, with 16 examples a class and the first seed; the test split
chooses nothing. Each run is written as soon as it ends, and a second start goes on where the first one stopped, so a first
start with `--shots 4 16 --seeds 3` is a part of the whole. With `--table` a plot is written beside the table.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import resuming
import torch
from adapted_encoder import HEAD, MASKED, METHOD, adapt
from intent_tasks import TASKS
from intent_words import SOFT_TEMPLATE, TEMPLATE
from plots import Line, Panel, lines_plot
from prompt_runs import (
    BATCH,
    HEADS,
    NEW_RATE,
    READERS,
    SOFT_TOKENS,
    TUNINGS,
    UNLABELLED,
    UNTRAINED,
    Job,
    Settings,
    run,
    steps_of,
)
from resuming import Row, Rows, Start

HERE = Path(__file__).resolve().parent
PLACE = HERE.parent / "build" / "prompts"
RATES = {"LoRA": (2e-3, 6e-3, 1.8e-2), "soft prompt": (1e-2, 3e-2, 9e-2), "full": (1e-4, 3e-4, 1e-3)}
CHOOSING = 16
"""The examples of a class with which learning rates are chosen."""


class Results(Rows):
    """The rows of all runs, and of the adaptation."""

    def __init__(self, path: Path, settings: Settings) -> None:
        super().__init__(path, "prompts")
        self.settings = settings

    def runs(self) -> dict[Job, Row]:
        """Returns the rows of the runs with these settings."""
        own = [row for row in self.rows if all(row.get(key) == value for key, value in self.settings._asdict().items())]
        return {Job(*(row[field] for field in Job._fields)): row for row in own if "reader" in row}

    def adaptation(self) -> Row | None:
        """Returns the row of the adaptation with as many epochs."""
        return next((row for row in self.rows if row.get("epochs") == self.settings.adaptation), None)

    def chosen(self, task: str, reader: str, tuning: str) -> float | None:
        """Returns the rate that is best on a task's validation split; None before all have run."""
        runs = self.runs()
        found = {rate: runs.get(choosing(task, reader, tuning, rate), {}).get("valid") for rate in RATES[tuning]}
        return None if None in found.values() else max(found, key=lambda rate: found[rate] or 0.0)


def choosing(task: str, reader: str, tuning: str, rate: float) -> Job:
    """Returns the run that shows how good a learning rate is."""
    return Job(task, reader, tuning, CHOOSING, 0, rate)


def missing(results: Results, options: argparse.Namespace) -> Iterator[Job]:
    """Yields the runs that can start now: first learning rates and runs without training, then those with the chosen rates."""
    runs = results.runs()
    words = [reader for reader in options.readers if reader in ("words", "KPT")]
    first = [Job(task, reader, UNTRAINED, 0, 0, 0.0) for task in options.tasks for reader in words]
    rates = {
        (task, reader, tuning): results.chosen(task, reader, tuning)
        for task in options.tasks
        for tuning in options.tunings
        for reader in options.readers
    }
    first += [choosing(*three, rate) for three, best in rates.items() if best is None for rate in RATES[three[2]]]
    left = [job for job in first if job not in runs]
    yield from left
    if not left:
        # Seeds are the outer loop: a table of fewer seeds is whole.
        for seed in range(options.seeds):
            for shots in options.shots:
                jobs = (Job(*three, shots, seed, rate) for three, rate in rates.items() if rate is not None)
                yield from (job for job in jobs if job not in runs)


def found(results: Results, task: str, reader: str, tuning: str, shots: int) -> list[float]:
    """Returns the accuracies on the test split in percent, one for each seed."""
    rate = results.chosen(task, reader, tuning)
    place = (task, reader, tuning, shots)
    return [100 * row["test"] for job, row in results.runs().items() if job[:4] == place and job.rate == rate]


def cell(values: Sequence[float], seeds: int) -> str:
    """Returns the mean with the lowest and the highest."""
    if not values:
        return "not run"
    part = f", {len(values)} seeds" if len(values) < seeds else ""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f}{part})"


def table(results: Results, task: str, options: argparse.Namespace) -> list[str]:
    """Returns the table of one task in Markdown."""
    lines = [
        f"## {task}",
        "",
        f"| tuning | reader | {' | '.join(f'{shots} examples' for shots in options.shots)} | rate | parameters |",
        "|---|---|" + "---|" * (len(options.shots) + 2),
    ]
    for tuning in options.tunings:
        for reader in options.readers:
            cells = [cell(found(results, task, reader, tuning, shots), options.seeds) for shots in options.shots]
            rate = results.chosen(task, reader, tuning)
            own = [row["parameters"] for job, row in results.runs().items() if job[:3] == (task, reader, tuning)]
            said = f"{rate:g}" if rate is not None else ""
            count = f"{own[0]:,}" if own else ""
            lines.append(f"| {tuning} | {reader} | {' | '.join(cells)} | {said} | {count} |")
    for job, row in results.runs().items():
        if job.tuning == UNTRAINED and job.task == task:
            lines += ["", f"`{job.reader}` without any training: {100 * row['test']:.1f}."]
    return [*lines, ""]


def plot(results: Results, options: argparse.Namespace) -> str:
    """Returns the plot as SVG: a row for each task, a panel for each tuning, a line for each reader."""
    rows = []
    for task in options.tasks:
        panels = []
        for tuning in options.tunings:
            lines = []
            for reader in options.readers:
                each = {shots: found(results, task, reader, tuning, shots) for shots in options.shots}
                points = [(n, statistics.mean(v), min(v), max(v)) for n, v in each.items() if v]
                lines.append(Line(reader, points))
            panels.append(Panel(f"{task}, {tuning}", lines))
        rows.append(panels)
    return lines_plot(rows, "Accuracy with few examples", "examples a class", "% right")


def document(results: Results, options: argparse.Namespace, picture: str) -> str:
    """Returns the page with the tables."""
    adaptation = results.adaptation()
    assert adaptation is not None
    steps = "/".join(dict.fromkeys(str(steps_of(results.settings, shots)) for shots in options.shots))
    said = (
        f"The encoder of `deltakit demo` learns the seven intents of SNIPS and the ten topics of CLINC150 from a few examples "
        f"of each class. It was made a masked-language model on {adaptation['requests']:,} training requests without their "
        f"labels: {METHOD!r} and the head's `{HEAD}`, {adaptation['epochs']} passes, {MASKED:.0%} of the tokens; the loss on "
        f"other requests went from {adaptation['before']:.2f} to {adaptation['after']:.2f} in {adaptation['seconds']:.0f} s. "
        f"`words`: the template `{TEMPLATE}` with one word a class, written by hand. `KPT`: up to ten words a class, of "
        f"which {UNLABELLED} unlabelled requests drop some. `prototypes`: ProtoVerb. `{HEADS[1]}`: a new classifier "
        f"on the adapted encoder, `{HEADS[0]}` on the published one. Tuned are LoRA with its defaults, {SOFT_TOKENS} soft "
        f"tokens (`{SOFT_TEMPLATE}`; before the request with a head), or all weights; all see {steps} "
        f"batches of {BATCH}. Each pair chooses one of three learning rates on the task's validation split, with "
        f"{CHOOSING} examples a class; classifiers, prototypes and weights of words have {NEW_RATE:g}. Accuracy is on "
        f"{results.settings.tested} requests of the test split: the mean of {options.seeds} seeds, which also draw the "
        f"examples, with the lowest and the highest."
    )
    lines = [f"![accuracy by examples a class]({picture})", ""]
    for task in options.tasks:
        lines += table(results, task, options)
    return harness.page("prompts.py", "Prompts with few examples", said, lines[:-1])


def work(results: Results, options: argparse.Namespace) -> list[str]:
    """Adapts the encoder, does all missing runs and returns the failures."""
    place = PLACE / f"adapted-{results.settings.adaptation}"
    if results.adaptation() is None or not place.exists():
        row = adapt(place, results.settings.adaptation)
        results.rows = [other for other in results.rows if other.get("epochs") != row["epochs"]]
        results.add(row)
        print(f"adapted: loss {row['before']:.2f} to {row['after']:.2f}, {row['seconds']:.0f} s", flush=True)

    def start(job: Job) -> Start:
        choice = job.rate in RATES.get(job.tuning, ()) and job == choosing(job.task, job.reader, job.tuning, job.rate)
        return run, (job, results.settings, place, ("valid", "test") if choice else ("test",))

    def done(job: Job, row: Row) -> None:
        results.add(row)
        shown = f"test {row['test']:.3f}, {row['seconds']:.0f} s"
        print(f"{job.task:<9} {job.reader:<18} {job.tuning:<12} {job.shots:>2} seed {job.seed}: {shown}", flush=True)

    return [*resuming.work(lambda: missing(results, options), start, done, options.workers).values()]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shots", nargs="*", type=int, default=[4, 8, 16, 32], help="examples of each class")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--readers", nargs="*", default=list(READERS), choices=READERS)
    parser.add_argument("--tunings", nargs="*", default=list(TUNINGS), choices=TUNINGS)
    parser.add_argument("--adaptation", type=int, default=2, help="passes over the unlabelled requests")
    parser.add_argument("--steps", type=int, default=30, help="training steps with 4 examples a class")
    parser.add_argument("--growth", type=float, default=0.5, help="steps grow with the examples to this power")
    parser.add_argument("--test", type=int, default=200, help="requests of the test split")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prompts.json")
    parser.add_argument("--table", type=Path, help="a Markdown file for the tables; the plot is an SVG file beside it")
    parser.add_argument("--measured", action="store_true", help="run nothing: print what has been measured")
    options = parser.parse_args()
    # As in the workers: the page says how many there were.
    torch.set_num_threads(1)
    results = Results(options.out, Settings(options.adaptation, options.steps, options.growth, options.test))
    failed = [] if options.measured else work(results, options)
    picture = (options.table or HERE / "prompts.md").with_suffix(".svg")
    text = document(results, options, picture.name)
    print(text)
    if options.table:
        options.table.write_text(text)
        picture.write_text(plot(results, options))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
