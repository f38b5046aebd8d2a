"""PromptForClassification: a backbone, a template and a verbalizer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltakit.core import checked
from deltakit.errors import OptionError
from deltakit.openprompt.data_loader import PromptDataLoader as PromptDataLoader
from deltakit.openprompt.prompt_base import Template, Verbalizer, at_one_slot
from deltakit.prompting import SlotOutput, call_at

_CALL = (
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "decoder_input_ids", "decoder_inputs_embeds",
    "past_key_values", "soft_token_ids",
)  # fmt: skip
"""What a batch may have for the backbone and the template."""


class PromptModel(nn.Module):
    """A backbone and a template.

    Args:
        plm: the backbone, with deltas or without.
        template: the template.
        freeze_plm: whether the backbone's parameters are frozen. Deltas are, too: leave it False, attaching freezes the rest.
        plm_eval_mode: whether its dropout stays off, too.
    """

    plm: Any

    @checked
    def __init__(
        self, plm: nn.Module, template: Template, freeze_plm: bool = False, plm_eval_mode: bool = False
    ) -> None:
        super().__init__()
        self.plm, self.template = plm, template
        self.freeze_plm, self.plm_eval_mode = freeze_plm, plm_eval_mode
        if freeze_plm or plm_eval_mode:
            plm.requires_grad_(False)
        if plm_eval_mode:
            plm.eval()

    def train(self, mode: bool = True) -> "PromptModel":
        """Switches dropout on or off; in the backbone only without `plm_eval_mode`."""
        super().train(mode)
        if self.plm_eval_mode:
            self.plm.eval()
        return self

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Returns what the backbone returns for a batch, with the logits of all positions."""
        return self.plm(**self.template.process_batch(_call(batch)))

    def slot_output(self, batch: Mapping[str, Any]) -> SlotOutput:
        """Returns what the backbone computes in the slots of a batch.

        Raises:
            OptionError: if examples have different numbers of slots, or none.
        """
        chosen = batch["loss_ids"] > 0
        counts = chosen.sum(1).unique().tolist()
        if len(counts) != 1 or not counts[0]:
            raise OptionError(
                f"PromptModel: the examples of a batch have {counts} slots; expected as many in each, at least 1"
            )
        slots = chosen.nonzero()[:, 1].view(len(chosen), -1)
        call = _call(batch)
        mask = call.get("attention_mask")
        if mask is not None:
            # Columns that are padding in all examples change nothing.
            length = int(mask.any(0).nonzero().max()) + 1
            for name in ("input_ids", "attention_mask", "token_type_ids", "soft_token_ids"):
                call = {**call, name: call[name][:, :length]} if name in call else call
        return call_at(self.plm, self.template.process_batch(call), slots + self.template.added_positions)


def _call(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {name: batch[name] for name in _CALL if batch.get(name) is not None}


class PromptForClassification(nn.Module):
    """Scores of classes: a backbone, a template and a verbalizer.

    Only the slots' logits are computed. OpenPrompt computes those of all positions, and all hidden states.

    Args:
        plm, template, freeze_plm, plm_eval_mode: as of `PromptModel`.
        verbalizer: the verbalizer.
    """

    @checked
    def __init__(
        self,
        plm: nn.Module,
        template: Template,
        verbalizer: Verbalizer,
        freeze_plm: bool = False,
        plm_eval_mode: bool = False,
    ) -> None:
        super().__init__()
        self.prompt_model = PromptModel(plm, template, freeze_plm, plm_eval_mode)
        self.verbalizer = verbalizer

    @property
    def plm(self) -> Any:
        """The backbone."""
        return self.prompt_model.plm

    @property
    def template(self) -> Template:
        """The template."""
        return self.prompt_model.template

    @property
    def tokenizer(self) -> Any:
        """The verbalizer's tokenizer."""
        return self.verbalizer.tokenizer

    @property
    def device(self) -> torch.device:
        """The device of the backbone."""
        return next(self.plm.parameters()).device

    def forward(self, batch: Mapping[str, Any]) -> Tensor:
        """Returns the scores of the classes [batch, classes]."""
        return self.verbalizer.process_outputs(self.prompt_model.slot_output(batch))

    def forward_without_verbalize(self, batch: Mapping[str, Any]) -> Tensor:
        """Returns the logits in the slot [batch, vocabulary], or in several slots [batch, slots, vocabulary]."""
        return at_one_slot(self.prompt_model.slot_output(batch).logits)
