"""Names of transformers' models that prompt models have, too: the Trainer calls or reads them on the model that it trains."""

from collections.abc import Sequence
from typing import Any

from torch import nn

from deltakit.errors import TargetError


class BackboneNames:
    """Passes calls on to the backbones."""

    def backbones(self) -> Sequence[nn.Module]:
        """Returns the backbones, each once."""
        raise NotImplementedError

    @property
    def config(self) -> Any:
        """The config of the backbone, or of the first one. The Trainer reads it for label smoothing."""
        return self.backbones()[0].config

    def get_input_embeddings(self) -> nn.Module:
        """Returns the embedding of the backbone's input ids. The Trainer adds NEFTune's noise there.

        Raises:
            TargetError: if there are several backbones.
        """
        one, *others = self.backbones()
        if others:
            raise TargetError(f"{type(self).__name__}: it has {1 + len(others)} backbones; ask one of them")
        found: nn.Module = one.get_input_embeddings()  # type: ignore[operator]
        return found

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Makes the backbone compute activations again in the backward pass, as `TrainingArguments` may ask for.

        Args:
            options: those of the backbone's own function.

        Raises:
            TargetError: if the backbone has no such function.
        """
        self._call("activation_checkpointing_enable", options)

    def activation_checkpointing_disable(self) -> None:
        """Ends `activation_checkpointing_enable`."""
        self._call("activation_checkpointing_disable", {})

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """`activation_checkpointing_enable` under its older name."""
        self._call("gradient_checkpointing_enable", options)

    def gradient_checkpointing_disable(self) -> None:
        """Ends `gradient_checkpointing_enable`."""
        self._call("gradient_checkpointing_disable", {})

    def _call(self, name: str, options: dict[str, Any]) -> None:
        for backbone in self.backbones():
            function = getattr(backbone, name, None)
            if function is None:
                raise TargetError(
                    f"{type(backbone).__name__}: it has no {name}(); use a model of transformers, or omit it"
                )
            function(**options)
