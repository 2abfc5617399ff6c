"""Profiles on the Hugging Face hub: bytes up, a path down. What `PrefixProfile.push_to_hub` and `from_pretrained` do.

Talks to the hub and nothing else; what is in a profile, and whether it obeys the format, is checked by profile.py. The
client of the hub is imported only when it is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .file import SUFFIX, ProfileError


def find_profile(source: str | os.PathLike[str], filename: str, **kwargs: Any) -> Path:
    """The path of a profile: as it is, in a folder, or fetched from the hub into its local cache.

    Arguments and errors are those of `PrefixProfile.from_pretrained`.
    """
    path = Path(source)
    if path.is_dir():
        return path / filename
    if path.is_file() or not isinstance(source, str) or source.endswith(SUFFIX):
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, filename, **kwargs))
    except Exception as error:
        raise ProfileError(f"cannot get {filename!r} of {source!r} from the hub: {_one_line(error)}") from error


def upload_profile(
    content: bytes, repo_id: str, filename: str, *, private: bool | None = None, token: Any = None, **kwargs: Any
) -> str:
    """Put a profile's content into a repository; a new one is made where there is none.

    Arguments, result and errors are those of `PrefixProfile.push_to_hub`. A `private` of None is the owner's default, a
    `token` of None the one that this machine is logged in with.
    """
    if not filename.endswith(SUFFIX):
        raise ProfileError(f"filename is {filename!r}; a profile's name ends in {SUFFIX}")
    from huggingface_hub import HfApi

    kwargs.setdefault("commit_message", f"Upload {filename} with prefixkv-cache")
    api = HfApi(token=token)
    try:
        if not kwargs.get("create_pr"):  # a pull request is made to a repository that is there, and somebody else's
            api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_file(path_or_fileobj=content, path_in_repo=filename, repo_id=repo_id, **kwargs)
    except Exception as error:
        raise ProfileError(f"cannot upload {filename!r} to {repo_id!r}: {_one_line(error)}") from error
    return str(commit.commit_url)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
