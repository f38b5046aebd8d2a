"""Damages saved deltas, kills saves, and reads beside writers; prints what came of it.

    python benchmarks/damage.py [--mutations 1000] [--forged 1000] [--kills 300] [--reads 150] [--seed 0]

mutations   Bits flipped, pieces cut off, the readable copy changed, files swapped with those of another delta or removed.
forged      Configs and tensors changed with right seals, and configs of the first format, which has none: what a stranger may
            upload. Some of them are other deltas that load.
kills       A process saves two deltas in turn and is killed at a random moment.
reads       Loads beside one process, and then two, that save two deltas in turn.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch

import deltakit as dk

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.damaged_files import DAMAGED, FORGED, backbone, made, outcome, result


def damage(name: str, kinds: tuple, count: int, seed: int, scratch: Path) -> None:
    deltas = [made(5), made(7)]
    saved, wanted = [delta.save(scratch / str(delta.methods[0].alpha)) for delta in deltas], [result(d) for d in deltas]
    found, longest, others = Counter(), 0.0, []
    for number in range(count):
        start = time.perf_counter()
        got, error = outcome(kinds, number, seed, saved, scratch / "damaged", wanted)
        longest = max(longest, time.perf_counter() - start)
        found[got] += 1
        others += [f"  {number}: {got}: {str(error)[:300]}"] if error is not None else []
    print(f"{count} {name}: {dict(found)}; the longest took {longest:.2f} s", *others[:40], sep="\n")


def writer(folder: Path, deltas: list[dk.Delta], first: int) -> int:
    """Starts a process that saves two deltas in turn until it is killed, and returns its id once it has saved one."""
    begun, told = os.pipe()
    process = os.fork()
    if process == 0:
        for number in range(first, sys.maxsize):
            deltas[number % 2].save(folder)
            os.write(told, b".")
    os.close(told)
    os.read(begun, 1)
    os.close(begun)
    return process


def kill(process: int) -> None:
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def compared(folder: Path, wanted: list[torch.Tensor]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            got = result(dk.load(folder, backbone()))
        except dk.DeltaError as error:
            return f"error: {str(error)[:200]}"
    told = " with a warning" if any(issubclass(w.category, dk.DeltaWarning) for w in caught) else ""
    return ("one of the two" if any(torch.equal(got, want) for want in wanted) else "MIXED") + told


def kills(count: int, seed: int, scratch: Path) -> None:
    deltas, chance = [made(5), made(7)], random.Random(seed)
    wanted, folder = [result(delta) for delta in deltas], scratch / "killed"
    found, left, stayed = Counter(), 0, 0
    for _ in range(count):
        process = writer(folder, deltas, chance.randrange(2))
        time.sleep(chance.random() * 0.02)
        kill(process)
        found[compared(folder, wanted)] += 1
        left += any(folder.glob(".*"))
        deltas[0].save(folder)
        stayed += any(folder.glob(".*"))
    print(f"{count} kills: {dict(found)}; {left} left something behind, {stayed} still after the next save")


def reads(count: int, scratch: Path) -> None:
    deltas = [made(5), made(7)]
    wanted, folder = [result(delta) for delta in deltas], scratch / "shared"
    for many in (1, 2):
        writers = [writer(folder, deltas, first) for first in range(many)]
        found = Counter(compared(folder, wanted) for _ in range(count))
        for process in writers:
            kill(process)
        print(
            f"{count} reads beside {many} writer{'s' * (many > 1)}: {dict(found)}; afterwards {compared(folder, wanted)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("mutations", 1000), ("forged", 1000), ("kills", 300), ("reads", 150), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        damage("mutations", DAMAGED, options.mutations, options.seed, Path(scratch))
        damage("forged", FORGED, options.forged, options.seed, Path(scratch))
        kills(options.kills, options.seed, Path(scratch))
        reads(options.reads, Path(scratch))


if __name__ == "__main__":
    main()
