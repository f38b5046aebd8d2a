"""What every method must do on every backbone of the zoo; printed as a table by `benchmarks/matrix.py`."""

import copy
import time
import warnings
from dataclasses import fields
from typing import Any, NamedTuple

import torch
import transformers as tf
from torch import nn

import deltakit as dk
from support import backbone_zoo
from support.models import beside, randomize, same, snapshot

SMALL = {"r": 2, "size": 3, "tokens": 3}
# What does not fit the zoo's layers, whose sizes are from 8 to 32.
OTHER = {
    "compacter": {"size": 4},
    "vblora": {"length": 4, "vectors": 7},
    "trainable_tokens": {"ids": tuple(range(30))},
    # Each target has one of these numbers for itself.
    "said": {"size": 300},
}
KINDS = ("lora", "adapter", "bitfit", "ia3", "prefix", "soft_prompt", "parallel_adapter")
"""One method of each way to hook a backbone. Of the adapters, also the one with other positions and pairs of layers."""


def small(name: str) -> dk.Method:
    """A method of a size that fits the zoo."""
    kind = dk.METHODS[name]
    return kind(
        **{**kind.example, **{f.name: SMALL[f.name] for f in fields(kind) if f.name in SMALL}, **OTHER.get(name, {})}
    )


METHODS = {
    dk.METHODS[name].__name__: small(name)
    for name in (*KINDS, *sorted(name for name in dk.METHODS if name not in KINDS))
}
USUAL = [dk.METHODS[name].__name__ for name in KINDS]
"""The methods that the usual test run tries. `pytest -m slow` tries all."""


class Result(NamedTuple):
    """One cell: `pass`, `does not apply` with the library's own reason, or `fail` with what went wrong."""

    backbone: str
    kind: str
    method: str
    status: str
    reason: str = ""
    seconds: float = 0.0


def cell(backbone: str, method: str) -> Result:
    """The result of one method on one backbone."""
    start = time.perf_counter()
    status, reason = "pass", ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tf.logging.set_verbosity_error()
        try:
            model, call = backbone_zoo.build(backbone)
            draw_biases(model)
            try:
                beside(model, METHODS[method], 0.05)
            except dk.DeltaError as error:
                return Result(
                    backbone,
                    backbone_zoo.ZOO[backbone].kind,
                    method,
                    "does not apply",
                    f"{type(error).__name__}: {error}",
                )
            bare, plain = call(model), frozen_output(model, call)
        except Exception as error:
            return Result(
                backbone, backbone_zoo.ZOO[backbone].kind, method, "fail", f"the backbone itself: {error!r}"[:300]
            )
        before = snapshot(model)
        try:
            delta = dk.attach(model, METHODS[method])
        except dk.DeltaError as error:
            status, reason = "does not apply", f"{type(error).__name__}: {error}"
            same(before, snapshot(model))
        else:
            try:
                try:
                    works(model, call, delta, METHODS[method], plain, backbone_zoo.ZOO[backbone].cached)
                except dk.StateError as error:
                    # What a method cannot work with may show in the first forward only. A target that does not fit is a fault
                    # of the choice, and fails.
                    status, reason = "does not apply", f"{type(error).__name__}: {error}"
                detaches(model, call, delta, before, bare)
            except Exception as error:
                status, reason = "fail", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return Result(backbone, backbone_zoo.ZOO[backbone].kind, method, status, reason, time.perf_counter() - start)


def draw_biases(model: nn.Module) -> None:
    """Gives biases that start at zero other values, as in trained models: elsewhere a method that scales them has no effect."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias" and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)


def frozen_output(model: nn.Module, call: Any) -> torch.Tensor:
    """What identity is measured by: torch rounds otherwise where a weight asks for a gradient, and in its own fused
    attention, which it uses where nothing is hooked."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            return call(model.requires_grad_(False))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        for parameter in asked:
            parameter.requires_grad_(True)


def works(model: nn.Module, call: Any, delta: dk.Delta, method: dk.Method, plain: torch.Tensor, cached: bool) -> None:
    """Identity where it can be, gradients in every parameter, an effect after a step, generation as without a cache."""
    first = frozen_output(model, call)
    if method.identity:
        assert torch.equal(first, plain), f"no identity: {(first - plain).abs().max():.2g} apart"
    randomize(delta, 0.05)
    if next(delta.parameters(), None) is not None:
        learns(model, call, delta)
    if cached:
        generates_alike(model)


def learns(model: nn.Module, call: Any, delta: dk.Delta) -> None:
    """Gradients in every parameter, and an effect after a step."""
    ran = Ran(model)
    output = call(model)
    (output * torch.randn_like(output)).sum().backward()
    ran.remove()
    without = [name for name, parameter in delta.named_parameters() if parameter.grad is None and ran.around(name)]
    assert len(without) < len(list(delta.parameters())), "nothing that a delta is on ran"
    assert not without, f"no gradient in {without[:3]} ({len(without)})"
    silent = [n for n, parameter in delta.named_parameters() if parameter.grad is not None and not parameter.grad.any()]
    assert not all_of_a_target(delta, silent), f"gradients of zero throughout in {silent[:3]} ({len(silent)})"
    torch.optim.SGD(delta.parameters(), lr=1.0).step()
    stepped = call(model)
    assert not torch.equal(stepped, output), "a step changed nothing"
    model.zero_grad()


class Ran:
    """Which modules ran: BLIP's text tower holds attention to images that its base model never calls."""

    def __init__(self, model: nn.Module) -> None:
        self.paths: set[str] = set()
        self.modules = dict(model.named_modules())
        self.hooks = [
            module.register_forward_hook(lambda *_, path=path: self.paths.add(path))
            for path, module in model.named_modules()
        ]

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def around(self, name: str) -> bool:
        """Whether what holds a parameter's target ran, or the module around it."""
        path = name
        while path not in self.modules:
            path = path.rpartition(".")[0]
        return bool(self.paths & {path, path.rpartition(".")[0]})


def all_of_a_target(delta: dk.Delta, silent: list[str]) -> bool:
    """Whether there is a target in which every parameter got a gradient of zero: it has no effect.

    A bias on keys has none in exact arithmetic, for softmax takes no notice of what all keys have in common.
    """
    heads = {name.rpartition(".")[0] for name in silent}
    loud = {name.rpartition(".")[0] for name, _ in delta.named_parameters()} - heads
    return bool(heads) and not loud


def generates_alike(model: nn.Module) -> None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generate") or not backbone_zoo.generates(config):
        return
    given = {
        name: value for name, value in backbone_zoo.inputs(model, config).items() if not name.startswith("decoder")
    }
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    if config.is_encoder_decoder:
        options["decoder_start_token_id"] = 2
    with torch.no_grad():
        cached, plain = (model.generate(**given, use_cache=cache, **options) for cache in (True, False))
    assert torch.equal(cached, plain), "generation with a cache differs from generation without"


def detaches(model: nn.Module, call: Any, delta: dk.Delta, before: Any, bare: torch.Tensor) -> None:
    twin = copy.deepcopy(model)
    delta.detach()
    assert torch.equal(call(model), bare), "detaching is not exact"
    same(before, snapshot(model))
    dk.deltas(twin)[-1].detach()
    assert torch.equal(call(twin), bare), "detaching a copy is not exact"
