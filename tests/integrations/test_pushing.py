"""What frameworks upload of a model with deltas."""

from concurrent.futures import Future
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers as tf
from safetensors.torch import load

import deltakit as dk
from deltakit.integrations import small_checkpoints
from integrations.test_trainer import bert, trainer_of
from support.loopback_hub import LoopbackHub
from support.models import randomize

BOTH = {"model.safetensors", "config.json", "delta_model.safetensors", "delta_config.json"}


@pytest.fixture(autouse=True)
def client(hub, monkeypatch):
    # transformers keeps a client with the settings of its first use.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    return hub


def test_a_model_uploads_its_backbone_and_its_delta(client, tmp_path):
    model = bert().eval()
    randomize(dk.attach(model, dk.LoRA(r=3), train="@head"))
    model.push_to_hub("me/model", token=LoopbackHub.TOKEN)
    found = client.repos["me/model"].commits[-1][1]
    assert found.keys() >= BOTH
    for name, content in found.items():
        (tmp_path / name).write_bytes(content)
    again = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    dk.load(tmp_path, again)
    batch = torch.tensor([[5, 6, 7]])
    assert torch.equal(again(batch).logits, model(batch).logits)


@pytest.mark.parametrize("line", [False, True])
def test_a_trainer_uploads_checkpoints_and_the_end(line, monkeypatch, tmp_path):
    uploads = []

    # The Trainer's own upload runs in the background while the Trainer writes the next files.
    def upload(self, *, folder_path, path_in_repo="", ignore_patterns=(), **options):
        paths = [path for path in Path(folder_path).rglob("*") if path.is_file()]
        names = {path: path.relative_to(folder_path).as_posix() for path in paths}
        kept = {path: name for path, name in names.items() if not any(fnmatch(name, p) for p in ignore_patterns or ())}
        uploads.append({f"{path_in_repo}/{name}".lstrip("/"): path.read_bytes() for path, name in kept.items()})
        done = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    model = bert()
    dk.attach(model, dk.LoRA(r=3), train="@head")
    options = {"push_to_hub": True, "hub_model_id": "me/model", "hub_token": LoopbackHub.TOKEN}
    trainer = trainer_of(model, tmp_path / "out", hub_strategy="all_checkpoints", **options)
    if line:
        small_checkpoints(trainer)
    trainer.train()
    first, checkpoint = uploads[:2]
    assert len(first["model.safetensors"]) < 20_000
    assert ("delta_model.safetensors" in first) is line
    assert {"checkpoint-2/model.safetensors", "checkpoint-2/delta_model.safetensors"} <= checkpoint.keys()
    trainer.push_to_hub()
    assert uploads[-1].keys() >= BOTH
    assert "bert.pooler.dense.weight" in load(uploads[-1]["model.safetensors"])
