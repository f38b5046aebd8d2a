"""The comparisons of methods, `benchmarks/accuracy.py` and `benchmarks/methods.py`: what they run, choose and write."""

import json

import pytest

import deltakit as dk
from support.paths import ROOT


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import accuracy

    return accuracy


@pytest.fixture
def results(accuracy, tmp_path):
    return accuracy.Results(tmp_path / "accuracy.json", accuracy.Settings("demo", 600, 3))


WANTED = {"lora": (dk.LoRA(),), "bitfit": (dk.BitFit(),)}


def row(job, valid, test, results, methods=None, **changed):
    common = {"methods": repr(methods or WANTED[job.name]), "parameters": 1234, "bytes": 5600, "seconds": 1.0}
    return {**job._asdict(), **results.settings._asdict(), **common, "valid": valid, "test": test, **changed}


def fill(accuracy, results, seeds, value, tasks=("SNIPS",)):
    """Does all runs, with accuracies that a function gives, and returns them in their order."""
    done = []
    while jobs := list(accuracy.missing(results, WANTED, tasks, seeds)):
        for job in jobs:
            results.add(row(job, *value(job), results))
        done += jobs
    return done


def test_every_registered_method_is_compared_with_a_grid_of_one_length(accuracy):
    found = accuracy.contestants()
    # What weighs other deltas is as good as these are.
    assert set(dk.METHODS) - {"adapter_fusion", "average"} < set(found)
    assert not {"adapter_fusion", "average"} & set(found)
    assert found["head alone"] == ()
    assert {len(accuracy.rates(name)) for name in found if found[name]} == {3}
    # It has only the classifier's rate.
    assert accuracy.rates("head alone") == (accuracy.HEAD_RATE,)
    # Prompts and scales get larger ones, by what they declare.
    assert accuracy.rates("ia3") == accuracy.rates("prefix + parallel_adapter") == accuracy.HIGH_RATES
    assert accuracy.rates("lora, dora=True") == accuracy.rates("bitfit") == accuracy.RATES


def test_the_rate_is_chosen_on_the_validation_split_alone(accuracy, results):
    # On the test split the middle rate is best, and a later seed likes the last one.
    low, middle, high = accuracy.RATES
    valid = {("lora", low): 0.9, ("lora", high): 0.7, ("bitfit", middle): 0.6}
    test = {("lora", low): 0.1, ("lora", middle): 0.8, ("bitfit", middle): 0.4}
    jobs = fill(accuracy, results, 3, lambda job: (valid.get(job[1:3], 0.5), test.get(job[1:3], 0.3)))
    own = [job for job in jobs if job.name == "lora"]
    assert [(job.rate, job.seed) for job in own] == [
        *((rate, 0) for rate in accuracy.RATES),
        *((accuracy.RATES[0], seed) for seed in (1, 2)),
    ]
    assert results.chosen("lora", WANTED["lora"], "SNIPS") == accuracy.RATES[0]
    lines = accuracy.table(results, WANTED, ["SNIPS"], 3)
    assert lines[0].startswith("| method | SNIPS, % right | rate | parameters |")
    # The best comes first, and a rate at an end of the grid has a mark.
    assert lines[2:] == [
        "| bitfit | 40.0 (40.0 to 40.0) | 0.006 | 1,234 | 6 |  |",
        "| lora | 10.0 (10.0 to 10.0) | 0.002 < | 1,234 | 6 |  |",
    ]


def test_the_first_task_chooses_the_rate_of_the_others(accuracy, results):
    low, *_ = accuracy.RATES
    best = {("SNIPS", low): 0.9, ("CLINC150", accuracy.RATES[1]): 0.99}
    jobs = fill(accuracy, results, 2, lambda job: (best.get((job.task, job.rate), 0.5), 0.3), ["SNIPS", "CLINC150"])
    assert {(job.rate, job.seed) for job in jobs if job.task == "CLINC150"} == {(low, 0), (low, 1)}
    lines = accuracy.table(results, WANTED, ["SNIPS", "CLINC150"], 2)
    assert lines[0].startswith("| method | SNIPS, % right | CLINC150, % right | rate | parameters |")
    assert lines[2] == "| lora | 30.0 (30.0 to 30.0) | 30.0 (30.0 to 30.0) | 0.002 < | 1,234 | 6 |  |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_a_second_start_does_what_is_missing(accuracy, results):
    jobs = fill(accuracy, results, 2, lambda job: (job.rate, 0.5))
    assert len(jobs) == len(set(jobs)) == 2 * (3 + 1)
    again = accuracy.Results(results.path, results.settings)
    assert not list(accuracy.missing(again, WANTED, ["SNIPS"], 2))
    assert len(list(accuracy.missing(again, WANTED, ["SNIPS"], 4))) == 2 * 2
    # Rows of other settings or options are neither counted nor lost.
    other = accuracy.Results(results.path, accuracy.Settings("demo", 100, 3))
    assert len(list(accuracy.missing(other, WANTED, ["SNIPS"], 2))) == 2 * 3
    changed = {"lora": (dk.LoRA(r=3),)}
    assert len(list(accuracy.missing(again, changed, ["SNIPS"], 2))) == 3
    assert "not run" in accuracy.table(again, changed, ["SNIPS"], 2)[2]
    other.add(row(jobs[0], 0.1, 0.1, other))
    assert len(json.loads(results.path.read_text())["rows"]) == len(jobs) + 1
    assert not results.path.with_suffix(".partial").exists()


