"""Times Llama shapes of 1 and 8 billion parameters on a GPU: steps, memory, decoding and mixed batches, beside PEFT and bare.

    python benchmarks/gpu.py [--sizes 1B 8B] [--device cuda] [--out gpu.json]
    python benchmarks/gpu.py --device cpu --sizes tiny    # that it runs

In bfloat16, with LoRA r=16 on all linear layers and random weights. All contestants have the same weights in memory; `null` is
a second copy of deltakit's. On a GPU wall time decides, and every figure waits for the device.
"""

import argparse
from pathlib import Path
from typing import Any

import harness
import peft
import rounds
import torch
import transformers as tf

import deltakit as dk

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
}
"""The shapes of Llama 3.2 1B and Llama 3.1 8B, and one for trying."""

LINEARS = harness.LINEARS["Llama 1 B"]
MIXED = ((16, 16), (64, 64))
"""The rows and the distinct deltas of mixed batches."""


def backbone(size: str, device: str) -> Any:
    """Returns a frozen Llama in bfloat16, whose weights are drawn on the device."""
    shape = SIZES[size]
    config = tf.LlamaConfig(
        **shape,
        num_key_value_heads=min(8, shape["num_attention_heads"]),
        vocab_size=1000 if size == "tiny" else 128256,
        dtype=torch.bfloat16,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def contestants(bare: Any, count: int = 1) -> dict[str, Any]:
    """Returns the bare backbone, and copies that share its weights and have this number of LoRAs each."""
    models = {"bare": bare}
    names = [f"d{k}" for k in range(count)]
    for own in ("deltakit", "null"):
        models[own] = harness.twin(bare)
        for name in names:
            dk.attach(models[own], dk.LoRA(r=16, at=LINEARS), name=name)
    # Its adapters in the backbone's dtype, as ours are; by default PEFT keeps them in float32, which costs more.
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS)
    models["PEFT"] = peft.get_peft_model(
        harness.twin(bare), config, adapter_name=names[0], autocast_adapter_dtype=False
    )
    for name in names[1:]:
        models["PEFT"].add_adapter(name, config, autocast_adapter_dtype=False)
    models["PEFT"].eval()
    return models


def step(model: Any, ids: torch.Tensor, embedded: torch.Tensor) -> None:
    """Runs a training step. The embedded inputs require gradients, so all backward passes are equally long."""
    model(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    embedded.grad = None


def peak(call: rounds.Call, device: str) -> int:
    """Returns the most bytes that a call has beyond those that were there before: on the GPU, or else resident."""
    call()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = harness.status("VmRSS")
    call()
    return harness.status("VmHWM") - before


def training(size: str, bare: Any, options: argparse.Namespace, bound: rounds.Bound) -> list[dict[str, Any]]:
    """Returns the rows of a training step: its time and its peak memory."""
    models = contestants(bare)
    ids = torch.randint(5, 900, (options.rows, options.length), device=options.device)
    embedded = bare.get_input_embeddings()(ids).detach().requires_grad_()
    cases = {who: lambda m=m: step(m, ids, embedded) for who, m in models.items()}
    peaks = {who: peak(call, options.device) / 1e6 for who, call in cases.items()}
    times = rounds.interleaved(cases, bound, rounds.share_known("bare"))
    what = f"training step, {options.rows} x {options.length} tokens"
    timed = _row(size, what, times, {who: 1000 * value for who, value in _seconds(times).items()}, "ms")
    return [timed, {"model": size, "what": f"{what}: peak", "base": "bare", "measures": peaks, "unit": "MB"}]


def decoding(size: str, bare: Any, options: argparse.Namespace, bound: rounds.Bound) -> list[dict[str, Any]]:
    """Returns the row of `generate`: tokens a second."""
    models = contestants(bare)
    ids = torch.randint(5, 900, (1, 8), device=options.device)
    new = options.tokens

    @torch.no_grad()
    def generate(model: Any) -> None:
        model.generate(input_ids=ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)

    times = rounds.interleaved(
        {k: lambda m=m: generate(m) for k, m in models.items()}, bound, rounds.share_known("bare")
    )
    speeds = {who: new / value for who, value in _seconds(times).items()}
    return [_row(size, f"generate {new} tokens, one example", times, speeds, "tokens a second")]


def mixed(size: str, bare: Any, options: argparse.Namespace, bound: rounds.Bound) -> list[dict[str, Any]]:
    """Returns the rows of forwards whose examples have their own deltas, of one token each."""
    found = []
    for examples, distinct in MIXED:
        models = contestants(bare, distinct)
        ids = torch.randint(5, 900, (examples, 1), device=options.device)
        names = [f"d{k % distinct}" for k in range(examples)]
        cases = {k: lambda m=models[k], ids=ids: m(input_ids=ids) for k in ("bare", "deltakit", "null")}
        cases["PEFT"] = lambda m=models["PEFT"], ids=ids, own=names: m(input_ids=ids, adapter_names=own)
        with torch.no_grad(), dk.rows(models["deltakit"], names), dk.rows(models["null"], names):
            times = rounds.interleaved(cases, bound, rounds.share_known("bare"))
        milliseconds = {who: 1000 * value for who, value in _seconds(times).items()}
        found.append(_row(size, f"{examples} examples, {distinct} deltas, one token", times, milliseconds, "ms"))
    return found


def _seconds(times: rounds.Times) -> dict[str, float]:
    return {who: rounds.quartiles(own).middle for who, own in times.deciding.items()}


def _row(size: str, what: str, times: rounds.Times, measures: dict[str, float], unit: str) -> dict[str, Any]:
    row = {"model": size, "what": what, "base": "bare", "measures": measures, "unit": unit}
    return {**row, **rounds.compared(times, "bare")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="*", default=["1B", "8B"], choices=list(SIZES))
    parser.add_argument("--rows", type=int, default=4, help="of a training batch")
    parser.add_argument("--length", type=int, default=512, help="of its rows, in tokens")
    parser.add_argument("--tokens", type=int, default=64, help="that are generated")
    harness.add_options(parser, rounds.Bound(9, 61, 45))
    parser.set_defaults(device="cuda")
    options = parser.parse_args()
    if options.device != "cpu":
        # So that wall time decides, and the page names the device.
        torch.cuda.init()
    bound = harness.begin(options)
    rows: list[dict[str, Any]] = []
    for size in options.sizes:
        bare = backbone(size, options.device)
        for part in (training, decoding, mixed):
            for row in part(size, bare, options, bound):
                rows.append(row)
                shown = "  ".join(f"{who} {value:.4g}" for who, value in row["measures"].items())
                print(f"{size}, {row['what']}: {shown} {row['unit']}")
                print(f"    {rounds.said(row, 'bare')}" if "clock" in row else "", flush=True)
            harness.write(options.out, "gpu", rows)


if __name__ == "__main__":
    main()
