"""The rows of PEFT's methods whose updates are sparse, also after a transform, or circulant."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from deltakit.core import Site
from deltakit.files.formats.layers import Layers
from deltakit.files.formats.peft.row import Field, Options, OptionsAt, Row, Stored, one_for_all, unlike
from deltakit.files.formats.peft.weight_rows import with_own
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing

_LINEAR = Layers(conv1d=False)


class _Frequencies(TypedDict):
    n_frequency: int
    n_frequency_pattern: dict[str, int] | None
    proportional_parameters: bool


def _frequencies(usual: int) -> Callable[[Source], OptionsAt]:
    """Returns what gives the number of trained entries of a target."""

    def computed(source: Source) -> OptionsAt:
        others = {"n_frequency_pattern": None, "proportional_parameters": False}
        given = source.options(_Frequencies, {"n_frequency": usual, **others})
        numbers = {given["n_frequency"], *(given["n_frequency_pattern"] or {}).values()}

        def at(path: str, tensors: Mapping[str, Tensor]) -> Options:
            n = tensors["spectrum"].shape[-1]
            if n not in numbers and not given["proportional_parameters"]:
                raise unlike(source, path, f"{n} frequencies")
            return {"n": n}

        return at

    return computed


_N_FREQUENCY = one_for_all("n_frequency", lambda module: module.spectrum.shape[-1])

FOURIERFT = Row(
    peft_type="FOURIERFT",
    method="fourierft",
    tensors={".fourierft_spectrum": Stored("spectrum")},
    fields={"scaling": Field("scaling", float, 150.0), "random_loc_seed": Field("seed", int, 777)},
    layers=Layers(),
    computed=with_own(_frequencies(1000)),
    written=_N_FREQUENCY,
    known=("n_frequency", "n_frequency_pattern"),
)


def _other_wavelets(config: Mapping[str, Any]) -> str:
    family = config.get("wavelet_family", "db1")
    if family != "db1":
        return f"has the wavelet {family!r}"
    return "" if config.get("use_idwt", True) is True else "has no wavelet (use_idwt)"


WAVEFT = Row(
    peft_type="WAVEFT",
    method="waveft",
    tensors={".waveft_spectrum": Stored("spectrum")},
    fields={"scaling": Field("scaling", float, 25.0), "random_loc_seed": Field("seed", int, 777)},
    layers=Layers(),
    computed=with_own(_frequencies(2592)),
    refuses=_other_wavelets,
    written=_N_FREQUENCY,
    known=("n_frequency", "n_frequency_pattern", "proportional_parameters", "use_idwt", "wavelet_family"),
)


def _of_c3a(_source: Source) -> OptionsAt:
    return lambda _path, tensors: {"block_size": tensors["kernel"].shape[-1]}


C3A = Row(
    peft_type="C3A",
    method="c3a",
    tensors={".c3a_kernel": Stored("kernel")},
    fields={},
    layers=_LINEAR,
    computed=_of_c3a,
    written=one_for_all("block_size", lambda module: module.block_size),
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
    return one_for_all("r", lambda module: module.values.numel() // sum(module.shape))(writing, sites)


class _Rank(TypedDict):
    r: int


def _of_shira(source: Source) -> OptionsAt:
    r = source.options(_Rank, {"r": 32})["r"]

    def at(path: str, tensors: Mapping[str, Tensor]) -> Options:
        if "places" in tensors and tensors["places"].dtype not in (torch.int32, torch.int64):
            raise unlike(source, path, f"places of the dtype {tensors['places'].dtype}")
        return {"r": r}

    return at


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

ROWS = (FOURIERFT, WAVEFT, C3A, SHIRA)
