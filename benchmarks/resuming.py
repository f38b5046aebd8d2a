"""Shared by the benchmarks that take long: rows that are written as soon as a run ends, and runs in several processes."""

import json
import sys
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import harness
import torch

Job = TypeVar("Job", bound=Hashable)
Row = dict[str, Any]
Start = tuple[Callable[..., Row], tuple[Any, ...]]
"""A function of a module, and its arguments."""


class Rows:
    """The rows of all runs, in a file that is complete after every run. A second start reads what the first one wrote."""

    def __init__(self, path: Path, benchmark: str) -> None:
        self.path, self.benchmark = path, benchmark
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(self, row: Row) -> None:
        self.rows.append(row)
        harness.write(self.path, self.benchmark, self.rows)


def work(
    missing: Callable[[], Iterable[Job]],
    start: Callable[[Job], Start],
    done: Callable[[Job, Row], None],
    workers: int,
) -> dict[Job, str]:
    """Runs all jobs that are missing, and those that are missing afterwards, and returns what failed and why.

    Args:
        missing: returns the jobs that can start now.
        start: returns the function that runs a job, with its arguments.
        done: is called with a job and its row as soon as it ends.
        workers: the number of processes, of one thread each.
    """
    failed: dict[Job, str] = {}
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        while jobs := [job for job in missing() if job not in failed]:
            print(f"{len(jobs)} runs", flush=True)
            running = {}
            for job in jobs:
                function, arguments = start(job)
                running[pool.submit(function, *arguments)] = job
            for future in as_completed(running):
                job = running[future]
                try:
                    row = future.result()
                except Exception as error:
                    failed[job] = f"{job}: {type(error).__name__}: {error}"
                    print(failed[job], file=sys.stderr, flush=True)
                    continue
                done(job, row)
    return failed
