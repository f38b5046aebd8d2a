"""Rounds in which contestants take turns, on two clocks, and what follows from them: ratios and shares with their spread.

A ratio is the median of the rounds' ratios, with the quartiles of the rounds. A share is our overhead as a part of PEFT's,
and its quartiles say how far the share itself is known: see `share`.
"""

import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
Seconds = Mapping[str, Sequence[float]]

RESAMPLES = 400
EVERY = 4
"""Whether the rounds suffice is asked every so many rounds: who asks each time stops at a lucky one."""


LEAST = 5
"""Rounds that are run even if one takes longer than all should."""

KNOWN = 0.25
"""How far apart the quartiles of a share may be if it is printed."""


class Estimate(NamedTuple):
    """A figure with its quartiles."""

    middle: float
    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class Bound:
    """How many rounds are run: at least `least`, and then until they suffice, or one of the other two is reached."""

    least: int = 9
    most: int = 61
    seconds: float = 120.0


@dataclass
class Times:
    """The seconds of each case in each round: CPU time of the process, and wall time."""

    cpu: dict[str, list[float]]
    wall: dict[str, list[float]] = field(default_factory=dict)
    on_gpu: bool = False
    bound: str = ""
    """The bound that ended the rounds; empty if they sufficed."""

    @property
    def deciding(self) -> dict[str, list[float]]:
        """The clock that decides: CPU time, without what neighbours on the machine take; on a GPU wall time."""
        return self.wall if self.on_gpu else self.cpu

    def add(self, name: str, start: tuple[float, float], end: tuple[float, float], times: int = 1) -> None:
        """Adds what passed on both clocks, divided by a number."""
        for seconds, before, after in zip((self.cpu, self.wall), start, end, strict=True):
            seconds.setdefault(name, []).append((after - before) / times)

    @property
    def rounds(self) -> int:
        return len(next(iter(self.cpu.values())))


def clocks() -> tuple[float, float]:
    """Returns the process's CPU seconds and the wall clock's, when a GPU has done all that it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def interleaved(
    cases: Mapping[str, Call],
    bound: Bound,
    suffices: Callable[[Times], bool] | None = None,
    *,
    warm: int = 2,
    read: Callable[[], tuple[float, float]] = clocks,
) -> Times:
    """Returns the times of each case in each round.

    The cases take turns, each round in another order, so that slow changes of the machine and what ran before cancel out.
    The garbage collector runs between rounds alone: in the middle of a call it would be a matter of chance whose call.

    Args:
        suffices: asked every few rounds, after the least number of them, whether to stop.
        read: gives the CPU seconds and the wall seconds.
    """
    for _ in range(warm):
        for call in cases.values():
            call()
    times = Times({name: [] for name in cases}, {name: [] for name in cases}, torch.cuda.is_initialized())
    order, draw = list(cases), random.Random(0)

    def one() -> None:
        draw.shuffle(order)
        for name in order:
            start = read()
            cases[name]()
            times.add(name, start, read())

    times.bound = repeated(one, bound, lambda: suffices is None or suffices(times), read=read)
    return times


def repeated(
    one: Call, bound: Bound, suffice: Callable[[], bool], *, read: Callable[[], tuple[float, float]] = clocks
) -> str:
    """Runs rounds without the garbage collector, and returns the bound that ended them; empty if they sufficed."""
    # In CPU seconds, so that a busy machine does not mean fewer rounds; a GPU's work takes none.
    clock = 1 if torch.cuda.is_initialized() else 0
    unit = ("CPU", "wall")[clock]
    began = read()[clock]
    gc.collect()
    # What is there already is not searched again in each round.
    gc.freeze()
    gc.disable()
    try:
        for done in itertools.count(1):
            gc.collect()
            one()
            if done >= min(bound.least, bound.most) and (done - bound.least) % EVERY == 0 and suffice():
                return ""
            if done >= bound.most:
                return f"{bound.most} rounds"
            if done >= LEAST and read()[clock] - began >= bound.seconds:
                return f"{bound.seconds:.0f} {unit} seconds"
    finally:
        gc.enable()
        gc.unfreeze()
    raise AssertionError("rounds never end by themselves")


class Calls:
    """The times of calls that are not repeated at will, such as attaching: by what they do, and in which case."""

    def __init__(self, read: Callable[[], tuple[float, float]] = clocks) -> None:
        self.of: dict[str, Times] = {}
        self.read = read

    def run(self, what: str, case: str, call: Call, *, times: int = 1) -> Any:
        """Runs a call and notes its time, divided by a number if it does something so many times. Returns its result."""
        start = self.read()
        result = call()
        own = self.of.setdefault(what, Times({}, {}))
        own.add(case, start, self.read(), times)
        return result

    def known(self, base: str, width: float = 0.1) -> bool:
        """Returns whether all ratios to a case are known within a part of themselves."""
        pairs = [(name, times) for times in self.of.values() if base in times.cpu for name in times.cpu]
        return all(ratio_known(name, base, width)(times) for name, times in pairs)


def quartiles(values: Sequence[float]) -> Estimate:
    """Returns the median and the quartiles."""
    if len(values) < 2:
        return Estimate(*[values[0]] * 3)
    low, middle, high = statistics.quantiles(values, n=4)
    return Estimate(middle, low, high)


def ratios(seconds: Seconds, base: str) -> dict[str, Estimate]:
    """Returns the median and the quartiles of each case's ratio to the base, taken within each round."""
    return {name: quartiles(_paired(seconds, name, base)) for name in seconds}


