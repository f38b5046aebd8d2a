"""Reads PEFT's prompt tuning, P-tuning and multitask prompts: vectors in front of the text, which are soft prompts here."""

import inspect
from typing import Any, TypedDict

from torch import Tensor, nn

from deltakit.core import own_modules
from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.peft.keys import PROMPT, TASKS
from deltakit.files.formats.shapes import refuse_integers
from deltakit.files.formats.source import Source


class Prompting(TypedDict):
    """The fields that prompts and prefixes have. PEFT always writes them."""

    num_virtual_tokens: int
    task_type: str | None


def read_prompt(source: Source, parts: Parts) -> None:
    """Adds the prompt of an adapter to the parts.

    Raises:
        CheckpointError: if the config is damaged, or the tensor does not fit.
    """
    options, prompt = _prompt_of(source)
    parts.add_in_order("soft_prompt", options, [{"prompt": prompt}])


def read_multitask(source: Source, parts: Parts) -> None:
    """Adds the prompts of several tasks to the parts.

    Raises:
        CheckpointError: if the config is damaged, or the tensors do not fit.
    """
    options, prompt = _prompt_of(source)
    tokens, d = prompt.shape
    if len(source.tensors[PROMPT]) > tokens:
        raise CheckpointError(
            f"{source.folder}: PEFT puts these prompts into the encoder and the decoder, and deltakit into the encoder only; "
            "with num_transformer_submodules=1 PEFT trains those of the encoder alone"
        )
    found = {ours: source.tensors.get(name) for name, ours in TASKS.items()}
    columns, rows = found["columns"], found["rows"]
    if (
        columns is None
        or rows is None
        or columns.ndim != 3
        or columns.shape[1] != tokens
        or rows.shape != (len(columns), columns.shape[2], d)
    ):
        raise CheckpointError(f"{source.folder}: {' and '.join(TASKS)} do not fit together; save or download it again")
    refuse_integers({name: source.tensors[name] for name in TASKS}, source.folder)
    # The ids in a text say which of several tasks it has.
    one = len(columns) == 1
    options = {**options, "tasks": len(columns), "rank": columns.shape[2], "prepend": one}
    parts.add_in_order("multitask_prompt", options, [{"prompt": prompt, "columns": columns, "rows": rows}])


def _prompt_of(source: Source) -> tuple[dict[str, Any], Tensor]:
    config, prompt = prompting(source)
    tokens = config["num_virtual_tokens"]
    # Of an encoder and a decoder PEFT keeps rows for both, and uses the encoder's.
    if prompt.ndim != 2 or tokens < 1 or prompt.shape[0] not in (tokens, 2 * tokens):
        raise CheckpointError(
            f"{source.folder}: {PROMPT} has shape {tuple(prompt.shape)}, and num_virtual_tokens is {tokens}; save or "
            "download it again"
        )
    # PEFT puts the vectors behind the scale of such an embedding (Gemma 3, BART), and deltakit before it.
    scale = embed_scale(source.backbone)
    options = {"tokens": tokens, "where": "start", "trim": not first_is_read(source.backbone, config["task_type"])}
    return options, prompt[:tokens] / scale


def prompting(source: Source) -> tuple[Prompting, Tensor]:
    """Returns the config and the tensor of an adapter that is a prompt or a prefix.

    Raises:
        CheckpointError: if the config is damaged, there is no such tensor, or PEFT itself would not use it.
    """
    config: Prompting = source.options(Prompting, {"task_type": None})
    prompt = source.tensors.get(PROMPT)
    if prompt is None:
        raise CheckpointError(f"{source.folder}: it has no {PROMPT}; save or download it again")
    refuse_integers({PROMPT: prompt}, source.folder)
    if config["task_type"] is None:
        raise CheckpointError(
            f"{source.folder}: it has no task_type, and without one PEFT puts no prompt into a model; write the task_type "
            f"into {source.config_file.name}, such as 'CAUSAL_LM'"
        )
    return config, prompt


def embed_scale(backbone: nn.Module | None) -> Any:
    """Returns what the input embedding multiplies its vectors by; 1 for nearly all."""
    try:
        embedding = backbone.get_input_embeddings()  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError):
        # No model of transformers, or one without ids. Where the prompt goes, and that it fits, is checked when it is built.
        return 1.0
    return getattr(embedding, "embed_scale", 1.0)


def first_is_read(backbone: nn.Module | None, task: str | None) -> bool:
    """Returns whether a classifier reads the first token outside of the text stack, which is the prompt's in PEFT.

    Such as RoBERTa's. BERT's pooler is inside of the stack, and GPT-2's classifier looks for the last token of the text.
    """
    if backbone is None or task != "SEQ_CLS":
        return False
    names = inspect.unwrap(type(backbone).forward).__code__.co_names
    poolers = (module for path, module in own_modules(backbone) if path.endswith(".pooler"))
    return "pad_token_id" not in names and next(poolers, None) is None
