"""Attach, switch, detach, attach again and draw, beside PEFT, on the shape of a large model without its weights.

    python benchmarks/attach.py [--layers 80] [--rounds 5] [--out attach.json]

Both run in one process, turn by turn; medians and ranges of the rounds are printed in milliseconds, and the medians' ratio.
"""

import argparse
import json
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import peft
import torch
import transformers

import deltakit as dk


def backbone(layers):
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


def timed(times, name, function):
    start = time.perf_counter()
    result = function()
    times.setdefault(name, []).append(1000 * (time.perf_counter() - start))
    return result


def ours(model, times):
    delta = timed(times, "attach", lambda: dk.attach(model, dk.LoRA(r=8, at=["@attn.{q,k,v,o}", "@ff.{up,gate,down}"])))
    timed(times, "switch off and on", lambda: [setattr(delta, "active", on) for on in (False, True)])
    timed(times, "draw", lambda: str(dk.show(model)))
    timed(times, "detach", delta.detach)
    timed(times, "attach again", delta.attach)
    delta.detach()


def theirs(model, times):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"]
    config = peft.LoraConfig(r=8, target_modules=names, task_type="CAUSAL_LM")
    wrapped = timed(times, "attach", lambda: peft.get_peft_model(model, config))

    def switch():
        with wrapped.disable_adapter():
            pass

    timed(times, "switch off and on", switch)
    timed(times, "detach", wrapped.unload)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("attach.json"))
    options = parser.parse_args()
    model = backbone(options.layers)
    times = {"deltakit": {}, "peft": {}}
    for _ in range(options.rounds):
        ours(model, times["deltakit"])
        theirs(model, times["peft"])
    versions = {name: version(name) for name in ("torch", "transformers", "peft", "deltakit")}
    print(f"Llama shape, {options.layers} layers, {7 * options.layers} targets; {platform.machine()}; {versions}")
    for name, found in times["deltakit"].items():
        line = f"{name:18} {statistics.median(found):8.2f} ({min(found):.2f} to {max(found):.2f})"
        if name in times["peft"]:
            other = times["peft"][name]
            ratio = statistics.median(other) / statistics.median(found)
            line += (
                f"   peft {statistics.median(other):9.2f} ({min(other):.2f} to {max(other):.2f})   {ratio:.0f} times"
            )
        print(line)
    options.out.write_text(
        json.dumps({"versions": versions, "layers": options.layers, "milliseconds": times}, indent=2)
    )


if __name__ == "__main__":
    main()
