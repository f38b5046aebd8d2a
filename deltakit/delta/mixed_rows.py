"""Mixed-adapter batches, `rows(model, names)`: one delta (or none) per example of the batch."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from deltakit.core import (
    Attachment,
    MixedBatch,
    Record,
    attachments_of,
    checked,
    close_rows,
    current_batch,
    notice_moved_buffers,
    open_rows,
)
from deltakit.delta.planning import original
from deltakit.delta.running_statistics import holding_word
from deltakit.errors import StateError
from deltakit.injection import watch_rows


class Rows:
    """A batch in which each example has its own delta. `rows` returns it.

    It is a context manager: forwards inside the `with` block use the deltas, and `with ... as model` gives the backbone. It is
    also callable: `rows(model, names)(**inputs)` is one forward with these deltas, and returns what the backbone returns. Both
    can be repeated, and used by several threads at once.
    """

    def __init__(self, called: nn.Module, names: Sequence[str | None]) -> None:
        self._called = called
        self.backbone = original(called)
        self.names = names
        self._entered: list[tuple[list[Record], MixedBatch]] = []

    def __enter__(self) -> nn.Module:
        self._entered.append(self._open(suspends=True))
        return self.backbone

    def __exit__(self, *_: object) -> Literal[False]:
        # Several threads may be inside. The block that the caller is in is the one to leave; a generator may be closed by
        # another thread or task, which is in no block.
        block = next((block for block in self._entered if current_batch(block[0]) is block[1]), self._entered[-1])
        self._entered.remove(block)
        close_rows(*block)
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        records, batch = self._open(suspends=False)
        try:
            # `torch.compile` makes another module of the backbone, and the caller wants that one.
            return self._called(*args, **kwargs)
        finally:
            close_rows(records, batch)

    def _open(self, *, suspends: bool) -> tuple[list[Record], MixedBatch]:
        _refuse_batch_second(self.backbone)
        attached = attachments_of(self.backbone)
        for attachment in {id(attachment.backbone): attachment for attachment in attached}.values():
            # Once for all on one module: on a GPU, comparing buffers waits for the device.
            notice_moved_buffers(attachment.backbone, attachment.record)
        for attachment in attached:
            _refuse_shared(attachment, named=attachment.record.name in self.names)
        records = [attachment.record for attachment in attached]
        device = next((p.device for p in self.backbone.parameters() if not p.is_meta), "cpu")
        batch = open_rows(records, self.names, suspends=suspends, device=device)
        try:
            watch_rows(self.backbone, attached)
        except BaseException:
            close_rows(records, batch)
            raise
        return records, batch


@checked
def rows(backbone: nn.Module, names: Sequence[str | None]) -> Rows:
    """Gives each example of a batch its own delta: inside `with rows(model, names):`, or in one call, `rows(model, names)(x)`.

    The block belongs to the thread or the asyncio task that enters it. Forwards in others are as without it, and others may
    be in blocks of their own. Tasks that are started inside the block, and `asyncio.to_thread`, take its rows with them; a
    bare `threading.Thread` does not. Around the `yield` of a generator use the call: a block there also holds for whoever
    drives the generator.

    The batch must be the first dimension of the inputs of all targets. Beam search works: all beams of an example use its
    delta. Training works, too; `backward` may be called anywhere, if the backbone itself was called and not a part of it.

    Args:
        names: for each example the name of an attached delta, or None for the bare backbone.

    Returns:
        A context manager that gives the backbone, and that can be called instead.

    Raises:
        OptionError: on entering, if a name is unknown, or there are no names.
        StateError: on entering, if a named delta is not active, patches weights, acts on the whole batch or is on an expert;
            if an attached delta fully trains parts of the backbone or is merged; if the caller is in a `rows` block of the
            backbone already; if the backbone has attention with `batch_first=False`. At once, if it is wrapped for
            distribution.
    """
    return Rows(backbone, names)


def _refuse_batch_second(backbone: nn.Module) -> None:
    # The first dimension of its tensors is the position in the text. Each position would silently get the delta of some
    # example.
    for path, module in backbone.named_modules():
        if isinstance(module, nn.MultiheadAttention) and not module.batch_first:
            raise StateError(
                f"rows: {path or 'the backbone'} is attention with batch_first=False, but the batch must be the first "
                "dimension; build the backbone with batch_first=True"
            )


def _refuse_shared(attachment: Attachment, *, named: bool) -> None:
    record = attachment.record
    shared = f"rows: delta {record.name!r} "
    for name in record.fully_trained[:1]:
        raise StateError(
            f"{shared}{holding_word(attachment.backbone, name)}, which all examples share; detach() it, or train without "
            "train= and with such layers in eval()"
        )
    if record.merged:
        raise StateError(f"{shared}is merged into the weights, which all examples share; unmerge() it first")
    for site in attachment.sites if named else ():
        if "experts" in site.path.split("."):
            raise StateError(
                f"{shared}is on an expert, {site.path}, whose input mixes the tokens of all examples; leave experts out with "
                "exclude="
            )
        if site.module.weight_read is not None or not site.module.mixable:
            why = (
                "patches a weight, which all examples share,"
                if site.module.weight_read is not None
                else ("acts on the whole batch")
            )
            raise StateError(
                f"{shared}{why} at {site.path} ({site.module.word()}); run its examples in a batch of their own without rows()"
            )
