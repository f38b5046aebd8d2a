"""Methods that change weights: each with the formula of its paper, and with what PEFT calls it and its parameters."""

from collections.abc import Callable
from typing import NamedTuple

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import deltakit as dk
from support.models import randomize


class Case(NamedTuple):
    """A method, PEFT's config for the same, and the formula of the update.

    `names`: our parameters and PEFT's. `update`: takes the weight [d_out, d_in], our tensors by name, and the frozen ones.
    `sizes`: of a linear layer and a Conv1D behind it; without the third one there is no Conv1D.
    """

    ours: dk.Method
    theirs: peft.PeftConfig | None
    names: dict[str, str]
    update: Callable
    sizes: tuple[int, ...] = (7, 11, 5)
    turned: tuple[str, ...] = ()
    """Those of our parameters that PEFT has transposed."""


def vera(weight, p, shared):
    out, into = weight.shape
    a, b = shared["A"][:, :into], shared["B"][:out]
    return torch.diag(p["b"]) @ b @ torch.diag(p["d"]) @ a


def loha(weight, p, shared):
    return 6 / 3 * (p["B1"] @ p["A1"]) * (p["B2"] @ p["A2"])


def lokr(weight, p, shared):
    sides = [p[side] if side in p else p[f"{side}_B"] @ p[f"{side}_A"] for side in ("left", "right")]
    return 5 / 2 * torch.kron(*sides)


def hira(weight, p, shared):
    return weight * (p["B"] @ p["A"])


def miss(weight, p, shared):
    out, into = weight.shape
    r = p["B"].shape[1]
    rows = p["B"][torch.arange(out) % len(p["B"])]
    return rows[:, torch.arange(into) % r]


