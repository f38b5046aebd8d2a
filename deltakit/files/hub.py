"""Deltas on the Hub: the only file that talks to `huggingface_hub`, which is imported when it is needed.

Importing it earlier would freeze its settings (`HF_ENDPOINT`, `HF_HUB_OFFLINE`) for everybody.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path

from deltakit.errors import CheckpointError, HubError
from deltakit.files.checkpoint import CARD_FILE, CONFIG_FILE, TENSORS_FILE

_REPO_ID = re.compile(r"[\w][\w.-]*(?:/[\w][\w.-]*)?")
_LOGIN = "log in with `hf auth login` or pass token="


def find_folder(source: str | PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """The folder that holds a delta: the source itself if it is one, else a copy of the Hub repository of that name.

    Raises:
        CheckpointError: if the source is neither a folder nor the name of a repository.
        HubError: if the repository cannot be read, or holds no delta.
    """
    name, folder = str(source), Path(source)
    if name and folder.is_dir():
        return folder
    if folder.exists() or not isinstance(source, str) or not _REPO_ID.fullmatch(name):
        raise CheckpointError(
            f"{name}: expected a folder with a delta, or a Hub repository such as 'user/my-delta'; found neither"
        )
    from huggingface_hub import snapshot_download

    with _explained(name, revision, "read"):
        copy = snapshot_download(
            name, revision=revision, token=token, allow_patterns=[CONFIG_FILE, TENSORS_FILE, CARD_FILE]
        )
    if not (Path(copy) / CONFIG_FILE).is_file():
        raise HubError(f"{name}: the repository holds no delta: {_found(name, revision, token)}")
    return Path(copy)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """The URL of the repository that now holds the folder, in one commit; created if it is not there.

    Raises:
        HubError: if the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo_id, None, "written"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=commit_message or "Upload a delta with deltakit"
        )
    return str(url)


def _found(repo_id: str, revision: str | None, token: str | bool | None) -> str:
    from huggingface_hub import HfApi

    with _explained(repo_id, revision, "read"):
        files = HfApi(token=token).list_repo_files(repo_id, revision=revision)
    more = f" and {len(files) - 10} more" if len(files) > 10 else ""
    return f"expected {CONFIG_FILE}, found {', '.join(files[:10]) or 'no files'}{more}"


@contextmanager
def _explained(repo_id: str, revision: str | None, verb: str) -> Iterator[None]:
    """One clear line for each way in which the Hub says no."""
    from huggingface_hub import errors
    from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

    no_network = (httpx.TransportError, ConnectionError, TimeoutError)
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(f"{repo_id}: the repository is gated: ask for access on its page, then {_LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: no such repository, or a private one: check the spelling; if it is private, {_LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo_id}: the repository has no revision {revision!r}; expected a branch, tag or commit"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository: expected 'user/name': {error}") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{repo_id}: {_refusal(error, verb)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, *no_network) as error:
        raise HubError(
            f"{repo_id}: the Hub cannot be reached and there is no copy in the cache: check the network, or unset "
            "HF_HUB_OFFLINE"
        ) from error


def _refusal(error: Exception, verb: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the token is not valid: {_LOGIN} with another one"
    if status == 403:
        return f"this token gives no right for it to be {verb}: {_LOGIN} with one that does"
    return f"the Hub refused with status {status}: {error}"
