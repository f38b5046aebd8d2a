"""Runs random sequences of calls on eight backbones, compares each step with plain torch, and prints what was done.

    python benchmarks/state_sequences.py [--steps 10000] [--seed 0] [--backbones toy bert ...]

The steps attach, detach, merge, train, save, load, copy, swap and replace modules, raise errors and Ctrl-C in forwards and at
random lines of deltakit's code, and run forwards in several threads. The oracle is in tests/support/state_fuzz.py.
"""

import argparse
import collections
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.state_fuzz import BACKBONES, Fuzz

EPISODE = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backbones", nargs="*", default=list(BACKBONES))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    counts: collections.Counter[str] = collections.Counter()
    failed = 0
    for number in range(-(-options.steps // (EPISODE * len(options.backbones)))):
        for name in options.backbones:
            episode = Fuzz(name, options.seed + number)
            try:
                for _ in range(EPISODE):
                    episode.step()
                episode.end()
            except Exception as error:
                failed += 1
                print(f"{name}, seed {options.seed + number}, step {episode.counts['steps']}: {error!r}", flush=True)
            counts += episode.counts
    print(", ".join(f"{what} {count:,}" for what, count in counts.most_common()))
    print(f"{failed} episodes failed")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
