"""States of accelerate (`save_state`, `load_state`) that hold only what deltas train."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from deltakit.core import checked
from deltakit.delta import deltas, deltas_in_file, trains_only_deltas, whole_checkpoint_mark
from deltakit.errors import OptionError
from deltakit.files import WEIGHTS_FILE
from deltakit.integrations.inner_backbones import inner_backbones, shrink

T = TypeVar("T")


@checked
def small_states(accelerator: T) -> T:
    """Makes `accelerator.save_state` write only what deltas train, `load_state` read it, and returns the accelerator.

    Models without deltas, and those that train more than their deltas, are saved whole, and so is all under FSDP and
    DeepSpeed. The optimiser, the scheduler and the random numbers are saved as before.

    Raises:
        OptionError: if this is no `Accelerator`.
    """
    try:
        kept: Any = accelerator
        kept.register_save_state_pre_hook(_Save(accelerator))
        kept.register_load_state_pre_hook(_Load(accelerator))
    except AttributeError as error:
        raise OptionError(
            f"small_states: expected an accelerate.Accelerator, found a {type(accelerator).__name__}; pass the accelerator"
        ) from error
    return accelerator


class _Save:
    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def __call__(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        # FSDP and DeepSpeed have written theirs already, and the list is empty.
        for number in range(len(weights)):
            model = _bare(self.accelerator, models[number])
            if any(trains_only_deltas(inner) for inner in inner_backbones(model)):
                weights[number] = model.state_dict()
                shrink(model, weights[number])
            else:
                # The state dict is that of the model with what wraps it, such as DistributedDataParallel.
                path = next((path for path, inner in models[number].named_modules() if inner is model), "")
                weights[number] = {**weights[number], **whole_checkpoint_mark(model, f"{path}." if path else "")}


class _Load:
    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def __call__(self, models: list[Any], folder: str) -> None:
        for number, wrapped in enumerate(models):
            model = _bare(self.accelerator, wrapped)
            file = Path(folder) / (f"_{number}.".join(WEIGHTS_FILE.rsplit(".", 1)) if number else WEIGHTS_FILE)
            names = deltas_in_file(model, file, str(file))
            if names or (not file.is_file() and deltas(model)):
                models[number] = _StandIn(model)


class _StandIn:
    """What accelerate loads such a state into: the model without what wraps it.

    safetensors counts the second name of a tied weight as unexpected, if the model says that it has it and the file does not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> tuple[list[str], list[str]]:
        self.model.load_state_dict(state)
        return [], []


def _bare(accelerator: Any, model: nn.Module) -> nn.Module:
    found: nn.Module = accelerator.unwrap_model(model, keep_torch_compile=False)
    return found
