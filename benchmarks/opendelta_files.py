"""Makes the deltas of OpenDelta that the tests read, by OpenDelta itself.

    python benchmarks/opendelta_files.py tests/checkpoints/opendelta

It needs an environment of its own: OpenDelta of August 2023 (commit 067eed2 on GitHub), transformers 4.30.2, and a torch that
they run with (2.13.0 was used). Of what OpenDelta imports, DeltaCenter and web.py may be stubs: nothing here uses them.

For each backbone it writes the weights, and for each case the folder that `save_finetuned` wrote and the logits; for prefixes
on T5 also those without a mask, and those of generated tokens.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

import opendelta as od

COMMON: dict[str, Any] = {"vocab_size": 19, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DROPS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 20}
BACKBONES: dict[str, Any] = {
    "bert": (
        tf.BertForSequenceClassification,
        tf.BertConfig,
        {**SIZES, **DROPS, **COMMON, "max_position_embeddings": 32},
    ),
    "t5": (
        tf.T5ForConditionalGeneration,
        tf.T5Config,
        {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3, "decoder_start_token_id": 0, **COMMON},
    ),
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 32, **COMMON}),
}
# Each: the class, its options, and what stays trainable beside the delta; None if nothing is frozen.
DELTAS = ["deltas"]
HEAD = ["deltas", "classifier"]
CASES: dict[str, tuple[str, dict[str, Any], list[str] | None]] = {
    "lora": ("Lora", {"lora_r": 2, "lora_alpha": 5}, DELTAS),
    "adapter": ("Adapter", {"bottleneck_dim": 5}, DELTAS),
    "low_rank": ("LowRankAdapter", {"reduction_factor": 3}, DELTAS),
    "compacter": ("Compacter", {"reduction_factor": 3}, DELTAS),
    "parallel": ("ParallelAdapter", {"bottleneck_dim": 5}, DELTAS),
    "bitfit": ("BitFit", {}, DELTAS),
    "prefix": ("Prefix", {"prefix_token_num": 3, "embed_dim": 5, "mid_dim": 7}, DELTAS),
    "prefix_plain": ("Prefix", {"prefix_token_num": 3, "reparameterize": False}, DELTAS),
    "soft_prompt": ("SoftPrompt", {"soft_token_num": 3}, DELTAS),
}
ONLY: dict[str, dict[str, tuple[str, dict[str, Any], list[str] | None]]] = {
    "bert": {
        "lora_head": ("Lora", {"lora_r": 2}, HEAD),
        "bitfit_head": ("BitFit", {}, HEAD),
        "never_frozen": ("Adapter", {"bottleneck_dim": 5}, None),
        "swish": (
            "Adapter",
            {"bottleneck_dim": 5, "non_linearity": "swish", "modified_modules": ["output.dense"]},
            DELTAS,
        ),
        "leakyrelu": ("LowRankAdapter", {"reduction_factor": 3, "non_linearity": "leakyrelu"}, DELTAS),
        "compacter_full": (
            "Compacter",
            {"reduction_factor": 3, "factorized_phm": False, "use_bias_up_sampler": False},
            DELTAS,
        ),
        "compacter_rule": (
            "Compacter",
            {
                "reduction_factor": 3,
                "factorized_phm_rule": True,
                "use_bias_up_sampler": False,
                "use_bias_down_sampler": False,
            },
            DELTAS,
        ),
        "parallel_by_name": (
            "ParallelAdapter",
            {"bottleneck_dim": 5, "modified_modules": ["intermediate.dense", "[r]layer.*[0-9].output.dense"]},
            DELTAS,
        ),
        "parallel_pairs": (
            "ParallelAdapter",
            {
                "bottleneck_dim": 5,
                "modified_modules": [
                    *("self.query", "attention.output.dense"),
                    *("intermediate.dense", "[r]layer.*[0-9].output.dense"),
                ],
            },
            DELTAS,
        ),
    },
    "t5": {
        # In some of the blocks: those behind them lose their relative positions, too.
        "prefix_somewhere": (
            "Prefix",
            {
                "prefix_token_num": 3,
                "embed_dim": 5,
                "mid_dim": 7,
                "modified_modules": [
                    "encoder.block.0.layer.0.SelfAttention",
                    "decoder.block.1.layer.0.SelfAttention",
                ],
            },
            DELTAS,
        ),
    },
    "gpt2": {},
}


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Returns the arguments of the call whose logits are kept."""
    ids = torch.randint(3, 19, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    more = {"decoder_input_ids": ids[:, :4].clone(memory_format=torch.contiguous_format)} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    kind, config, options = BACKBONES[name]
    model: nn.Module = kind(config(**options)).eval()
    with torch.no_grad():
        # Biases and norms start at 0 and 1, where much does not show.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def make(
    folder: Path, name: str, case: str, kind: str, options: dict[str, Any], exclude: list[str] | None
) -> dict[str, torch.Tensor]:
    """Saves a delta of OpenDelta with random values, and returns its logits by what was called."""
    model = build(name)
    delta = getattr(od, f"{kind}Model")(model, **options)
    if exclude is not None:
        delta.freeze_module(exclude=exclude, set_state_dict=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and exclude is not None:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    delta.save_finetuned(str(folder / name / case))
    model.eval()
    call = inputs(name)
    with torch.no_grad():
        found = {case: model(**call).logits}
        if (name, kind) == ("t5", "Prefix"):
            found[f"{case}.unmasked"] = model(**{k: v for k, v in call.items() if k != "attention_mask"}).logits
            if "modified_modules" not in options:
                found[f"{case}.generated"] = generated(model, call)
    return {key: value.contiguous().clone() for key, value in found.items()}


def generated(model: Any, call: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the scores [7, batch, vocabulary] of generated tokens."""
    output = model.generate(
        call["input_ids"],
        attention_mask=call["attention_mask"],
        max_new_tokens=7,
        min_new_tokens=7,
        do_sample=False,
        num_beams=1,
        output_scores=True,
        return_dict_in_generate=True,
    )
    return torch.stack(output.scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    for name in BACKBONES:
        model = build(name)
        (folder / name).mkdir(parents=True, exist_ok=True)
        expected = {"bare": model(**inputs(name)).logits.detach().contiguous().clone()}
        save_file(
            {key: value.clone() for key, value in model.state_dict().items()}, folder / name / "backbone.safetensors"
        )
        for case, (kind, options, exclude) in {**CASES, **ONLY[name]}.items():
            if (name, case) == ("gpt2", "lora"):
                # OpenDelta has no LoRA for GPT-2's layers.
                continue
            expected |= make(folder, name, case, kind, options, exclude)
        save_file(
            {**inputs(name), **{f"expected.{key}": value for key, value in expected.items()}},
            folder / name / "expected.safetensors",
        )


if __name__ == "__main__":
    main()
