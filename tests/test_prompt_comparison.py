"""`benchmarks/prompts.py`: what it runs, chooses and writes."""

import argparse
import json
from xml.etree import ElementTree

import pytest
import torch
import transformers as tf

from support.paths import ROOT
from support.tiny_transformers import COMMON, SIZES


@pytest.fixture
def prompts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import prompts

    return prompts


@pytest.fixture
def results(prompts, tmp_path):
    return prompts.Results(tmp_path / "prompts.json", prompts.Settings(2, 3, 0.5, 5))


OPTIONS = argparse.Namespace(
    shots=[4, 8], seeds=2, tasks=["SNIPS", "CLINC150"], readers=["head", "words"], tunings=["LoRA", "full"]
)


def fill(prompts, results, options, value):
    """Does all runs, with an accuracy on the validation split for each rate, and returns them in their order."""
    done = []
    while jobs := list(prompts.missing(results, options)):
        for job in jobs:
            found = {"valid": value(job), "test": job.rate + job.seed / 100, "parameters": 1234, "seconds": 1.0}
            results.add({**job._asdict(), **results.settings._asdict(), **found})
        done += jobs
    return done


def test_rates_are_chosen_first_and_a_second_start_does_what_is_missing(prompts, results):
    middle = {rates[1] for rates in prompts.RATES.values()}
    jobs = fill(prompts, results, OPTIONS, lambda job: 0.9 if job.rate in middle else 0.5)
    rates, rest = jobs[:26], jobs[26:]
    assert {job.tuning for job in rates[:2]} == {"none"}
    assert {(job.task, job.shots, job.seed) for job in rates[2:]} == {("SNIPS", 16, 0), ("CLINC150", 16, 0)}
    assert len(rest) == len(set(rest)) == 2 * 2 * 2 * 2 * 2
    assert {job.rate for job in rest} == {prompts.RATES["LoRA"][1], prompts.RATES["full"][1]}
    again = prompts.Results(results.path, results.settings)
    assert not list(prompts.missing(again, OPTIONS))
    more = argparse.Namespace(**{**vars(OPTIONS), "shots": [4, 8, 16], "seeds": 3})
    # The run that has chosen a rate is one of these.
    assert len(list(prompts.missing(again, more))) == 2 * 2 * (3 * 2 * 3 - 2 * 2 * 2) - 8
    assert len(list(prompts.missing(prompts.Results(results.path, prompts.Settings(2, 3, 0.0, 5)), OPTIONS))) == 26


def test_the_page_and_its_plot_show_what_has_run(prompts, results):
    results.add({"epochs": 2, "requests": 6700, "before": 11.0, "after": 3.25, "seconds": 61.0})
    fill(prompts, results, OPTIONS, lambda job: job.rate)
    wide = argparse.Namespace(**{**vars(OPTIONS), "seeds": 3, "shots": [4, 8, 32]})
    text = prompts.document(results, wide, "prompts.svg")
    low = prompts.RATES["LoRA"][2] * 100
    row = f"| LoRA | words | {low + 0.5:.1f} ({low:.1f} to {low + 1:.1f}, 2 seeds)"
    assert row in text
    assert text.count("| not run |") == 2 * 4
    assert "all see 3/4/8 batches of 16" in text.replace("\n", " ")
    assert "went from 11.00 to 3.25 in 61 s" in text.replace("\n", " ")
    assert "`words` without any training: 0.0." in text
    drawn = prompts.plot(results, wide)
    assert "nan" not in drawn
    tree = ElementTree.fromstring(drawn)
    named = {"".join(part.itertext()) for part in tree.iter("{http://www.w3.org/2000/svg}text")}
    assert {"SNIPS, LoRA", "CLINC150, full", "head", "words", "examples a class"} <= named
    # A line for each reader in each of four panels.
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}polyline"))) == 2 * 4
    # A tuning of which nothing has run.
    more = argparse.Namespace(**{**vars(wide), "tunings": ["soft prompt"]})
    assert "| soft prompt | head | not run | not run | not run |  |  |" in prompts.document(
        results, more, "prompts.svg"
    )
    assert "nan" not in prompts.plot(results, more)


