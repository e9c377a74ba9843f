"""The Hugging Face Hub: files of a repository, fetched as a local folder, and folders pushed to one.

No code is fetched or run, nor files that could hold code, unless these are asked for by name (and then read as plain
tensors). The token comes from the environment (``HF_TOKEN``) alone, and is in no message.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from counterstain.errors import InputError, MismatchError

RepoType = Literal["model", "dataset"]
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WITH_CODE = ("*.py", "*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.pickle")
OURS = (
    "safetensors",
    "json",
    "jsonl",
    "yaml",
    "md",
    "csv",
    "parquet",
    "txt",
    "png",
    "svg",
)  # endings of what is pulled
PATIENCE_S = 5.0


def is_repo(source: str | Path) -> bool:
    """Whether a source names a repository of the Hub: OWNER/NAME, no file of weights, and nothing that is here."""
    path = Path(source)
    named = REPO_ID.fullmatch(str(source)) is not None and not path.match("*.safetensors")
    return named and not path.exists() and not any(path.match(pattern) for pattern in WITH_CODE)


def fetched(
    repo: str,
    patterns: Iterable[str] | None = None,
    *,
    kinds: Iterable[RepoType] = ("model",),
    into: Path | None = None,
) -> Path:
    """Return the folder with the files of a repository that match any of ``patterns``: the cache's, or ``into``.

    It is the first of the ``kinds`` of which there is one of that name. Without a connection it is what the cache
    holds. Raises InputError where the repository cannot be read.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    allowed = (
        [*(f"*.{ending}" for ending in OURS), "*/c/*"] if patterns is None else list(patterns)
    )  # c: chunks of Zarr
    options: dict[str, Any] = {"allow_patterns": allowed, "local_dir": into}
    offline = constants.HF_HUB_OFFLINE or not answers(constants.ENDPOINT)
    unwanted = list(WITH_CODE if patterns is None else WITH_CODE[:1])
    options |= {"ignore_patterns": unwanted, "local_files_only": offline}
    *others, last = kinds
    for kind in (*others, last):
        try:
            return Path(str(HfApi(token=_token()).snapshot_download(repo, repo_type=kind, **options)))
        except Exception as error:  # of the Hub's client, or of whichever library it speaks HTTP with
            absent = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
            if kind == last or not absent:
                if offline:
                    error = ConnectionError("no connection, and it is not in the cache")
                here = "no such folder is here either: give one that holds its files, or check the name"
                remedy = here if into is None else "check the name and, where it is private, HF_TOKEN"
                raise _cannot(repo, "read", error, remedy) from error
    raise AssertionError


def push_folder(folder: Path, repo: str, *, kind: RepoType, public: bool) -> str:
    """Push the files of a folder in one commit, and return the repository's address; it is private unless ``public``.

    Raises MismatchError where the repository is public already and that was not asked for, InputError where it cannot
    be written.
    """
    from huggingface_hub import HfApi

    if REPO_ID.fullmatch(repo) is None:
        raise InputError(f"{repo}: no name of a repository; expected OWNER/NAME")
    if not os.environ.get("HF_TOKEN"):
        raise InputError(f"{repo}: set HF_TOKEN to a token that may write (huggingface.co/settings/tokens)")
    api = HfApi(token=_token())
    try:
        address = str(api.create_repo(repo, repo_type=kind, private=not public, exist_ok=True))
        may = public or api.repo_info(repo, repo_type=kind).private
        if may:
            said = "Upload with counterstain"
            api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind, commit_message=said)
    except Exception as error:
        raise _cannot(repo, "written", error, "check its name and your token's permissions") from error
    if not may:
        raise MismatchError(f"{repo}: is public; give --public if everybody may see what you push, or another name")
    return address


def answers(address: str) -> bool:
    """Whether a server is there at all."""
    try:
        urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=PATIENCE_S).close()  # noqa: S310 - the Hub's own
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _token() -> str | bool:
    return os.environ.get("HF_TOKEN") or False  # never one that was stored by a login


def _cannot(repo: str, what: str, error: Exception, remedy: str) -> InputError:
    said = (str(error).splitlines() or [""])[0]
    if (token := os.environ.get("HF_TOKEN")) is not None:
        said = said.replace(token, "…")
    reason = f"{type(error).__name__}: {said:.200}"
    if "Gated" in type(error).__name__:
        remedy = f"accept its licence at huggingface.co/{repo} and set HF_TOKEN"
    return InputError(f"{repo}: cannot be {what} on the Hub ({reason}); {remedy}")
