"""Every method at its default on every backbone of the zoo: it works, or says that it does not apply and why."""

import os

import pytest

from support import backbone_zoo, method_matrix
from support.paths import GOLDEN

KNOWN = GOLDEN / "matrix.txt"
SIGNS = {"pass": "+", "does not apply": "-", "fail": "!"}

# One or two of each kind; the others take half a minute together.
FAST = {"bert", "squeezebert", "gpt2", "llama", "bloom", "mixtral", "gpt_oss", "mamba", "jamba", "t5", "bart", "vit"}
FAST |= {"resnet", "wavlm", "whisper", "clip", "torch.nn.Transformer", "timm-like ViT", "LSTM tagger", "MLP"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in backbone_zoo.ZOO]
)
def test_methods(name):
    results = [method_matrix.cell(name, method) for method in method_matrix.METHODS]
    assert not [f"{result.method}: {result.reason}" for result in results if result.status == "fail"]
    line = f"{name}: {' '.join(r.method + SIGNS[r.status] for r in results)}"
    if os.environ.get("DELTAKIT_UPDATE_GOLDEN"):
        known = dict(row.split(": ", 1) for row in KNOWN.read_text().splitlines()) if KNOWN.exists() else {}
        known |= dict([line.split(": ", 1)])
        KNOWN.write_text("".join(f"{n}: {known[n]}\n" for n in backbone_zoo.ZOO if n in known))
    # What once worked must not come to "does not apply" unseen.
    assert line in KNOWN.read_text().splitlines()


def test_the_zoo_is_as_wide_as_promised():
    kinds = {backbone.kind for backbone in backbone_zoo.ZOO.values()}
    assert len(backbone_zoo.ZOO) >= 60
    assert kinds == {
        *("encoder", "decoder", "encoder-decoder", "vision", "audio", "multimodal", "mixture of experts"),
        *("state space", "hybrid", "convolutional", "plain torch"),
    }
