"""Times attach, switch, detach, attach again and draw against PEFT, on a large model without its weights.

    python benchmarks/attach.py [--layers 80] [--rounds 5] [--out attach.json]

Both run in one process and take turns. It prints the median and the range of all rounds in milliseconds, and the ratio of
the medians. PEFT cannot attach a removed adapter again: for it, "detach and attach again" is `unload` and `get_peft_model`.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import peft
import torch
import transformers

import deltakit as dk

Times = dict[str, list[float]]


def backbone(layers: int) -> Any:
    """Returns a Llama with the widths of the 70-billion-parameter model, on the meta device."""
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def timed(times: Times, name: str, call: harness.Call) -> Any:
    start = time.perf_counter()
    result = call()
    times.setdefault(name, []).append(1000 * (time.perf_counter() - start))
    return result


def ours(model: Any, times: Times) -> None:
    method = dk.LoRA(r=8, at=["@attn.{q,k,v,o}", "@ff.{up,gate,down}"])
    delta = timed(times, "attach", lambda: dk.attach(model, method))
    timed(times, "switch off and on", lambda: [setattr(delta, "active", on) for on in (False, True)])
    timed(times, "draw", lambda: str(dk.show(model)))
    timed(times, "detach and attach again", lambda: delta.detach().attach())
    timed(times, "detach", delta.detach)


def theirs(model: Any, times: Times) -> None:
    config = peft.LoraConfig(r=8, target_modules=harness.LINEARS["Llama 150 M"], task_type="CAUSAL_LM")
    wrapped = timed(times, "attach", lambda: peft.get_peft_model(model, config))

    def switch() -> None:
        with wrapped.disable_adapter():
            pass

    timed(times, "switch off and on", switch)
    wrapped = timed(times, "detach and attach again", lambda: peft.get_peft_model(wrapped.unload(), config))
    timed(times, "detach", wrapped.unload)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(harness.machine())
    model = backbone(options.layers)
    times: dict[str, Times] = {"deltakit": {}, "PEFT": {}}
    for _ in range(options.rounds):
        ours(model, times["deltakit"])
        theirs(model, times["PEFT"])
    print(f"Llama shape, {options.layers} layers, {7 * options.layers} targets; milliseconds")
    for name, found in times["deltakit"].items():
        line = f"{name:24} {statistics.median(found):8.2f} ({min(found):.2f} to {max(found):.2f})"
        other = times["PEFT"].get(name)
        if other:
            ratio = statistics.median(other) / statistics.median(found)
            line += (
                f"   PEFT {statistics.median(other):9.2f} ({min(other):.2f} to {max(other):.2f})   {ratio:.0f} times"
            )
        print(line)
    harness.write(options.out, "attach", {"layers": options.layers, "milliseconds": times})


if __name__ == "__main__":
    main()
