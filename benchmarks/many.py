"""Times many deltas on one backbone: loading, switching, and mixed-adapter batches.

    python benchmarks/many.py [--deltas 100] [--out many.json]

They are compared with PEFT's `load_adapter`, `set_adapter` and `adapter_names`; mixed batches also with one forward for
each delta. `null` is a second copy of deltakit's contestant. A row of mixed batches takes as long as it needs, and at most a
minute, and its forwards for each delta at most half a minute; all takes about twelve minutes, of which loading takes three.
"""

import argparse
import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import peft
import rounds
import torch

import deltakit as dk


def backbone(device: str, layers: int, width: int = 768) -> Any:
    """Returns a Llama with seven linear layers in each block."""
    sizes = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
    }
    return (
        harness.llama(**sizes, num_key_value_heads=12, vocab_size=1000, use_cache=False)
        .requires_grad_(False)
        .to(device)
    )


LINEARS = harness.LINEARS["Llama 150 M"]


def loading(count: int, device: str) -> dict[str, Any]:
    """Returns the milliseconds to load and to switch deltas and PEFT adapters, and the memory of one delta."""
    model, calls = backbone(device, 24, 384), rounds.Calls()
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder) / "ours", Path(folder) / "theirs"
        delta = dk.attach(model, dk.LoRA(r=8, at=LINEARS))
        delta.save(ours)
        bytes_each = sum(p.numel() * p.element_size() for p in delta.parameters())
        delta.detach()
        other = copy.deepcopy(model)
        wrapped = peft.get_peft_model(other, peft.LoraConfig(r=8, target_modules=LINEARS), adapter_name="first")
        wrapped.save_pretrained(theirs)
        before = harness.status("VmRSS")
        deltas = []
        for k in range(count):
            load = lambda k=k: dk.load(ours, model, name=f"d{k}", attach=False)  # noqa: E731
            deltas.append(calls.run("load", _place(k, count), load))
        grown = (harness.status("VmRSS") - before) / count
        most = min(count, 50)
        for k in range(most):
            load = lambda k=k: wrapped.load_adapter(theirs / "first", adapter_name=f"a{k}")  # noqa: E731
            calls.run("PEFT load", _place(k, most), load)
        switching(deltas[:2], calls)
        for k in range(12):
            calls.run("PEFT set_adapter", "", lambda k=k: wrapped.set_adapter(f"a{k % 2}"))
    milliseconds = {
        f"{what} ms{case and ', '}{case}": {"cpu": _ms(times.cpu[case]), "wall": _ms(times.wall[case])}
        for what, times in calls.of.items()
        for case in times.cpu
        if case != "between"
    }
    return {
        "targets": 168,
        "PEFT's last was the": most,
        "resident bytes a delta / its parameters": grown / bytes_each,
        "ms": milliseconds,
    }


def _place(k: int, count: int) -> str:
    """Returns the group of loads that the k-th belongs to: some neighbours each, so that a group has quartiles."""
    if k == 0:
        return "first"
    return "45th to 50th" if 44 <= k < 50 else "last five" if k >= count - 5 else "between"


def _ms(seconds: list[float]) -> Sequence[float]:
    milliseconds = [1000 * second for second in seconds]
    return rounds.quartiles(milliseconds) if len(milliseconds) > 1 else milliseconds


def switching(deltas: list[dk.Delta], calls: rounds.Calls) -> None:
    """Notes the times of three ways to switch between two deltas."""
    one, other = deltas
    one.attach()
    for _ in range(6):
        calls.run("switch", "detach and attach", lambda a=one, b=other: (a.detach(), b.attach()))
        one, other = other, one

    def switch() -> None:
        one.active, other.active = other.active, one.active

    for _ in range(20):
        calls.run("switch", "swapped", lambda: one.swap(other))
    other.attach()
    one.active, other.active = True, False
    for _ in range(20):
        calls.run("switch", "both attached", switch)
    one.detach(), other.detach()


def rows(distinct: int, batch: int, length: int, bound: rounds.Bound, device: str) -> dict[str, Any]:
    """Returns the times of a mixed-adapter batch beside the bare backbone's. Examples use the deltas in turn."""
    bare = backbone(device, 2)
    names = [f"d{k}" for k in range(distinct)]
    own = [names[i % distinct] for i in range(batch)]
    ids = torch.randint(5, 900, (batch, length)).to(device)
    models = {who: harness.twin(bare) for who in ("deltakit", "null")}
    for model in models.values():
        for name in names:
            dk.attach(model, dk.LoRA(r=8, at=LINEARS), name=name)
    config = peft.LoraConfig(r=8, target_modules=LINEARS)
    wrapped = peft.get_peft_model(harness.twin(bare), config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    wrapped.eval()
    handles = {delta.name: delta for delta in dk.deltas(models["deltakit"])}

    def one_after_another() -> None:
        for name in names:
            for other, delta in handles.items():
                delta.active = other == name
            models["deltakit"](input_ids=ids[[i for i, n in enumerate(own) if n == name]])
        for delta in handles.values():
            delta.active = True

    plain = {"bare": lambda: bare(input_ids=ids)}
    cases = {who: lambda m=model: m(input_ids=ids) for who, model in models.items()}
    cases["PEFT"] = lambda: wrapped(input_ids=ids, adapter_names=own)
    enough = rounds.both(rounds.share_known("bare"), rounds.ratio_known("deltakit", "bare", 0.02))
    with torch.no_grad():
        with dk.rows(models["deltakit"], own), dk.rows(models["null"], own):
            times = rounds.interleaved({**plain, **cases}, bound, enough)
        apart = rounds.interleaved(
            {**plain, "one after another": one_after_another},
            dataclasses.replace(bound, seconds=bound.seconds / 2),
            rounds.ratio_known("one after another", "bare", 0.05),
        )
    found = {"distinct": distinct, "batch": batch, "tokens": length, **rounds.compared(times, "bare")}
    return {**found, "apart": rounds.compared(apart, "bare")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deltas", type=int, default=100)
    harness.add_options(parser, rounds.Bound(13, 121, 60))
    options = parser.parse_args()
    bound = harness.begin(options)
    found = [loading(options.deltas, options.device)]
    for name, value in found[0].items():
        if name != "ms":
            print(f"{name:<42} {value:.3g}")
    for name, value in found[0]["ms"].items():
        print(f"{name:<42} cpu {rounds.text(value['cpu'], 2)}  wall {rounds.text(value['wall'], 2)}", flush=True)
    for length in (1, 32):
        for distinct, batch in ((2, 16), (16, 16), (1, 64), (8, 64), (64, 64)):
            row = rows(distinct, batch, length, bound, options.device)
            found.append(row)
            print(f"{batch} rows, {distinct} distinct, {length} tokens\n    {rounds.said(row, 'bare')}")
            print(f"    {rounds.said(row['apart'], 'bare')}", flush=True)
            harness.write(options.out, "many", found)


if __name__ == "__main__":
    main()
