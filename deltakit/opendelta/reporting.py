"""What a model class of OpenDelta prints and logs of its backbone."""

from typing import Any

from torch import nn

from deltakit.opendelta.utils.inspect import inspect_module_statistics
from deltakit.opendelta.utils.visualization import Visualization


class Reporting:
    """Prints the backbone with its delta, and logs how much of it is trained."""

    backbone_model: nn.Module
    stat: dict[str, Any]

    def log(
        self,
        module: nn.Module | None = None,
        delta_ratio: bool = True,
        trainable_ratio: bool = True,
        visualization: bool = True,
        cuda_memory: bool = True,
    ) -> None:
        """Prints the tree of a module (None: the backbone), and logs the shares that are asked for. `stat` has the figures."""
        module = self.backbone_model if module is None else module
        if visualization:
            Visualization(module).structure_graph()
        self.stat = inspect_module_statistics(
            module, delta_ratio=delta_ratio, trainable_ratio=trainable_ratio, cuda_memory=cuda_memory
        )
