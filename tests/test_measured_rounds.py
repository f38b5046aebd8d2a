"""`benchmarks/rounds.py`: rounds on a clock that is no clock, and estimates of ratios and shares whose answer is known."""

import gc
import random

import pytest

from support.paths import ROOT


@pytest.fixture
def rounds(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import rounds

    return rounds


class Machine:
    """Cases that take known seconds on two clocks, both only moved by the cases."""

    def __init__(self, **seconds):
        self.cpu = self.wall = 0.0
        self.order, self.collecting = [], []
        self.cases = {name: lambda n=name, s=own: self.run(n, s) for name, own in seconds.items()}

    def run(self, name, seconds):
        self.order.append(name)
        self.cpu += seconds
        self.wall += 2 * seconds
        self.collecting.append(gc.isenabled())

    def read(self):
        return self.cpu, self.wall


def noisy(count, seed=0, *, noise=0.05, **seconds):
    """Times with noise in each call, a slow change of the machine over the rounds, and now and then a call of five times."""
    draw, times = random.Random(seed), {name: [] for name in seconds}
    for turn in range(count):
        slow = 1 + turn / count
        for name, own in seconds.items():
            burst = 5 if draw.random() < 0.05 else 1
            times[name].append(own * slow * burst * (1 + noise * draw.gauss(0, 1)))
    return times


def test_both_clocks_are_read_and_every_case_runs_once_a_round(rounds):
    machine = Machine(base=1.0, deltakit=1.2, PEFT=1.4)
    times = rounds.interleaved(machine.cases, rounds.Bound(5, 5), warm=0, read=machine.read)
    assert times.rounds == 5
    assert times.cpu["deltakit"] == pytest.approx([1.2] * 5)
    assert times.wall["PEFT"] == pytest.approx([2.8] * 5)
    turns = [tuple(machine.order[i : i + 3]) for i in range(0, 15, 3)]
    assert all(sorted(turn) == ["PEFT", "base", "deltakit"] for turn in turns)
    assert len(set(turns)) > 1
    assert not any(machine.collecting)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("bound", "after", "done", "said"),
    [((9, 50, 1e9), 20, 21, ""), ((9, 15, 1e9), 20, 15, "15 rounds"), ((9, 50, 22), 20, 7, "22 CPU seconds"), ((9, 50, 1), 20, 5, "1 CPU seconds"), ((9, 50, 1e9), 0, 9, "")],
)  # fmt: skip
def test_rounds_end_when_they_suffice_or_at_a_bound_that_is_said(rounds, bound, after, done, said):
    machine = Machine(base=1.0, deltakit=1.2, PEFT=1.3)
    times = rounds.interleaved(
        machine.cases, rounds.Bound(*bound), lambda times: times.rounds >= after, warm=0, read=machine.read
    )
    assert (times.rounds, times.bound) == (done, said)
    row = rounds.compared(times, "base")
    assert ("ended by the bound of" in rounds.said(row, "base")) is bool(said)


def test_garbage_is_collected_again_after_a_case_that_fails(rounds):
    def fails():
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        rounds.interleaved({"x": fails}, rounds.Bound(), warm=0, read=lambda: (0, 0))
    assert gc.isenabled()


def test_a_share_is_known_in_spite_of_noise_drift_and_bursts(rounds):
    found = [
        rounds.share(noisy(40, seed, base=1.0, deltakit=1.1, PEFT=1.2), "deltakit", "PEFT", "base")
        for seed in range(30)
    ]
    assert sum(estimate.middle for estimate in found) / 30 == pytest.approx(0.5, abs=0.03)
    # Half of all estimates should have the truth between their quartiles.
    assert 8 <= sum(estimate.low <= 0.5 <= estimate.high for estimate in found) <= 22
    # The quotients of single rounds are nearly anything.
    times = noisy(40, base=1.0, deltakit=1.1, PEFT=1.2)
    each = [(b - a) / (c - a) for a, b, c in zip(*times.values(), strict=True)]
    assert rounds.quartiles(each).width > 2 * found[0].width


def test_more_rounds_make_a_share_narrower(rounds):
    few, many = (
        rounds.share(noisy(n, base=1.0, deltakit=1.1, PEFT=1.2), "deltakit", "PEFT", "base") for n in (10, 640)
    )
    assert many.width < few.width / 3
    times = rounds.Times(noisy(640, base=1.0, deltakit=1.1, PEFT=1.2))
    assert rounds.share_known("base", 0.1)(times)
    assert not rounds.share_known("base", many.width / 2)(times)
    assert rounds.ratio_known("PEFT", "base", 0.1)(times)


