"""`deltakit merge`, `push` and `inspect --json`: from the file of a delta to a plain model, and to the Hub."""

import json
import shutil

import pytest
import torch
import transformers

import deltakit as dk
from deltakit.cli import main
from support.forged_files import forge
from support.models import Transformer, beside, method_of, randomize


@pytest.fixture
def classifier(toy):
    """A folder with a tiny classifier and its tokenizer."""
    torch.manual_seed(3)
    config = transformers.AutoConfig.from_pretrained(toy, num_labels=5)
    transformers.BertForSequenceClassification(config).save_pretrained(toy)
    return toy


def fresh(folder):
    return transformers.BertForSequenceClassification.from_pretrained(folder).eval()


def test_merge(classifier, tmp_path, capsys):
    model = fresh(classifier)
    delta = randomize(dk.attach(model, dk.LoRA(r=3), dk.BitFit(at="@ff.up"), train="@head"))
    delta.save(tmp_path / "delta")
    words = transformers.AutoTokenizer.from_pretrained(classifier)(["play some music"], return_tensors="pt")
    words.pop("token_type_ids", None)
    expected = model(**words).logits
    assert (expected - fresh(classifier)(**words).logits).abs().max() > 1e-2
    out = tmp_path / "merged"
    capsys.readouterr()
    assert main(["merge", str(classifier), str(tmp_path / "delta"), str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"is in {out}, with tokenizer.json, tokenizer_config.json" in printed.out
    # A program without deltakit reads it.
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert not any("lora" in name for name in plain.state_dict())
    again = transformers.AutoTokenizer.from_pretrained(out)(["play some music"], return_tensors="pt")
    assert torch.equal(again["input_ids"], words["input_ids"])
    torch.testing.assert_close(plain(**words).logits, expected, rtol=1e-5, atol=1e-5)
    assert main(["merge", str(classifier), str(tmp_path / "delta"), str(out)]) == 1
    assert f"{out}: something is here already" in capsys.readouterr().err


def test_what_cannot_be_merged(classifier, tmp_path, capsys):
    randomize(dk.attach(fresh(classifier), dk.Adapter(size=3), train=())).save(tmp_path / "adapter")
    assert main(["merge", str(classifier), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 1
    assert "AdapterDelta does not change weights, so it cannot be merged" in capsys.readouterr().err
    # The encoder alone has no classifier, and the delta has none either.
    encoder = tmp_path / "encoder"
    fresh(classifier).bert.save_pretrained(encoder)
    randomize(dk.attach(fresh(classifier), dk.LoRA(r=3), train=())).save(tmp_path / "lora")
    assert main(["merge", str(encoder), str(tmp_path / "lora"), str(tmp_path / "out")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for content in (b"garbage", (classifier / "model.safetensors").read_bytes()[:5000]):
        (classifier / "model.safetensors").write_bytes(content)
        assert main(["merge", str(classifier), str(tmp_path / "lora"), str(tmp_path / "out")]) == 1
        err = capsys.readouterr().err
        assert err.startswith(f"deltakit: {classifier}: transformers cannot build a model from it: ")
        assert err.count("\n") == 1


def test_push_uploads_the_files_of_the_delta_alone(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", hub.TOKEN)
    folder = randomize(dk.attach(Transformer(), dk.LoRA(r=3))).save(tmp_path / "saved")
    (folder / "optimizer.pt").write_bytes(b"secret")
    assert main(["push", str(folder), "me/lora", "--private", "--message", "the first"]) == 0
    assert capsys.readouterr().out == f"{hub.endpoint}/me/lora\n"
    (commit,) = hub.repos["me/lora"].commits
    assert set(commit[1]) - {".gitattributes"} == {"delta_model.safetensors", "delta_config.json", "README.md"}
    assert hub.repos["me/lora"].private
    assert [method.name for method in dk.inspect("me/lora", token=hub.TOKEN).methods] == ["lora"]


def test_what_is_not_pushed(hub, tmp_path, capsys):
    folder = randomize(dk.attach(Transformer(), dk.LoRA(r=3))).save(tmp_path / "saved")
    for source, what in (
        (tmp_path, "but in folders below: saved; pass one of them"),
        ("me/lora", "no such folder"),
        (folder, "the Hub asks for a token to write to the repository"),
    ):
        assert main(["push", str(source), "me/lora"]) == 1
        err = capsys.readouterr().err
        assert what in err
        assert err.count("\n") == 1
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    weights = bytearray((damaged / "delta_model.safetensors").read_bytes())
    (damaged / "delta_model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert main(["push", str(damaged), "me/lora"]) == 1
    assert not hub.repos


def test_inspect_as_json(tmp_path, capsys):
    delta = randomize(dk.attach(Transformer(), dk.LoRA(r=3), train="@head", name="topic"))
    delta.save(tmp_path / "saved")
    assert main(["inspect", str(tmp_path / "saved"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["name"], found["values"]) == ("deltakit", "topic", delta.num_parameters)
    assert found["methods"][0]["targets"] == list(delta.modules)
    assert found["fully_trained"] == delta.fully_trained
    assert {name: tensor["shape"] for name, tensor in found["tensors"].items()} == {
        name: list(tensor.shape) for name, tensor in delta.state_dict().items()
    }


def mean():
    """A delta without tensors."""
    method = method_of("average")
    return dk.attach(beside(Transformer(), method), method)


def test_inspect_of_a_delta_without_tensors(tmp_path, capsys):
    """No tensor's name says how many targets there may be."""
    delta = mean()
    folder = delta.save(tmp_path / "mean")
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    (line,) = [line.split() for line in out.splitlines() if line.startswith("  average")]
    assert line == ["average", "deltas=['a',", "'b']", str(len(delta.modules)), "targets", "+0"]
    assert out.endswith("0 values\n")
    (method,) = dk.inspect(folder).methods
    assert sorted(method.targets) == sorted(delta.modules)


@pytest.mark.parametrize("target", ["{0-49000}", "{0-49000!0-49000}"])
def test_a_forged_file_cannot_name_millions_of_targets(target, tmp_path, capsys):
    """Forty methods without tensors, for each of which 49,001 names are looked at, in 15 kB."""
    folder = mean().save(tmp_path / "mean")
    forge(folder, config=lambda own: own.update(methods=[{**own["methods"][0], "targets": [target]}] * 40))
    assert main(["inspect", str(folder)]) == 1
    assert f"{target!r} stands for more paths than the backbone has" in capsys.readouterr().err