def share(seconds: Seconds, ours: str, theirs: str, base: str) -> Estimate | None:
    """Returns our overhead over the base as a part of theirs; None if their overhead is not above the noise.

    A share is a quotient of two small differences, so the median of the rounds' shares is not sound: in a round in which
    theirs is near the base the quotient is anything, and its quartiles become no narrower with more rounds. Therefore each
    overhead is estimated first, and the share is the quotient of the two. An overhead is the mean of the middle half of the
    ratios within rounds: as blind to a neighbour's bursts as the median, and a fifth nearer to the truth in simulated rounds
    (noise of 5 %, overheads of 10 and 20 %). The share's quartiles are those of the same quotient on rounds drawn again with
    replacement (the bootstrap: Efron 1979). They say how far the share would move if all were measured again, and become
    narrower with each round. What is drawn is whole rounds, because in one round a slow base makes both overheads small.
    """
    mine, other = ([each - 1 for each in _paired(seconds, name, base)] for name in (ours, theirs))
    pairs = [(_middle(mine, draw), _middle(other, draw)) for draw in _draws(len(mine))]
    # Quotients by what may be zero have no quartiles that mean anything.
    if sorted(under for _, under in pairs)[len(pairs) // 20] <= 0 or _middle(other) <= 0:
        return None
    low, _, high = statistics.quantiles([over / under for over, under in pairs if under > 0], n=4)
    return Estimate(_middle(mine) / _middle(other), low, high)


def usual_ratio(seconds: Seconds, name: str, base: str) -> Estimate:
    """Returns the mean of the middle half of a case's ratios to the base, and how far it is known: as for `share`."""
    each = _paired(seconds, name, base)
    low, _, high = statistics.quantiles([_middle(each, draw) for draw in _draws(len(each))], n=4)
    return Estimate(_middle(each), low, high)


def share_known(
    base: str, width: float = 0.1, *, ours: str = "deltakit", theirs: str = "PEFT"
) -> Callable[[Times], bool]:
    """Returns the question whether the quartiles of the share are within a width."""

    def known(times: Times) -> bool:
        found = share(times.deciding, ours, theirs, base)
        return found is not None and found.width <= width

    return known


def ratio_known(name: str, base: str, width: float) -> Callable[[Times], bool]:
    """Returns the question whether a case's ratio to the base is known within a part of itself."""

    def known(times: Times) -> bool:
        found = usual_ratio(times.deciding, name, base)
        return found.width <= width * found.middle

    return known


def both(*questions: Callable[[Times], bool]) -> Callable[[Times], bool]:
    """Returns the question whether all hold."""
    return lambda times: all(question(times) for question in questions)


def compared(times: Times, base: str, *, ours: str = "deltakit", theirs: str = "PEFT") -> dict[str, Any]:
    """Returns what a row of results says of its rounds.

    If there is a case `null`, a second copy of ours, it has a share too: how far both differ is the noise.
    """
    row: dict[str, Any] = {"rounds": times.rounds, "bound": times.bound, "clock": "wall" if times.on_gpu else "cpu"}
    for clock, seconds in (("cpu", times.cpu), ("wall", times.wall)):
        row[clock] = {
            "ratios": ratios(seconds, base),
            "seconds": {name: statistics.median(own) for name, own in seconds.items()},
            **({"share": share(seconds, ours, theirs, base)} if {ours, theirs} <= seconds.keys() else {}),
            **({"null": share(seconds, "null", theirs, base)} if {"null", theirs} <= seconds.keys() else {}),
        }
    return row


def text(estimate: Sequence[float], digits: int = 3) -> str:
    """Returns a figure as text: the median and the quartiles, or a value that was measured once."""
    if len(estimate) == 1:
        return f"{estimate[0]:.{digits}f} (measured once)"
    middle, low, high = (f"{value:.{digits}f}" for value in estimate)
    return f"{middle} ({low} to {high})"


def share_text(estimate: Sequence[float] | None) -> str:
    """Returns a share as text. One whose spread hides it has no figure."""
    if estimate is None:
        return "PEFT's overhead is within the noise"
    _, low, high = estimate
    return text(estimate, 2) if high - low <= KNOWN else f"unknown ({low:.2f} to {high:.2f})"


def counted(row: Mapping[str, Any]) -> str:
    """Returns the number of rounds of a row, and the bound that ended them before they sufficed."""
    return f"{row['rounds']}" + (f", ended by the bound of {row['bound']}" if row["bound"] else "")


def said(row: Mapping[str, Any], base: str) -> str:
    """Returns a row for the terminal: ratios and share on both clocks, the noise, and the rounds."""
    parts = []
    for clock in ("cpu", "wall") if row["clock"] == "cpu" else ("wall",):
        found = row[clock]
        shown = [f"{name} {text(own)}" for name, own in found["ratios"].items() if name != base]
        shown += [f"{what} {share_text(found[key])}" for key, what in SHARES.items() if key in found]
        parts.append(f"{clock}: " + "  ".join(shown))
    return "\n    ".join([*parts, f"rounds: {counted(row)}"])


SHARES = {"share": "share of PEFT's overhead", "null": "share of a second copy (null)"}


def _paired(seconds: Seconds, name: str, base: str) -> list[float]:
    return [own / other for own, other in zip(seconds[name], seconds[base], strict=True)]


def _middle(values: Sequence[float], draw: Sequence[int] | None = None) -> float:
    """Returns the mean of the middle half of values; of those that were drawn, some of them several times."""
    own = sorted(values if draw is None else [values[i] for i in draw])
    cut = len(own) // 4
    return statistics.fmean(own[cut : len(own) - cut])


def _draws(count: int) -> list[list[int]]:
    """Returns the rounds of each resample. They are the same each time, so that a figure is one of its rounds alone."""
    draw = random.Random(count)
    return [draw.choices(range(count), k=count) for _ in range(RESAMPLES)]
