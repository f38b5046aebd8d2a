"""The rows of PEFT's methods that change weights by other products than LoRA's."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from deltakit.core import Site
from deltakit.errors import CheckpointError
from deltakit.files.formats.layers import Layers, differs_with_new_weight, in_kernel, pointwise
from deltakit.files.formats.peft.row import Field, Options, OptionsAt, Row, Stored
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

_LINEAR = Layers(conv1d=False)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


def turned(tensor: Tensor, _: object = None) -> Tensor:
    """Returns the tensor with its last two dimensions in the other order; a vector, which a load refuses, as it is."""
    return tensor.mT.contiguous() if tensor.ndim > 1 else tensor


def untied(source: Source) -> OptionsAt:
    """PEFT adapts a module alone, also if its weight is tied."""

    def at(path: str, _: Mapping[str, Tensor]) -> Options:
        module = source.module(path)
        return {"untie": module is not None and source.is_tied(module._parameters.get("weight"))}

    return at


def with_own(own: Callable[[Source], OptionsAt]) -> Callable[[Source], OptionsAt]:
    """Returns what gives these options and that of `untied`."""

    def computed(source: Source) -> OptionsAt:
        first, second = untied(source), own(source)
        return lambda path, tensors: {**first(path, tensors), **second(path, tensors)}

    return computed


def _differs_in_groups(module: nn.Module | None) -> str:
    return "is a grouped convolution" if getattr(module, "groups", 1) != 1 else differs_with_new_weight(module)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


def _in_kernel(tensor: Tensor, site: Site) -> Tensor:
    return in_kernel(tensor, site.target)


def _pointwise(tensor: Tensor, site: Site) -> Tensor:
    return pointwise(tensor, site.target)


def _flat_core(core: Tensor) -> Tensor:
    return core.flatten(2) if core.ndim > 2 else core


def _core_in_kernel(core: Tensor, site: Site) -> Tensor:
    kernel: Any = site.target.kernel_size
    # PEFT's core of a 1d convolution has a second dimension.
    return core.unflatten(2, kernel if len(kernel) > 1 else (*kernel, 1))


def _core(ours: str) -> Stored:
    return Stored(ours, _flat_core, _core_in_kernel, optional=True)


LOHA = Row(
    peft_type="LOHA",
    method="loha",
    tensors={
        ".hada_w1_a": Stored("B1"),
        ".hada_w1_b": Stored("A1"),
        ".hada_w2_a": Stored("B2"),
        ".hada_w2_b": Stored("A2"),
        ".hada_t1": _core("core1"),
        ".hada_t2": _core("core2"),
    },
    fields={
        "r": Field("r", int, 8, "rank_pattern"),
        "alpha": Field("alpha", float, 8, "alpha_pattern"),
        "use_effective_conv2d": Field("tucker", bool, False),
    },
    layers=Layers(_CONVOLUTIONS, conv1d=False),
    computed=untied,
    differs=differs_with_new_weight,
    training_only=("rank_dropout", "module_dropout"),
)


def _of_lokr(source: Source) -> OptionsAt:
    def at(path: str, tensors: Mapping[str, Tensor]) -> Options:
        if "right" in tensors and tensors["right"].ndim == 3:
            raise CheckpointError(
                f"{source.folder}: {path} is a 1d convolution whose right matrix has its full rank, where LOKR of PEFT 0.21 "
                "computes no Kronecker product; train it with a lower rank"
            )
        return {}

    return at


def _split(writing: Writing, sites: Sequence[Site]) -> Options:
    methods: Sequence[Any] = writing.attachment.record.methods
    own = [methods[site.method] for site in sites]
    wide = next(
        (site for site in sites if "right" in site.module._parameters and isinstance(site.target, nn.Conv1d)), None
    )
    if any(method.left is not None or method.full for method in own):
        raise writing.impossible("PEFT has neither left= nor full= of LoKr")
    if wide is not None:
        raise writing.impossible(
            f"{wide.path} has a right matrix of full rank, which PEFT computes wrongly on a Conv1d"
        )
    return {}


LOKR = Row(
    peft_type="LOKR",
    method="lokr",
    tensors={
        ".lokr_w1": Stored("left", optional=True),
        ".lokr_w1_a": Stored("left_B", optional=True),
        ".lokr_w1_b": Stored("left_A", optional=True),
        ".lokr_w2": Stored("right", _flat, _in_kernel, optional=True),
        ".lokr_w2_a": Stored("right_B", optional=True),
        ".lokr_w2_b": Stored("right_A", optional=True),
        ".lokr_t2": _core("core"),
    },
    fields={
        "r": Field("r", int, 8, "rank_pattern"),
        "alpha": Field("alpha", float, 8, "alpha_pattern"),
        "decompose_factor": Field("factor", int, -1),
        "decompose_both": Field("both", bool, False),
        "use_effective_conv2d": Field("tucker", bool, False),
    },
    layers=Layers(_CONVOLUTIONS, conv1d=False),
    computed=with_own(_of_lokr),
    written=_split,
    differs=differs_with_new_weight,
    training_only=("rank_dropout", "module_dropout"),
    known=("rank_dropout_scale",),
)


def _no_embedding(writing: Writing, sites: Sequence[Site]) -> Options:
    embedding = next((site for site in sites if isinstance(site.target, nn.Embedding)), None)
    if embedding is not None:
        raise writing.impossible(f"{embedding.path} is an Embedding, for which deltakit writes no HiRA")
    return {}


def _of_embeddings(source: Source) -> Source:
    renamed = {name.replace(".hira_embedding_", ".hira_"): tensor for name, tensor in source.tensors.items()}
    return replace(source, tensors=renamed)


HIRA = Row(
    peft_type="HIRA",
    method="hira",
    tensors={".hira_A": Stored("A", _flat, _in_kernel), ".hira_B": Stored("B", _flat, _pointwise)},
    fields={"r": Field("r", int, 32, "rank_pattern")},
    layers=Layers((*_CONVOLUTIONS, nn.Conv3d, nn.Embedding)),
    computed=untied,
    prepared=_of_embeddings,
    consumed=(".hira_embedding_A", ".hira_embedding_B"),
    written=_no_embedding,
    differs=_differs_in_groups,
    training_only=("hira_dropout",),
)


def _of_miss(source: Source) -> OptionsAt:
    start, mini = source.config.get("init_weights"), source.config.get("mini_r")

    def at(_: str, tensors: Mapping[str, Tensor]) -> Options:
        if tensors["B"].ndim == 3:
            return {"bat": True, "dropout": 0.0}
        return {"mini": mini if start == "mini" else None}

    return at


def _turned_matrix(block: Tensor, _: object = None) -> Tensor:
    return turned(block) if block.ndim == 2 else block


def _form(writing: Writing, sites: Sequence[Site]) -> Options:
    methods: Sequence[Any] = writing.attachment.record.methods
    forms = {(methods[site.method].bat, methods[site.method].mini) for site in sites}
    if len(forms) > 1:
        raise writing.impossible("its targets differ in bat or mini, and MISS of PEFT has one form for all")
    ((bat, mini),) = forms
    return {"init_weights": "bat" if bat else "mini" if mini else True, "mini_r": mini or 1}


MISS = Row(
    peft_type="MISS",
    method="miss",
    tensors={".miss_block": Stored("B", _turned_matrix, _turned_matrix)},
    fields={"r": Field("r", int, 64), "miss_dropout": Field("dropout", float, 0.0)},
    layers=_LINEAR,
    computed=with_own(_of_miss),
    written=_form,
    known=("mini_r",),
)


def _zero_start(writing: Writing, sites: Sequence[Site]) -> Options:
    if any("A0" in site.module._parameters for site in sites):
        raise writing.impossible(
            "DELORA of PEFT has no start of random factors; use DeLoRA(start='zero'), or write the LoRA that "
            "combine(model, {name: 1.0}) gives"
        )
    return {}


DELORA = Row(
    peft_type="DELORA",
    method="delora",
    tensors={
        ".delora_A": Stored("A"),
        ".delora_B": Stored("B"),
        ".delora_lambda": Stored("lam"),
        ".delora_w_norm": Stored("norms"),
    },
    fields={
        "r": Field("r", int, 8, "rank_pattern"),
        "delora_lambda": Field("strength", float, 15.0, "lambda_pattern"),
        "module_dropout": Field("dropout", float, 0.0),
    },
    layers=_LINEAR,
    computed=with_own(lambda _: lambda _path, _tensors: {"start": "zero"}),
    written=_zero_start,
)

GRALORA = Row(
    peft_type="GRALORA",
    method="gralora",
    tensors={
        ".gralora_A": Stored("A", turned, turned),
        ".gralora_B": Stored("B", turned, turned),
        ".gralora_A_general.weight": Stored("A_whole", optional=True),
        ".gralora_B_general.weight": Stored("B_whole", optional=True),
    },
    fields={
        "r": Field("r", int, 32),
        "alpha": Field("alpha", float, 64.0),
        "gralora_k": Field("k", int, 2),
        "hybrid_r": Field("hybrid", int, 0),
        "gralora_dropout": Field("dropout", float, 0.0),
    },
    layers=Layers(),
    computed=untied,
)

ROWS = (LOHA, LOKR, HIRA, MISS, DELORA, GRALORA)
