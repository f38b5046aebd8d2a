"""Measures every registered method beside LoRA of the same rank, and beside PEFT's where PEFT has it.

    python benchmarks/methods.py [--methods lora vera ...] [--out benchmarks/results/methods.json]
                                 [--table benchmarks/methods.md]

Measured are the time of a training step, the floating-point operations of its products, the bytes kept for the backward pass,
and the parameters. The backbones of one row take turns in one process. A row is written as soon as it is measured; the rows
of other methods in the file stay. A row takes as long as its share and its ratio to LoRA need, and at most two minutes; all
take about an hour.
"""

import argparse
import copy
import dataclasses
import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import peft
import rounds
import torch
import transformers as tf
from memory import kept
from step import require_gradients, step
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import deltakit as dk

LINEARS = harness.LINEARS["BERT base"]

PEFT: dict[str, tuple[str, tuple[str, ...]]] = {
    "adalora": ("AdaLoraConfig", ()),
    "boft": ("BOFTConfig", ()),
    "c3a": ("C3AConfig", ("block_size",)),
    "delora": ("DeloraConfig", ("r",)),
    "fourierft": ("FourierFTConfig", ()),
    "glora": ("GloraConfig", ("r",)),
    "gralora": ("GraloraConfig", ("r",)),
    "hira": ("HiraConfig", ("r",)),
    "hra": ("HRAConfig", ("r",)),
    "ia3": ("IA3Config", ()),
    "ln_tuning": ("LNTuningConfig", ()),
    "loha": ("LoHaConfig", ("r",)),
    "lokr": ("LoKrConfig", ("r",)),
    "lora": ("LoraConfig", ("r",)),
    "miss": ("MissConfig", ("r",)),
    "oft": ("OFTConfig", ()),
    "p_tuning": ("PromptEncoderConfig", ()),
    "prefix": ("PrefixTuningConfig", ()),
    "randlora": ("RandLoraConfig", ("r",)),
    "road": ("RoadConfig", ()),
    "shira": ("ShiraConfig", ("r",)),
    "soft_prompt": ("PromptTuningConfig", ()),
    "trainable_tokens": ("TrainableTokensConfig", ()),
    "vblora": ("VBLoRAConfig", ("r",)),
    "vera": ("VeraConfig", ("r",)),
    "waveft": ("WaveFTConfig", ()),
}
"""PEFT's config of a method, and its options that have the name and the value of ours. The others are PEFT's defaults."""

MORE: dict[str, dict[str, Any]] = {
    "adalora": {"total_step": 1000},
    # Without it PEFT keeps a copy of each weight's magnitude for a backend that does not exist on CPUs.
    "gralora": {"alpha": 16},
}
"""Options that PEFT's configs cannot do without."""


