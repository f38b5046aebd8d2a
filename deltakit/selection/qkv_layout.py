"""Measures which output features of a fused projection are queries, keys and values.

Only the code of the forward knows the layout: GPT-2 splits its output in three, GPT-NeoX, BLOOM and Falcon interleave by
head or by group of heads, CodeGen orders q, v, k. A table by model class would miss the next model. So a dry-run copy of
the attention module is called on two tokens and on one, in float64 on the CPU and without its large weights, and
gradients show which features each output depends on:

- The last token's output depends on another token's features only through keys and values.
- With a single token, softmax over one key is 1 whatever the query and the key are. So its output depends on values only.
- All other features are queries.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from deltakit.core import FeatureSlice, hidden_output, projection_sizes, same_random_numbers, slice_where
from deltakit.selection.dry_run import Ones, dry_run


def measure(attention: nn.Module, fused: str, output: str | None) -> dict[str, FeatureSlice] | None:
    """Returns the feature slices of a fused projection by letter (`q`, `k`, `v`); None if they cannot be determined.

    Args:
        fused: the path of the fused projection below the attention module, without PEFT's wrappers.
        output: the path of the output projection below the attention module, or None if it is not inside.
    """
    # Selecting targets must not change the random numbers of the user's training run.
    with same_random_numbers(), torch.inference_mode(False), torch.device("cpu"), torch.enable_grad():
        # Inference mode has no gradients, even with gradients enabled.
        return _measure(attention, fused, output)


def _measure(attention: nn.Module, fused: str, output: str | None) -> dict[str, FeatureSlice] | None:
    together = _features_used(attention, fused, output, tokens=2)
    alone = _features_used(attention, fused, output, tokens=1)
    if together is None or alone is None:
        return None
    other, own = together
    values = alone[1]
    # Queries are what the last token uses of its own features and another token cannot offer.
    masks = {"v": values, "k": other & ~values, "q": own & ~other}
    # Features without any effect, or values that no other token uses, mean that this is not plain softmax attention.
    if not bool((values | other | own).all()) or bool((values & ~other).any()):
        return None
    found = {letter: slice_where(letter, mask) for letter, mask in masks.items() if bool(mask.any())}
    return None if not found or None in found.values() else found  # type: ignore[return-value]


def _features_used(
    attention: nn.Module, fused: str, output: str | None, *, tokens: int
) -> tuple[Bool[Tensor, " d_out"], Bool[Tensor, " d_out"]] | None:
    """Two masks: the features of the first and of the last token that the last token's output depends on.

    None if the attention module cannot be called in any of the known ways.
    """
    sizes = projection_sizes(attention.get_submodule(fused))
    if sizes is None:
        return None
    for x, keywords in _calls(attention, sizes[0], tokens):
        # `torch.manual_seed` would set the generators of all devices, even of those that were not used so far.
        torch.default_generator.manual_seed(0)
        copy = dry_run(attention)
        # The fused projection is replaced by the features themselves, so that gradients refer to its output.
        features = torch.randn(*x.shape[:-1], sizes[1], dtype=torch.float64, requires_grad=True)
        _replace(copy, fused, _Features(features))
        # The output projection mixes all heads, so the measurement looks at what goes into it.
        catch = _InputRecorder(_size(attention, output)) if output is not None else None
        if catch is not None:
            _replace(copy, str(output), catch)
        try:
            result = copy(x, **keywords)
            seen = catch.seen if catch is not None else hidden_output(result)
            last = seen.reshape(tokens, -1)[-1]  # type: ignore[union-attr]
            # A random weighting, so that gradients of opposite sign do not cancel.
            (slope,) = torch.autograd.grad((last * torch.randn_like(last)).sum(), features)
        except Exception:
            # An unknown forward may raise anything. Any error means that it cannot be called this way.
            continue
        slope = slope.reshape(tokens, -1).abs()
        # Relative to the largest slope: float64 leaves about 1e-16 of rounding where the true slope is zero.
        hits = slope > 1e-9 * slope.max()
        return hits[0], hits[-1]
    return None


def _calls(attention: nn.Module, width: int, tokens: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Ways to call an attention module: an input, and the keyword arguments that its signature names.

    Inputs are batched, packed without a batch (vision towers of Qwen2-VL) or have an extra dimension. Rotary tables come
    in four shapes, because models rotate all features of a head, half of them, or expand the tables themselves.
    """
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
                # Adding the same number to all scores changes nothing, and a boolean mask of ones hides nothing.
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


def _replace(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    root.get_submodule(parent)._modules[name] = module


def _size(attention: nn.Module, path: str | None) -> int:
    sizes = projection_sizes(attention.get_submodule(str(path)))
    return sizes[1] if sizes is not None else 1


class _Features(Ones):
    """Replaces the fused projection: it returns the features whose use is measured."""

    def __init__(self, features: Float[Tensor, "*batch d_out"]) -> None:
        super().__init__(features.shape[-1])
        self.features = features

    def forward(self, x: Float[Tensor, "*tokens d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.features


class _InputRecorder(Ones):
    """Replaces the output projection: it keeps its input, which is the result of attention."""

    seen: Tensor | None = None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        self.seen = x
        return super().forward(x)
