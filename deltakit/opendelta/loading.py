"""SaveLoadMixin: how OpenDelta's model classes are made from configs and files, and written to files."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from deltakit.core import parent_of, tensors_of
from deltakit.delta import OTHER_BACKBONE, Delta, attach_beside, load, spare_name
from deltakit.errors import CheckpointError, DeltaWarning, OptionError, warn
from deltakit.opendelta.delta_configs import BaseDeltaConfig
from deltakit.opendelta.parameter_lists import ParameterLists


class SaveLoadMixin(ParameterLists):
    """Makes deltas from configs and from saved files, and saves them."""

    delta_type: ClassVar[str]
    config_class: ClassVar[type[BaseDeltaConfig]]
    public_name: ClassVar[str] = ""
    """The name of the class that its user calls, if it is another."""

    @classmethod
    def from_config(cls, config: Any, backbone_model: nn.Module, check_hash: bool = True, **kwargs: Any) -> Any:
        """Attaches the delta that a config describes, and returns it. Other keywords have no effect, which is a warning.

        Raises:
            OptionError: if this is no config of this type, or a value is out of its range.
            TargetError: if the method cannot be attached to a module that the names match.
        """
        if not isinstance(config, cls.config_class):
            raise OptionError(
                f"{cls.__name__}.from_config: expected a {cls.config_class.__name__}, found a {type(config).__name__}; make "
                f"one with {cls.config_class.__name__}.from_dict, or use AutoDeltaConfig and AutoDeltaModel"
            )
        if kwargs:
            warn(f"{cls.__name__}.from_config: no effect of {', '.join(kwargs)}; set options in the config")
        own = set(cls.config_class.option_names()) - {"backbone_class", "backbone_checkpoint_name", "backbone_hash"}
        make: Any = cls
        return make(backbone_model, **{name: value for name, value in vars(config).items() if name in own})

    @classmethod
    def from_finetuned(
        cls,
        finetuned_delta_path: str | PathLike[str] = "",
        backbone_model: nn.Module | None = None,
        delta_config: BaseDeltaConfig | None = None,
        cache_dir: str | None = None,
        state_dict: Mapping[str, Any] | None = None,
        *model_args: Any,
        force_download: bool = False,
        check_hash: bool = True,
        local_files_only: bool = False,
        token: str | bool | None = None,
        revision: str | None = None,
        finetuned_model_name_or_path: str | PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Loads a delta from a folder or a Hub repository, attaches it and returns it. The backbone is in eval mode then.

        Options that have no effect here are named in a warning.

        Args:
            check_hash: whether to warn of another backbone than the delta's own. It is loaded all the same, as in OpenDelta.
            cache_dir: where downloads are kept; by default the Hub's own cache.
            local_files_only: whether to read a folder or the cache alone, without asking the Hub.
            token: an access token for the Hub.
            revision: a branch, tag or commit of the repository.
            finetuned_model_name_or_path: the path, by its name in OpenDelta 0.2.

        Raises:
            OptionError: if the path or the backbone is missing.
            CheckpointError: if the folder is missing, is no delta of this type, is damaged, or does not fit the backbone.
            HubError: if the repository cannot be read.
        """
        called = cls.public_name or cls.__name__
        source = finetuned_delta_path or finetuned_model_name_or_path or ""
        if not source or not isinstance(backbone_model, nn.Module):
            missing = "backbone_model" if source else "finetuned_delta_path"
            raise OptionError(f"{called}.from_finetuned: {missing}= is missing; pass a folder, and the backbone")
        given = {"delta_config": delta_config, "state_dict": state_dict}
        without = [name for name, value in given.items() if value is not None] + ["force_download"] * force_download
        if without or kwargs or model_args:
            named = [*without, *kwargs, *map(repr, model_args)]
            warn(f"{called}.from_finetuned: no effect of {', '.join(named)}; the files tell all options")
        with warnings.catch_warnings():
            if not check_hash:
                warnings.filterwarnings("ignore", f".*{OTHER_BACKBONE}", DeltaWarning)
            delta = load(
                source,
                backbone_model,
                name=spare_name(backbone_model),
                freeze=False,
                attach=False,
                check="warn",
                token=token,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        return cls._of(delta, source)

    @classmethod
    def _of(cls, delta: Delta, source: str | PathLike[str]) -> Any:
        """Returns the object for a loaded delta, and attaches it."""
        found = {method.name for method in delta.methods}
        if cls.delta_type and found != {cls.delta_type}:
            raise CheckpointError(
                f"{source}: expected the delta_type {cls.delta_type!r} for {cls.__name__}, found {', '.join(sorted(found))}; "
                "use AutoDeltaModel.from_finetuned, which takes any"
            )
        model: Any = cls.__new__(cls)
        model.restore(delta)
        attach_beside(delta)
        delta.backbone.eval()
        return model

    def save_finetuned(
        self,
        finetuned_delta_path: str | PathLike[str] = "./delta_checkpoints/",
        save_config: bool = True,
        state_dict: Mapping[str, Any] | None = None,
        save_function: Callable[..., Any] = torch.save,
        push_to_dc: bool = False,
        center_args: Mapping[str, Any] = {},  # never written to
        center_args_pool: Mapping[str, Any] = {},
        list_tags: Sequence[str] = (),
        dict_tags: Mapping[str, Any] = {},
        delay_push: bool = False,
        test_result: Any = None,
        usage: str = "",
        *,
        push_to_hub: str | bool = False,
    ) -> Path:
        """Saves the delta in deltakit's format and returns the folder.

        Args:
            push_to_hub: a repository such as "user/name", to which the delta is uploaded as well.

        What is for DeltaCenter, `state_dict`, `save_function` and `save_config=False` have no effect, which is a warning.

        Raises:
            CheckpointError: if the files cannot be written.
            HubError: if the Hub cannot be reached or refuses the upload.
            OptionError: if `push_to_hub` is True.
            StateError: if nothing is attached, the delta's scale is not 1, or this process does not hold all of its values.
        """
        if push_to_hub is True:
            raise OptionError(
                "save_finetuned(push_to_hub=True): expected a repository, such as push_to_hub='user/name'"
            )
        center = {"push_to_dc": push_to_dc, "center_args": center_args, "center_args_pool": center_args_pool}
        tags = {"list_tags": list_tags, "dict_tags": dict_tags, "test_result": test_result, "usage": usage}
        given = {**center, "delay_push": delay_push, **tags, "state_dict": state_dict}
        without = [name for name, value in given.items() if value]
        without += ["save_function"] * (save_function is not torch.save) + ["save_config=False"] * (not save_config)
        if without:
            warn(
                f"save_finetuned: no effect of {', '.join(without)}: the delta is saved to {finetuned_delta_path} alone, "
                "with its config (DeltaCenter is not served; push_to_hub='user/name' uploads to the Hugging Face Hub)"
            )
        folder = self._delta().save(finetuned_delta_path)
        if push_to_hub:
            self._delta().push(push_to_hub)
        return folder

    def save_checkpoint(self, path: str | PathLike[str], save_func: Callable[..., Any] = torch.save) -> None:
        """Writes the delta's tensors into one file, without its options."""
        save_func(self._delta().state_dict(), path)

    def load_checkpoint(self, path: str | PathLike[str], load_func: Callable[..., Any] = torch.load) -> None:
        """Loads what `save_checkpoint` wrote. What the delta trained fully is excluded in `freeze_module` first.

        Raises:
            CheckpointError: if a tensor is missing, unknown, of another shape or dtype, or not finite.
        """
        delta, state = self._delta(), load_func(path)
        also = {name for name, _ in tensors_of(self.backbone_model)}.intersection(state) - set(delta.fully_trained)
        if also:
            modules = sorted({parent_of(name) or name for name in also})
            raise CheckpointError(
                f"{path}: {len(also)} of its tensors are of modules of the backbone that this delta does not train fully; "
                f"call freeze_module(exclude={['deltas', *modules]}) before load_checkpoint"
            )
        delta.load_state_dict(state, where=str(path))
