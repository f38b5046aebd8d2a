"""The rows of PEFT's methods whose targets share matrices: frozen ones from a seed, or one trained bank of vectors."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import torch
from torch import Tensor

from deltakit.core import METHODS, Site
from deltakit.errors import CheckpointError
from deltakit.files.formats.layers import Layers
from deltakit.files.formats.peft.row import Field, Options, OptionsAt, Row, Stored
from deltakit.files.formats.peft.weight_rows import untied, with_own
from deltakit.files.formats.source import Source
from deltakit.files.formats.writing import Writing


class _Seed(TypedDict):
    r: int
    projection_prng_key: int
    sparse: bool
    very_sparse: bool


def _frozen_options(source: Source, name: str, r: int) -> Options:
    """Returns the options of a method of deltakit that decide what its frozen matrices are.

    Args:
        name: the name of the method, with which the names of the matrices begin.
        r: its default rank in PEFT.
    """
    given = source.options(_Seed, {"r": r, "projection_prng_key": 0, "sparse": False, "very_sparse": False})
    a, b = (source.tensors.get(f"{name}_{which}") for which in "AB")
    # Without the matrices their sizes are those of the largest target, as they are by default here.
    sizes = None if a is None or b is None else (int(a.shape[-1]), int(b.shape[0]))
    found = {"r": given["r"], "seed": given["projection_prng_key"], "sizes": sizes}
    if name == "vera":
        return found
    return {**found, "bases": "very_sparse" if given["very_sparse"] else "sparse" if given["sparse"] else "uniform"}


def _checked(name: str, r: int, end: str) -> Callable[[Source], Source]:
    """Returns what compares the frozen matrices in a file with those that deltakit draws.

    Args:
        name: the name of the method, with which the names of the matrices begin.
        r: its default rank in PEFT.
        end: how the name of a tensor of a target ends.
    """

    def prepared(source: Source) -> Source:
        index, options = source.index, _frozen_options(source, name, r)
        path = next((path for path in source.by_path({end: ""}) if source.module(path) is not None), None)
        if index is None or path is None or options["sizes"] is None or source.tensors[f"{name}_A"].is_meta:
            return source
        a, b = (source.tensors[f"{name}_{which}"] for which in "AB")
        count = () if name == "vera" else (-(-a.shape[-1] // max(1, options["r"])),)
        if a.shape[0] != options["r"] or b.shape[1:] != (*count, options["r"]):
            raise CheckpointError(
                f"{source.folder}: {name}_A and {name}_B have the shapes {tuple(a.shape)} and {tuple(b.shape)}, which do not "
                f"fit the rank {options['r']} of its config; save or download it again"
            )
        kind: Any = METHODS[name]
        drawn = kind(**options).build_shared(index, [index.target(path)]).drawn()
        for which, values in drawn:
            held = source.tensors[f"{name}_{which}"]
            if not torch.equal(values.to(held.dtype), held.cpu()):
                raise CheckpointError(
                    f"{source.folder}: its {name}_{which} is not what the seed {options['seed']} gives here: it was drawn by "
                    "another version or on another device; merge the adapter into the backbone by PEFT's merge_and_unload()"
                )
        return source

    return prepared


def _frozen(name: str, r: int) -> Callable[[Source], OptionsAt]:
    def options(source: Source) -> OptionsAt:
        found = _frozen_options(source, name, r)
        return lambda _path, _tensors: found

    return with_own(options)


def _drawn(writing: Writing, name: str) -> dict[str, Tensor]:
    shared = writing.attachment.sites[0].module.shared
    # As PEFT draws and keeps them, in float32: a narrower dtype would lose digits of them.
    return {f"{name}_{which}": values for which, values in shared.drawn()}


def _one_seed(writing: Writing, sites: Sequence[Site]) -> Options:
    if len({writing.attachment.record.methods[site.method] for site in sites}) > 1:
        raise writing.impossible("its targets have different options, and PEFT has the same frozen matrices for all")
    return {"save_projection": True}


VERA = Row(
    peft_type="VERA",
    method="vera",
    tensors={".vera_lambda_b": Stored("b"), ".vera_lambda_d": Stored("d")},
    fields={
        "r": Field("r", int, 256),
        "projection_prng_key": Field("seed", int, 0),
        "vera_dropout": Field("dropout", float, 0.0),
    },
    layers=Layers(),
    computed=_frozen("vera", 256),
    written=_one_seed,
    prepared=_checked("vera", 256, ".vera_lambda_b"),
    consumed=("vera_A", "vera_B"),
    drawn=lambda writing, _: _drawn(writing, "vera"),
    known=("save_projection", "d_initial"),
)


def _bases(writing: Writing, sites: Sequence[Site]) -> Options:
    method: Any = writing.attachment.record.methods[sites[0].method]
    kinds = {"sparse": method.bases == "sparse", "very_sparse": method.bases == "very_sparse"}
    return {**_one_seed(writing, sites), **kinds}


def _drawn_for_each(writing: Writing, sites: Sequence[Site]) -> dict[str, Tensor]:
    # PEFT's files have them once for all, and again for each target.
    shared = _drawn(writing, "randlora")
    return shared | {f"{site.path}.{name}": tensor for site in sites for name, tensor in shared.items()}


RANDLORA = Row(
    peft_type="RANDLORA",
    method="randlora",
    tensors={".randlora_lambda": Stored("L"), ".randlora_gamma": Stored("G")},
    fields={
        "r": Field("r", int, 32),
        "projection_prng_key": Field("seed", int, 0),
        "randlora_alpha": Field("alpha", float, 640.0),
        "randlora_dropout": Field("dropout", float, 0.0),
    },
    layers=Layers(),
    computed=_frozen("randlora", 32),
    written=_bases,
    prepared=_checked("randlora", 32, ".randlora_lambda"),
    consumed=(".randlora_A", ".randlora_B", "randlora_A", "randlora_B"),
    drawn=_drawn_for_each,
    known=("save_projection", "sparse", "very_sparse"),
)

_LOGITS = (".vblora_logits_A", ".vblora_logits_B")
_TOP = ("_topk_indices", "_topk_weights")
_NEVER = -1e4


def _all_logits(source: Source) -> Source:
    """With `save_only_topk_weights` a file has no logits, but the chosen vectors and all of their weights but the last."""
    bank = source.tensors.get("vblora_vector_bank")
    found: dict[str, Tensor] = {}
    left = 64 * (2**20 + sum(tensor.numel() for tensor in source.tensors.values()))
    for name, chosen in source.tensors.items():
        if not name.endswith(tuple(f"{end}{_TOP[0]}" for end in _LOGITS)):
            continue
        logits = name.removesuffix(_TOP[0])
        weights = source.tensors.get(f"{logits}{_TOP[1]}")
        if bank is None or weights is None or weights.shape != (*chosen.shape[:-1], chosen.shape[-1] - 1):
            raise CheckpointError(f"{source.folder}: it has no weights for {name}; save or download it again")
        if chosen.numel() and not chosen.is_meta and int(chosen.max()) >= len(bank):
            raise CheckpointError(f"{source.folder}: {name} chooses vectors that its bank does not have; save it again")
        left -= chosen.numel() // max(1, chosen.shape[-1]) * len(bank)
        if left < 0:
            raise CheckpointError(
                f"{source.folder} is damaged: its logits would have far more values than it has itself"
            )
        weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1).clamp_min(1e-30)
        every = torch.full((*chosen.shape[:-1], len(bank)), _NEVER, dtype=weights.dtype, device=weights.device)
        found[logits] = every.scatter(-1, chosen.long(), weights.log())
    return replace(source, tensors={**source.tensors, **found})


VBLORA = Row(
    peft_type="VBLORA",
    method="vblora",
    tensors={
        ".vblora_logits_A": Stored("logits_A"),
        ".vblora_logits_B": Stored("logits_B"),
        "vblora_vector_bank": Stored("shared.bank"),
    },
    fields={
        "r": Field("r", int, 4),
        "num_vectors": Field("vectors", int, 256),
        "vector_length": Field("length", int, 256),
        "topk": Field("top", int, 2),
        "vblora_dropout": Field("dropout", float, 0.0),
    },
    layers=Layers(),
    computed=untied,
    prepared=_all_logits,
    consumed=tuple(f"{end}{top}" for end in _LOGITS for top in _TOP),
    known=("save_only_topk_weights", "init_vector_bank_bound", "init_logits_std"),
)

ROWS = (VERA, RANDLORA, VBLORA)
