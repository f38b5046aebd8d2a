"""Prototypes of classes (ProtoVerb, Cui et al. 2022, https://arxiv.org/abs/2203.09770)."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.openprompt.prompts.manual_verbalizer import ManualVerbalizer, MultiToken
from deltakit.openprompt.prompts.soft_verbalizer import class_names
from deltakit.prompting import PrototypicalVerbalizer, SlotOutput, standardized


class ProtoVerbalizer(ManualVerbalizer):
    """Words first, and after `train_proto` also trained prototypes: `deltakit.prompting.PrototypicalVerbalizer`.

    Args:
        tokenizer, classes, num_classes, label_words, prefix, multi_token_handler, post_log_softmax: as of `ManualVerbalizer`.
        model: the backbone.
        lr, epochs: the learning rate of prototypes, and how many steps over all examples they are trained.
        mid_dim: the number of features of prototypes.
        multi_verb: "multi" adds the scores of words and prototypes, "proto" has prototypes alone.
    """

    @checked
    def __init__(
        self,
        tokenizer: Any,
        model: nn.Module,
        classes: Sequence[Any] | None = None,
        num_classes: int | None = None,
        label_words: Any = None,
        prefix: str = " ",
        multi_token_handler: MultiToken = "first",
        post_log_softmax: bool = True,
        lr: float = 1e-3,
        mid_dim: int = 64,
        epochs: int = 5,
        multi_verb: Literal["multi", "proto"] = "multi",
    ) -> None:
        super().__init__(tokenizer, classes, num_classes, label_words, prefix, multi_token_handler, post_log_softmax)
        self.lr, self.epochs, self.multi_verb, self.trained = lr, epochs, multi_verb, False
        self.proto = PrototypicalVerbalizer(model, class_names(self), size=mid_dim)

    def process_outputs(self, output: SlotOutput) -> Tensor:
        if not self.trained:
            return super().process_outputs(output)
        proto = self.proto(output)
        if self.multi_verb == "proto":
            return proto
        return (standardized(super().process_outputs(output)) + standardized(proto)) / 2

    def train_proto(self, model: Any, dataloader: Iterable[Any], device: Any = None) -> None:
        """Trains the prototypes on what the backbone computes in the slots. Classes may have different numbers of examples.

        Args:
            model: the `PromptForClassification`.
            dataloader: batches with labels.
            device: unused; batches are moved to the backbone's device.

        Raises:
            OptionError: if there are no batches.
        """
        training = model.training
        model.eval()
        with torch.no_grad():
            seen = [
                (model.prompt_model.slot_output(own), own["label"])
                for own in (one.to(model.device) for one in dataloader)
            ]
        model.train(training)
        if not seen:
            raise OptionError("train_proto: the dataloader has no batches")
        # The loss reads the hidden states alone.
        hidden = torch.cat([output.hidden for output, _ in seen])
        output, labels = SlotOutput(hidden, hidden), torch.cat([label for _, label in seen])
        optimizer = torch.optim.Adam(self.proto.parameters(), lr=self.lr)
        for _ in range(self.epochs):
            optimizer.zero_grad()
            self.proto.loss(output, labels).backward()
            optimizer.step()
        self.trained = True
