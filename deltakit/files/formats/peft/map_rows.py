"""The rows of PEFT's methods that turn inputs or outputs of layers, or add sparse updates."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from deltakit.core import Site
from deltakit.files.formats.layers import Layers
from deltakit.files.formats.peft.row import Field, Options, OptionsAt, Row, Stored
from deltakit.files.formats.peft.weight_rows import turned, with_own
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

_LINEAR = Layers(conv1d=False)
_IMAGES = Layers((nn.Conv2d,), conv1d=False)


def _of_tensors(read: Callable[[Mapping[str, Tensor]], Options]) -> Callable[[Source], OptionsAt]:
    """Returns what gives the options that the tensors of a target show."""
    return lambda _source: lambda _path, tensors: read(tensors)


def _one(field: str, value: Callable[[Any], Any]) -> Callable[[Writing, Sequence[Site]], Options]:
    """Returns what writes a field of the config that all delta modules agree in."""

    def written(writing: Writing, sites: Sequence[Site]) -> Options:
        values = sorted({value(site.module) for site in sites})
        if len(values) > 1:
            raise writing.impossible(
                f"its targets have {values[0]} and {values[1]} as {field}, and PEFT has one for all"
            )
        return {field: values[0]}

    return written


def _over_pixels(module: nn.Module | None) -> str:
    several = isinstance(module, nn.Conv2d) and any(size != 1 for size in module.kernel_size)
    return "is a convolution over several pixels" if several else ""


def _uneven(module: nn.Module | None) -> str:
    """PEFT passes one padding and one stride to torch's function, and nothing else."""
    if not isinstance(module, nn.Conv2d):
        return ""
    pairs = (module.kernel_size, module.stride, module.padding)
    plain = module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    even = all(not isinstance(pair, str) and len(set(pair)) == 1 for pair in pairs)
    return "" if plain and even else "is a convolution with groups, dilation, or other sizes across than along"


class _Cayley(TypedDict):
    use_cayley_neumann: bool
    num_cayley_neumann_terms: int


_CAYLEY = {"use_cayley_neumann": True, "num_cayley_neumann_terms": 5}
_OFT_KEY = ".oft_R.weight"


def _other_direction(source: Source) -> Source:
    """PEFT's series is that of the transposed rotation, which is the rotation of -Q."""
    if not source.options(_Cayley, _CAYLEY)["use_cayley_neumann"]:
        return source
    return replace(
        source, tensors={name: -value if name.endswith(_OFT_KEY) else value for name, value in source.tensors.items()}
    )


def _of_oft(source: Source) -> OptionsAt:
    given = source.options(_Cayley, _CAYLEY)
    # Three terms are four in PEFT.
    terms = max(4, given["num_cayley_neumann_terms"]) if given["use_cayley_neumann"] else 5

    def at(_path: str, tensors: Mapping[str, Tensor]) -> Options:
        # A skew-symmetric matrix of size b has b (b - 1) / 2 numbers.
        return {"block_size": round((1 + (1 + 8 * tensors["skew"].shape[-1]) ** 0.5) / 2), "terms": terms}

    return at


def _refused_oft(config: Mapping[str, Any]) -> str:
    if config.get("coft"):
        return "has constrained rotations (coft)"
    terms = config.get("num_cayley_neumann_terms", 5)
    series = config.get("use_cayley_neumann", True)
    return f"has a series of {terms} terms" if series and isinstance(terms, int) and terms < 3 else ""


OFT = Row(
    peft_type="OFT",
    method="oft",
    tensors={_OFT_KEY: Stored("skew", write=lambda skew, site: -skew if vars(site.module)["terms"] else skew)},
    fields={
        "block_share": Field("block_share", bool, False),
        "use_cayley_neumann": Field(
            "cayley", bool, True, read=("exact", "neumann").__getitem__, write=lambda cayley: cayley == "neumann"
        ),
    },
    layers=_IMAGES,
    prepared=_other_direction,
    computed=_of_oft,
    written=lambda writing, sites: {
        **_one("oft_block_size", lambda module: module.block_size)(writing, sites),
        **_one("num_cayley_neumann_terms", lambda module: module.terms or 5)(writing, sites),
        "r": 0,
    },
    refuses=_refused_oft,
    differs=_over_pixels,
    training_only=("module_dropout",),
    known=("r", "oft_block_size", "num_cayley_neumann_terms", "coft", "eps"),
)


def _one_scale(scale: Tensor, site: Site) -> Tensor:
    return scale.reshape((1, -1) if isinstance(site.target, nn.Conv2d) else (-1, 1))


