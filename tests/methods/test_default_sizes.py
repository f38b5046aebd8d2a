"""The sizes that each method has when none is given: the papers' own, as numbers, so that no edit changes them unseen."""

import pytest
import torch
from torch import nn

import deltakit as dk
from support.models import Transformer


class Wide(nn.Module):
    """A feed-forward part wide enough for every default size, and nothing else."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(101, 103)

    def forward(self, x):
        return self.layer(x)


def shapes(method):
    delta = dk.attach(Wide(), method)
    return {
        name.rpartition(".")[2] if "adapter" not in name else name[14:]: tuple(p.shape)
        for name, p in delta.named_parameters()
    }


def test_lora():
    """Rank 8 and alpha 16, scaled by alpha / r = 2: the authors' scripts for RoBERTa (microsoft/LoRA, roberta_base_mnli.sh)."""
    assert shapes(dk.LoRA(at="layer")) == {"A": (8, 101), "B": (103, 8)}
    (lora,) = dk.attach(Wide(), dk.LoRA(at="layer")).modules["layer"]
    assert (lora.scaling, lora.dropout, lora.keep) == (2, 0, "exact")
    assert dk.LoRA().to_dict().items() >= {"r": 8, "alpha": 16, "rslora": False, "dropout": 0.0}.items()


def test_adapter():
    """64 units and GELU: `feedforward_adapter(hidden_size=64)` in the authors' code (google-research/adapter-bert)."""
    assert shapes(dk.Adapter(at="layer")) == {
        "down.weight": (64, 103),
        "down.bias": (64,),
        "up.weight": (103, 64),
        "up.bias": (103,),
    }
    assert dk.Adapter().activation == "gelu"


def test_the_other_adapters():
    """Compacter and its baseline: reduction 32, rank 1 and n = 4 (the authors' compacter.json and low_rank_adapter.json).

    The parallel adapter: 512 units, ReLU and a factor of 4, as in the authors' script for XSum.
    """
    model = nn.ModuleDict({"layer": nn.Linear(101, 256)})
    at = {"at": "layer"}
    for method, summary in (
        (dk.LowRankAdapter(**at), "size=8 r=1 gelu_tanh"),
        (dk.Compacter(**at), "size=8 n=4 r=1 gelu_tanh"),
        (dk.ParallelAdapter(**at), "size=512 scaling=4 relu"),
    ):
        delta = dk.attach(model, method)
        assert delta.modules["layer"][0].summary() == summary
        delta.detach()
    assert (dk.Compacter().shared_rule, dk.Compacter().bias) == (True, True)


def test_prefix():
    """10 tokens, the best length for table-to-text (arXiv:2101.00190, section 7.2), and an MLP of 512 units (appendix A)."""
    flat = dk.attach(Transformer(), dk.Prefix())
    assert {tuple(p.shape) for p in flat.parameters()} == {(4, 10, 5)}
    by_mlp = dict(dk.attach(Transformer(), dk.Prefix(reparam=True)).named_parameters())
    assert {name.rpartition("shared.")[2]: tuple(p.shape) for name, p in by_mlp.items() if "shared" in name} == {
        "embedding": (10, 20),
        "inner.weight": (512, 20),
        "inner.bias": (512,),
    }


def test_soft_prompt():
    """20 tokens: more give little (arXiv:2104.08691, section 3.2 and figure 3a)."""
    (prompt,) = dk.attach(Transformer(), dk.SoftPrompt()).parameters()
    assert prompt.shape == (20, 20)
    assert (dk.SoftPrompt().tokens, dk.SoftPrompt().init, dk.SoftPrompt().prepend) == (20, "vocab", True)


@pytest.mark.parametrize("blocks", [2, 3])
def test_bitfit(blocks):
    """Every bias of the transformer (arXiv:2106.10199, section 3): six linear layers and two norms a block, and the last norm."""
    delta = dk.attach(Transformer(blocks), dk.BitFit())
    assert (dk.BitFit().subset, len(delta.modules)) == ("all", 8 * blocks + 1)
    assert all(torch.equal(p, torch.zeros_like(p)) for p in delta.parameters())
