"""Upload a finished model directory to the Hugging Face hub."""

import glob
from pathlib import Path
from typing import Any

from lvctx.artifacts.manifest import listed_files, verify_files
from lvctx.errors import InputError, MissingError, UsageError, first_line


def check_upload(repository: str) -> None:
    """Raise UsageError for an id without an owner or if the hub is switched off, and MissingError without a login."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise UsageError(f"--push-to-hub {repository!r:.100} is not the id of a model", fix="write OWNER/NAME")
    if constants.is_offline_mode():
        raise UsageError("--push-to-hub needs the hub, which HF_HUB_OFFLINE switches off", fix="unset HF_HUB_OFFLINE")
    if not get_token():
        raise MissingError("no login for the hub", where="--push-to-hub", fix="set HF_TOKEN, or run hf auth login")


def upload_model(directory: Path, repository: str) -> dict[str, Any]:
    """Upload the files in the manifest of `directory`; returns where they are, and the commit.

    The repository is created if there is none; the visibility of an existing one stays. Retries are the library's.
    Raises InputError if a file is damaged, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    verify_files(directory, cached=False)
    names = sorted(listed_files(directory))
    api = HfApi()
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="Upload model",
            allow_patterns=[glob.escape(name) for name in names],
        )
    except Exception as e:  # the hub client may raise anything
        reason = first_line(e).replace(get_token() or "\0", "***")
        raise InputError(f"the hub did not take the model ({reason})", where=repository) from e
    return {"url": str(commit.repo_url), "commit": commit.oid, "uploaded": len(names)}
