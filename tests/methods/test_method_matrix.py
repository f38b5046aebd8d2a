"""Every method at its default on every backbone of the zoo: it works, or says that it does not apply and why."""

import os

import pytest

from support import backbone_zoo, method_matrix
from support.paths import GOLDEN

KNOWN = GOLDEN / "matrix.txt"
UPDATES = bool(os.environ.get("DELTAKIT_UPDATE_GOLDEN"))
SIGNS = {"pass": "+", "does not apply": "-", "fail": "!"}

# One or two of each kind; the others take half a minute together.
FAST = {"bert", "squeezebert", "gpt2", "llama", "bloom", "mixtral", "gpt_oss", "mamba", "jamba", "t5", "bart", "vit"}
FAST |= {"resnet", "wavlm", "whisper", "clip", "torch.nn.Transformer", "timm-like ViT", "LSTM tagger", "MLP"}


def results_of(name, methods):
    """The results of methods on a backbone as words, such as `LoRA+`. No method may fail."""
    results = [method_matrix.cell(name, method) for method in methods]
    assert not [f"{result.method}: {result.reason}" for result in results if result.status == "fail"]
    return [r.method + SIGNS[r.status] for r in results]


def known_results():
    """The results of all methods by backbone, as the last update found them."""
    lines = (line.split(": ") for line in KNOWN.read_text().splitlines()) if KNOWN.exists() else ()
    return {name: words.split() for name, words in lines}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in backbone_zoo.ZOO]
)
def test_methods(name):
    if UPDATES:
        pytest.skip("the test of every method writes the results")
    # What once worked must not come to "does not apply" unseen.
    assert set(results_of(name, method_matrix.USUAL)) <= set(known_results()[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", backbone_zoo.ZOO)
def test_every_registered_method(name):
    found, known = results_of(name, method_matrix.METHODS), known_results()
    if UPDATES:
        known[name] = found
        KNOWN.write_text("".join(f"{n}: {' '.join(known[n])}\n" for n in backbone_zoo.ZOO if n in known))
    assert found == known[name]


def test_the_zoo_is_as_wide_as_promised():
    kinds = {backbone.kind for backbone in backbone_zoo.ZOO.values()}
    assert len(backbone_zoo.ZOO) >= 60
    assert kinds == {
        *("encoder", "decoder", "encoder-decoder", "vision", "audio", "multimodal", "mixture of experts"),
        *("state space", "hybrid", "convolutional", "plain torch"),
    }
