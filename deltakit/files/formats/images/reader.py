"""Reads the LoRAs of image models: those of diffusers, of kohya's sd-scripts, and of LyCORIS."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from deltakit.core import is_quantized, join, tensors_in, wide
from deltakit.errors import CheckpointError
from deltakit.files.formats.dora import read_magnitudes
from deltakit.files.formats.format import Parts
from deltakit.files.formats.images.fused import unfused
from deltakit.files.formats.images.keys import LOHA, LOKR, METADATA, PICKLE, TENSORS, spelling
from deltakit.files.formats.images.lycoris import add_update, read_alpha
from deltakit.files.formats.images.names import Names
from deltakit.files.formats.images.parts import Layer, Part, part_for, parts_of, refuse_strange
from deltakit.files.formats.layers import differs
from deltakit.files.formats.lora import Scale, add_lora
from deltakit.files.formats.lora_config import LoRAOptions
from deltakit.files.formats.products import product
from deltakit.files.formats.source import Source
from deltakit.files.pickles import read_pickle
from deltakit.files.saved import Saved, Trained
from deltakit.files.schema import checked, read_json
from deltakit.files.tensor_file import read_metadata, read_tensors


def is_diffusers(place: Path) -> bool:
    """Returns whether a folder has a LoRA of diffusers, or a file is one."""
    folder = (place / TENSORS).is_file() or (place / PICKLE).is_file()
    return folder or _spelling_in(place) == "diffusers"


def is_kohya(place: Path) -> bool:
    """Returns whether a file is a LoRA of kohya's sd-scripts or of LyCORIS. They have no name of their own."""
    return _spelling_in(place) == "kohya"


def _spelling_in(place: Path) -> str:
    is_file = place.suffix == ".safetensors" and place.is_file()
    return spelling(read_tensors(place, values=False)) if is_file else ""


def read(place: Path, backbone: nn.Module | None, values: bool) -> Saved:
    """Returns the LoRA in a folder or file; see `Reader`. With a backbone it is the part for that component of the pipeline.

    Raises:
        CheckpointError: if a file is missing or damaged, it has no part for the backbone, or a method that deltakit does not
            have.
    """
    file = next((place / name for name in (TENSORS, PICKLE) if (place / name).is_file()), place)
    tensors, configs = _contents(file, values)
    parts = [part for part in parts_of(tensors, place) if part.layers or part.strange]
    flat = any(layer.flat for part in parts for layer in part.layers.values())
    library = "kohya or LyCORIS" if flat else "diffusers"
    source, found = Source(library, place, file / METADATA, configs, tensors, backbone), Parts(place)
    if backbone is None:
        chosen = [(part, {name: _shown(part, name) for name in part.layers}) for part in parts]
    else:
        names = Names(backbone, place)
        chosen = [part_for([unfused(part, names) for part in parts], names, place)]
    refuse_strange((part for part, _ in chosen), place)
    full: dict[str, Tensor] = {}
    for part, paths in chosen:
        scale_of = _scales(part, source)
        for name, path in paths.items():
            layer = part.layers[name]
            if {*LOHA, *LOKR} & layer.tensors.keys():
                add_update(source, found, path, layer.name, layer.tensors)
            elif {"A", "B", "mid", "dora_scale"} & layer.tensors.keys():
                a, b = _factors(layer, place)
                _refuse_layer(source, path)
                scale = scale_of(path) or _scale(layer, a.shape[0], place)
                add_lora(source, found, path, a, b, scale, _magnitudes(source, path, layer, len(b)))
            for ours in ("weight", "bias"):
                if ours in layer.tensors:
                    full[join(path, ours)] = _sum(source, path, ours, layer.tensors[ours])
    if backbone is not None:
        source.refuse_tied(full)
    methods, renamed = found.named()
    return Saved(methods, renamed | full, Trained(names=sorted(full)))


def _contents(file: Path, values: bool) -> tuple[dict[str, Tensor], Mapping[str, object]]:
    """Returns the tensors of a file, and the configs of the components. Alphas have their values always: they are options."""
    if file.name == PICKLE:
        read, metadata = read_pickle, {}
    else:
        read, metadata = read_tensors, read_metadata(file)
    tensors = read(file, values=values)
    if not values and any(key.endswith(".alpha") for key in tensors):
        tensors |= {key: tensor for key, tensor in read(file, values=True).items() if key.endswith(".alpha")}
    where = file / METADATA
    configs = read_json(metadata[METADATA], where) if METADATA in metadata else {}
    found: dict[str, object] = checked(configs, dict[str, object], where)
    return tensors, found