def test_the_label_words_are_tokens_of_the_encoder(prompts):
    from intent_words import WORDS

    for name, words in WORDS.items():
        task = prompts.TASKS[name]()
        assert set(words) == set(task.classes)
        job = prompts.Job(name, "KPT", "none", 0, 0, 0.0)
        model = tf.BertForMaskedLM(tf.BertConfig(**SIZES, vocab_size=30522))
        from prompt_runs import verbalizer_for

        assert verbalizer_for(job, task, model).words_by_class() == words


@pytest.fixture
def toy_encoder(prompts, monkeypatch, tmp_path):
    """The demo's encoder made tiny, with its own tokenizer."""
    import adapted_encoder
    import prompt_runs

    adapted_encoder.tokenizer().save_pretrained(tmp_path / "toy")
    config = tf.BertConfig(
        **{**SIZES, **COMMON, "vocab_size": len(adapted_encoder.tokenizer()), "initializer_range": 0.5}
    )
    tf.BertModel(config).save_pretrained(tmp_path / "toy")
    for module in (adapted_encoder, prompt_runs):
        monkeypatch.setattr(module, "bundled_model", lambda: str(tmp_path / "toy"))
    monkeypatch.setattr(adapted_encoder, "unlabelled", lambda split, own=adapted_encoder.unlabelled: own(split)[::149])
    yield adapted_encoder
    adapted_encoder.adapted.cache_clear()


def test_adaptation_and_runs(prompts, toy_encoder, tmp_path):
    place = tmp_path / "adapted"
    found = toy_encoder.adapt(place, 20)
    assert found["after"] < found["before"]
    model = toy_encoder.adapted(place)
    assert toy_encoder.held_out(model) == pytest.approx(found["after"], rel=1e-5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings, tokens = prompts.Settings(20, 2, 0.5, 10), prompts.SOFT_TOKENS
    counts = {}
    for reader in prompts.READERS:
        for tuning in prompts.TUNINGS:
            job = prompts.Job("SNIPS", reader, tuning, 4, 1, 1e-2)
            row = prompts.run(job, settings, place, ("valid", "test"))
            assert json.loads(json.dumps(row)) == row
            assert {row["valid"], row["test"]} <= {count / 10 for count in range(11)}
            counts[reader, tuning] = row["parameters"]
    assert counts["words", "soft prompt"] == tokens * 24
    # A weight for each word; a projection and prototypes; a classifier of seven classes.
    assert counts["KPT", "soft prompt"] - counts["words", "soft prompt"] == 65
    assert counts["prototypes", "LoRA"] - counts["words", "LoRA"] == 64 * 24 + 7 * 64
    assert counts["head", "LoRA"] - counts["words", "LoRA"] == 7 * 24 + 7
    assert counts["words", "full"] == sum(parameter.numel() for parameter in model.parameters())
    assert counts["head", "full"] == counts["head, as published", "full"]
    assert prompts.run(prompts.Job("SNIPS", "words", "none", 0, 0, 0.0), settings, place, ("test",))["parameters"] == 0
    # Runs get copies of the adapted encoder.
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_heads_start_from_the_encoder_that_they_name(prompts, toy_encoder, tmp_path):
    from prompt_runs import with_head

    place = tmp_path / "adapted"
    toy_encoder.adapt(place, 1)
    task = prompts.TASKS["SNIPS"]()
    name = "encoder.layer.0.attention.self.query.weight"
    published, own = (
        with_head(prompts.Job("SNIPS", reader, "LoRA", 4, 0, 1e-3), task, place).model.base_model.get_parameter(name)
        for reader in ("head, as published", "head")
    )
    assert torch.equal(own, toy_encoder.adapted(place).base_model.get_parameter(name))
    assert not torch.equal(own, published)
