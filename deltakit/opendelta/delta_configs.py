"""BaseDeltaConfig: the options of a delta with OpenDelta's names, as an object, a dictionary or a JSON file."""

import copy
import inspect
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar

from deltakit.core import Method
from deltakit.errors import CheckpointError, OptionError, warn
from deltakit.opendelta.matching import Selectors

CONFIG_NAME, OWN_CONFIG_NAME = "config.json", "delta_config.json"


class BaseDeltaConfig:
    """The options that all deltas have. A subclass for each type has its own before them, also by position."""

    delta_type: ClassVar[str] = ""
    method: ClassVar[Any]
    """deltakit's method class for this type."""
    renamed: ClassVar[Mapping[str, str]] = {}
    """OpenDelta's options, each with the name that the method has for it."""

    def __init__(
        self,
        modified_modules: Selectors = None,
        exclude_modules: Selectors = None,
        unfrozen_modules: Selectors = ("deltas",),
        common_structure: bool = False,
        backbone_class: str | None = None,
        backbone_checkpoint_name: str | None = None,
        backbone_hash: str | None = None,
    ) -> None:
        self.modified_modules = modified_modules
        self.exclude_modules = exclude_modules
        self.unfrozen_modules = unfrozen_modules
        self.common_structure = common_structure
        self.backbone_class = backbone_class
        self.backbone_checkpoint_name = backbone_checkpoint_name
        self.backbone_hash = backbone_hash

    def method_at(self, at: Any, **options: Any) -> Method:
        """Returns deltakit's method with these options and targets, and with further options of deltakit.

        Raises:
            OptionError: if an option is out of its range.
        """
        own = {ours: getattr(self, name) for name, ours in self.renamed.items()}
        method: Method = self.method(at=at, **own, **options)
        return method

    @classmethod
    def options_of(cls, method: Mapping[str, Any]) -> dict[str, Any]:
        """Returns OpenDelta's options for a method as deltakit's files have it."""
        own = {name: method[ours] for name, ours in cls.renamed.items() if ours in method}
        return {**own, "modified_modules": method.get("at"), "delta_type": cls.delta_type}

    @classmethod
    def option_names(cls) -> list[str]:
        """Returns the names of the options, in their order."""
        names: dict[str, None] = {}
        for kind in cls.__mro__:
            if issubclass(kind, BaseDeltaConfig):
                parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
                names.update(dict.fromkeys(p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD))
        return list(names)

    @classmethod
    def own_names(cls) -> list[str]:
        """Returns the names of the options that only this type has, in their order."""
        common = BaseDeltaConfig.option_names()
        return [name for name in cls.option_names() if name not in common]

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Returns the config for a dictionary. `kwargs` come before what is in the dictionary.

        Keys that this type does not have are named in a warning and have no effect. With `return_unused_kwargs` they are
        returned, too, as `(config, rest)`.
        """
        given = {**config_dict, **kwargs}
        known = cls.option_names()
        rest = {name: value for name, value in given.items() if name not in known}
        unknown = sorted(rest.keys() - {"delta_type"})
        if unknown:
            warn(
                f"{cls.__name__}.from_dict: {', '.join(unknown)} are no options of this delta type, and have no effect"
            )
        config = cls(**{name: value for name, value in given.items() if name in known})
        return (config, rest) if return_unused_kwargs else config

    @classmethod
    def from_finetuned(cls, finetuned_delta_path: str | PathLike[str], **kwargs: Any) -> Any:
        """Returns the config in a folder that OpenDelta or deltakit wrote. `kwargs` come before what is in it.

        Raises:
            CheckpointError: if there is no config, or it is damaged.
        """
        found = cls.get_config_dict(finetuned_delta_path)
        options = cls.options_of(found) if "method" in found else found
        # OpenDelta's files have more than options, such as the version of transformers.
        own = {*cls.option_names(), "delta_type"}
        return cls.from_dict({name: value for name, value in options.items() if name in own}, **kwargs)

    @classmethod
    def get_config_dict(cls, finetuned_delta_path: str | PathLike[str]) -> dict[str, Any]:
        """Returns what the config in a folder, or the JSON file itself, holds; of deltakit's own the first method.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        path = Path(finetuned_delta_path)
        own = path / OWN_CONFIG_NAME
        file = own if own.is_file() else path / CONFIG_NAME if path.is_dir() else path
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file}: no config of OpenDelta could be read: {error}; pass a folder with a {CONFIG_NAME}"
            ) from None
        methods = found.get("methods", [found]) if isinstance(found, dict) else [found]
        if not (isinstance(methods, list) and methods and isinstance(methods[0], dict)):
            raise CheckpointError(f"{file}: expected a dictionary of options; pass a folder with a {CONFIG_NAME}")
        return dict(methods[0])

    def save_finetuned(self, save_directory: str | PathLike[str]) -> None:
        """Writes the config into a folder, which is made if it is not there.

        Raises:
            OptionError: if an option cannot be written as JSON.
        """
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.to_json_file(Path(save_directory) / CONFIG_NAME)

    def to_dict(self) -> dict[str, Any]:
        """Returns all options and the `delta_type`."""
        return {**copy.deepcopy(self.__dict__), "delta_type": self.delta_type}

    def to_json_string(self) -> str:
        """Returns the options as JSON.

        Raises:
            OptionError: if an option cannot be written as JSON.
        """
        try:
            return json.dumps(self.to_dict(), indent=2, sort_keys=True, default=list) + "\n"
        except (TypeError, ValueError) as error:
            raise OptionError(f"{type(self).__name__}: an option cannot be written as JSON: {error}") from None

    def to_json_file(self, json_file_path: str | PathLike[str]) -> None:
        """Writes the options as JSON into a file.

        Raises:
            OptionError: if an option cannot be written as JSON.
        """
        Path(json_file_path).write_text(self.to_json_string(), encoding="utf-8")

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Sets options from a dictionary."""
        self.__dict__.update(config_dict)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.__dict__ == self.__dict__

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"
