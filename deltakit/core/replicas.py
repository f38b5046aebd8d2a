"""Replicas of `nn.DataParallel`: copies of a model on several GPUs, for one forward."""

from torch import nn


def complete_replica(model: nn.Module) -> None:
    """Gives the modules of a replica the tables of parameters that all other modules have; nothing happens to other models.

    torch leaves these tables empty, and makes the copies of parameters plain attributes. Delta modules that look into a table
    would find nothing, and updates that are computed again in the backward pass would get no gradients.
    """
    if "_is_replica" not in model.__dict__:
        return
    modules = list(model.modules())
    shared: dict[int, nn.Module] = {}
    for module in modules:
        module._parameters.update(module.__dict__.get("_former_parameters", {}))
        # One delta module holds the module that they share, and torch has copied it. The others only know the original.
        held = module._modules.get("shared")
        if held is not None and "_shared" in module.__dict__:
            shared[id(module.__dict__["_shared"][0])] = held
    for module in modules:
        for original in module.__dict__.get("_shared", ()):
            module.__dict__["_shared"] = (shared.get(id(original), original),)