def _scales(part: Part, source: Source) -> Callable[[str], Scale | None]:
    """Returns what gives the options of the LoRA at a path, if the metadata have the config of this component."""
    prefix = f"{part.component}." if part.component else ""
    config = {key.removeprefix(prefix): value for key, value in source.config.items() if key.startswith(prefix)}
    return LoRAOptions(replace(source, config=config)).scale if "lora_alpha" in config else _no_scale


def _no_scale(_path: str) -> None:
    return None


def _shown(part: Part, name: str) -> str:
    """Returns how a layer is called where no backbone tells its path."""
    between = "_" if part.layers[name].flat else "."
    return f"{part.component}{between}{name}" if part.component else name


def _refuse_layer(source: Source, path: str) -> None:
    why = differs(source.module(path))
    if why:
        raise CheckpointError(
            f"{source.folder}: {path} {why}, where the LoRA of {source.library} computes something else than deltakit's; "
            "use it in the library that it was trained with"
        )


def _factors(layer: Layer, place: Path) -> tuple[Tensor, Tensor]:
    """Returns A [r, d_in] and B [d_out, r] of a layer."""
    a, b, mid = (layer.tensors.get(name) for name in ("A", "B", "mid"))
    if a is None or b is None or min(a.ndim, b.ndim) < 2 or a.shape[0] != (b if mid is None else mid).shape[1]:
        raise CheckpointError(f"{place}: {layer.name} has no two factors of LoRA; save or download it again")
    if mid is None:
        return a.flatten(1), b.flatten(1)
    if mid.ndim < 3 or mid.shape[0] != b.shape[1]:
        raise CheckpointError(
            f"{place}: {layer.name}: the factors of its LoRA do not fit each other; download it again"
        )
    # LyCORIS splits the kernel of a convolution off A: B [out, r], mid [r, r, *kernel] and A [r, in] give the update
    # [out, in, *kernel]. The product of mid and A is a plain A.
    kernel = mid.shape[2:]
    rows = product(wide(mid).movedim(1, -1).flatten(0, -2), wide(a.flatten(1)), place)
    return rows.unflatten(0, (mid.shape[0], *kernel)).movedim(-1, 1).flatten(1), wide(b.flatten(1))


def _magnitudes(source: Source, path: str, layer: Layer, rows: int) -> Tensor | None:
    """Returns the magnitudes of a DoRA of LyCORIS, whose `dora_scale` has the shape [d_out, 1, ...]; None without one."""
    found = layer.tensors.get("dora_scale")
    if found is not None and (found.ndim < 1 or found.shape[0] != rows or found.numel() != rows):
        raise CheckpointError(
            f"{source.folder}: the DoRA of {path} has magnitudes of shape {tuple(found.shape)}, and deltakit's has one for "
            f"each of the {rows} outputs (LyCORIS with wd_on_out=True); use it in the library that it was trained with"
        )
    return None if found is None else read_magnitudes(source, path, found)


def _scale(layer: Layer, r: int, place: Path) -> Scale:
    return Scale(read_alpha(layer.tensors, r, f"{place}: the alpha of {layer.name}"))


def _sum(source: Source, path: str, name: str, difference: Tensor) -> Tensor:
    """Returns a tensor of the backbone with the difference that a file has for it; without a backbone the difference."""
    module = source.module(path)
    if module is None:
        return difference
    own = dict(tensors_in("", module)).get(name)
    fits = own is not None and difference.is_floating_point() and _squeezed(own) == _squeezed(difference)
    if own is None or not fits or own.is_meta or is_quantized(own):
        shape = "none" if own is None else f"one of {tuple(own.shape)} in {own.dtype}"
        raise CheckpointError(
            f"{source.folder}: it has a difference of shape {tuple(difference.shape)} for the {name} of {path}, and this "
            f"backbone has {shape}; load the backbone that it was trained on, not quantized and with its weights"
        )
    if difference.is_meta:
        return difference.reshape(own.shape)
    return (wide(own.detach().cpu()) + wide(difference.reshape(own.shape))).to(own.dtype)


def _squeezed(tensor: Tensor) -> list[int]:
    # A kernel of one is left out in some files.
    return [size for size in tensor.shape if size != 1]
