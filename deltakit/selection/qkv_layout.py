"""Where queries, keys and values stand in the output of a fused projection, measured on the module's own forward.

The order and the grouping are written nowhere but in the code of the forward: GPT-2 splits in three, GPT-NeoX, BLOOM and
Falcon interleave by head or by group of heads, CodeGen orders q, v, k. So a stand-in of the attention module is run on two
tokens, in float64 on the CPU and without its large weights, and gradients say what depends on what. What one token's
output takes from another token's features are keys and values; what a token's output takes from its own features when it
is alone are values, for a softmax over one key is 1 whatever the query and the key are; the rest are queries.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import FeatureSlice, hidden_output, projection_sizes, slice_where
from deltakit.selection.dry_run import Ones, dry_run


def measure(attention: nn.Module, fused: str, output: str | None) -> dict[str, FeatureSlice] | None:
    """The rows of the projection at `fused` by letter (`q`, `k`, `v`), or None where they cannot be told.

    Args:
        fused: the path of the fused projection below the attention module.
        output: the path of the output projection below it, if it is there.
    """
    state = torch.random.get_rng_state()
    try:
        with torch.device("cpu"), torch.enable_grad():
            return _measure(attention, fused, output)
    finally:
        torch.random.set_rng_state(state)


def _measure(attention: nn.Module, fused: str, output: str | None) -> dict[str, FeatureSlice] | None:
    together = _gradients(attention, fused, output, tokens=2)
    alone = _gradients(attention, fused, output, tokens=1)
    if together is None or alone is None:
        return None
    other, own = together
    values = alone[1]
    masks = {"v": values, "k": other & ~values, "q": own & ~other}
    if not bool((values | other | own).all()) or bool((values & ~other).any()):
        return None
    found = {letter: slice_where(letter, mask) for letter, mask in masks.items() if bool(mask.any())}
    return None if not found or None in found.values() else found  # type: ignore[return-value]


def _gradients(attention: nn.Module, fused: str, output: str | None, *, tokens: int) -> tuple[Tensor, Tensor] | None:
    """Which features of the first and of the last token the last token's result depends on."""
    sizes = projection_sizes(attention.get_submodule(fused))
    if sizes is None:
        return None
    for x, keywords in _calls(attention, sizes[0], tokens):
        torch.manual_seed(0)
        copy = dry_run(attention)
        features = torch.randn(*x.shape[:-1], sizes[1], dtype=torch.float64, requires_grad=True)
        _set(copy, fused, _Feed(features))
        catch = _Catch(_size(attention, output)) if output is not None else None
        if catch is not None:
            _set(copy, str(output), catch)
        try:
            result = copy(x, **keywords)
            seen = catch.seen if catch is not None else hidden_output(result)
            last = seen.reshape(tokens, -1)[-1]  # type: ignore[union-attr]
            (slope,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), features)
        except Exception:
            # Whatever a forward that we know nothing of raises: it cannot be called this way.
            continue
        slope = slope.reshape(tokens, -1).abs()
        hits = slope > 1e-9 * slope.max()
        return hits[0], hits[-1]
    return None


def _calls(attention: nn.Module, width: int, tokens: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Ways to call an attention module: shapes of its input, with what else it may ask for by name."""
    named = list(inspect.signature(type(attention).forward).parameters)[2:]
    size = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None) or 2
    for shape in ((1, tokens, width), (tokens, width), (1, tokens, 1, width)):
        x = torch.randn(*shape, dtype=torch.float64)
        for angles in ((1, tokens, size), (tokens, size), (1, 1, 1), (1, tokens, size // 2)):
            cos = torch.ones(angles, dtype=torch.float64)
            known: dict[str, Callable[[], Any]] = {
                "position_embeddings": lambda cos=cos: (cos, torch.zeros_like(cos)),
                "position_ids": lambda: torch.arange(tokens)[None],
                "cache_position": lambda: torch.arange(tokens),
                "cu_seqlens": lambda: torch.tensor([0, tokens], dtype=torch.int32),
                # Added to scores it changes nothing, for it is the same everywhere; as a mask of booleans it hides nothing.
                "attention_mask": lambda: torch.ones(1, 1, tokens, tokens, dtype=torch.float64),
                "alibi": lambda: torch.zeros(_heads(attention), 1, tokens, dtype=torch.float64),
                "position_bias": lambda: torch.zeros(_heads(attention), tokens, tokens, dtype=torch.float64),
                "residual": lambda x=x: torch.zeros_like(x),
                "encoder_hidden_states": lambda x=x: x,
            }
            parameters = inspect.signature(type(attention).forward).parameters
            required = {n for n in named if parameters[n].default is inspect.Parameter.empty}
            variadic = {
                n for n in named if parameters[n].kind in (parameters[n].VAR_KEYWORD, parameters[n].VAR_POSITIONAL)
            }
            wanted = (required | {"position_embeddings", "position_ids", "cache_position"} & set(named)) - variadic
            yield x, {name: known[name]() if name in known else None for name in wanted}


def _heads(attention: nn.Module) -> int:
    for name in ("num_heads", "n_heads", "num_attention_heads"):
        if isinstance(getattr(attention, name, None), int):
            return int(getattr(attention, name))
    return 1


def _set(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def _size(attention: nn.Module, path: str | None) -> int:
    sizes = projection_sizes(attention.get_submodule(str(path)))
    return sizes[1] if sizes is not None else 1


class _Feed(Ones):
    """Stands for the fused projection, and gives the features whose use is measured."""

    def __init__(self, features: Tensor) -> None:
        super().__init__(features.shape[-1])
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return self.features


class _Catch(Ones):
    """Stands for the output projection, and keeps what attention gave it."""

    seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)
