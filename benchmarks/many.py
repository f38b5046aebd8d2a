"""Times many deltas on one backbone: loading, switching, and mixed-adapter batches.

    python benchmarks/many.py [--deltas 100] [--rounds 9] [--out many.json]

They are compared with PEFT's `load_adapter`, `set_adapter` and `adapter_names`; mixed batches also with one forward for
each delta.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import peft
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
    model = backbone(device, 24, 384)
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
        mine = [timed(lambda k=k: dk.load(ours, model, name=f"d{k}", attach=False)) for k in range(count)]
        grown = (harness.status("VmRSS") - before) / count
        peft_times = []
        for k in range(min(count, 50)):
            peft_times.append(timed(lambda k=k: wrapped.load_adapter(theirs / "first", adapter_name=f"a{k}"))[0])
        deltas = [delta for _, delta in mine]
        switch = switching(deltas[:2])
        set_adapter = [timed(lambda k=k: wrapped.set_adapter(f"a{k % 2}"))[0] for k in range(6)]
    return {
        "targets": 168,
        "load ms, first": 1e3 * mine[0][0],
        "load ms, 50th": 1e3 * statistics.median([t for t, _ in mine[45:50]]),
        "load ms, last": 1e3 * statistics.median([t for t, _ in mine[-5:]]),
        "PEFT load ms, first": 1e3 * peft_times[0],
        "PEFT load ms, last": 1e3 * statistics.median(peft_times[-3:]),
        "PEFT's last was the": len(peft_times),
        "resident bytes a delta / its parameters": grown / bytes_each,
        "PEFT set_adapter ms": 1e3 * statistics.median(set_adapter),
        **switch,
    }


def switching(deltas: list[dk.Delta]) -> dict[str, float]:
    """Returns the milliseconds of three ways to switch between two deltas."""
    one, other = deltas
    one.attach()
    taken = [timed(lambda: (one.detach(), other.attach()))[0], timed(lambda: (other.detach(), one.attach()))[0]]
    other.attach()

    def switch() -> None:
        one.active, other.active = other.active, one.active

    swapped = [timed(lambda: one.swap(other))[0] for _ in range(20)]
    one.active, other.active = True, False
    times = [timed(switch)[0] for _ in range(20)]
    one.detach(), other.detach()
    return {
        "switch ms, both attached": 1e3 * statistics.median(times),
        "switch ms, swapped": 1e3 * statistics.median(swapped),
        "switch ms, detach and attach": 1e3 * statistics.median(taken),
    }


def timed(call: harness.Call) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def rows(distinct: int, batch: int, length: int, rounds: int, device: str) -> dict[str, Any]:
    """Returns the times of a mixed-adapter batch as ratios to the bare backbone. Examples use the deltas in turn."""
    bare = backbone(device, 2)
    mine, theirs = copy.deepcopy(bare), copy.deepcopy(bare)
    names = [f"d{k}" for k in range(distinct)]
    for name in names:
        dk.attach(mine, dk.LoRA(r=8, at=LINEARS), name=name)
    config = peft.LoraConfig(r=8, target_modules=LINEARS)
    wrapped = peft.get_peft_model(theirs, config, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    own = [names[i % distinct] for i in range(batch)]
    ids = torch.randint(5, 900, (batch, length)).to(device)
    handles = {delta.name: delta for delta in dk.deltas(mine)}
    wrapped.eval()

    def together() -> None:
        with torch.no_grad():
            mine(input_ids=ids)

    def one_after_another() -> None:
        with torch.no_grad():
            for name in names:
                for other, delta in handles.items():
                    delta.active = other == name
                mine(input_ids=ids[[i for i, n in enumerate(own) if n == name]])
        for delta in handles.values():
            delta.active = True

    def peft_mixed() -> None:
        with torch.no_grad():
            wrapped(input_ids=ids, adapter_names=own)

    def plain() -> None:
        with torch.no_grad():
            bare(input_ids=ids)

    with dk.rows(mine, own):
        times = harness.interleaved({"bare": plain, "deltakit": together, "PEFT": peft_mixed}, rounds)
    times |= {"one after another": harness.interleaved({"x": one_after_another}, rounds)["x"]}
    found = harness.ratios(times, "bare")
    return {"distinct": distinct, "batch": batch, "tokens": length, "ratios": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--deltas", type=int, default=100)
    harness.add_options(parser, rounds=9)
    options = parser.parse_args()
    print(harness.machine())
    found = [loading(options.deltas, options.device)]
    for name, value in found[0].items():
        print(f"{name:<42} {value:.3g}")
    for length in (1, 32):
        for distinct, batch in ((2, 16), (16, 16), (1, 64), (8, 64), (64, 64)):
            row = rows(distinct, batch, length, options.rounds, options.device)
            found.append(row)
            shown = "  ".join(f"{k} {harness.spread(v)}" for k, v in row["ratios"].items() if k != "bare")
            print(f"{batch} rows, {distinct} distinct, {length} tokens: {shown}")
    harness.write(options.out, "many", found)


if __name__ == "__main__":
    main()
