"""Input and output hooks: they call the delta modules of a target before and after the target. `injection` registers them.

A hook looks its delta modules up by key in the module that is called, and has no references to them. So it also works in a
deepcopy, after unpickling, and in the replicas of `nn.DataParallel`, which share one table of hooks. A parameter captured by a
hook would not be trained under FSDP2, which replaces parameters: its gradient stays None, silently (measured).

For the check of the first forward a hook notes that it has fired. In compiled code one attribute of the delta's record is set
instead, for all targets: what traced code sets is set again after each call of the compiled code, by Python code that finds
each hook from the root of the model. That took 1.1 us for each target, a sixth of LoRA's time in compiled decoding (measured).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deltakit.core.caller_rows import rows_now

is_traced = torch.compiler.is_dynamo_compiling
"""Whether dynamo traces the caller. It takes a third of the time of `torch.compiler.is_compiling`."""
NO_OUTPUT = object()
"""The default of an output hook's last argument, which it gets only if torch also passes it keyword arguments."""
_NOT_ASKED = object()


class InputHook:
    """Calls all delta modules that change a target's input, before the target.

    There is one hook for all of them: each further hook would cost 0.7 us per call (measured on a CPU).
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.delta_keys = keys
        # Read by the check of the first forward.
        self.fired = False

    # torch calls it without keyword arguments if they are not registered, or not any more: while another thread attaches or
    # detaches a delta, after torch has read the table of hooks. And its quantizers copy hooks to the module that replaces the
    # target, which has no delta; `replaced_targets` tells the user.
    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> Any:
        if kwargs is None:
            return None
        traced, changed = is_traced(), False
        if not traced:
            self.fired = True
        for key in self.delta_keys:
            delta: Any = target._modules.get(key)
            if delta is None or not delta.live:
                continue
            if traced and delta.record is not None:
                delta.record.compiled = True
            new = delta.before_call(target, args, kwargs)
            if new is not None:
                (args, kwargs), changed = new, True
        return (args, kwargs) if changed else None


class OutputHook:
    """Calls all delta modules that change a target's output, after the target. Each gets the output of the one before.

    A kind of delta module may have one of its own (`AttachedModule.output_hook`).
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self.delta_keys = keys
        self.fired = False

    # Without keyword arguments, for the same reasons as in `InputHook`, there is no fourth argument.
    def __call__(self, target: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = NO_OUTPUT) -> Any:
        return None if output is NO_OUTPUT else self.call_deltas(self.delta_keys, target, args, kwargs, output)

    def call_deltas(
        self, keys: Sequence[str], target: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any
    ) -> Any:
        """Returns the output after the delta modules with these keys."""
        # This runs in every call of every target, so it reads each attribute once.
        traced = is_traced()
        if not traced:
            self.fired = True
        batch: Any = _NOT_ASKED
        for key in keys:
            delta: Any = target._modules.get(key)
            if delta is None:
                continue
            record = delta.record
            # What `record.live` says, without the call of a property.
            if record is not None and (not record.active or record.weights_before_merge):
                continue
            if traced and record is not None:
                record.compiled = True
            # Nearly always no rows are in use at all. If they are, all deltas of the backbone have the same.
            if record is None or not record.has_rows:
                own = None
            else:
                own = batch = rows_now(record, delta) if batch is _NOT_ASKED else batch
            if own is None:
                new = delta.after_call(target, args, kwargs, output)
            else:
                # The first low-rank delta at a target computes the batched product for all of them. Compiled code finds it
                # out while it is traced: what another forward noted would be one more reason to compile anew.
                compiling = torch.compiler.is_compiling()
                place = target, delta.training
                first = None if compiling else own.first.get(place)
                if first is not None and first is not delta:
                    if not first.live:
                        return output
                    delta = first
                new = delta.after_call_mixed(target, args, kwargs, output, own)
                if not compiling and own.first.get(place) is delta:
                    return output if new is None else new
            if new is not None:
                output = new
        return output