BOFT = Row(
    peft_type="BOFT",
    method="boft",
    tensors={".boft_R": Stored("R"), ".boft_s": Stored("scale", Tensor.flatten, _one_scale)},
    fields={},
    layers=_IMAGES,
    computed=with_own(
        _of_tensors(lambda tensors: {"block_size": tensors["R"].shape[-1], "factors": tensors["R"].shape[0]})
    ),
    written=lambda writing, sites: {
        **_one("boft_block_size", lambda module: module.block_size)(writing, sites),
        **_one("boft_n_butterfly_factor", lambda module: len(module.R))(writing, sites),
        "boft_block_num": 0,
    },
    differs=_uneven,
    training_only=("boft_dropout",),
    known=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor"),
)


def _orthogonal(source: Source) -> Source:
    """Reflections by orthogonal vectors can be in any order, so vectors that PEFT makes orthogonal are read as such."""
    if not source.config.get("apply_GS"):
        return source
    tensors = {
        name: torch.linalg.qr(value)[0] if name.endswith(".hra_u") and not value.is_meta else value
        for name, value in source.tensors.items()
    }
    return replace(source, tensors=tensors)


def _refused_hra(config: Mapping[str, Any]) -> str:
    r = config.get("r", 8)
    return f"has an odd number of reflections (r={r})" if isinstance(r, int) and r % 2 else ""


HRA = Row(
    peft_type="HRA",
    method="hra",
    tensors={".hra_u": Stored("u", turned, turned)},
    fields={"r": Field("r", int, 8)},
    layers=_IMAGES,
    prepared=_orthogonal,
    written=lambda _writing, _sites: {"apply_GS": False},
    refuses=_refused_hra,
    differs=_over_pixels,
    known=("apply_GS",),
)


class _Groups(TypedDict):
    group_size: int


def _of_road(source: Source) -> OptionsAt:
    size = source.options(_Groups, {"group_size": 64})["group_size"]
    return lambda _path, _tensors: {"group_size": size}


ROAD = Row(
    peft_type="ROAD",
    method="road",
    tensors={".road_theta": Stored("angle"), ".road_alpha": Stored("scale")},
    fields={"variant": Field("variant", str, "road_1")},
    layers=_LINEAR,
    computed=_of_road,
    written=_one("group_size", lambda module: module.group_size),
    known=("group_size",),
)
FOURIERFT = Row(
    peft_type="FOURIERFT",
    method="fourierft",
    tensors={".fourierft_spectrum": Stored("spectrum")},
    fields={"scaling": Field("scaling", float, 150.0), "random_loc_seed": Field("seed", int, 777)},
    layers=Layers(),
    computed=with_own(_of_tensors(lambda tensors: {"n": tensors["spectrum"].shape[-1]})),
    written=_one("n_frequency", lambda module: module.spectrum.shape[-1]),
    known=("n_frequency", "n_frequency_pattern"),
)
C3A = Row(
    peft_type="C3A",
    method="c3a",
    tensors={".c3a_kernel": Stored("kernel")},
    fields={},
    layers=_LINEAR,
    computed=_of_tensors(lambda tensors: {"block_size": tensors["kernel"].shape[-1]}),
    written=_one("block_size", lambda module: module.block_size),
    known=("block_size", "block_size_pattern"),
)


def _rank(writing: Writing, sites: Sequence[Site]) -> Options:
    """As PEFT counts it: the number of entries by the number of inputs and outputs."""
    for site in sites:
        module: Any = site.module
        if module.values.numel() % sum(module.shape):
            raise writing.impossible(
                f"{site.path} has {module.values.numel()} trained entries, and PEFT has a multiple of its {sum(module.shape)} "
                "inputs and outputs"
            )
    return _one("r", lambda module: module.values.numel() // sum(module.shape))(writing, sites)


class _Rank(TypedDict):
    r: int


def _of_shira(source: Source) -> OptionsAt:
    r = source.options(_Rank, {"r": 32})["r"]
    return lambda _path, _tensors: {"r": r}


SHIRA = Row(
    peft_type="SHIRA",
    method="shira",
    tensors={".shira_weight": Stored("values"), ".shira_indices": Stored("places", integer=True)},
    fields={},
    layers=_LINEAR,
    computed=with_own(_of_shira),
    written=_rank,
    known=("mask_type", "random_seed"),
)

ROWS = (OFT, BOFT, HRA, ROAD, FOURIERFT, C3A, SHIRA)
