"""AdaLoRA: y = W x + alpha / r_0 B diag(E) A x. While it is trained, ranks move to the targets that need them.

Zhang et al. 2023, https://arxiv.org/abs/2303.10512. The importance of a parameter is a product of two moving averages: that
of |p dL/dp|, and that of its distance from its average (equations 9 to 11). The score of a value of E is its own importance
plus the means of those of its row of A and its column of B (equation 8). The values with the lowest scores of all targets are
set to zero, as many as the schedule says (equation 12). A penalty keeps the rows of A and the columns of B orthogonal
(equation 4).

As in PEFT, the update is divided by the start rank also where less is left, and the penalty is the mean of the norms over all
A and B, where the paper has a sum of squares.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from deltakit.core import (
    TRAINING,
    DeltaModule,
    Design,
    Method,
    Target,
    gathered,
    gathered_in_training,
    scatter,
    wants_start_values,
)
from deltakit.errors import OptionError, StateError
from deltakit.ops import LowRank, LowRankMethod, check_rank, like, stack_of

_FACTORS = ("A", "E", "B")
_AVERAGES = ("importance", "uncertainty")


class AdaLoRADelta(LowRank):
    """The factors `A` [*stack, r, d_in], `E` [*stack, r, 1] and `B` [*stack, d_out, r]. E starts at zero."""

    tags: ClassVar[Mapping[str, str]] = {
        "A": "down",
        "E": "values",
        "B": "up",
        "kept": TRAINING,
        "steps": TRAINING,
        **{f"{name}_{average}": TRAINING for name in _FACTORS for average in _AVERAGES},
    }

    def __init__(self, target: Target, options: "AdaLoRA") -> None:
        # PEFT's small number, so that its files give its outputs.
        super().__init__(target, scaling=options.alpha / (options.init_r + 1e-5), dropout=options.dropout)
        check_rank(target, "AdaLoRA", options.init_r, option="init_r")
        stack, r, new = stack_of(target), options.init_r, like(target)
        for name, shape in zip(_FACTORS, ((r, self.d_in), (r, 1), (self.d_out, r)), strict=True):
            self.register_parameter(name, nn.Parameter(torch.empty(*stack, *shape, **new)))
            for average in _AVERAGES:
                self.register_buffer(f"{name}_{average}", torch.zeros(*stack, *shape, **new))
        # Which values of E were kept when the ranks were last chosen.
        self.register_buffer("kept", torch.ones(*stack, r, 1, dtype=torch.bool, device=new["device"]))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=new["device"]))
        if wants_start_values(self.get_parameter("A")):
            self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.get_parameter("A"), std=0.02)
        nn.init.zeros_(self.get_parameter("E"))
        nn.init.normal_(self.get_parameter("B"), std=0.02)

    def factors(self) -> tuple[Float[Tensor, "*stack r d_in"], Float[Tensor, "*stack d_out r"]]:
        own: Any = self._parameters
        return own["A"] * own["E"], own["B"]

    @property
    def rank(self) -> int:
        """The number of values of E that are not zero."""
        return int(gathered(self.get_parameter("E").detach()).count_nonzero())

    def notice_gradients(self, beta1: float, beta2: float) -> None:
        """Moves the averages of importance and uncertainty by one step."""
        for name in _FACTORS:
            parameter = self.get_parameter(name)
            if parameter.grad is not None:
                importance, uncertainty = (self.get_buffer(f"{name}_{average}") for average in _AVERAGES)
                sensitivity = (gathered(parameter.detach()) * gathered(parameter.grad)).abs()
                importance.mul_(beta1).add_(sensitivity, alpha=1 - beta1)
                uncertainty.mul_(beta2).add_((sensitivity - importance).abs(), alpha=1 - beta2)

    def scores(self) -> Float[Tensor, "*stack r 1"]:
        """Returns the score of each value of E."""
        a, e, b = (self.get_buffer(f"{n}_importance") * self.get_buffer(f"{n}_uncertainty") for n in _FACTORS)
        return e + a.mean(-1, keepdim=True) + b.mean(-2).unsqueeze(-1)

    def drop(self) -> None:
        """Sets the values of E to zero that are not kept."""
        values = self.get_parameter("E")
        scatter(values, gathered(values.detach()).masked_fill(~self.get_buffer("kept"), 0))

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        super().load_saved(state)
        # A file has no `kept`. Without it, training that goes on would bring the dropped values back.
        self.get_buffer("kept").copy_(self.get_parameter("E") != 0)

    @property
    def revived(self) -> bool:
        """Whether values of E that were dropped have been trained again."""
        kept = self.get_buffer("kept")
        return bool((gathered(self.get_parameter("E").detach()) != 0)[~kept].any())

    def summary(self) -> str:
        return f"r={self.get_parameter('E').shape[-2]} scale={self.scaling:g}"


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRankMethod, name="adalora"):
    """Low-rank updates whose ranks are chosen while they are trained: call `delta.step()` in each step.

    The loss is `loss + delta.penalty()`. The step stands between `optimizer.step()` and `optimizer.zero_grad()`. For a
    `Trainer` of transformers write `integrations.training_steps(trainer)` instead of both. The file has the values that were
    set to zero, too; an adapter of PEFT (`format="peft"`) leaves them out.

    Args:
        total_steps: the number of calls of `delta.step()` in the training run.
        init_r: the rank of each target at the start, at least 1 and at most the smaller side of the weight.
        target_r: the mean rank of the targets at the end, at least 1 and at most `init_r`.
        alpha: the update is multiplied by alpha / (init_r + 1e-5); at least 0.
        tinit: the number of first steps that keep all ranks.
        tfinal: the number of last steps in which the ranks stay as they are.
        delta_t: the ranks are chosen every so many steps in between, at least 1.
        beta1, beta2: the decay of the two averages in (0, 1), that of the importance and that of the uncertainty.
        orthogonality: the weight of the penalty, at least 0.
        dropout: the probability in [0, 1) with which inputs of the update are dropped in training.
        untie: whether to adapt a module alone although other modules share its weight.

    Raises:
        OptionError: if an option is out of its range, or no steps are left between the first and the last ones.
    """

    kind: ClassVar[type[DeltaModule]] = AdaLoRADelta
    lora_elsewhere: ClassVar[bool] = True
    design: ClassVar[Design] = Design(form="s B diag(E) A x")
    example: ClassVar[Mapping[str, Any]] = {"total_steps": 100}

    total_steps: int
    init_r: int = 12
    target_r: int = 8
    alpha: float = 16
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orthogonality: float = 0.5

    def validate(self) -> None:
        super().validate()
        largest = torch.finfo(torch.float32).max
        for option, fits, expected in (
            ("init_r", self.init_r >= 1, "a rank of at least 1; 12 is usual"),
            ("target_r", 1 <= self.target_r <= self.init_r, f"a rank from 1 to init_r={self.init_r}"),
            ("alpha", 0 <= self.alpha <= largest, "a finite number of at least 0 that float32 holds; 16 is usual"),
            ("tinit", self.tinit >= 0, "a number of steps of at least 0"),
            ("tfinal", self.tfinal >= 0, "a number of steps of at least 0"),
            ("delta_t", self.delta_t >= 1, "a number of steps of at least 1"),
            ("beta1", 0 < self.beta1 < 1, "a decay in (0, 1); 0.85 is usual"),
            ("beta2", 0 < self.beta2 < 1, "a decay in (0, 1); 0.85 is usual"),
            ("orthogonality", 0 <= self.orthogonality <= largest, "a finite number of at least 0; 0.5 is usual"),
            (
                "total_steps",
                self.total_steps > self.tinit + self.tfinal,
                f"the number of steps of the training run, more than tinit={self.tinit} and tfinal={self.tfinal} together",
            ),
        ):
            if not fits:
                raise OptionError(f"AdaLoRA({option}={getattr(self, option)}): expected {expected}")

    def penalty(self, modules: Sequence[DeltaModule]) -> Tensor | float:
        terms = []
        for module in modules if self.orthogonality else ():
            a, b = (gathered_in_training(module.get_parameter(name)) for name in "AB")
            for product in (a @ a.mT, b.mT @ b):
                identity = torch.eye(product.shape[-1], dtype=product.dtype, device=product.device)
                terms.append(
                    torch.linalg.matrix_norm(product - identity).flatten().to(modules[0].get_buffer("steps").device)
                )
        return self.orthogonality * torch.cat(terms).mean() if terms else 0.0

    def step(self, modules: Sequence[DeltaModule]) -> None:
        own = [module for module in modules if isinstance(module, AdaLoRADelta)]
        now, last = int(own[0].get_buffer("steps")) + 1, self.total_steps - self.tfinal
        if now == 1 and _ranks_of_a_file(own):
            for module in own:
                module.drop()
            return
        if now < last:
            _refuse_without_gradients(own)
            for module in own:
                module.notice_gradients(self.beta1, self.beta2)
        if self.tinit < now <= last and (now == last or now % self.delta_t == 0):
            self._choose(own, now)
        for module in own:
            module.get_buffer("steps").add_(1)
            if now >= last or (now > self.tinit and now % self.delta_t == 0):
                module.drop()

    def budget(self, step: int, values: int) -> int:
        """Returns how many values of E are kept at a step, counted from 1.

        Args:
            values: how many there are.
        """
        end = values // self.init_r * self.target_r
        last = self.total_steps - self.tfinal
        left = 1 - (min(max(step, self.tinit), last) - self.tinit) / (last - self.tinit)
        return int((values - end) * left**3 + end)

    def _choose(self, modules: Sequence[AdaLoRADelta], step: int) -> None:
        device = modules[0].get_buffer("steps").device
        scores = torch.cat([module.scores().flatten().to(device) for module in modules])
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[scores.argsort(stable=True)[: len(scores) - self.budget(step, len(scores))]] = False
        for module, part in zip(modules, kept.split([m.get_buffer("kept").numel() for m in modules]), strict=True):
            own = module.get_buffer("kept")
            own.copy_(part.view_as(own))

    @classmethod
    def combination(cls, parts: Sequence[DeltaModule], rank: int | None) -> Method:
        ranks = [part.rank if isinstance(part, AdaLoRADelta) else 0 for part in parts]
        return super().combination(parts, rank if rank is not None else max(1, sum(ranks)))

    def unfinished(self, modules: Sequence[DeltaModule], *, loaded: bool) -> str:
        own = [module for module in modules if isinstance(module, AdaLoRADelta)]
        if _ranks_of_a_file(own) and any(module.revived for module in own):
            return (
                "values that AdaLoRA had dropped have been trained again, so its ranks are above those that it chose; call "
                "delta.step() between optimizer.step() and optimizer.zero_grad()"
            )
        steps = modules[0].get_buffer("steps")
        if loaded or steps.is_meta or int(steps):
            return ""
        return (
            "it was trained without delta.step(), so AdaLoRA chose no ranks; call delta.step() between optimizer.step() and "
            "optimizer.zero_grad()"
        )


def _ranks_of_a_file(modules: Sequence[AdaLoRADelta]) -> bool:
    """Returns whether the ranks are those that an earlier run chose, and no step was taken since. Such ranks stay."""
    kept = [module.get_buffer("kept") for module in modules]
    if kept[0].is_meta or int(modules[0].get_buffer("steps")) or all(bool(one.all()) for one in kept):
        return False
    if any(bool(one.any()) for one in kept):
        return True
    # It was saved before it was trained.
    for one in kept:
        one.fill_(True)
    return False


def _refuse_without_gradients(modules: Sequence[AdaLoRADelta]) -> None:
    if all(parameter.grad is None for module in modules for parameter in module.parameters()):
        raise StateError(
            "delta.step(): AdaLoRA needs the gradients of its parameters, and there are none; call it after backward() and "
            "before optimizer.zero_grad(), and leave it out in a step without backward()"
        )
