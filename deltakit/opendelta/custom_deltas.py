"""What subclasses of OpenDelta's DeltaBase call to insert modules of their own, which is not served."""

from typing import Any, NoReturn

from deltakit.errors import StateError


class CustomDeltas:
    """Says what to do instead."""

    def insert_module(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raises an error.

        Raises:
            StateError: always.
        """
        raise StateError(
            f"{type(self).__name__}: modules of one's own are not inserted by deltakit.opendelta; write a method of deltakit "
            'instead: CONTRIBUTING.md, "Adding a method"'
        )

    insert_sequential_module = insert_parallel_module = replace_module = insert_module
    add_all_delta_to_backbone = update_module = modify_module = new_module_like = insert_module
