"""Shared by all benchmarks: interleaved timing, ratios with their spread, the backbones, and the versions."""

import argparse
import gc
import json
import os
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import deltakit as dk

Call = Callable[[], Any]


def add_options(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the options of all benchmarks that run models: `--device`, `--rounds` and `--out`."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path)


def interleaved(cases: Mapping[str, Call], rounds: int, *, warm: int = 2) -> dict[str, list[float]]:
    """Returns the seconds of each case in each round.

    The cases take turns, and every second round runs them backwards, so that slow changes of the machine cancel out.
    """
    for _ in range(warm):
        for call in cases.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in cases}
    gc.collect()
    gc.disable()
    finish()
    try:
        for turn in range(rounds):
            for name in list(cases)[:: 1 if turn % 2 else -1]:
                start = time.perf_counter()
                cases[name]()
                finish()
                times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def finish() -> None:
    """Waits until a GPU has done all that it was given. Without one it does nothing."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def ratios(times: Mapping[str, list[float]], base: str) -> dict[str, tuple[float, float, float]]:
    """Returns the median and the quartiles of each case's ratio to the base, taken within each round."""
    found = {}
    for name, own in times.items():
        each = [a / b for a, b in zip(own, times[base], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4) if len(each) > 1 else (each[0],) * 3
        found[name] = (middle, low, high)
    return found


def spread(ratio: tuple[float, float, float]) -> str:
    """Returns a ratio as text: the median and the quartiles."""
    middle, low, high = ratio
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def machine() -> dict[str, Any]:
    """Returns the versions and the machine that results belong to."""
    packages = {name: version(name) for name in ("torch", "transformers", "peft")}
    gpu = {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_initialized() else {}
    return {
        **packages,
        **gpu,
        "deltakit": dk.__version__,
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def status(field: str) -> int:
    """Returns a field of this process's status in bytes, such as its resident memory `VmRSS`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def write(path: Path | None, name: str, rows: Any) -> None:
    """Writes the results of a benchmark as JSON, with the machine."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # By renaming: a benchmark that is stopped while it writes must not lose what it had.
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"benchmark": name, "machine": machine(), "rows": rows}, indent=1) + "\n")
        partial.replace(path)


def page(script: str, title: str, text: str, lines: Sequence[str]) -> str:
    """Returns a Markdown page of results: the command, the machine, a text and a table."""
    known = ", ".join(f"{key} {value}" for key, value in machine().items())
    head = [f"<!-- written by benchmarks/{script} -->", f"# {title}", "", f"`python benchmarks/{script}`; {known}.", ""]
    return "\n".join([*head, *textwrap.wrap(text, 127), "", *lines, ""])


CONFIGS: dict[str, Callable[[], Any]] = {
    "GPT-2 small": lambda: tf.GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False),
    "BERT base": lambda: tf.BertConfig(hidden_dropout_prob=0, attention_probs_dropout_prob=0),
    "T5 base": lambda: tf.T5Config(
        d_model=768, d_ff=3072, num_layers=12, num_heads=12, dropout_rate=0, decoder_start_token_id=0, use_cache=False
    ),
    "Llama 150 M": lambda: tf.LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        use_cache=False,
    ),
    "Llama 1 B": lambda: tf.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        use_cache=False,
    ),
}
"""The configs of the backbones. Their weights are random."""


def llama(kind: Any = tf.LlamaForCausalLM, **sizes: Any) -> Any:
    """Returns a Llama of these sizes in evaluation mode; every call gives the same weights."""
    torch.manual_seed(0)
    return kind(tf.LlamaConfig(**sizes)).eval()


SIZES = {"cpu": (4, 128), "cuda": (16, 512)}
"""The examples and the tokens of each in a batch that keeps the device busy."""


def models_for(device: str) -> list[str]:
    """Returns the names of the backbones that are measured on a device. The largest one only runs on a GPU."""
    return [name for name in CONFIGS if device != "cpu" or name != "Llama 1 B"]


def backbone(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """Returns a backbone in evaluation mode; every call gives the same weights."""
    torch.manual_seed(0)
    return tf.AutoModel.from_config(CONFIGS[name]()).to(device, dtype).eval()


def batch(model: Any, rows: int | None = None, length: int | None = None) -> dict[str, torch.Tensor]:
    """Returns a batch of token ids for a backbone, on its device; by default one that keeps the device busy."""
    usual = SIZES[model.device.type]
    rows, length = rows or usual[0], length or usual[1]
    ids = torch.randint(5, 30000, (rows, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    return {"input_ids": ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})}


LINEARS = {
    "GPT-2 small": ["c_attn", "c_proj", "c_fc"],
    "BERT base": ["query", "key", "value", "dense"],
    "T5 base": ["q", "k", "v", "o", "wi", "wo"],
    "Llama 150 M": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "Llama 1 B": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
"""The names of all linear layers in the blocks, as PEFT expects them. deltakit gets the same modules by path."""

QUERY_VALUE = {"GPT-2 small": ["c_attn"], "BERT base": ["query", "value"], "T5 base": ["q", "v"]}
QUERY_VALUE["Llama 150 M"] = QUERY_VALUE["Llama 1 B"] = ["q_proj", "v_proj"]


def targets(model: Any, names: list[str]) -> list[str]:
    """Returns the paths of the modules with these names, except poolers."""
    return [path for path, _ in model.named_modules() if path.rpartition(".")[2] in names and "pooler" not in path]
