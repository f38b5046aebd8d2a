"""How many parameters a module or an optimiser has, trains, and has in deltas."""

from typing import Any

import torch
from torch import nn

from deltakit.core import DeltaModule, num_parameters
from deltakit.opendelta.utils.logging import get_logger

_GIGABYTE = 1024**3


def num_trainable_parameters(module: nn.Module) -> int:
    """Returns the number of trained values, those of deltas included."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def num_total_parameters(module: nn.Module) -> int:
    """Returns the number of values, those of deltas included. Quantized weights count as many values as they stand for."""
    return num_parameters(module) + num_delta_parameters(module)


def num_delta_parameters(module: nn.Module) -> int:
    """Returns the number of values in deltas."""
    deltas = {p for inner in module.modules() if isinstance(inner, DeltaModule) for p in inner.parameters()}
    return sum(parameter.numel() for parameter in deltas)


def inspect_module_statistics(
    module: nn.Module,
    verbose: bool = True,
    *,
    delta_ratio: bool = True,
    trainable_ratio: bool = True,
    cuda_memory: bool = True,
) -> dict[str, Any]:
    """Returns counts of parameters, shares of all (0 to 1) and GPU memory in GB, and logs them if `verbose`.

    Args:
        delta_ratio: whether to log the share of deltas.
        trainable_ratio: whether to log the share that is trained.
        cuda_memory: whether to log the GPU memory.
    """
    counts = (num_total_parameters, num_trainable_parameters, num_delta_parameters)
    total, trained, delta = (count(module) for count in counts)
    devices = range(torch.cuda.device_count())
    stat = {
        "total_parameters": total,
        "trainable_parameters": trained,
        "trainable_ratio": trained / max(total, 1),
        "delta_parameters": delta,
        "delta_ratio": delta / max(total, 1),
        "cudamem": sum(torch.cuda.memory_allocated(device) for device in devices) / _GIGABYTE,
        "maxcudamem": sum(torch.cuda.max_memory_allocated(device) for device in devices) / _GIGABYTE,
    }
    if verbose:
        logger = get_logger()
        if trainable_ratio:
            logger.info(f"Trainable Ratio: {trained}/{total}={100 * stat['trainable_ratio']:.6f}%")
        if delta_ratio:
            logger.info(f"Delta Parameter Ratio: {delta}/{total}={100 * stat['delta_ratio']:.6f}%")
        if cuda_memory:
            logger.info(f"Static Memory {stat['cudamem']:.2f} GB, Max Memory {stat['maxcudamem']:.2f} GB")
    return stat


def inspect_optimizer_statistics(optimizer: torch.optim.Optimizer, verbose: bool = True) -> dict[str, Any]:
    """Returns counts and options of the last group of an optimiser, and logs those of all groups if `verbose`."""
    stats = {}
    for number, group in enumerate(optimizer.param_groups):
        total = sum(parameter.numel() for parameter in group["params"])
        trained = sum(parameter.numel() for parameter in group["params"] if parameter.requires_grad)
        stats[f"param_group_{number}"] = {
            "total_parameters": total,
            "trainable_parameters": trained,
            "trainable_ratio": f"{100 * trained / max(total, 1):.6f}%",
            **{name: value for name, value in group.items() if name != "params"},
        }
    if verbose:
        get_logger().info(f"optimizer info: {stats}")
    return list(stats.values())[-1]