@pytest.mark.parametrize("name", ["head alone", "lora"])
def test_a_run_trains_its_method_and_the_classifier(accuracy, toy, name):
    settings = accuracy.Settings(str(toy), 8, 1)
    methods = accuracy.contestants()[name]
    before, _, groups = accuracy.fresh(settings.model, "SNIPS", methods, 0)
    assert sum(p.numel() for p in groups[0]["params"]) == sum(p.numel() for p in before.classifier.parameters())
    found = accuracy.run(accuracy.Job("SNIPS", name, 1e-2, 0), methods, settings)
    assert (found["parameters"] > 0, found["bytes"] > 0) == (name == "lora",) * 2
    assert 0 <= found["test"] <= 1
    assert found["seed"] == 0
    assert json.loads(json.dumps(found)) == found
    assert accuracy.run(accuracy.Job("SNIPS", name, 1e-2, 0), methods, settings)["valid"] == found["valid"]


def test_the_splits_are_apart(accuracy):
    for name, classes in (("SNIPS", 7), ("CLINC150", 10)):
        task = accuracy.TASKS[name]()
        assert len(task.classes) == classes
        splits = [{request for request, _ in part} for part in (task.pool, task.valid, task.test)]
        assert {label for _, label in task.test} == {label for _, label in task.valid} == set(task.classes)
        assert min(map(len, splits)) >= 300
        assert splits[0].isdisjoint(splits[1])
        assert splits[0].isdisjoint(splits[2])
        assert splits[1].isdisjoint(splits[2])
        assert task.train(50, 0) != task.train(50, 1)
        assert task.train(50, 1) == task.train(50, 1)


def test_the_table_of_costs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import methods

    # What PEFT has of ours has a name in the registry, or is not there yet.
    assert {"lora", "ia3", "prefix", "soft_prompt", "trainable_tokens"} <= methods.PEFT.keys() & dk.METHODS.keys()
    ratios = {"floor": (1, 1, 1), "LoRA": (1.1, 1, 1.2), "deltakit": (1.25, 1.2, 1.3)}
    row = {
        "method": "lora",
        "missing": {},
        "clock": "cpu",
        "cpu": {"ratios": ratios},
        "rounds": 13,
        "bound": "",
        "to LoRA": (1.136, 1.1, 1.2),
        "operations": {"floor": 100, "LoRA": 110, "deltakit": 121},
        "kept": {"floor": 1e6, "LoRA": 2e6, "deltakit": 3.5e6},
        "parameters": {"floor": 0, "LoRA": 1200, "deltakit": 3400},
    }
    alone = {**row, "method": "a", "missing": {"PEFT": "ValueError: no"}, "bound": "120 CPU seconds"}
    beside = {name: {**row[name], "PEFT": 5e6} for name in ("kept", "parameters", "operations")}
    beside["cpu"] = {"ratios": {**ratios, "PEFT": (2, 1.9, 2.1)}, "share": (0.25, 0.2, 0.3)}
    text = methods.document([{**row, **beside}, alone])
    assert text.splitlines()[-6:] == [
        "| a |  | 1.250 (1.200 to 1.300) |  | 1.136 (1.100 to 1.200) | 1.10 |  | 2.5 |  | 3,400 | 13, ended by the bound of 120 CPU "
        "seconds |",
        "| lora | 2.000 (1.900 to 2.100) | 1.250 (1.200 to 1.300) | 0.25 (0.20 to 0.30) | 1.136 (1.100 to 1.200) | 1.10 | 4.0 | 2.5 "
        "| 5,000,000.0 | 3,400 | 13 |",
        "",
        "PEFT's that do not run on this model:",
        "",
        "- PEFT's a: ValueError: no",
    ]
