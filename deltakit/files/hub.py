"""Deltas on the Hub. This is the only file that uses `huggingface_hub`, and it imports it only when needed.

`huggingface_hub` reads its settings (`HF_ENDPOINT`, `HF_HUB_OFFLINE`) once, at its import. An import at the top would fix
them before the user's code can set them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

from deltakit.errors import CheckpointError, HubError, OptionError
from deltakit.files.formats import FILES, holds_delta, no_delta
from deltakit.files.repository import is_repository

_LOGIN = "log in with `hf auth login` or pass token="


def find_folder(source: str | PathLike[str], *, revision: str | None = None, token: str | bool | None = None) -> Path:
    """Returns the folder that holds a delta: the source if it is a folder, else a copy of the Hub repository.

    Args:
        source: a local folder, or a repository id such as "user/name". Texts that can only be paths (`name`, `./name`,
            absolute paths, more than one slash, backslashes) and `Path` objects are never looked up on the Hub.
        revision: a branch, tag or commit of the repository; by default its main branch.
        token: an access token, or False to send none; by default the one that `hf auth login` saved.

    Raises:
        OptionError: if `revision` is given for a folder.
        CheckpointError: if the source can only be a local folder and does not exist, or is a file.
        HubError: if there is no such repository, it holds no delta, or the Hub cannot be reached or refuses.
    """
    name, folder = str(source), Path(source)
    try:
        is_folder, is_there = folder.is_dir(), folder.exists()
    except OSError:
        # Too long for a path.
        is_folder = is_there = False
    if is_folder and revision is not None:
        raise OptionError(
            f"revision={revision!r}: {name} is a folder, and only repositories have revisions; omit revision="
        )
    if is_folder:
        return folder
    if is_there:
        raise CheckpointError(f"{name or repr(name)}: this is a file; pass the folder of a delta, or a Hub repository")
    # Every delta on the Hub has an owner; only a few old models have none.
    if not isinstance(source, str) or not is_repository(name) or "/" not in name:
        raise CheckpointError(
            f"{name or repr(name)}: no such folder, and this is not a Hub repository id such as 'user/my-delta'; check the "
            f"path (working directory {Path.cwd()})"
        )
    from huggingface_hub import snapshot_download

    with _explained(name, revision, "read", missing_folder=f"no local folder {name!r} exists, and "):
        copy = snapshot_download(name, revision=revision, token=token, allow_patterns=list(FILES))
    if not holds_delta(Path(copy)):
        raise HubError(f"{name}: {no_delta(_files(name, revision, token))}")
    return Path(copy)


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a folder in one commit and returns the URL of the repository, which is created if needed.

    Raises:
        HubError: if the id is malformed, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo_id, None, "write to"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id, folder_path=folder, commit_message=commit_message or "Upload a delta with deltakit"
        )
    return str(url)


def _files(repo_id: str, revision: str | None, token: str | bool | None) -> list[str]:
    from huggingface_hub import HfApi

    with _explained(repo_id, revision, "read"):
        return list(HfApi(token=token).list_repo_files(repo_id, revision=revision))


@contextmanager
def _explained(repo_id: str, revision: str | None, verb: str, *, missing_folder: str = "") -> Iterator[None]:
    """Turns each error of the Hub into a `HubError` of one line.

    `missing_folder` starts the messages of the errors after which a local folder may be what the user meant.
    """
    from huggingface_hub import errors

    httpx = _httpx()
    no_network = (httpx.TransportError, ConnectionError, TimeoutError)
    try:
        yield
    except errors.LocalTokenNotFoundError as error:
        raise HubError(f"{repo_id}: token=True needs a saved token, and there is none: {_LOGIN}") from error
    except errors.GatedRepoError as error:
        raise HubError(f"{repo_id}: this repository is gated: ask for access on its page, then {_LOGIN}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id}: {missing_folder}the Hub has no such repository, or it is private: check the spelling; if it is "
            f"private, {_LOGIN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{repo_id}: the repository has no revision {revision!r}; pass one of its branches, tags or commits"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository id: {error}; pass one such as 'user/name'") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{repo_id}: {_refusal(error, verb)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, *no_network) as error:
        cached = "" if verb != "read" else " and the cache has no copy"
        raise HubError(
            f"{repo_id}: {missing_folder}the Hub cannot be reached{cached}: check the network, or unset HF_HUB_OFFLINE"
        ) from error


def _httpx() -> Any:
    """Returns the network library of the installed huggingface_hub."""
    from huggingface_hub import utils

    # From some release on it is a copy of its own under this name, and before that the package httpx.
    return utils.httpx if hasattr(utils, "httpx") else import_module("httpx")


def _refusal(error: Exception, verb: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return f"the token is not valid: {_LOGIN} with another one"
    if status == 403:
        return f"this token has no permission to {verb} the repository: {_LOGIN} with one that has"
    return f"the Hub refused with status {status}: {error}; try again later, or check the repository's page"
