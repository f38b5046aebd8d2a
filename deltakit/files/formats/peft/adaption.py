"""Reads PEFT's adaption prompts, which are those of LLaMA-Adapter."""

from deltakit.errors import CheckpointError
from deltakit.files.formats.format import Parts
from deltakit.files.formats.peft.keys import ADAPTION
from deltakit.files.formats.source import Source


def read_adaption(source: Source, parts: Parts) -> None:
    """Adds the prompts and gates of an adapter to the parts.

    Raises:
        CheckpointError: if a prompt has no gate or another shape, or the model is GPT-2.
    """
    kind = getattr(getattr(source.backbone, "config", None), "model_type", None)
    if kind == "gpt2":
        raise CheckpointError(
            f"{source.folder}: in GPT-2, PEFT adds its prompts behind the attention's output projection, and deltakit before "
            "it, as the paper does; train a LlamaAdapter"
        )
    for path, part in source.by_path(ADAPTION).items():
        prompt, gate = part.get("prompt"), part.get("gate")
        if prompt is None or gate is None or prompt.ndim != 3 or len(prompt) != 1 or gate.shape != (1,):
            raise CheckpointError(
                f"{source.folder}: {' and '.join(ADAPTION)} of {path} do not fit together; save or download it again"
            )
        parts.add("llama_adapter", {"tokens": prompt.shape[1]}, path, {"prompt": prompt[0], "gate": gate})
