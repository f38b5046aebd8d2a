"""Prefix tuning: softmax(q [P_k; K]^T) [P_v; V] in every attention.  Li and Liang 2021, https://arxiv.org/abs/2101.00190.

P-tuning v2 (Liu et al. 2022, https://arxiv.org/abs/2110.07602) is the same with the values trained directly, which is
the default here; with `reparam` they come out of an MLP over one embedding (section 4.3), dropped when saved. A prefix has
no position, and every query sees it. It enters inside the attention and not by `past_key_values`, which would shift
positions and serve no encoder. Untrained it is not the identity: even a zero key takes its share of the softmax.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode

from deltakit.core import DeltaModule, Method, Target, hidden_input, join
from deltakit.errors import OptionError, TargetError
from deltakit.ops import (
    AttentionPrefix,
    Heads,
    PrefixMode,
    attends,
    close,
    enters_by_interface,
    heads_of,
    install_prefixes,
    joined,
    joined_by_rows,
    like,
    live_prefixes,
)
from deltakit.selection import BackboneIndex


class PrefixDelta(AttentionPrefix):
    """`key` [heads, tokens, d_k] and `value` [heads, tokens, d_v], trained as they are or given by a `Reparam`."""

    def __init__(self, heads: Heads, tokens: int, up: "Reparam | None", **like: Any) -> None:
        super().__init__()
        self.heads, self.tokens = heads, tokens
        self.up = up
        if up is None:
            self.key = nn.Parameter(torch.empty(heads.count, tokens, heads.d_key, **like))
            self.value = nn.Parameter(torch.empty(heads.count, tokens, heads.d_value, **like))
            self.reset_parameters()
        install_prefixes()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        install_prefixes()

    def reset_parameters(self) -> None:
        if self.up is None:
            # transformers' usual scale for embeddings: small against keys, so that no head is taken over at the start.
            nn.init.normal_(self.key, std=0.02)
            nn.init.normal_(self.value, std=0.02)

    def key_value(self) -> tuple[Float[Tensor, "heads prefix d_k"], Float[Tensor, "heads prefix d_v"]]:
        if self.up is None:
            return self.key, self.value
        rows = self.up().view(self.tokens, self.heads.count, -1).transpose(0, 1)
        key, value = rows.split([self.heads.d_key, self.heads.d_value], dim=-1)
        return key, value

    def saved_state(self) -> dict[str, Tensor]:
        key, value = self.key_value()
        return {"key": key.detach(), "value": value.detach()}

    def load_saved(self, state: Mapping[str, Tensor]) -> None:
        if self.up is not None:
            weight, self.up = self.up.out.weight, None
            self.key, self.value = (nn.Parameter(state[name].to(weight, copy=True)) for name in ("key", "value"))
        super().load_saved(state)

    def summary(self) -> str:
        return f"tokens={self.tokens}" + (" reparam" if self.up is not None else "")


class PrefixModeDelta(PrefixDelta):
    """A prefix for attention outside transformers' interface: it watches torch's functions during the forward."""

    always_after: ClassVar[bool] = True
    by_rows: ClassVar[bool | None] = True

    def before(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prefixes = live_prefixes(target)
        if prefixes[0] is not self:
            return
        batch = self.record.batch if self.record is not None else None
        if batch is None:
            PrefixMode(target, *joined(prefixes)).__enter__()
        else:
            times = batch.times(hidden_input(args, kwargs), target)
            PrefixMode(target, *joined_by_rows(prefixes, batch, times)).__enter__()

    def after_rows(
        self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, batch: Any
    ) -> Any:
        return self.after(target, args, kwargs, output)

    def after(self, target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # torch's own stack of modes holds it: of this thread, and of this call.
        mode = _get_current_function_mode()
        if isinstance(mode, PrefixMode) and mode.module is target:
            mode.__exit__(None, None, None)
            if output is not None:
                close(mode)
        return output


class Reparam(nn.Module):
    """The MLP of the paper: one embedding [tokens, width] and one layer for all targets, one layer out for each.

    The first target holds the shared part; the others refer to it, so that it is counted, moved and saved once.
    """

    _shared: tuple["SharedRows"]

    def __init__(self, shared: "SharedRows", first: bool, hidden: int, out: int, **like: Any) -> None:
        super().__init__()
        if first:
            self.shared = shared
        self.__dict__["_shared"] = (shared,)
        self.out = nn.Linear(hidden, out, **like)

    def forward(self) -> Float[Tensor, "prefix d_out"]:
        return self.out(self._shared[0]())


class SharedRows(nn.Module):
    """tanh(W e + b) over the embedding of the prefix, shared by all targets."""

    def __init__(self, tokens: int, width: int, hidden: int, **like: Any) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(tokens, width, **like))
        self.inner = nn.Linear(width, hidden, **like)
        nn.init.normal_(self.embedding)

    def forward(self) -> Float[Tensor, "prefix hidden"]:
        return torch.tanh(self.inner(self.embedding))


@dataclass(frozen=True, kw_only=True)
class Prefix(Method, name="prefix"):
    """Trained keys and values in front of every attention's own. A target is any module with attention at or below it.

    `tokens`: the length of the prefix, at least 1; 10 is the authors' default. `reparam`: train through an MLP of
    `hidden` units (512 in the paper's table-to-text runs), which is dropped when the delta is saved.
    """

    tokens: int = 10
    reparam: bool = False
    hidden: int = 512

    default_words: ClassVar[str] = "attention whose keys and values can be reached"
    identity: ClassVar[bool] = False

    def validate(self) -> None:
        for option in ("tokens", "hidden"):
            value = getattr(self, option)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise OptionError(f"Prefix({option}={value!r}): an integer of at least 1")

    def default_targets(self, backbone: nn.Module) -> Sequence[str]:
        return [path for path, module in BackboneIndex(backbone).by_path.items() if attends(module)]

    def place(self, backbone: nn.Module, selected: Sequence[Target]) -> Sequence[Target]:
        modules = BackboneIndex(backbone)
        sites = self.default_targets(backbone)
        placed = []
        for target in selected:
            below = [site for site in sites if site == target.path or site.startswith(join(target.path, "") or "")]
            if not below:
                raise TargetError(
                    f"{target.path}: no attention at or below this {type(target.module).__name__}: prefix expects one; "
                    f"attention is at {', '.join(sites[:3]) or 'no place of this backbone'}"
                )
            placed += [modules.target(site) for site in below]
        return placed

    def build(self, backbone: nn.Module, targets: Sequence[Target]) -> dict[str, DeltaModule]:
        sizes = {target.path: heads_of(target) for target in targets}
        shared = self._shared(targets[0], sizes[targets[0].path]) if self.reparam else None
        built: dict[str, DeltaModule] = {}
        for target in targets:
            heads, new = sizes[target.path], like(target)
            out = heads.count * (heads.d_key + heads.d_value)
            up = None if shared is None else Reparam(shared, target is targets[0], self.hidden, out, **new)
            kind = PrefixDelta if enters_by_interface(target.module) else PrefixModeDelta
            built[target.path] = kind(heads, self.tokens, up, **new)
        return built

    def _shared(self, first: Target, heads: Heads) -> SharedRows:
        return SharedRows(self.tokens, first.width or heads.count * heads.d_key, self.hidden, **like(first))

    def to_dict(self) -> dict[str, Any]:
        # The MLP is dropped at save: what is saved is flat.
        return super(Prefix, replace(self, reparam=False)).to_dict()
