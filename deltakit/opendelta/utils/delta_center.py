"""DeltaCenter, which is not served."""

from deltakit.errors import HubError


def download(finetuned_delta_path: str, **_: object) -> str:
    """Raises an error that says what serves instead.

    Raises:
        HubError: always.
    """
    raise HubError(
        f"{finetuned_delta_path}: DeltaCenter is not served; pass a folder or a repository of the Hugging Face Hub to "
        "AutoDeltaModel.from_finetuned"
    )
