"""Prints a table of every method on every tiny backbone of the tests' zoo: pass, does not apply, or fail.

python benchmarks/matrix.py [--backbones bert ...] [--json FILE] [--table FILE]
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
import transformers

from support import backbone_zoo, method_matrix

SIGNS = {"pass": "✓", "does not apply": "–", "fail": "✗"}


def table(results: list[method_matrix.Result]) -> str:
    """Returns the table as Markdown, followed by the reasons."""
    counts = Counter(result.status for result in results)
    cells = {(result.backbone, result.method): result for result in results}
    names = list(dict.fromkeys(result.backbone for result in results))
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}: "
        f"{len(names)} backbones, {counts['pass']} pass, {counts['does not apply']} do not apply, {counts['fail']} fail.",
        "",
        f"| backbone | kind | {' | '.join(method_matrix.METHODS)} |",
        "|---|---|" + "---|" * len(method_matrix.METHODS),
    ]
    for name in names:
        signs = " | ".join(SIGNS[cells[name, method].status] for method in method_matrix.METHODS)
        lines.append(f"| {name} | {backbone_zoo.ZOO[name].kind} | {signs} |")
    lines += ["", "| does not apply, or fails | why |", "|---|---|"]
    lines += [f"| {r.backbone}, {r.method} | {r.reason.replace('|', '/')} |" for r in results if r.status != "pass"]
    return "\n".join(lines)


def one(name: str) -> list[method_matrix.Result]:
    torch.set_num_threads(1)
    return [method_matrix.cell(name, method) for method in method_matrix.METHODS]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbones", nargs="*", help="only these")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        results = [result for row in pool.map(one, options.backbones or backbone_zoo.ZOO) for result in row]
    wall = time.perf_counter() - start
    text = table(results)
    print(text)
    print(f"\n{wall:.0f} s with {options.workers} processes")
    if options.json:
        rows = [result._asdict() for result in results]
        options.json.write_text(json.dumps({"wall_seconds": wall, "results": rows}, indent=1) + "\n")
    if options.table:
        options.table.write_text(f"<!-- written by benchmarks/matrix.py -->\n# Methods on backbones\n\n{text}\n")
    return int(any(result.status == "fail" for result in results))


if __name__ == "__main__":
    sys.exit(main())
