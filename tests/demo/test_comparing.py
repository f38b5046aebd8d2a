"""`deltakit compare`: methods on the user's own texts, and the errors for tables that do not fit."""

import json
import math
import shutil

import pytest

from deltakit.cli import main
from deltakit.demo.data import read
from deltakit.demo.own_texts import held_out, read_texts
from deltakit.demo.recipes import RECIPES, recipes_of
from deltakit.demo.results import Result, verdict
from deltakit.errors import OptionError
from support.tiny_transformers import build


@pytest.fixture
def table(tmp_path):
    """Forty real requests with three labels, as a spreadsheet exports them."""
    rows = [(text, label) for text, label in read("train") if label in ("GetWeather", "PlayMusic", "BookRestaurant")]
    lines = [f'"{text}",{label}' for text, label in rows[:40]]
    file = tmp_path / "requests.csv"
    file.write_text("\n".join(["request,intent", *lines]) + "\n", encoding="utf-8-sig")
    return file


def test_compare(toy, table, tmp_path, capsys):
    page = tmp_path / "report.html"
    command = ["compare", str(toy), str(table), "--text", "request", "--label", "intent", "--methods", "lora,ia3"]
    command += ["--epochs", "1", "--seeds", "2", "--html", str(page), "--out", str(tmp_path / "out")]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert err == f"deltakit: the page is in {page}\n"
    for row in ("linear probe", "LoRA", "IA3", "full fine-tuning"):
        assert row in out
    assert "1 of 4  linear probe: " in out
    assert "does best: " in out
    assert "31 rows of requests.csv with 3 labels, 1 epoch, 2 seeds; accuracy on 9 others" in out
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["ia3", "lora"]
    text = page.read_text(encoding="utf-8")
    # The tree has a script of its own, and the page loads nothing.
    assert "src=" not in text
    for part in ("linear probe", "class='bar'", "+lora r=8", "does best: "):
        assert part in text


def test_json_stands_alone_on_the_standard_output(toy, table, capsys):
    command = ["compare", str(toy), str(table), "--text", "request", "--label", "intent", "--methods", "bitfit"]
    assert main([*command, "--epochs", "1", "--no-full", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [result["title"] for result in found["results"]] == ["linear probe", "BitFit"]
    assert "2 of 2  BitFit: " in err


BAD = {
    "missing": ("text,kind\na,b\n", "it has no column 'label'; its columns are text, kind; name one with --label"),
    "empty": ("", "it has no column 'text'; its columns are none, the file is empty"),
    "one class": ("text,label\n" + "a,x\n" * 12, "all rows have the label 'x'; expected at least two different ones"),
    "few": ("text,label\na,x\nb,y\n", "it has 2 rows; expected at least 10, some of which are held out"),
    "alone": (
        "text,label\n" + "a,x\n" * 12 + "b,y\n",
        "only one row has the label 'y'; expected at least two rows of each",
    ),
    "holes": ("text,label\n" + "a,x\n,y\nb\n" * 5, "there is no text or no label in line 3, 4, 6, 7, 9 and 5 more"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_table_that_does_not_fit(name, tmp_path, capsys):
    content, what = BAD[name]
    file = tmp_path / "table.csv"
    file.write_text(content, encoding="utf-8")
    assert main(["compare", "no-model", str(file)]) == 1
    err = capsys.readouterr().err
    assert f"{file}: {what}" in err
    assert err.count("\n") == 1


def test_other_bad_input(tmp_path, table, capsys):
    latin = tmp_path / "latin.csv"
    latin.write_bytes("text,label\nkäse,x\n".encode("latin-1"))
    own = ["--text", "request", "--label", "intent"]
    for arguments, what in (
        ([str(latin)], "it cannot be read: 'utf-8' codec"),
        ([str(tmp_path / "none.csv")], "it cannot be read: No such file or directory; pass a CSV or TSV file in UTF-8"),
        ([str(table), *own], "no-model: "),
    ):
        assert main(["compare", "no-model", *arguments]) == 1
        err = capsys.readouterr().err
        assert what in err
        assert err.count("\n") == 1


def test_tabs_and_quotes(tmp_path):
    tabs = tmp_path / "table.tsv"
    tabs.write_text("label\ttext\n" + 'x\tsay "hi\ny\tone, two\n' * 5, encoding="utf-8")
    assert read_texts(tabs, text="text", label="label")[:2] == [('say "hi', "x"), ("one, two", "y")]
    commas = tmp_path / "table.csv"
    commas.write_text("label,text\n" + 'x,"one, ""two""\nthree"\ny,b\n' * 5, encoding="utf-8")
    assert read_texts(commas, text="text", label="label")[:2] == [('one, "two"\nthree', "x"), ("b", "y")]


def test_both_parts_have_every_label():
    rows = [(f"{label} {number}", label) for label, count in (("a", 2), ("b", 31)) for number in range(count)]
    learn, test = held_out(rows, 0.2)
    assert sorted([*learn, *test]) == sorted(rows)
    assert [sum(label == name for _, label in test) for name in "ab"] == [1, 6]
    assert held_out(rows, 0.2) == (learn, test)
    assert {label for _, label in held_out(rows, 0.9)[0]} == {"a", "b"}


def test_recipes():
    probe, lora, ia3, full = recipes_of(["lora", "ia3", "lora"], full=True)
    assert (probe.methods, lora, full.full) == ((), RECIPES[1], True)
    assert (ia3.title, ia3.lr) == ("IA3", 3e-2)
    with pytest.raises(OptionError, match="unknown method 'x'"):
        recipes_of(["x"], full=False)


def test_the_verdict_knows_chance():
    probe, full = Result("linear probe", 10, 1000, (0.5,), 1.0), Result("full fine-tuning", 1000, 1000, (0.95,), 9.0)
    large, small = Result("Adapter", 90, 1000, (0.94,), 2.0, 400), Result("LoRA", 80, 1000, (0.94,), 2.0, 300)
    assert verdict([probe, large, small, full], examples=700) == (
        "LoRA does best: 94.0% with 8 % of the parameters, within chance of full fine-tuning (95.0%) and "
        "44.0 points above the linear probe (50.0%)."
    )
    # With enough examples, a point is more than chance.
    assert 2 * math.sqrt((0.94 * 0.06 + 0.95 * 0.05) / 10_000) < 0.01
    assert "1.0 points below full fine-tuning" in verdict([small, full], examples=10_000)


def test_a_model_without_a_tokenizer(toy, table, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(toy / name, bare / name)
    build("llama").save_pretrained(tmp_path / "llama")
    for model in (bare, tmp_path / "llama"):
        assert main(["compare", str(model), str(table), "--text", "request", "--label", "intent"]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"deltakit: {model}: it has no tokenizer; save that of the model")
        assert err.count("\n") == 1


def test_places_that_cannot_be_written_are_known_before_the_training(tmp_path, table, capsys):
    (tmp_path / "file").touch()
    for option, place, what in (
        ("--html", tmp_path / "no" / "page.html", f"it cannot be written: there is no folder {tmp_path / 'no'}; pass"),
        ("--html", tmp_path, "it cannot be written: this is a folder; pass a file in a folder that is there"),
        ("--out", tmp_path / "file", "this is a file; pass a folder, or a path where nothing is"),
    ):
        for command in (["compare", "no-model", str(table)], ["demo", "--model", "no-model"]):
            assert main([*command, option, str(place)]) == 1
            err = capsys.readouterr().err
            assert err.startswith(f"deltakit: {option} {place}: {what}")
            assert err.count("\n") == 1
