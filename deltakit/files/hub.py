"""Deltas on the Hub. This is the only file that uses `huggingface_hub`, and it imports it only when needed.

`huggingface_hub` reads its settings (`HF_ENDPOINT`, `HF_HUB_OFFLINE`) once, at its import. An import at the top would fix
them before the user's code can set them.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from glob import escape
from importlib import import_module
from os import PathLike
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from deltakit.errors import CheckpointError, HubError, OptionError
from deltakit.files.formats import FILES, TELLING, formats_in, no_delta
from deltakit.files.repository import is_repository

_FILE = re.compile(r"/resolve/[^/]+/([^?]+)")
"""The name of a file in its address on the Hub."""
_MODEL_CONFIG = "config.json"
_LOGIN = "log in with `hf auth login` or pass token="


@dataclass(frozen=True)
class Access:
    """How a repository is read; the fields are the arguments of `dk.load` with these names."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | PathLike[str] | None = None
    local_files_only: bool = False
    subfolder: str | None = None

    def copy(self, repo_id: str, files: Sequence[str], revision: str | None) -> Path:
        """Returns a folder with those of the files that the repository has. Downloads what is not in the cache."""
        from huggingface_hub import snapshot_download

        # In a subfolder, or it is one of them itself. What is asked for are patterns, and names may look like some.
        inside = escape(self.subfolder or "").strip("/")
        wanted = [*(f"{inside}/{file}" for file in files), inside] if inside else list(files)
        found = snapshot_download(
            repo_id,
            revision=revision,
            token=self.token,
            cache_dir=None if self.cache_dir is None else Path(self.cache_dir),
            local_files_only=self.local_files_only,
            allow_patterns=wanted,
        )
        return Path(found)

    def refuse_outside(self, source: object) -> None:
        """Refuses a subfolder that is in no folder or repository.

        Raises:
            OptionError: if it is one.
        """
        inside = PurePosixPath(self.subfolder or ".")
        if self.subfolder is not None and (not inside.parts or inside.is_absolute() or ".." in inside.parts):
            raise OptionError(
                f"subfolder={self.subfolder!r}: expected a folder or file in {source}, such as 'style' or 'lora.safetensors'"
            )


def called(source: str | PathLike[str], access: Access) -> str:
    """Returns what errors and printouts call the place of a delta."""
    return f"{source}/{access.subfolder}" if access.subfolder is not None else str(source)


def find_folder(source: str | PathLike[str], access: Access = Access()) -> Path:
    """Returns the folder or file that holds a delta: the source if it is there, else a copy of the Hub repository.

    Args:
        source: a local folder or file, or a repository id such as "user/name". Texts that can only be paths (`name`,
            `./name`, absolute paths, more than one slash, backslashes) and `Path` objects are never looked up on the Hub.

    Raises:
        OptionError: if `revision` is given for a folder, or `subfolder` is in none.
        CheckpointError: if the source can only be local and does not exist.
        HubError: if there is no such repository, it holds no delta, or the Hub cannot be reached or refuses.
    """
    name, folder = str(source), Path(source)
    access.refuse_outside(name)
    is_there = _exists(folder)
    if is_there and access.revision is not None:
        raise OptionError(
            f"revision={access.revision!r}: {name} is on this machine, and only repositories have revisions; omit the revision"
        )
    if is_there:
        place = folder / (access.subfolder or "")
        if not _exists(place):
            raise CheckpointError(f"{name}: it has no {access.subfolder}; pass the path of a folder or file in it")
        return _whole(place)
    # Every delta on the Hub has an owner; only a few old models have none.
    if not isinstance(source, str) or not is_repository(name) or "/" not in name:
        raise CheckpointError(
            f"{name or repr(name)}: no such folder, and this is not a Hub repository id such as 'user/my-delta'; check the "
            f"path (working directory {Path.cwd()})"
        )
    return _downloaded(name, access)


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:
        # Too long for a path.
        return False


def _whole(place: Path) -> Path:
    """Returns the folder of a delta of which people pass a file, such as its config; else the place."""
    return place.parent if place.name in FILES and place.is_file() and formats_in(place.parent) else place


def _downloaded(name: str, access: Access) -> Path:
    with _explained(name, access, "read", missing_folder=f"no local folder {name!r} exists, and "):
        copy = access.copy(name, FILES, access.revision)
        place = copy / (access.subfolder or "")
        late = [file for kind in formats_in(place) for file in kind.late_files]
        if late:
            # The name of the copy is its commit: the repository may have changed in between.
            place = access.copy(name, [*FILES, *late], copy.name) / (access.subfolder or "")
    if place.is_file() and place.name in TELLING:
        # The other files of the delta are beside it.
        above = str(PurePosixPath(access.subfolder or "").parent)
        return _downloaded(name, replace(access, subfolder=None if above == "." else above))
    if not formats_in(place):
        raise HubError(f"{called(name, access)}: {_none_on_the_hub(name, access)}")
    return place


