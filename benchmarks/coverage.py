"""Counts the model types of transformers on which every role is found.

    python benchmarks/coverage.py [--types bert llama ...] [--json FILE] [--table FILE]

Every model type is built from its default config on the meta device. The roles are judged by separate rules about names
and shapes, not by the inference under test. "resolved": each attention module has a role for all its projections, and
each block with a feed-forward part has `@ff`. "wrong": the shapes of a role contradict it.
"""

import argparse
import json
import platform
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import models
import torch
import transformers
from torch import nn

import deltakit as dk
from deltakit.core.linear import projection_sizes
from deltakit.selection.role_inference.infer import infer_roles
from deltakit.selection.role_inference.role_map import RoleMap, Unit

METHODS = {
    "LoRA": dk.LoRA(r=1),
    "Adapter": dk.Adapter(size=2),
    "BitFit": dk.BitFit(),
    "IA3": dk.IA3(),
    "Prefix": dk.Prefix(tokens=2),
    "SoftPrompt": dk.SoftPrompt(tokens=2),
}
# Projections of positions and short convolutions are not projections of the hidden states.
_ELSE = re.compile(r"relative|pos|conv", re.IGNORECASE)
_PROJECTION = re.compile(r"(^|_)(w?[qkv]|quer(y|ies)|keys?|values?|w?q?kv|c_attn)(_|$|s$)", re.IGNORECASE)
_PARAMETER = re.compile(r"^(q|k|v|query|key|value|qkv|in)(_proj)?(_weight)?$")
_ATTENTION = re.compile(r"attention|attn$", re.IGNORECASE)
_FEED_FORWARD = re.compile(r"(mlp|ffn|feedforward|ff)$", re.IGNORECASE)


def attention_modules(model: nn.Module) -> dict[str, dict[str, str]]:
    """Returns the modules whose class is named attention, each with its projections by name."""
    found: dict[str, dict[str, str]] = {}
    for path, module in model.named_modules():
        if not _ATTENTION.search(type(module).__name__) or isinstance(module, nn.Linear):
            continue
        named = {}
        for name, child in module.named_children():
            linears = [join(name, p) for p, m in child.named_modules() if projection_sizes(m)]
            if len(linears) == 1 and _PROJECTION.search(name) and not _ELSE.search(name):
                named[name] = join(path, linears[0])
        bare = {name: join(path, name) for name, p in module.named_parameters(recurse=False) if p.ndim > 1}
        named |= {name: place for name, place in bare.items() if _PARAMETER.search(name)}
        if named or isinstance(module, nn.MultiheadAttention):
            found[path] = named
    return found


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def judge_attention(model: nn.Module, roles: RoleMap) -> list[str]:
    """Returns what is unresolved in attention: projections by name that no unit has, or a missing output projection."""
    problems = []
    for path, named in attention_modules(model).items():
        units = [u for u in roles.units if u.kind == "attn" and related(u.path, path)]
        own = {part: place for unit in units for part, place in unit.parts.items()}
        if isinstance(model.get_submodule(path), nn.MultiheadAttention):
            missing = sorted(set("qkvo") - own.keys())
        else:
            answered = {place for unit in units for place in unit.parts.values()}
            missing = [name for name, place in named.items() if place not in answered]
            missing += [] if any("o" in unit.parts for unit in units) else ["the output projection"]
        if missing:
            problems.append(f"{path} ({type(model.get_submodule(path)).__name__}): {', '.join(missing)}")
    return problems


