"""Upload of an exported folder to the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

from flyp_saflex.errors import ConfigError, RunError
from flyp_saflex.user_text import quoted

ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)")


def repository(address: str) -> str:
    """Return `user/name` of an address `hf://user/name`.

    Raises:
        ConfigError: another form.
    """
    found = ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(f"--push {quoted(address)}: expected hf://USER/NAME, for example hf://anna/clip-birds")
    return found[1]


def push(folder: Path, repo_id: str) -> str:
    """Upload a folder to a model repository, which is made private if it is new; return its address.

    Args:
        folder: what is uploaded.
        repo_id: `user/name`.

    Raises:
        RunError: no network, no login, or no right to write there; the folder stays.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo_id=repo_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message="Model of flyp-saflex")
    except Exception as error:  # the client raises its own types, those of its HTTP library, and OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(
            f"--push hf://{repo_id}: the upload failed ({quoted(reason)}); {folder} is complete: check the login "
            "(`hf auth login`) and the network, and upload it with `hf upload`"
        ) from None
    return str(url)
