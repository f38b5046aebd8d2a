"""Prints how many lines the tasks of `benchmarks/tasks_beside_peft.py` need in deltakit and in PEFT.

    python benchmarks/lines.py [--guide examples/guides/lines_beside_peft.md]

Counted are the lines of the task: no imports, and not the model. `--guide` writes the page of examples/guides, whose code
and numbers are those of the tasks.
"""

import argparse
from pathlib import Path

import peft
from tasks_beside_peft import TASKS, Task

HEAD = """# 34 tasks in deltakit and in PEFT

`python benchmarks/lines.py --guide examples/guides/lines_beside_peft.md` writes this page. A test runs all code on it, that
for PEFT {version} too, and checks that both did the task. Counted are the lines of the task alone, without imports and without
building the model. Time and memory beside PEFT are in [the results](../../benchmarks/results.md).
[Coming from PEFT](from_peft.md) has more pairs of lines, and what PEFT has that deltakit has not.

"""


def lines_of(code: str | None) -> int | None:
    """Returns the number of lines of code; None if there is none."""
    return None if code is None else sum(bool(line.strip()) for line in code.splitlines())


def table(tasks: tuple[Task, ...]) -> list[str]:
    """Returns the table as lines of Markdown, with the totals of the tasks that both do."""
    rows = ["| task | lines, deltakit | lines, PEFT |", "|---|---|---|"]
    for task in tasks:
        theirs = lines_of(task.theirs)
        rows.append(f"| {task.title} | {lines_of(task.ours)} | {f'no: {task.why}' if theirs is None else theirs} |")
    both = [task for task in tasks if task.theirs is not None]
    ours, theirs = (sum(lines_of(getattr(task, side)) or 0 for task in both) for side in ("ours", "theirs"))
    return [*rows, f"| all {len(both)} that both do | {ours} | {theirs} |"]


def guide(tasks: tuple[Task, ...]) -> str:
    """Returns the page: the table, and then the code of each task."""
    parts = [HEAD.format(version=peft.__version__) + "\n".join(table(tasks)) + "\n\n## The code\n"]
    for task in tasks:
        theirs = f"\nPEFT cannot: {task.why}\n" if task.theirs is None else f"\nPEFT:\n\n```py\n{task.theirs}\n```\n"
        parts.append(f"\n### {task.title[0].upper()}{task.title[1:]}\n\n```py\n{task.ours}\n```\n{theirs}")
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guide", type=Path)
    given = parser.parse_args()
    print("\n".join(table(TASKS)))
    if given.guide is not None:
        given.guide.write_text(guide(TASKS), encoding="utf-8")


if __name__ == "__main__":
    main()