def _none_on_the_hub(name: str, access: Access) -> str:
    """Returns what to say of a repository, or of a folder in one, without a delta."""
    files = _files(name, access)
    if access.subfolder is None:
        return no_delta(files, listed=True)
    inside = f"{access.subfolder.strip('/')}/"
    there = [file.removeprefix(inside) for file in files if file.startswith(inside)]
    if not there and access.subfolder not in files:
        folders = ", ".join(sorted({file.rpartition("/")[0] for file in files} - {""})[:10])
        return f"the repository has no {access.subfolder}; " + (f"its folders are {folders}" if folders else "omit it")
    return no_delta(there or [access.subfolder], listed=True)


def fetch_config(repo_id: str) -> None:
    """Downloads the config of a model on the Hub into the cache.

    transformers, which asks for a file in several calls, tries each call again for half a minute without a network.

    Raises:
        HubError: if the Hub has no such repository, it has no config, or the Hub cannot be reached and the cache has none.
    """
    access = Access()
    with _explained(repo_id, access, "read", missing_folder=f"no local folder {repo_id!r} exists, and "):
        found = access.copy(repo_id, [_MODEL_CONFIG], None)
    if not (found / _MODEL_CONFIG).is_file():
        raise HubError(
            f"{repo_id}: no config.json is in the repository, or in the cache without a network; pass a model's id"
        )


def upload(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    revision: str | None = None,
) -> str:
    """Uploads a folder in one commit and returns the URL of the repository, which is created if needed.

    Raises:
        HubError: if the id is malformed, or the Hub cannot be reached or refuses.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with _explained(repo_id, Access(revision, token), "write to"):
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload a delta with deltakit",
            revision=revision,
        )
    return str(url)


def _files(repo_id: str, access: Access) -> list[str]:
    from huggingface_hub import HfApi

    with _explained(repo_id, access, "read"):
        return list(HfApi(token=access.token).list_repo_files(repo_id, revision=access.revision))


@contextmanager
def _explained(repo_id: str, access: Access, verb: str, *, missing_folder: str = "") -> Iterator[None]:
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
            f"{repo_id}: the repository has no revision {access.revision!r}; pass one of its branches, tags or commits"
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{repo_id!r} is not a repository id: {error}; pass one such as 'user/name'") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{repo_id}: {_refusal(error, verb)}") from error
    except (httpx.RemoteProtocolError, httpx.ReadError, httpx.ReadTimeout) as error:
        raise HubError(f"{repo_id}: {_cut_off(error, verb)}") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, *no_network) as error:
        if access.local_files_only:
            raise HubError(
                f"{repo_id}: {missing_folder}the cache has no copy of this repository; omit local_files_only= to download it"
            ) from error
        cached = "" if verb != "read" else " and the cache has no copy"
        raise HubError(
            f"{repo_id}: {missing_folder}the Hub cannot be reached{cached}: check the network, or unset HF_HUB_OFFLINE"
        ) from error


def _cut_off(error: Any, verb: str) -> str:
    """Returns what to say of a connection that was there and broke off."""
    found = None
    if verb != "read":
        return "the connection to the Hub broke off: push again"
    # Some errors have no request, and raise this where they are asked for it.
    with suppress(RuntimeError):
        found = _FILE.search(str(error.request.url))
    return f"the download{f' of {unquote(found[1])}' if found else ''} was cut off: load again"


def _httpx() -> Any:
    """Returns the network library of the installed huggingface_hub."""
    from huggingface_hub import utils

    # From some release on it is a copy of its own under this name, and before that the package httpx.
    return utils.httpx if hasattr(utils, "httpx") else import_module("httpx")


def _refusal(error: Exception, verb: str) -> str:
    response: Any = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if status in (401, 403) and "authorization" not in response.request.headers:
        return f"the Hub asks for a token to {verb} the repository, and none was sent: {_LOGIN}"
    if status == 401:
        return f"the token is not valid: {_LOGIN} with another one"
    if status == 403:
        return f"this token has no permission to {verb} the repository: {_LOGIN} with one that has"
    return f"the Hub refused with status {status}: {error}; try again later, or check the repository's page"