def related(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def judge_feed_forward(model: nn.Module, roles: RoleMap) -> list[str]:
    """Returns the modules whose class is named feed-forward, in blocks with attention, that have no unit."""
    problems = []
    hidden = hidden_sizes(model)
    attending = {block for block in roles.blocks for u in roles.units if u.kind == "attn" and related(u.path, block)}
    units = [unit.path for unit in roles.units if unit.kind == "ff"]
    for path, module in model.named_modules():
        block = next((b for b in attending if path.startswith(f"{b}.")), None)
        if block is None or not _FEED_FORWARD.search(type(module).__name__):
            continue
        sizes = [size for m in module.modules() if (size := projection_sizes(m))]
        if (
            len(sizes) > 1
            and any(size[1] in hidden for size in sizes)
            and not any(related(unit, path) for unit in units)
        ):
            problems.append(f"{path} ({type(module).__name__})")
    return problems


def judge_shapes(model: nn.Module, roles: RoleMap) -> list[str]:
    """Returns the roles whose shapes contradict them. Hidden sizes are those of norms and of the configs."""
    hidden = hidden_sizes(model)
    sizes = {path: size for path, module in model.named_modules() if (size := projection_sizes(module))}
    wrong = []
    for unit in roles.units:
        parts = {part: sizes[place] for part, place in unit.parts.items() if place in sizes}
        wrong += [f"{unit.path}: {text}" for text in contradictions(unit, parts, hidden)]
    return wrong


def hidden_sizes(model: nn.Module) -> set[int]:
    """Returns the possible hidden sizes: those of norms, and those that the configs name so."""
    norms = {
        module.weight.numel()
        for module in model.modules()
        if "norm" in type(module).__name__.lower() and isinstance(getattr(module, "weight", None), torch.Tensor)
    }
    said = {
        value
        for module in model.modules()
        for name, value in getattr(getattr(module, "config", None), "__dict__", {}).items()
        if isinstance(value, int) and re.search(r"hidden_size|d_model|n_embd|embed_dim|hidden_dim|^dim$", name)
    }
    return norms | said


def contradictions(unit: Unit, parts: dict[str, tuple[int, int]], hidden: set[int]) -> list[str]:
    wrong = []
    first = parts.get("q_a") or parts.get("q") or parts.get("qkv")
    if unit.kind == "attn" and first and first[0] not in hidden | {2 * size for size in hidden}:
        wrong.append(f"queries are made of {first[0]}, hidden sizes are {sorted(hidden)}")
    if "o" in parts and parts["o"][1] not in hidden:
        wrong.append(f"o gives {parts['o'][1]}, hidden sizes are {sorted(hidden)}")
    for low, high in (("q_a", "q"),):
        if low in parts and high in parts and parts[low][1] != parts[high][0]:
            wrong.append(f"{high} does not take what {low} gives")
    if "v" in parts and "o" in parts and parts["o"][0] % parts["v"][1] and parts["v"][1] % parts["o"][0]:
        wrong.append(f"o takes {parts['o'][0]}, v gives {parts['v'][1]}")
    if "down" in parts:
        ups = [parts[part] for part in ("up", "gate") if part in parts]
        wrong += [f"{up} and down {parts['down']} are no pair" for up in ups if up != parts["down"][::-1]]
        if parts["down"][1] not in hidden:
            wrong.append(f"down gives {parts['down'][1]}, hidden sizes are {sorted(hidden)}")
    return wrong


def cover(model_type: str) -> dict[str, Any]:
    """Returns the results for one model type."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    built = models.build(model_type)
    record: dict[str, Any] = {"type": model_type, "built": built.model is not None, "how": built.how}
    if built.model is None:
        return record
    model = built.model
    start = time.perf_counter()
    roles = infer_roles(model)
    record["seconds_roles"] = time.perf_counter() - start
    record["blocks"] = len(roles.blocks)
    record["attention"] = len(attention_modules(model))
    record["roles"] = dict(Counter(f"{u.kind}.{part}" for u in roles.units for part in u.parts))
    record["problems"] = judge_attention(model, roles) + judge_feed_forward(model, roles)
    record["wrong"] = judge_shapes(model, roles)
    record["defaults"] = {}
    for name, method in METHODS.items():
        start = time.perf_counter()
        try:
            record["defaults"][name] = {"targets": sum(map(len, dk.plan(model, method).paths.values()))}
        except dk.DeltaError as error:
            record["defaults"][name] = {"targets": 0, "error": f"{type(error).__name__}: {error}"}
        record["defaults"][name]["seconds"] = time.perf_counter() - start
    return record


def status(record: dict[str, Any]) -> str:
    if not record["built"]:
        return "not built"
    if record["wrong"]:
        return "wrong"
    if not record["attention"]:
        return "no attention"
    return "unresolved" if record["problems"] else "resolved"


def table(records: list[dict[str, Any]]) -> str:
    """Returns the summary and the list of unresolved model types, as Markdown."""
    counts = Counter(map(status, records))
    attending = counts["resolved"] + counts["unresolved"] + counts["wrong"]
    lines = [
        f"transformers {transformers.__version__}, torch {torch.__version__}, Python {platform.python_version()}: "
        f"{len(records)} model types, {len(records) - counts['not built']} built, {attending} with attention.",
        "",
        "| | model types | share |",
        "|---|---|---|",
    ]
    for word in ("resolved", "unresolved", "wrong"):
        lines.append(f"| {word} | {counts[word]} | {100 * counts[word] / max(attending, 1):.1f} % |")
    lines += [f"| no attention | {counts['no attention']} | |", f"| not built | {counts['not built']} | |", ""]
    lines += ["| method | attaches at its default | on types with attention |", "|---|---|---|"]
    for name in METHODS:
        done = [r for r in records if r["built"] and r["defaults"][name]["targets"]]
        lines.append(f"| {name} | {len(done)} | {sum(bool(r['attention']) for r in done)} |")
    lines += ["", "| not resolved | why |", "|---|---|"]
    for record in records:
        if status(record) in ("unresolved", "wrong"):
            shown = (record["wrong"] + record["problems"])[:2]
            count = len(record["wrong"] + record["problems"])
            more = f"; {count - 2} more" if count > 2 else ""
            lines.append(f"| {record['type']} | {'; '.join(shown)}{more} |")
    lines += ["", "| not built | why |", "|---|---|"]
    lines += [f"| {r['type']} | {r['how']} |" for r in records if not r["built"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--types", nargs="*", help="only these model types")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, help="a Markdown file for the table")
    options = parser.parse_args()
    start = time.perf_counter()
    with ProcessPoolExecutor(options.workers) as pool:
        records = list(pool.map(cover, options.types or models.model_types()))
    wall = time.perf_counter() - start
    text = table(records)
    print(text)
    print(f"\n{wall:.0f} s with {options.workers} processes")
    if options.json:
        options.json.write_text(json.dumps({"wall_seconds": wall, "records": records}, indent=1) + "\n")
    if options.table:
        options.table.write_text(f"<!-- written by benchmarks/coverage.py -->\n# Coverage\n\n{text}\n")


if __name__ == "__main__":
    main()