def test_without_an_overhead_of_theirs_there_is_no_share(rounds):
    times = rounds.Times(noisy(20, base=1.0, deltakit=1.1, PEFT=1.0))
    assert rounds.share(times.cpu, "deltakit", "PEFT", "base") is None
    assert not rounds.share_known("base")(times)
    assert "within the noise" in rounds.share_text(None)


def test_a_share_whose_spread_hides_it_has_no_figure(rounds):
    assert rounds.share_text([0.5, 0.4, 0.6]) == "0.50 (0.40 to 0.60)"
    assert rounds.share_text([0.5, 0.2, 0.8]) == "unknown (0.20 to 0.80)"


def test_exact_times_give_exact_figures_and_a_null_of_the_same_share(rounds):
    machine = Machine(base=1.0, deltakit=1.25, null=1.25, PEFT=1.5)
    times = rounds.interleaved(machine.cases, rounds.Bound(), rounds.share_known("base"), warm=1, read=machine.read)
    row = rounds.compared(times, "base")
    assert row["rounds"] == 9
    assert row["cpu"]["ratios"]["PEFT"] == pytest.approx((1.5, 1.5, 1.5))
    for clock in ("cpu", "wall"):
        assert row[clock]["share"] == row[clock]["null"] == pytest.approx((0.5, 0.5, 0.5))
    assert "share of a second copy (null) 0.50 (0.50 to 0.50)" in rounds.said(row, "base")
    assert rounds.counted(row) == "9"


def test_on_a_gpu_wall_time_decides(rounds):
    times = rounds.Times({"a": [1.0]}, {"a": [2.0]}, on_gpu=True)
    assert times.deciding == {"a": [2.0]}
    assert rounds.Times({"a": [1.0]}, {"a": [2.0]}).deciding == {"a": [1.0]}


def results(rounds, tmp_path, measure):
    """Writes rows of exact and of noisy rounds, as the benchmarks do, and returns the page of results."""
    import harness
    import run

    measure(lambda name, rows: harness.write(tmp_path / f"{name}.json", name, rows))
    return run.table(tmp_path)


def test_the_page_of_results_has_shares_with_their_spread_and_bounds(rounds, tmp_path):
    exact = {"bare": 1.0, "floor": 1.0, "deltakit": 1.25, "null": 1.25, "PEFT": 1.5, "limit": 1.1, "full": 2.0}
    exact |= {"products alone": 1.1, "merged": 1.0}
    machine = Machine(**exact)
    times = rounds.interleaved(machine.cases, rounds.Bound(9, 9), lambda _: False, read=machine.read)

    def measure(write):
        row = {"model": "GPT-2 small", "layers": 4, "dtype": "torch.float32", "targets": "all linear"}
        write("step", [{**row, **rounds.compared(times, "floor")}])
        write("forward", [{"case": "one token", **rounds.compared(times, "bare")}])

    page = results(rounds, tmp_path, measure).splitlines()
    shares = "0.50 (0.50 to 0.50) | 0.50 (0.50 to 0.50) | 0.50 (0.50 to 0.50) | 9, ended by the bound of 9 rounds |"
    ratios = {name: f"{value:.3f} ({value:.3f} to {value:.3f})" for name, value in exact.items()}
    named = " | ".join(ratios[name] for name in ("full", "PEFT", "deltakit", "limit"))
    assert f"| GPT-2 small, 4 layers, float32, all linear | {named} | {shares}" in page
    named = " | ".join(ratios[name] for name in ("PEFT", "deltakit", "products alone", "merged"))
    assert f"| one token | {named} | {shares}" in page


