"""Prints the largest difference between the logits of other libraries and those of deltakit with the same files.

    python benchmarks/formats.py [--only T5 ...] [--out formats.json]

For "in", the other library saves an adapter with random values, and deltakit loads it. For "out", deltakit saves a delta, and
the other library loads it. Each time the backbone is built again, tiny and in float64; Mixtral in float32.
"""

import argparse
import copy
import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import harness
import peft
import torch
from torch import nn

import deltakit as dk
from support.models import randomize
from support.peft_models import QUERIES, adapted, opened, outputs, wide


class Case(NamedTuple):
    """One row: what is compared, and what returns both logits when it is given an empty folder."""

    format: str
    method: str
    backbone: str
    logits: Callable[[Path], tuple[torch.Tensor, torch.Tensor]]


IA3 = {
    "bert": (["key", "value", "output.dense"], ["output.dense"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "t5": (["k", "v", "wo"], ["wo"]),
    "mixtral": (["k_proj", "v_proj"], []),
    "resnet": (["convolution", "0.shortcut.convolution"], ["0.shortcut.convolution"]),
}
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM", "mixtral": "CAUSAL_LM"}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
WITH_PREFIX = ("bert", "gpt2", "llama")


def peft_configs() -> dict[tuple[str, str], Any]:
    """Returns PEFT's config for each method and backbone."""
    found: dict[tuple[str, str], Any] = {}
    for name, names in QUERIES.items():
        found["LoRA", name] = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names)
        found["LoRA, bias of B", name] = peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, lora_bias=True)
        found["AdaLoRA", name] = peft.AdaLoraConfig(target_modules=names, total_step=9, init_r=4, lora_alpha=5)
        found["IA3", name] = peft.IA3Config(target_modules=IA3[name][0], feedforward_modules=IA3[name][1])
    for name, task in TASKS.items():
        found["prompt tuning", name] = peft.PromptTuningConfig(num_virtual_tokens=5, task_type=task)
        found["P-tuning", name] = peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=11, task_type=task)
    for name in WITH_PREFIX:
        found["prefix tuning", name] = peft.PrefixTuningConfig(num_virtual_tokens=5, task_type=TASKS[name])
    found["LoRA on experts", "mixtral"] = peft.LoraConfig(r=3, target_modules=[], target_parameters=EXPERTS)
    found["LoRA, rank and alpha patterns", "llama"] = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 1}, alpha_pattern={"layers.1.*q_proj": 3}
    )
    return found


WEIGHTS = {
    "VeRA": (peft.VeraConfig(r=3), dk.VeRA(r=3)),
    "RandLoRA": (peft.RandLoraConfig(r=3), dk.RandLoRA(r=3)),
    "VB-LoRA": (peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=2), dk.VBLoRA(r=3, vectors=7, length=2)),
    "GraLoRA": (peft.GraloraConfig(r=4), dk.GraLoRA(r=4)),
    "GLoRA": (peft.GloraConfig(r=3), dk.GLoRA(r=3)),
    "WaveFT": (peft.WaveFTConfig(n_frequency=40), dk.WaveFT(n=40)),
    "HiRA": (peft.HiraConfig(r=3), dk.HiRA(r=3)),
    "LoHa": (peft.LoHaConfig(r=2, use_effective_conv2d=True), dk.LoHa(r=2, tucker=True)),
    "LoKr": (peft.LoKrConfig(r=2, use_effective_conv2d=True), dk.LoKr(r=2, tucker=True)),
    "MiSS": (peft.MissConfig(r=4), dk.MiSS(r=4)),
    "DeLoRA": (peft.DeloraConfig(r=3, delora_lambda=2.5), dk.DeLoRA(r=3, strength=2.5, start="zero")),
}
"""The methods that change weights: PEFT's config and the same in deltakit."""

