"""The error for options that do not exist, with our names for those that PEFT, OpenDelta or transformers have."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches

from deltakit.errors import OptionError

_HERE = {
    "r": ("rank", "lora_r", "lora_rank", "r"),
    "alpha": ("lora_alpha",),
    "at": ("target_modules", "target_parameters", "modified_modules", "targets", "modules", "layers"),
    "exclude": ("exclude_modules",),
    "dropout": ("lora_dropout",),
    "rslora": ("use_rslora", "use_rs_lora"),
    "invocation": ("alora_invocation_tokens",),
    "total_steps": ("total_step",),
    "delta_t": ("deltaT",),
    "orthogonality": ("orth_reg_weight",),
    "tokens": ("num_virtual_tokens", "soft_token_num", "prefix_token_num", "num_tokens", "prefix_length"),
    "init": ("prompt_tuning_init", "token_init"),
    "reparam": ("prefix_projection", "reparameterize"),
    "hidden": ("encoder_hidden_size", "mid_dim"),
    "size": ("bottleneck_dim", "bottleneck_size", "adapter_size", "adapter_dim"),
    "reduction": ("reduction_factor",),
    "activation": ("non_linearity",),
    "name": ("adapter_name",),
    "names": ("adapter_names",),
    "train": ("modules_to_save", "unfrozen_modules"),
    "backbone": ("model", "backbone_model", "base_model", "module"),
    "source": ("path", "folder", "peft_model_id", "model_id", "pretrained_model_name_or_path"),
    "folder": ("path", "save_directory", "output_dir", "finetuned_delta_path"),
}
"""Our names, and the names that others have for the same."""

_ELSEWHERE = {
    "name": "it belongs to attach(model, ..., name=)",
    "train": "write attach(model, ..., train='@head') to train modules fully",
    "bias": "omit it; attach BitFit() beside this method to train biases",
    "task_type": "omit it; attach(model, ..., train='@head') trains the head of a task",
    "init_lora_weights": "omit it; B always starts at zero, so an untrained LoRA changes nothing",
    "inference_mode": "omit it; set delta.trainable = False instead",
    "is_trainable": "omit it; set delta.trainable instead",
    "fan_in_fan_out": "omit it; transposed weights are recognised",
    "layers_to_transform": "choose layers by a range in at=, such as at='layers.{0-11}/@attn.q'",
    "layers_pattern": "choose layers by a range in at=, such as at='layers.{0-11}/q_proj'",
    "rank_pattern": "write r={'layers.0.q_proj': 4, '*': 8}, with selectors instead of regular expressions",
    "alpha_pattern": "write alpha={'layers.0.q_proj': 8, '*': 16}, with selectors instead of regular expressions",
    "feedforward_modules": "omit it; side='input' scales the input of the targets in at=",
    "prompt_tuning_init_text": "write SoftPrompt.from_text(text, tokenizer)",
    "base_model_name_or_path": "omit it; attach gets the model itself",
    "peft_type": "omit it; the class is the type",
}
"""What to do about options of others that are no options here."""


def unknown_options(where: str, names: Sequence[str], options: Collection[str]) -> OptionError:
    """Returns the error for options that do not exist.

    >>> print(unknown_options("LoRA", ["target_modules", "lora_alpha"], ["at", "r", "alpha"]))
    LoRA(target_modules=..., lora_alpha=...): no such options; write at= for target_modules, write alpha= for lora_alpha

    Args:
        where: the function or class that was called.
        options: the names that it has.
    """
    given = ", ".join(f"{name}=..." for name in names)
    what = dict.fromkeys(_instead(name, options) for name in names)
    return OptionError(f"{where}({given}): no such option{'s' if len(names) > 1 else ''}; {', '.join(what)}")


def _instead(name: str, options: Collection[str]) -> str:
    own = [ours for ours, others in _HERE.items() if name == ours or name in others]
    same = next((option for option in options if any(option == ours or option in _HERE[ours] for ours in own)), None)
    if same is not None:
        return f"write {same}= for {name}"
    elsewhere = next((_ELSEWHERE[key] for key in (name, *own) if key in _ELSEWHERE), None)
    if elsewhere is not None:
        return f"{name}: {elsewhere}"
    near = get_close_matches(name, options, n=3, cutoff=0.6)
    if near:
        return f"the nearest to {name} are {', '.join(f'{one}=' for one in near)}"
    return f"the options are {', '.join(options)}" if options else "there are no options"