def miss_bat(weight, p, shared):
    new, r = torch.zeros_like(weight), p["B"].shape[1]
    for o in range(weight.shape[0] // r):
        for i in range(weight.shape[1] // r):
            place = slice(o * r, o * r + r), slice(i * r, i * r + r)
            new[place] = weight[place] @ p["B"][o] + p["B"][o]
    return new


def delora(weight, p, shared):
    def product(a, b, lam):
        terms = [torch.outer(b[:, i], a[i]) / (b[:, i].norm() * a[i].norm()) for i in range(len(a))]
        return lam / len(a) * sum(terms) * weight.norm(dim=0)

    start = product(p["A0"], p["B0"], 2.5) if "A0" in p else 0
    return product(p["A"], p["B"], p["lam"]) - start


def gralora(weight, p, shared):
    (k, r, columns), rows = p["A"].shape, p["B"].shape[1]
    new = torch.zeros_like(weight)
    for n in range(k):
        for i in range(k):
            part = slice(i * r // k, (i + 1) * r // k), slice(n * r // k, (n + 1) * r // k)
            product = p["B"][i][:, part[1]] @ p["A"][n][part[0]]
            new[i * rows : (i + 1) * rows, n * columns : (n + 1) * columns] = product
    hybrid = len(p.get("A_whole", ()))
    return 5 / (r + hybrid) * (new + (p["B_whole"] @ p["A_whole"] if hybrid else 0))


def randlora(weight, p, shared):
    """The sum of the paper, with the matrices B_j that the pairing of columns means."""
    small, large = sorted(weight.shape)
    r, n = p["L"].shape
    joined = shared["B"][:large, :n].reshape(large, n * r)
    bases = [joined[:, j::n] for j in range(n)]
    a = shared["A"][:, 0, :small]
    new = 5 / r * sum(bases[j] @ torch.diag(p["L"][:, j]) @ a @ torch.diag(p["G"][j]) for j in range(n))
    return new if weight.shape[1] == small else new.T


def vblora(weight, p, shared):
    def mixed(logits):
        best = logits.topk(2)
        chances = best.values.exp()
        return sum(c * shared["bank"][i] for c, i in zip(chances / chances.sum(), best.indices, strict=True))

    a = torch.stack([torch.cat([mixed(part) for part in row]) for row in p["logits_A"]])
    b = torch.stack([torch.cat([mixed(part) for part in row]) for row in p["logits_B"].transpose(0, 1)])
    return b.T @ a


LOHA = {f"{ours}{which}": f"hada_w{which}_{theirs}" for ours, theirs in (("A", "b"), ("B", "a")) for which in "12"}
THIN = {"left": "lokr_w1", "right_B": "lokr_w2_a", "right_A": "lokr_w2_b"}
BOTH = {"left_B": "lokr_w1_a", "left_A": "lokr_w1_b", "right_B": "lokr_w2_a", "right_A": "lokr_w2_b"}
GRALORA = {"A": "gralora_A", "B": "gralora_B"}
DELORA = {"A": "delora_A", "B": "delora_B", "lam": "delora_lambda", "norms": "delora_w_norm"}
RANDLORA = {"L": "randlora_lambda", "G": "randlora_gamma"}

CASES = {
    "VeRA": Case(
        dk.VeRA(r=3, start=0.2, seed=4),
        peft.VeraConfig(r=3, d_initial=0.2, projection_prng_key=4),
        {"b": "vera_lambda_b", "d": "vera_lambda_d"},
        vera,
    ),
    "LoHa": Case(dk.LoHa(r=3, alpha=6), peft.LoHaConfig(r=3, alpha=6), LOHA, loha, (7, 11)),
    "LoKr": Case(dk.LoKr(r=2, alpha=5), peft.LoKrConfig(r=2, alpha=5), THIN, lokr, (35, 22)),
    "LoKr, both": Case(
        dk.LoKr(r=2, alpha=5, both=True),
        peft.LoKrConfig(r=2, alpha=5, decompose_both=True),
        BOTH,
        lokr,
        (35, 77),
    ),
    "LoKr, full": Case(
        dk.LoKr(r=4, alpha=10, factor=4),
        peft.LoKrConfig(r=4, alpha=10, decompose_factor=4),
        {"left": "lokr_w1", "right": "lokr_w2"},
        lokr,
        (12, 10),
    ),
    "HiRA": Case(dk.HiRA(r=3), peft.HiraConfig(r=3), {"A": "hira_A", "B": "hira_B"}, hira),
    "MiSS": Case(dk.MiSS(r=3), peft.MissConfig(r=3), {"B": "miss_block"}, miss, (7, 11), ("B",)),
    "MiSS, mini": Case(
        dk.MiSS(r=3, mini=5),
        peft.MissConfig(r=3, mini_r=5, init_weights="mini"),
        {"B": "miss_block"},
        miss,
        (7, 15),
        ("B",),
    ),
    "MiSS, bat": Case(
        dk.MiSS(r=3, bat=True), peft.MissConfig(r=3, init_weights="bat"), {"B": "miss_block"}, miss_bat, (9, 15)
    ),
    "DeLoRA": Case(
        dk.DeLoRA(r=3, strength=2.5, start="zero"), peft.DeloraConfig(r=3, delora_lambda=2.5), DELORA, delora, (7, 11)
    ),
    "DeLoRA, random": Case(dk.DeLoRA(r=3, strength=2.5), None, DELORA, delora),
    "GraLoRA": Case(
        dk.GraLoRA(r=6, alpha=5, k=3),
        peft.GraloraConfig(r=6, alpha=5, gralora_k=3),
        GRALORA,
        gralora,
        (6, 15, 9),
        ("A", "B"),
    ),
    "GraLoRA, hybrid": Case(
        dk.GraLoRA(r=6, alpha=5, k=3, hybrid=2),
        peft.GraloraConfig(r=6, alpha=5, gralora_k=3, hybrid_r=2),
        GRALORA | {"A_whole": "gralora_A_general", "B_whole": "gralora_B_general"},
        gralora,
        (6, 15, 9),
        ("A", "B"),
    ),
    **{
        f"RandLoRA, {bases}": Case(
            dk.RandLoRA(r=2, alpha=5, seed=4, bases=bases),
            peft.RandLoraConfig(
                r=2, randlora_alpha=5, projection_prng_key=4, **{bases: True} if bases != "uniform" else {}
            ),
            RANDLORA,
            randlora,
        )
        for bases in ("uniform", "sparse", "very_sparse")
    },
    "VBLoRA": Case(
        dk.VBLoRA(r=3, vectors=11, length=5),
        peft.VBLoRAConfig(r=3, num_vectors=11, vector_length=5),
        {"logits_A": "vblora_logits_A", "logits_B": "vblora_logits_B"},
        vblora,
        (10, 35, 15),
    ),
}


class Chain(nn.Module):
    """A linear layer, a nonlinear function, and a Conv1D if there are three sizes."""

    def __init__(self, sizes):
        super().__init__()
        self.first = nn.Linear(*sizes[:2])
        self.second = Conv1D(sizes[2], sizes[1]) if len(sizes) > 2 else nn.Identity()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    @property
    def targets(self):
        return ["first"] + (["second"] if isinstance(self.second, Conv1D) else [])


def chain(case):
    """The model of a case in float64, and its input."""
    torch.manual_seed(3)
    model = Chain(case.sizes).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model, torch.randn(2, 13, case.sizes[0], dtype=torch.float64)


def with_options(method, **options):
    """The method with other options."""
    return dk.Method.from_dict({**method.to_dict(), **options})


def attached(case, model, name="delta"):
    return randomize(dk.attach(model, with_options(case.ours, at=model.targets), name=name))


def frozen(module):
    """The tensors of the shared module in float64."""
    if module.shared is None:
        return {}
    return {name: value.detach().double() for name, value in module.shared.state_dict().items()} | dict(
        module.shared.named_buffers()
    )
