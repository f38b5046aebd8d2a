"""Writes soft prompts and prefixes as PEFT's prompt tuning and prefix tuning, where PEFT computes the same."""

from typing import Any

import torch
from torch import Tensor

from deltakit.core import Attachment, own_modules, tensors_of
from deltakit.files.formats.merged import refuse_unknown
from deltakit.files.formats.peft.keys import PREFIX_OF_PROMPTS, PROMPT, TASKS
from deltakit.files.formats.peft.prompt import embed_scale, first_is_read
from deltakit.files.formats.writing import Writing

PROMPTS = ("soft_prompt", "p_tuning", "intrinsic_prompt")
"""The methods whose files have one prompt."""

PREFIXES = ("prefix", "p_tuning_v2")
"""The methods whose files have keys and values of a prefix."""

_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
"""PEFT's tasks, by the end of the class's name. Without one, PEFT puts no prompt into a model."""

_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""How the names of the heads end that PEFT saves with a prompt."""


def prompt_options(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the options and the tensor of a soft prompt.

    Raises:
        CheckpointError: if PEFT would compute something else.
    """
    attachment, tensors = writing.attachment, writing.tensors
    (method,) = attachment.record.methods
    backbone, task = attachment.backbone, _task(writing)
    insertion: Any = next(
        (vars(site.module)["insertion"] for site in attachment.sites if hasattr(site.module, "insertion")), None
    )
    if insertion is None:
        raise writing.impossible("its prompt stands where the ids are, and PEFT's in front of the text (prepend=True)")
    if insertion.at:
        raise writing.impossible("its prompt stands after the first token, and PEFT's before it (where='start')")
    reads = first_is_read(backbone, task)
    if reads and insertion.trim:
        raise writing.impossible(
            "the classifier reads the first token, which in PEFT is the prompt's, as with SoftPrompt(trim=False)"
        )
    if not reads and not insertion.trim and not insertion.encodes and task == "SEQ_CLS":
        raise writing.impossible("the classifier reads the last token, which trim=False moves")
    (prompt,) = (value for name, value in tensors.items() if name.endswith(f".{method.name}.prompt"))
    vectors = prompt * embed_scale(backbone)
    both = 2 if insertion.encodes else 1
    return {
        "task_type": task,
        "num_virtual_tokens": len(prompt),
        "num_transformer_submodules": both,
        "token_dim": prompt.shape[1],
        # PEFT does not use these for prompts, and fails where it finds them neither here nor in the backbone's config.
        "num_layers": 1,
        "num_attention_heads": 1,
    }, {PROMPT: vectors.repeat(both, 1), **_head(attachment, task)}


def multitask_options(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the options and the tensors of a multitask prompt of one task.

    Raises:
        CheckpointError: if PEFT would compute something else.
    """
    options, named = prompt_options(writing)
    for name, ours in TASKS.items():
        (named[name],) = (value for key, value in writing.tensors.items() if key.endswith(f".multitask_prompt.{ours}"))
    tokens, rows = options["num_virtual_tokens"], named["prefix_task_rows"]
    # With more, PEFT would put prompts into the decoder, too.
    options["num_transformer_submodules"], named[PROMPT] = 1, named[PROMPT][:tokens]
    return {**options, "num_tasks": len(rows), "num_ranks": rows.shape[1], "prompt_tuning_init": "RANDOM"}, named


def prefix_options(writing: Writing) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the options and the tensor of a prefix.

    Raises:
        CheckpointError: if PEFT would compute something else.
    """
    attachment, tensors = writing.attachment, writing.tensors
    (method,) = attachment.record.methods
    if not method.shift:  # type: ignore[attr-defined]
        raise writing.impossible("in PEFT the positions of the text start after a prefix, as with Prefix(shift=True)")
    if method.gate:  # type: ignore[attr-defined]
        raise writing.impossible("its prefix has a gate, and PEFT has none with one")
    order = {path: number for number, (path, _) in enumerate(own_modules(attachment.backbone))}
    sites = [site for site in attachment.sites if attachment.named(site, "key") in tensors]
    sites.sort(key=lambda site: order[site.path])
    pairs = [[tensors[attachment.named(site, name)] for name in ("key", "value")] for site in sites]
    layers = getattr(getattr(attachment.backbone, "config", None), "num_hidden_layers", None)
    if len(pairs) != layers or len({tensor.shape for pair in pairs for tensor in pair}) > 1:
        raise writing.impossible(
            f"PEFT puts keys and values of one shape into every layer, and it has {len(pairs)} pairs for {layers} layers"
        )
    stacked = torch.stack([torch.stack(pair) for pair in pairs])
    heads, tokens, d = stacked.shape[2:]
    task = _task(writing)
    return {
        "task_type": task,
        "num_virtual_tokens": tokens,
        "num_transformer_submodules": 1,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * d,
    }, {PROMPT: stacked.permute(3, 0, 1, 2, 4).reshape(tokens, -1), **_head(attachment, task)}


def _head(attachment: Attachment, task: str) -> dict[str, Tensor]:
    """Returns the tensors of the heads that PEFT expects beside a prompt, also where nobody trains them.

    Raises:
        CheckpointError: if one has no values here.
    """
    ends = _HEADS.get(task, ())
    heads = [f"{path}." for path, _ in own_modules(attachment.backbone) if ends and path.endswith(ends)]
    found = {name: tensor for name, tensor in tensors_of(attachment.backbone) if name.startswith(tuple(heads))}
    where = f"delta {attachment.record.name!r} cannot be saved as an adapter of PEFT"
    for name, tensor in found.items():
        if name not in attachment.record.fully_trained:
            refuse_unknown(name, tensor, where, "prompts of classifiers with the values of")
    return {f"{PREFIX_OF_PROMPTS}{name}": tensor.detach() for name, tensor in found.items()}


def _task(writing: Writing) -> str:
    name = type(writing.attachment.backbone).__name__
    task = next((task for end, task in _TASKS.items() if name.endswith(end)), None)
    if task is None:
        raise writing.impossible(f"PEFT puts prompts into models with a head, and {name} is none that it knows")
    return task
