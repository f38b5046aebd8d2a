"""Delta: the handle of one delta on one backbone, with which it is attached, detached, merged, swapped and saved."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from deltakit.core import Selector, checked, one_walk
from deltakit.delta import merging, saving, swapping, tensors
from deltakit.delta.changed_backbone import refuse_changed
from deltakit.delta.claims import check_scalable, claim, refuse_in_rows, refuse_merged, refuse_unloaded
from deltakit.delta.composition import refuse_beside_merged
from deltakit.delta.freezing import freeze_backbone
from deltakit.delta.in_training import DeltaInTraining
from deltakit.delta.putting import put_all, switch, take_all
from deltakit.delta.quantized import Quantize
from deltakit.delta.running_statistics import fitting
from deltakit.delta.unloading import unload
from deltakit.errors import StateError
from deltakit.files import Written, check_tensors
from deltakit.view import states


@checked
class Delta(DeltaInTraining):
    """One or more methods on one backbone, with all their delta modules.

    `attached`, `active` and `trainable` are independent: changing one does not change the others. `attach`, `detach`,
    `freeze`, `merge`, `unmerge` and `swap` return the delta itself. An argument or a value that is set is an `OptionError` if
    it has the wrong type.
    """

    @property
    def active(self) -> bool:
        """Whether the delta takes part in forwards while it is attached. Can be set.

        While it is not active, fully trained tensors have the backbone's own values and are not trained.

        Raises:
            StateError: if it is set while the delta is merged, or inside a `rows` block.
        """
        return self._record.active

    @active.setter
    def active(self, active: bool) -> None:
        if active != self.active:
            refuse_in_rows(self.name, self._record, "changing active")
            refuse_merged(self._record, "changing active")
            refuse_unloaded(self._record)
            if active and self.attached and self._record.grad_ledger.merged:
                refuse_beside_merged(self._attachment)
            switch(self._attachment, active=active)

    @property
    def scale(self) -> float:
        """Multiplies the delta's effect in forwards (0.5 = half, -1 = reversed). Can be set to any finite number.

        It is not saved, and `combine` ignores it.

        Raises:
            OptionError: if it is set to a value that is not finite.
            StateError: if it is set while the delta is merged or inside a `rows` block, or the delta fully trains parts of
                the backbone or has a method without a scale (Prefix, SoftPrompt).
        """
        return self._record.scale

    @scale.setter
    def scale(self, scale: float) -> None:
        if scale != self.scale:
            check_scalable(self._attachment)
        self._record.scale = float(scale)

    def freeze(self, *, train: Selector | None = None) -> "Delta":
        """Freezes the backbone, except for the modules that `train` selects: the delta trains them fully and saves them.

        The backbone is frozen while the delta is attached, as with `attach(..., freeze=True)`.

        Args:
            train: selectors of backbone modules, such as "@head". A warning names what is new in the backbone, such
                as a head, and would stay frozen with random weights; `train=()` says that this is intended.

        Raises:
            SelectorError: if a selector is malformed or matches nothing.
            RoleError: if a role does not exist, or the backbone has no sure answer for it.
            StateError: if the delta is not attached, or `train` is given and the delta is merged, scaled or in a `rows` block,
                or a parameter in `train` is tied to one outside, quantized, offloaded, fully trained by another delta, or
                has another delta merged into it.
        """
        freeze_backbone(self, train)
        return self

    def attach(self) -> "Delta":
        """Attaches the delta. At each target deltas apply in the order in which they were first attached.

        Raises:
            StateError: if it is attached already, its name is taken, it has no name and a target has the same method already,
                another delta fully trains the same parameters or is merged into them, a target was replaced or resized, or the
                backbone is in a `rows` block.
        """
        if self.attached or self._record.leaving:
            raise StateError(f"delta {self.name!r} is attached already; detach() it before attaching it again")
        refuse_unloaded(self._record)
        with one_walk(self.backbone):
            refuse_changed(self._attachment, "attaching")
            claim(self._attachment)
            put_all(self._attachment)
        return self

    def detach(self) -> "Delta":
        """Removes the delta from the backbone, which is then bit-exact as before. A merged delta is unmerged first.

        Raises:
            StateError: inside a `rows` block.
        """
        # After an interruption nothing but the record may show that a part of it is left.
        if not (self.attached or self._record.leaving):
            return self
        refuse_in_rows(self.name, self._record)
        if self.merged:
            self.unmerge()
        with one_walk(self.backbone):
            take_all(self._attachment)
        return self

    @contextmanager
    def detached(self) -> Iterator[nn.Module]:
        """Detaches the delta inside a `with` block, and restores its state afterwards, also after an exception.

        Raises:
            StateError: inside a `rows` block.
        """
        was, merged = self.attached, merging.merged_weights(self._attachment)
        try:
            self.detach()
            yield self.backbone
        finally:
            if was and (self._record.leaving or not self.attached):
                # It does the rest, if Ctrl-C came twice. Otherwise nothing is left to do.
                self.detach()
                self.attach()
                merging.merge_again(self._attachment, merged)

    def merge(self, *, quantize: Quantize | None = None) -> "Delta":
        """Adds the delta to the backbone's weights, so that forwards cost nothing extra. Saving works as before.

        Args:
            quantize: quantizes weights again, if the backbone's weights are quantized. It gets an `nn.Linear` with the sum,
                and quantizes it in place or returns another layer. A warning says how much of the update rounding lost.

        Raises:
            StateError: if the delta is not attached, not active or merged already, a weight is tied, offloaded, fully trained
                by another delta or has another delta merged into it, or the backbone is in a `rows` block.
            TargetError: if one of its methods cannot be merged, a weight is computed from others (weight norm), or a weight is
                quantized and `quantize` is not given or does not fit.
        """
        refuse_unloaded(self._record)
        merging.merge(self._attachment, quantize)
        return self

    def unmerge(self) -> "Delta":
        """Restores the weights from before merging, bit-exact.

        Raises:
            StateError: if it is not merged.
        """
        if not self.merged:
            raise StateError(
                f"delta {self.name!r} is not merged, it is {states(self._attachment)}; unmerge() only a merged delta"
            )
        merging.unmerge(self._attachment)
        return self

    def merge_and_unload(self, *, quantize: Quantize | None = None) -> nn.Module:
        """Adds the delta to the backbone's weights for good, removes all else of it, and returns the backbone.

        The backbone is then a plain model: exports, quantizers and `save_pretrained` see the sums. Fully trained parts and
        running statistics keep the delta's values. The delta can be saved, before and after, but not attached again.

        Args:
            quantize: as for `merge`.

        Raises:
            StateError: as `merge` does; a delta that is merged already stays merged.
            TargetError: as `merge` does.
        """
        if not self.merged:
            self.merge(quantize=quantize)
        refuse_in_rows(self.name, self._record)
        unload(self._attachment)
        return self.backbone

    def load_state_dict(self, state: Mapping[str, Tensor], *, where: str = "the state dict") -> None:
        """Loads all tensors of a `state_dict()`.

        Args:
            where: where the tensors come from, for error messages.

        Raises:
            CheckpointError: if a tensor is missing, unknown, of another shape or dtype, or not finite. Nothing is changed
                then.
            StateError: if the delta is merged, or this process has only a part of it (FSDP1, DeepSpeed ZeRO-3).
        """
        refuse_merged(self._record, "loading tensors into it")
        before = self.state_dict()
        own = self._record.fully_trained
        check_tensors(state, fitting(self._attachment, state, before), own=own, where=where)
        tensors.load_state_dict(self._attachment, state, before)

    def swap(self, other: "Delta") -> "Delta":
        """Exchanges values with another delta of the same methods, options, targets and shapes. The names stay.

        This is the fastest way to switch tasks: no tensor is copied, and compiled models are not recompiled. Load the second
        delta with `load(..., attach=False)`.

        Raises:
            StateError: if the two deltas differ, one is merged, in a `rows` block or sharded, or fully trains parts of the
                backbone.
        """
        swapping.swap(self._attachment, other._attachment)
        return self

    def save(
        self, folder: str | PathLike[str], *, format: Written = "deltakit", results: saving.Results | None = None
    ) -> Path:
        """Writes the delta's config, tensors and model card into a folder, and returns the folder.

        Under FSDP2 every process must call it; the first process writes. A warning says if the delta is as it was attached.

        Args:
            format: "peft" for an adapter of PEFT: LoRA or IA3, with the modules that are trained in full. LoRAs of different
                ranks or scales are padded to one rank, which changes no output. "diffusers" for a LoRA of diffusers, on linear
                layers and convolutions; its tensors are named for the component that pipelines have of the backbone's class:
                unet, transformer, text_encoder, or text_encoder_2 for a `CLIPTextModelWithProjection`.
            results: figures for the model card, such as `{"accuracy": 0.93}`. A README.md that you wrote is kept.

        Raises:
            CheckpointError: if the files cannot be written, or the format has no such delta. What was saved there before is
                unchanged then.
            StateError: if its scale is not 1, a value is infinite or not a number, a target was replaced or resized since the
                delta was attached, it was offloaded with its backbone, or this process has only a part of it (FSDP1,
                DeepSpeed ZeRO-3).
        """
        return saving.save(self, folder, format, results)

    def push(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        message: str | None = None,
        revision: str | None = None,
        format: Written = "deltakit",
        results: saving.Results | None = None,
    ) -> str:
        """Uploads the delta to a Hub repository, which is created if it does not exist, and returns its URL.

        Args:
            repo_id: the repository as "owner/name".
            private: whether to create a private repository; None for the owner's default.
            token: the Hub's access token; by default the one of `hf auth login`.
            message: the commit message.
            revision: the branch, which is created if it does not exist; by default the main one.
            format, results: what to upload, as for `save`.

        Raises:
            CheckpointError: if the format has no such delta.
            HubError: if the Hub cannot be reached or refuses the upload.
            StateError: as `save` does.
        """
        return saving.push(
            self, repo_id, format, results, private=private, token=token, commit_message=message, revision=revision
        )
