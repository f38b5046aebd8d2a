"""Times attach, switch, detach, attach again and draw against PEFT, on a large model without its weights and on a small one.

    python benchmarks/attach.py [--layers 80 8] [--out attach.json]

Both run in one process and take turns. It prints milliseconds, and the ratio within a round of ours to PEFT's. PEFT cannot
attach a removed adapter again: for it, "detach and attach again" is `unload` and `get_peft_model`. A shape of more than
eight layers has no weights: then attaching draws no start values. It takes about five minutes.
"""

import argparse
from typing import Any

import harness
import peft
import rounds
import torch
import transformers

import deltakit as dk


def backbone(layers: int) -> Any:
    """Returns a Llama with the widths of the 70-billion-parameter model on the meta device, or a small one with weights."""
    large = layers > 8
    config = transformers.LlamaConfig(
        hidden_size=8192 if large else 768,
        intermediate_size=28672 if large else 2048,
        num_hidden_layers=layers,
        num_attention_heads=64 if large else 12,
        num_key_value_heads=8 if large else 4,
        vocab_size=128256 if large else 1000,
    )
    with torch.device("meta" if large else "cpu"):
        return transformers.LlamaForCausalLM(config)


def ours(model: Any, calls: rounds.Calls) -> None:
    method = dk.LoRA(r=8, at=["@attn.{q,k,v,o}", "@ff.{up,gate,down}"])
    delta = calls.run("attach", "deltakit", lambda: dk.attach(model, method))
    calls.run("switch off and on", "deltakit", lambda: [setattr(delta, "active", on) for on in (False, True)])
    calls.run("draw", "deltakit", lambda: str(dk.show(model)))
    calls.run("detach and attach again", "deltakit", lambda: delta.detach().attach())
    calls.run("detach", "deltakit", delta.detach)


def theirs(model: Any, calls: rounds.Calls) -> None:
    config = peft.LoraConfig(r=8, target_modules=harness.LINEARS["Llama 150 M"], task_type="CAUSAL_LM")
    wrapped = calls.run("attach", "PEFT", lambda: peft.get_peft_model(model, config))

    def switch() -> None:
        with wrapped.disable_adapter():
            pass

    calls.run("switch off and on", "PEFT", switch)
    wrapped = calls.run("detach and attach again", "PEFT", lambda: peft.get_peft_model(wrapped.unload(), config))
    calls.run("detach", "PEFT", wrapped.unload)


def measure(layers: int, bound: rounds.Bound) -> list[dict[str, Any]]:
    """Returns the rows of a shape."""
    model, calls = backbone(layers), rounds.Calls()

    def one(calls: rounds.Calls) -> None:
        ours(model, calls)
        theirs(model, calls)

    one(rounds.Calls())
    ended = rounds.repeated(lambda: one(calls), bound, lambda: calls.known("PEFT"))
    rows = []
    for what, times in calls.of.items():
        times.bound = ended
        base = "PEFT" if "PEFT" in times.cpu else "deltakit"
        milliseconds = {
            clock: {who: rounds.quartiles([1000 * second for second in own]) for who, own in seconds.items()}
            for clock, seconds in (("cpu", times.cpu), ("wall", times.wall))
        }
        rows.append({"layers": layers, "what": what, "ms": milliseconds, **rounds.compared(times, base)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="*", default=[80, 8])
    harness.add_options(parser, rounds.Bound(9, 61, 180))
    options = parser.parse_args()
    bound = harness.begin(options)
    rows = []
    for layers in options.layers:
        rows += measure(layers, bound)
        harness.write(options.out, "attach", rows)
    for row in rows:
        print(f"{7 * row['layers']} targets, {row['what']}; rounds: {rounds.counted(row)}")
        for clock, found in row["ms"].items():
            shown = "  ".join(f"{who} {rounds.text(own, 2)} ms" for who, own in found.items())
            print(f"    {clock}: {shown}  ratio {rounds.text(row[clock]['ratios']['deltakit'])}", flush=True)


if __name__ == "__main__":
    main()