def test_calls_are_compared_within_rounds_and_divided(rounds, tmp_path):
    machine, calls = Machine(short=1.0, long=4.0), rounds.Calls(lambda: machine.read())

    def one():
        calls.run("save", "100", machine.cases["short"])
        assert calls.run("save", "200", lambda: (machine.cases["long"](), 7)[1], times=2) == 7

    bound = rounds.repeated(one, rounds.Bound(5, 61, 1e9), lambda: calls.known("100"), read=machine.read)
    times = calls.of["save"]
    assert (bound, times.rounds) == ("", 5)
    assert times.cpu["200"] == pytest.approx([2.0] * 5)

    def measure(write):
        row = rounds.compared(times, "100")
        milliseconds = {"deltakit": (12.345, 12, 13), "PEFT": (100.0, 99, 101)}
        there = rounds.compared(
            rounds.Times({"deltakit": [1.0], "PEFT": [4.0]}, {"deltakit": [1.0], "PEFT": [4.0]}), "PEFT"
        )
        write("scale", {"count": 200, "deltas": 2, "targets": {"save": row}, "last": {}})
        write("attach", [{"layers": 8, "what": "attach", "ms": {"cpu": milliseconds, "wall": milliseconds}, **there}])

    page = results(rounds, tmp_path, measure).splitlines()
    assert "| save | 400.00 | 800.00 | 2.000 (2.000 to 2.000) | 5 |" in page
    shown = "12.35 (12.00 to 13.00) | 100.00 (99.00 to 101.00) | 0.250 (0.250 to 0.250)"
    assert any(line.startswith("| 56 | attach | 12.3") and shown[5:] in line for line in page)


def test_results_of_an_older_form_are_left_out_and_named(rounds, tmp_path, capsys):
    import run

    (tmp_path / "step.json").write_text('{"benchmark": "step", "machine": {}, "rows": [{"share": 0.19}]}')
    assert "0.19" not in run.table(tmp_path)
    assert "run benchmarks/step.py again" in capsys.readouterr().out


def test_every_part_has_a_page(rounds, tmp_path):
    seconds = {
        "bare": 1.0,
        "deltakit": 1.2,
        "null": 1.2,
        "PEFT": 2.0,
        "one after another": 3.0,
        "default": 4.0,
        "fused": 2.0,
    }
    times = rounds.Times(
        {name: [own] * 9 for name, own in seconds.items()}, {name: [own] * 9 for name, own in seconds.items()}
    )
    row = rounds.compared(times, "bare")
    compiling = {"deltakit": {"graphs": 1, "cpu": 20.04, "wall": 31.0}}

    def measure(write):
        write("optimizer", [rounds.compared(times, "default")])
        loads = {"load ms, first": {"cpu": [12.5], "wall": (20, 19, 21)}}
        batch = {"distinct": 2, "batch": 16, "tokens": 1, **row, "apart": row}
        write("many", [{"targets": 168, "ms": loads}, batch])
        events = [("deltakit", "dynamic", "rows", 0, True), ("PEFT", "fixed", "x", "Unsupported", False)]
        write("compiled", {"times": [{"case": "step", **row, "compiling": compiling}], "graphs": events})
        kept = {"floor": 1e6, "PEFT": 4e6, "deltakit": 3e6, "deltakit int8": 2e6}
        peak = {name: (own, own - 1e6, own + 1e6) for name, own in kept.items()}
        write("memory", [{"model": "m", "dtype": "float32", "kept": kept, "peak": peak, "limit": 2e6}])
        measures = {"bare": 800.0, "PEFT": 123.44, "deltakit": 99.0}
        size = {"model": "8B", "base": "bare", "unit": "MB", "measures": measures}
        write("gpu", [{**size, "what": "peak"}, {**size, "what": "step", **row}])

    page = results(rounds, tmp_path, measure).splitlines()
    shares = "0.20 (0.20 to 0.20) | 0.20 (0.20 to 0.20) | 0.20 (0.20 to 0.20) | 9 |"
    ratios = "2.000 (2.000 to 2.000) | 1.200 (1.200 to 1.200) | " + shares
    for line in (
        "| fused | 0.500 (0.500 to 0.500) | 0.500 (0.500 to 0.500) | 9 |",
        "| load ms, first | 12.50 (measured once) | 20.00 (19.00 to 21.00) |",
        f"| 16, 2, 1 | 3.000 (3.000 to 3.000) | {ratios}",
        f"| step | {ratios}",
        "| step | deltakit | 1 | 20.0 | 31.0 |",
        "| deltakit | dynamic | rows | 0 | right |",
        "| PEFT | fixed | x | Unsupported | WRONG |",
        "| m, float32 | MB kept for backward beyond the floor | 3.0 | 2.0 | 1.0 | 2.0 |",
        "|  | MB at the peak beyond the model; floor 1 (0 to 2) | 4 (3 to 5) | 3 (2 to 4) | 2 (1 to 3) |  |",
        "| 8B | peak | MB | 800 | 123.4 | 99 |  |  |  |  |  |  |",
        f"| 8B | step | MB | 800 | 123.4 | 99 | {ratios}",
    ):
        assert line in page, line