NO_CONV1D = ("GLoRA", "LoHa", "LoKr", "MiSS", "DeLoRA")
OF_IMAGES = ("LoHa", "LoKr", "HiRA")


def weight_methods() -> list[Case]:
    """Returns the rows of methods that change weights, on the layers that PEFT has each of them for."""
    found = []
    for method, (config, ours) in WEIGHTS.items():
        for name, targets in QUERIES.items():
            if (name == "resnet" and method not in OF_IMAGES) or (name == "gpt2" and method in NO_CONV1D):
                continue
            theirs = copy.deepcopy(config)
            theirs.target_modules = set(targets)
            found.append(Case("PEFT in", method, name, read(name, theirs)))
            at = {"at": "**", "of": nn.Conv2d} if name == "resnet" else {"at": targets}
            found.append(Case("PEFT out", method, name, written(name, dataclasses.replace(ours, **at))))
    return found


def read(name: str, config: Any) -> Callable[[Path], tuple[torch.Tensor, torch.Tensor]]:
    """Returns what compares PEFT with a delta loaded from its files."""

    def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        adapted(wide(name), config, folder)
        model = wide(name)
        dk.load(folder, model)
        return outputs(name, model), outputs(name, opened(wide(name), folder))

    return logits


def written(name: str, method: dk.Method) -> Callable[[Path], tuple[torch.Tensor, torch.Tensor]]:
    """Returns what compares a delta with PEFT that has loaded its files."""

    def logits(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
        model = wide(name)
        delta = randomize(dk.attach(model, method, train=()), 0.3)
        for value in delta.parameters():
            # PEFT holds prompts and prefixes in float32.
            value.data.copy_(value.data.float())
        delta.save(folder, format="peft")
        return outputs(name, model), outputs(name, opened(wide(name), folder))

    return logits


def cases() -> list[Case]:
    """Returns all rows."""
    found = [Case("PEFT in", method, name, read(name, config)) for (method, name), config in peft_configs().items()]
    for name in QUERIES:
        found.append(Case("PEFT out", "LoRA", name, written(name, dk.LoRA(r=3, alpha=5))))
        scales = dk.IA3(at="**", of=nn.Conv2d) if name == "resnet" else dk.IA3(at=IA3[name][0], side="output")
        found.append(Case("PEFT out", "IA3", name, written(name, scales)))
    for name in TASKS:
        found.append(Case("PEFT out", "soft prompt", name, written(name, dk.SoftPrompt(tokens=5, where="start"))))
    for name in WITH_PREFIX:
        found.append(Case("PEFT out", "prefix", name, written(name, dk.Prefix(tokens=5, shift=True))))
    ranks = dk.LoRA(r={"layers.0": 4, "*": 2}, alpha={"q_proj": 3, "*": 7})
    found += weight_methods()
    return [*found, Case("PEFT out", "LoRA, ranks and alphas", "llama", written("llama", ranks))]


def difference(case: Case) -> float:
    """Returns the largest difference between the two logits. Of a prompt in the output only the text is compared."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        ours, theirs = case.logits(Path(folder) / "adapter")
    if ours.ndim == 3 and theirs.shape[1] != ours.shape[1]:
        theirs = theirs[:, -ours.shape[1] :]
    return float((ours - theirs).abs().max())


def main() -> None:
    """Runs all rows and prints them as a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", help="only rows with one of these words")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(", ".join(f"{name} {value}" for name, value in harness.machine().items()))
    print("\n| format | method | backbone | largest difference of logits |\n|---|---|---|---|")
    rows = []
    for case in cases():
        name = f"{case.format} | {case.method} | {case.backbone}"
        if options.only is None or any(word.lower() in name.lower() for word in options.only):
            largest = difference(case)
            rows.append({"format": case.format, "method": case.method, "backbone": case.backbone, "largest": largest})
            print(f"| {name} | {largest:.1e} |", flush=True)
    harness.write(options.out, "formats", rows)


if __name__ == "__main__":
    main()
