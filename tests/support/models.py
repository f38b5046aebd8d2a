"""Backbones for the tests: unequal prime sizes, so that a transpose shows, and every way of calling and returning."""

from dataclasses import fields
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

import deltakit as dk

WIDTH, INNER, VOCAB, CLASSES = 20, 28, 31, 3


class Pair(NamedTuple):
    hidden: torch.Tensor
    extra: int


class SelfAttention(nn.Module):
    """Plain attention over keyword-called projections, returned as a tuple."""

    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q_proj = nn.Linear(WIDTH, WIDTH)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH)
        self.o_proj = nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        return x.view(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def forward(self, hidden_states, mask=None):
        q, k, v = self.q_proj(input=hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        mixed = nn.functional.scaled_dot_product_attention(self.heads(q), self.heads(k), self.heads(v), attn_mask=mask)
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), None


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(WIDTH, INNER)
        self.down_proj = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        return self.down_proj(torch.relu(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.self_attn, self.mlp = SelfAttention(), MLP()

    def forward(self, x):
        x = x + self.self_attn(hidden_states=self.norm_1(x))[0]
        return x + self.mlp(self.norm_2(x))


class Transformer(nn.Module):
    """Two blocks over token ids, with a classifier on the mean."""

    def __init__(self, blocks=2):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, CLASSES)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.classifier(self.norm(x).mean(1))


class Calls(nn.Module):
    """One linear target, called and returning in a chosen style."""

    def __init__(self, style, d_out=5):
        super().__init__()
        self.target = Styled(style, d_out)
        self.style = style

    def forward(self, x):
        out = self.target(x) if self.style != "keyword" else self.target(hidden_states=x)
        if self.style in ("tuple", "list", "pair"):
            return out[0]
        if self.style in ("dict", "model_output"):
            return out["last_hidden_state"]
        return out


class Styled(nn.Linear):
    def __init__(self, style, d_out=5):
        super().__init__(7, d_out)
        self.style = style

    def forward(self, hidden_states):
        y = super().forward(hidden_states)
        return {
            "tuple": lambda: (y, 1),
            "list": lambda: [y, 1],
            "pair": lambda: Pair(y, 1),
            "dict": lambda: {"last_hidden_state": y, "other": 1},
            "model_output": lambda: BaseModelOutput(last_hidden_state=y),
        }.get(self.style, lambda: y)()


STYLES = ("tensor", "keyword", "tuple", "list", "pair", "dict", "model_output")


class Kinds(nn.Module):
    """One target of each type that LoRA serves."""

    NAMES = ("embedding", "conv", "linear", "conv1d")

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 12)
        self.conv = nn.Conv2d(3, 7, (2, 3), stride=(1, 2), padding=(1, 0))
        self.linear = nn.Linear(7, 11)
        self.conv1d = Conv1D(5, 11)

    def forward(self, ids):
        x = self.embedding(ids).unflatten(-1, (3, 4)).movedim(-2, -3)
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.conv1d(self.linear(x))


def a_layer_of_each_kind():
    """A model of `Kinds` in float64, and its input."""
    torch.manual_seed(2)
    return Kinds().double().eval(), torch.randint(0, 13, (3, 5))


NEEDED = {
    "adalora": {"total_steps": 10, "init_r": 3, "target_r": 2},
    "miss": {"r": 5},
    "vblora": {"length": 4, "vectors": 7},
    "adapter_fusion": {"deltas": ("a", "b")},
    "average": {"deltas": ("a", "b")},
}
"""The options of methods whose defaults are for larger layers than those here, besides ranks."""


def needed(kind):
    """The options without which a method has no delta on the small layers here: those without a default, and a low rank."""
    default = next((field.default for field in fields(kind) if field.name == "r"), None)
    rank = {"r": 4} if isinstance(default, int) and default > 4 else {}
    return {**kind.example, **rank, **NEEDED.get(kind.name, {})}


def method_of(name, **options):
    """A method by its name, with the options that it cannot do without."""
    return dk.METHODS[name](**{**needed(dk.METHODS[name]), **options})


WITHOUT_PARAMETERS = {"average"}
"""Methods in which nothing can be trained."""


def beside(model, method, scale=0.3):
    """The model with the deltas that a method weighs: always the same values, neither active nor trained."""
    for number, name in enumerate(method.weighed):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            delta = randomize(dk.attach(model, dk.Adapter(size=3), name=name, train=()), scale)
        delta.active = delta.trainable = False
    return model


def ids(rows=3, length=11):
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(1))


def snapshot(backbone):
    """Everything about a backbone that a detach must leave as it was."""
    return {
        "keys": list(backbone.state_dict()),
        "hooks": [
            (path, len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), sorted(m._modules))
            for path, m in backbone.named_modules()
        ],
        "grad": [(name, p.requires_grad) for name, p in backbone.named_parameters()],
        "values": {name: value.clone() for name, value in backbone.state_dict().items()},
        "types": [type(m) for m in backbone.modules()],
    }


def same(before, after):
    assert before.keys() == after.keys()
    for part in ("keys", "hooks", "grad", "types"):
        assert before[part] == after[part], part
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def randomize(delta, scale=0.3):
    """The delta, with a value that shows in every parameter."""
    with torch.no_grad():
        for parameter in delta.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)
    return delta


def attached(model, *methods, **options):
    """A delta with a value that shows in every parameter: of the methods given, or a LoRA."""
    return randomize(dk.attach(model, *(methods or (dk.LoRA(r=3),)), **options))
