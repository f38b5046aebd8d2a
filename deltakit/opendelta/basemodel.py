"""DeltaBase: what all of OpenDelta's model classes have. `delta` is deltakit's own handle."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from deltakit.core import Method, checked, own_parameters
from deltakit.delta import (
    Delta,
    Spelling,
    attach,
    attach_beside,
    deltas,
    freeze_parameters,
    keep_frozen,
    narrow,
    spare_name,
    widen,
)
from deltakit.errors import OptionError, SelectorError, StateError, warn
from deltakit.opendelta.custom_deltas import CustomDeltas
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.freezing import Frozen, is_leaf_module, unfreeze, walk, warn_without_effect
from deltakit.opendelta.interactive import picked_names
from deltakit.opendelta.loading import SaveLoadMixin
from deltakit.opendelta.matching import Addresses, Selectors, as_list
from deltakit.opendelta.reporting import Reporting
from deltakit.opendelta.utils.signature import get_arg_names_inside_func

__all__ = ["DeltaBase", "is_leaf_module", "non_module_param"]

_EXCLUDE = Spelling("exclude", always=("deltas",), role="", none="")


def non_module_param(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the names and parameters that a module holds itself."""
    return list(module.named_parameters(recurse=False))


class DeltaBase(Reporting, SaveLoadMixin, CustomDeltas):
    """A delta with OpenDelta's methods. As in OpenDelta, it attaches at once and freezes nothing.

    Its parameters, its own `state_dict()` and `to()` are those of the delta, without the backbone, which is
    `backbone_model`. `delta` is deltakit's handle; None where the names matched nothing, which is a warning.
    """

    delta_type: ClassVar[str] = ""
    default_modified_modules: ClassVar[Sequence[str]] = ()
    default_exclude_modules: ClassVar[Sequence[str]] = ("lm_head",)
    default_unfrozen_modules: ClassVar[Sequence[str]] = ("deltas",)
    config_class: ClassVar[type[BaseDeltaConfig]] = BaseDeltaConfig
    times_named: ClassVar[int] = 1  # How often `modified_modules` has a module that is picked by hand.

    _narrowed: tuple[nn.Module, list[str]] | None
    _froze: set[str]
    """The names of the backbone's parameters that required gradients until `freeze_module` froze them."""

    def __init__(
        self,
        backbone_model: nn.Module,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = None,
        interactive_modify: bool | int = False,
        common_structure: bool | None = None,
        backend: str = "hf",
    ) -> None:
        if backend != "hf":
            raise OptionError(
                f"{type(self).__name__}(backend={backend!r}): only backend='hf' is served; models of BMTrain are not"
            )
        if interactive_modify:
            # As in OpenDelta, what is picked comes before modified_modules=, and its names are the model's own.
            common_structure = False
            found = picked_names(backbone_model, interactive_modify, type(self).__name__)
            modified_modules = [name for name in found for _ in range(self.times_named)]
        self._begin(backbone_model)
        self.modified_modules = as_list(modified_modules) or list(self.default_modified_modules)
        self.exclude_modules = as_list(exclude_modules)
        self.unfrozen_modules = as_list(unfrozen_modules) or list(self.default_unfrozen_modules)
        # OpenDelta's default names are common names.
        self.common_structure = bool(common_structure) or not as_list(modified_modules)

    def _begin(self, backbone: nn.Module) -> None:
        super().__init__()
        # Not in the module tree: the delta's parameters do not include the backbone's.
        self.__dict__.update(backbone_model=backbone, _narrowed=None, _froze=set())
        self.delta = None
        self.delta_modules = nn.ModuleList()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """There is none: the backbone is called.

        Raises:
            StateError: always.
        """
        raise StateError(f"{type(self).__name__} has no forward of its own; call the backbone, to which it is attached")

    def _attach_with(self, given: Mapping[str, Any]) -> None:
        """Attaches a new delta with the arguments that the `__init__` of its class was given: its `locals()`."""
        # As in OpenDelta, the classes take the common arguments in different orders, and two have no backend.
        common = get_arg_names_inside_func(DeltaBase.__init__)
        DeltaBase.__init__(self, **{name: given[name] for name in common if name in given})
        options = {name: given[name] for name in self.config_class.own_names()}
        own = {name: getattr(self, name) for name in ("modified_modules", "exclude_modules", "unfrozen_modules")}
        self.config = self.config_class(
            **options, **own, common_structure=self.common_structure, backbone_class=type(self.backbone_model).__name__
        )
        methods = self._methods()
        if not methods:
            warn(
                f"{type(self).__name__}: {', '.join(map(repr, self.modified_modules))} matched no module of this "
                f"{type(self.backbone_model).__name__}, so nothing is attached; Visualization(model).structure_graph() shows "
                "the names"
            )
        else:
            name = spare_name(self.backbone_model)
            self.hold(attach(self.backbone_model, *methods, name=name, freeze=False))
        for option, value in options.items():
            setattr(self, option, value)

    def hold(self, delta: Delta) -> None:
        """Makes a delta of deltakit the one that this object stands for."""
        self.delta = delta
        modules = [module for found in delta.modules.values() for module in found]
        self.delta_modules = nn.ModuleList(modules)
        self.mark_as_delta()

    def restore(self, delta: Delta) -> None:
        """Makes this new object stand for a delta that was loaded, with the options in its file."""
        self._begin(delta.backbone)
        method = delta.methods[0]
        self.config = self.config_class.from_dict(self.config_class.options_of(method.to_dict()))
        for option, value in vars(self.config).items():
            setattr(self, option, value)
        self.unfrozen_modules = as_list(self.config.unfrozen_modules)
        self.hold(delta)

    def _methods(self) -> list[Method]:
        """Returns deltakit's methods with their targets; none if the names match nothing."""
        at = self._targets()
        return [] if at == () else [self.config.method_at(at)]

    def _targets(self) -> tuple[str, ...] | None:
        """Returns the paths to attach to; None for the default positions of deltakit's method."""
        found = self._found()
        if not isinstance(found, dict):
            return found
        return tuple(dict.fromkeys(path for of_name in found.values() for path in of_name))

    def _found(self) -> dict[str, list[str]] | tuple[str, ...] | None:
        """Returns the paths that each name matches; or selectors or None (default positions), where deltakit finds them."""
        addresses = Addresses(self.backbone_model, common=self.common_structure)
        defaults = self.modified_modules == list(self.default_modified_modules)
        if self.common_structure and not addresses.known:
            # Another architecture than OpenDelta's eight: deltakit finds the positions itself.
            return None if defaults else self._by_role()
        found = addresses.select(self.modified_modules, self.exclude_modules)
        missing = [name for name, of_name in found.items() if not of_name]
        if len(missing) == len(found) and defaults:
            return None
        if missing and len(missing) < len(found) and not defaults:
            warn(f"{type(self).__name__}: {', '.join(map(repr, missing))} matched no module and has no effect")
        return found

    def _by_role(self) -> tuple[str, ...]:
        known = [name for name in self.modified_modules if "@" in name]
        if len(known) < len(self.modified_modules):
            raise SelectorError(
                f"{type(self).__name__}(common_structure=True): this {type(self.backbone_model).__name__} has none of the "
                "classes that have common names; omit common_structure= and name its own modules"
            )
        return tuple(known)

    def find_key(self, key: str, target_list: Sequence[str]) -> bool:
        """Returns whether a path has one of some names."""
        addresses = Addresses(self.backbone_model, common=self.common_structure)
        return any(addresses.has(key, name) for name in as_list(target_list))

    def find_module(self, root_module: nn.Module, key: str) -> tuple[nn.Module, str, nn.Module]:
        """Returns the module around the one at a path, the name in it, and that module itself."""
        parent, _, name = key.rpartition(".")
        around = root_module.get_submodule(parent)
        return around, name, around.get_submodule(name)

    def mark_as_delta(self, module: nn.Module | None = None) -> None:
        """Sets `_is_delta` on all parameters of a module (None: of the delta)."""
        for parameter in (self if module is None else module).parameters():
            parameter._is_delta = True  # type: ignore[attr-defined]

    @checked
    def freeze_module(
        self,
        module: nn.Module | None = None,
        exclude: Selectors = None,
        set_state_dict: bool = True,
        prefix: str = "",
    ) -> None:
        """Freezes a module (None: the backbone), except for the modules and parameters that `exclude` names.

        What is excluded stays as it is. What of it requires gradients, or did until an earlier call on this object froze it,
        is fully trained and saved with the delta. As in OpenDelta, all else stays frozen after `detach`, and for the next
        delta.

        Args:
            exclude: names as in `modified_modules`, and "deltas" for all deltas: without it the deltas are frozen, too. By
                default `unfrozen_modules`, which is "deltas".
            set_state_dict: whether `module.state_dict()` then has only what is trained now, until `detach`.
            prefix: the path of the module, for names that are longer than the paths in it.

        Warns if an entry matches or trains nothing, and of a new head that would stay frozen with random weights.

        Raises:
            StateError: if a parameter in `exclude` cannot be trained fully.
        """
        module = self.backbone_model if module is None else module
        names = self.unfrozen_modules if exclude is None else as_list(exclude)
        found = walk(module, Addresses(self.backbone_model, common=self.common_structure), names, prefix)
        missing = [name for name in names if name not in {*found.matched, "deltas"}]
        if missing:
            warn(f"freeze_module(exclude=...): {', '.join(map(repr, missing))} matched nothing and has no effect")
        unfreeze(self.backbone_model, found, self._froze)
        warn_without_effect(module, found, prefix)
        self._freeze(found, [name for name in names if name != "deltas"])
        if set_state_dict:
            self.set_active_state_dict(module)

    def _freeze(self, found: Frozen, names: Sequence[str]) -> None:
        own = own_parameters(self.backbone_model)
        froze = {name for name, parameter in own if id(parameter) in found.frozen and parameter.requires_grad}
        if self.delta is not None:
            train = [key for key, parameter in found.kept.items() if parameter.requires_grad]
            freeze_parameters(self.delta, found.frozen, train, names, _EXCLUDE)
        self._froze.update(froze)
        for parameter in (*found.frozen.values(), *found.frozen_of_deltas):
            parameter.requires_grad_(False)
        for delta in deltas(self.backbone_model) if found.frozen_of_deltas else ():
            keep_frozen(delta)

    def set_active_state_dict(self, module: nn.Module) -> None:
        """Leaves in `module.state_dict()` only what is trained now, until `detach`.

        Without a delta it warns and changes nothing: the module's `save_pretrained` would write a model without its weights.
        """
        if self.delta is None:
            warn(
                f"freeze_module: this {type(self).__name__} matched no module, so it has no delta, and state_dict() keeps the "
                "whole model; pass set_state_dict=False, or give modified_modules= what is in the model"
            )
            return
        names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
        narrow(self.delta, module, names)
        self.__dict__["_narrowed"] = (module, names)

    def attach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Attaches the delta again, beside others at the same modules too. Does nothing if it is attached.

        Args:
            reset_state_dict: whether the state dict that `freeze_module` narrowed is narrowed again.

        Raises:
            StateError: inside a `rows` block.
        """
        if self.delta is None or self.delta.attached:
            return
        attach_beside(self.delta)
        if reset_state_dict and self._narrowed is not None:
            narrow(self.delta, *self._narrowed)

    def detach(self, module: nn.Module | None = None, reset_state_dict: bool = True) -> None:
        """Removes the delta; the backbone is bit-exact as before, but what was frozen stays so. Twice is once.

        `reset_state_dict=False` has no effect, which is a warning: the state dict is that of the whole backbone again.

        Raises:
            StateError: inside a `rows` block.
        """
        if not reset_state_dict and self._narrowed is not None:
            warn(
                "detach: no effect of reset_state_dict=False: the state dict is that of the whole backbone again; "
                "delta.delta.state_dict() returns the delta's tensors also while it is detached"
            )
        if self.delta is not None:
            self.delta.detach()
            if self._narrowed is not None:
                widen(self.delta, self._narrowed[0])

    def merge(self) -> None:
        """Adds the delta to the backbone's weights. Raises what `Delta.merge` raises."""
        self._delta().merge()

    def unmerge(self) -> None:
        """Restores the weights from before `merge`. Raises what `Delta.unmerge` raises."""
        self._delta().unmerge()

    def create_config_from_model(self) -> None:
        """Sets `config` to the options of this delta. It has them from the start."""
