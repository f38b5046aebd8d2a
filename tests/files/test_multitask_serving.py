"""The tutorial's serving code, with three deltas that OpenDelta itself saved, downloaded from a Hub on loopback."""

import sys

import torch

import deltakit as dk
from support.models import same, snapshot
from support.opendelta_files import FILES, backbone
from support.paths import CHECKPOINTS

sys.path.insert(0, str(CHECKPOINTS.parent.parent / "examples"))
IDS = {
    "thunlp/Spelling_Correction_T5_LRAdapter_demo": "low_rank",
    "thunlp/Question_Topic_T5-large_Compacter": "compacter",
    "thunlp/FactQA_T5-large_Adapter": "adapter",
}


class Letters:
    """Texts are letters, and a letter is its place in the alphabet."""

    def __call__(self, text, return_tensors):
        return type("Encoding", (), {"input_ids": torch.tensor([[3 + "abcdefghijklmnop".index(one) for one in text]])})

    def decode(self, ids, skip_special_tokens):
        return "".join("abcdefghijklmnop"[i - 3] for i in ids.tolist() if i >= 3)


def test_three_tasks_from_the_hub(hub, capsys, monkeypatch):
    from multitask_serving import AutoDeltaModel, multitask_serving

    for name, case in IDS.items():
        hub.add_repo(name, {file.name: file.read_bytes() for file in (FILES / "t5" / case).iterdir()})
    model = backbone("t5")
    before = snapshot(model)
    deltas = []
    for name in IDS:
        deltas.append(AutoDeltaModel.from_finetuned(name, backbone_model=model))
        deltas[-1].detach()
    same(before, snapshot(model))

    def serve():
        for question in ("abba", "cocoa"):
            multitask_serving(model, Letters(), deltas, question)
        return capsys.readouterr().out.splitlines()

    printed = serve()
    assert len(printed) == 6
    assert [line.partition(":")[0] for line in printed[:3]] == ["Correct Spelling", "Question Topic", "Question Answer"]
    # What each delta says by itself on a model of its own: no task has left anything behind.
    given = "abba"
    for name, line in zip(IDS, printed, strict=False):
        alone = backbone("t5")
        dk.load(FILES / "t5" / IDS[name], alone)
        ids = alone.generate(input_ids=Letters()(given, "pt").input_ids, max_length=20, num_beams=4)
        said = Letters().decode(ids[0], True)
        assert line.partition(": ")[2] == said
        given = said if name.startswith("thunlp/Spelling") else given
    assert serve() == printed
    same(before, snapshot(model))