def backbone(device: str) -> Any:
    """Returns a BERT of base's width with four layers; every call gives the same weights."""
    torch.manual_seed(0)
    config = tf.BertConfig(num_hidden_layers=4, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return tf.BertModel(config).to(device).eval()


def standing_alone() -> list[str]:
    """Returns the methods that weigh no other deltas: the cost of the others is mostly that of the deltas they weigh."""
    return sorted(name for name, kind in dk.METHODS.items() if not kind(**kind.example).weighed)


def method(name: str, model: nn.Module) -> dk.Method:
    """Returns a method with its default options: on all linear layers if LoRA's positions are its default, too."""
    kind = dk.METHODS[name]
    made = kind(**kind.example)
    if made.positions() != dk.LoRA().positions():
        return made
    return kind(**kind.example, at=["^" + path for path in harness.targets(model, LINEARS)])


def peft_config(name: str, ours: dk.Method, delta: dk.Delta) -> Any:
    """Returns PEFT's config of the same method on the same modules; None if PEFT does not have it."""
    if name not in PEFT:
        return None
    word, same = PEFT[name]
    kind = getattr(peft, word)
    known = {field.name for field in dataclasses.fields(kind)}
    options = {option: value for option in same if (value := getattr(ours, option, None)) is not None}
    options |= MORE.get(name, {})
    if issubclass(kind, peft.PromptLearningConfig):
        options |= {"num_virtual_tokens": ours.tokens, "task_type": "FEATURE_EXTRACTION"}
    else:
        # LN-tuning's targets are the parameters of norms, and PEFT wants the norms.
        targets = (path.removesuffix(".weight").removesuffix(".bias") for path in delta.modules)
        options["target_modules"] = list(dict.fromkeys(targets))
    if name == "ia3":
        options["feedforward_modules"] = [path for path in delta.modules if path.endswith("output.dense")]
    if "token_indices" in known:
        options["token_indices"] = list(ours.ids)
    return kind(**options)


def contestants(name: str, device: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the backbones of a row, copies of one, and why some are missing."""
    floor, missing = backbone(device), dict[str, str]()
    models = {"floor": floor, "LoRA": copy.deepcopy(floor), "deltakit": copy.deepcopy(floor)}
    ours = method(name, floor)
    delta = dk.attach(models["deltakit"], ours)
    modules = dict(floor.named_modules())
    linear = all(type(modules.get(path)) is nn.Linear for path in delta.modules)
    at = ["^" + path for path in delta.modules] if linear else None
    rank = getattr(ours, "r", 8)
    dk.attach(models["LoRA"], dk.LoRA(r=rank if isinstance(rank, int) else 8, at=at))
    try:
        config = peft_config(name, ours, delta)
        if config is not None:
            models["PEFT"] = peft.get_peft_model(copy.deepcopy(floor), config)
            with torch.no_grad():
                models["PEFT"](**harness.batch(floor, 1, 8))
    except Exception as error:
        # PEFT's prefixes and prompts do not run on every encoder.
        models.pop("PEFT", None)
        missing["PEFT"] = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    floor.requires_grad_(False)
    for model in models.values():
        # PEFT starts some methods in training mode. Every backbone is without dropout.
        model.eval()
        require_gradients(model)
    return models, missing


def operations(call: Callable[[], Any]) -> int:
    """Returns the floating-point operations of the matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def measure(name: str, bound: rounds.Bound, device: str) -> dict[str, Any]:
    """Returns the row of a method."""
    models, missing = contestants(name, device)
    inputs = harness.batch(models["floor"])
    cases = {who: lambda model=model: step(model, inputs, None) for who, model in models.items()}
    to_lora = rounds.ratio_known("deltakit", "LoRA", 0.05)
    enough = rounds.both(to_lora, rounds.share_known("floor")) if "PEFT" in models else to_lora
    times = rounds.interleaved(cases, bound, enough)
    # Beyond the floor: what a method itself costs.
    return {
        "method": name,
        "missing": missing,
        "options": repr(method(name, models["floor"])).partition("at=")[0],
        **rounds.compared(times, "floor"),
        "to LoRA": rounds.ratios(times.deciding, "LoRA")["deltakit"],
        "operations": {who: operations(call) for who, call in cases.items()},
        "kept": {who: kept(model, inputs) for who, model in models.items()},
        "parameters": {who: sum(p.numel() for p in m.parameters() if p.requires_grad) for who, m in models.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the table in Markdown."""
    lines = [
        "| method | step: PEFT | step: deltakit | share of PEFT's | deltakit to LoRA | operations to LoRA | MB kept: PEFT | "
        "deltakit | parameters: PEFT | deltakit | rounds |",
        "|---" * 11 + "|",
    ]
    for row in sorted(rows, key=lambda row: row["method"]):
        found = row[row["clock"]]
        steps = [shown(found["ratios"].get(who)) for who in ("PEFT", "deltakit")]
        share = rounds.share_text(found["share"]) if "share" in found else ""
        work = row["operations"]["deltakit"] / row["operations"]["LoRA"]
        bytes_kept = [
            f"{(row['kept'][who] - row['kept']['floor']) / 1e6:.1f}" if who in row["kept"] else ""
            for who in ("PEFT", "deltakit")
        ]
        counts = [f"{row['parameters'][who]:,}" if who in row["parameters"] else "" for who in ("PEFT", "deltakit")]
        costs = (f"{work:.2f}", *bytes_kept, *counts, rounds.counted(row))
        lines.append(f"| {' | '.join((row['method'], *steps, share, shown(row['to LoRA']), *costs))} |")
    return lines


def shown(ratio: Sequence[float] | None) -> str:
    return "" if ratio is None else rounds.text(ratio)


def document(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the page with the table."""
    missing = [f"- PEFT's {row['method']}: {row['missing']['PEFT']}" for row in rows if row["missing"]]
    said = (
        "A training step on a BERT of base's width with four layers: CPU time on one thread, turn by turn in one process. "
        "Steps are ratios to the frozen backbone's forward and backward, and to a step with LoRA of the same rank, or of rank "
        "8: medians with the quartiles of the rounds. The share is our overhead as a part of PEFT's, with quartiles "
        "over resampled rounds. Operations are those of the matrix products in the same steps. Bytes "
        "kept for the backward pass are beyond the frozen backbone's. Methods whose default is LoRA's queries and values are "
        "on all linear layers, and so is the LoRA beside them; others are at their defaults, and LoRA beside them is on the "
        "same layers or on queries and values."
    )
    failing = ["", "PEFT's that do not run on this model:", "", *missing] if missing else []
    return harness.page("methods.py", "The cost of every method", said, [*table(rows), *failing])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=standing_alone(), choices=standing_alone())
    parser.add_argument("--table", type=Path, help="a Markdown file for the table")
    harness.add_options(parser, rounds.Bound(9, 61, 120))
    options = parser.parse_args()
    bound = harness.begin(options)
    there = harness.rows_there(options.out)
    results = [row for row in there if row["method"] not in options.methods]
    for name in options.methods:
        row = measure(name, bound, options.device)
        results.append(row)
        print(f"{name}\n    {rounds.said(row, 'floor')}\n    to LoRA {rounds.text(row['to LoRA'])}", flush=True)
        print(*row["missing"].values(), flush=True)
        harness.write(options.out, "methods", results)
        gc.collect()
    if options.table:
        options.table.write_text(document(results))


if __name__ == "__main__":
    sys.exit(main())
