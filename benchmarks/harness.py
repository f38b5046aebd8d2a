"""Shared by all benchmarks: the options, one thread, the backbones, and the versions. `rounds.py` has the timing."""

import argparse
import copy
import json
import os
import platform
import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from rounds import Bound
from torch import nn

import deltakit as dk


def add_options(parser: argparse.ArgumentParser, bound: Bound | None = None) -> None:
    """Adds the options of all benchmarks that run models: `--device`, `--out`, and those of the rounds of each row."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path)
    if bound is not None:
        parser.add_argument("--least", type=int, default=bound.least, help="rounds of a row at least")
        parser.add_argument("--most", type=int, default=bound.most, help="and at most")
        parser.add_argument(
            "--seconds", type=float, default=bound.seconds, help="of CPU time, after which a row has no more rounds"
        )


def begin(options: argparse.Namespace) -> Bound:
    """Sets one thread, prints the machine, and returns the bound of the rounds.

    With several threads the time of a small product is a matter of what else the machine does: a product of 20 us took
    3,300 us beside a busy neighbour, because each waits for the slowest thread. CPU time would count the waiting.
    """
    torch.set_num_threads(1)
    print(machine(), flush=True)
    return Bound(*(getattr(options, name, 0) for name in ("least", "most", "seconds")))


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


FORM = 2
"""The form of the files of results. Those of form 1 had neither CPU time nor a spread of the share."""


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
        partial.write_text(
            json.dumps({"benchmark": name, "form": FORM, "machine": machine(), "rows": rows}, indent=1) + "\n"
        )
        partial.replace(path)


def rows_there(path: Path | None) -> list[Any]:
    """Returns the rows that a file of results has already; none if it is of an older form."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    return found["rows"] if found.get("form") == FORM else []


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


def backbone(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", layers: int = 0) -> Any:
    """Returns a backbone in evaluation mode; every call gives the same weights.

    Args:
        layers: how many layers of its shape it has; 0 for all.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]()
    if layers:
        config.num_hidden_layers = layers
        # T5 has as many in its decoder.
        if getattr(config, "num_decoder_layers", None):
            config.num_decoder_layers = layers
    return tf.AutoModel.from_config(config).to(device, dtype).eval()


def twin(model: nn.Module) -> Any:
    """Returns a copy with the same parameter tensors: where a copy lies in memory would change how fast it is."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


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
