"""The Hugging Face Hub: which names are its repositories, and files fetched from them or sent to them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from vidsieve.errors import PolicyError, VidsieveError

_WORD = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(f"{_WORD}/{_WORD}", re.ASCII)
_REVISION = re.compile(f"{_WORD}(/{_WORD})*", re.ASCII)


def is_repository(name: str) -> bool:
    """Return True if a name has the form ``OWNER/NAME``, whether or not the hub has it."""
    return _NAME.fullmatch(name) is not None


def is_hub_name(name: str | Path) -> bool:
    """Return True if a name is to be looked up on the hub: ``OWNER/NAME``, or ``OWNER/NAME@REVISION``.

    Paths, names of local files and folders, and names that begin with a local folder's are not: nothing is asked for
    a misspelt folder.
    """
    if not isinstance(name, str):
        return False
    repository, at, revision = name.partition("@")
    if not is_repository(repository) or (at and not _REVISION.fullmatch(revision)):
        return False
    return not os.path.lexists(name) and not os.path.isdir(name.partition("/")[0])


def no_policy(name: str) -> PolicyError:
    """Return the error for a path that is no policy's, and no name on the hub."""
    hub = ""
    if is_repository(name.partition("@")[0]) and not os.path.isdir(name):
        hub = f" ({name.partition('/')[0]} is a local folder, so the hub is not asked)"
    return PolicyError(f"no policy in {name}: config.json is missing there{hub}; train one with `vidsieve train`")


def download(name: str, files: Sequence[str], error: type[VidsieveError]) -> Path:
    """Return the folder of the hub's cache that has these files of ``OWNER/NAME`` or ``OWNER/NAME@REVISION``.

    Nothing but these files is fetched. Where the hub cannot be reached, it is the commit that was fetched last for
    this revision.

    Raises
    ------
    VidsieveError
        The type given as `error`, if there is no such repository or revision, or the hub cannot be reached and the
        cache does not have it.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(files)))
    except LocalEntryNotFoundError:
        offline = constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set: unset it" if offline else f"{constants.ENDPOINT} cannot be reached: go online"
        raise error(
            f"there is no folder {name}, the cache {constants.HF_HUB_CACHE} does not have it, and {why}, set HF_HOME "
            "to a cache that has it, or give a local folder"
        ) from None
    except RevisionNotFoundError:
        raise error(
            f"{repository} has no revision {revision!r} at {constants.ENDPOINT}: give a branch, a tag or a whole commit"
        ) from None
    except RepositoryNotFoundError:
        raise error(
            f"there is no folder {name}, and {constants.ENDPOINT} shows you no such repository: check the name; for "
            "one that is private, run `hf auth login`"
        ) from None
    except _failures() as fault:
        raise error(f"cannot fetch {name} from {constants.ENDPOINT}: {_first_line(fault)}") from None


def upload(folder: Path, repository: str, private: bool, message: str, error: type[VidsieveError]) -> str:
    """Send every file of `folder` to a model repository, in one commit, and return the hash of that commit.

    A repository that is not there yet is created.

    Parameters
    ----------
    repository : str
        ``OWNER/NAME``.
    private : bool
        Of a repository that is created.
    message : str
        First line of the commit's message.

    Raises
    ------
    VidsieveError
        The type given as `error`, if the name is of another form, or the hub cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, constants

    if not is_repository(repository):
        raise error(f"{repository!r} is no repository of the hub: give OWNER/NAME")
    files = [CommitOperationAdd(path.name, path) for path in sorted(folder.iterdir())]
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, files, commit_message=message)
    except _failures() as fault:
        raise error(
            f"cannot push to {repository} at {constants.ENDPOINT}: {_first_line(fault)}; a token that may write there "
            "is needed: run `hf auth login`"
        ) from None
    return commit.oid


def _failures() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises for the network, statuses, the disk, answers and uploads.

    The bases of its own error are OSError and that of its HTTP client, which is another one in its older versions.
    """
    from huggingface_hub.errors import HfHubHTTPError

    bases = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)
    return (*bases, ValueError, RuntimeError)


def _first_line(fault: Exception) -> str:
    return (str(fault).strip() or type(fault).__name__).splitlines()[0].rstrip(".")
