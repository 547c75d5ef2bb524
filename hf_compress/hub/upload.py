"""``push``: upload a finished model folder to the Hub."""

from __future__ import annotations

import glob
import json
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import HubError

PUBLISHED = (
    "README.md",
    "config.json",
    "metrics.json",
    "model.safetensors.index.json",
    "plan*.json",
    "preprocessor_config.json",
    "processor_config.json",
    "recipe.yaml",
    "*.onnx",
    "*.onnx.data",
    "*.png",
    "*.safetensors",
)
_TRANSIENT = {408, 429, 500, 502, 503, 504}
_FIRST_WAIT = 1.0  # seconds; doubles with every retry
_REMEDIES = {
    401: "The token is not valid; make one at https://huggingface.co/settings/tokens and set HF_TOKEN.",
    403: "The token may not write there; give it write access, or choose a repository of your own.",
    404: "Check the name, and that the token may see it.",
}


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    endpoint: str | None = None,
    retries: int = 3,
) -> str:
    """Upload a model folder: weights, configuration, card, pictures, metrics, recipe and ONNX file; nothing below it.

    Args:
        folder: what ``save_pretrained`` or a recipe wrote. Only files directly in it whose names are in ``PUBLISHED``
            are sent, so no checkpoint of an unfinished stage.
        repo_id: ``user/name``; made when it does not exist.
        private: for a new repository.
        token: an access token; the environment variable HF_TOKEN or the token of ``hf auth login`` when not given.
        endpoint: address of the Hub, if not the public one.
        retries: how often a failed connection or an overloaded server is tried again, after 1, 2, 4, ... seconds.

    Returns:
        Address of the commit.

    Raises:
        HubError: without a token, offline, with nothing to upload, or when the Hub refuses.
    """
    import huggingface_hub

    token = token or huggingface_hub.get_token()
    if not token:
        raise HubError(
            f"no access token, so nothing was sent to {repo_id}. Set HF_TOKEN, run `hf auth login`, or pass token=; a "
            "token with write access comes from https://huggingface.co/settings/tokens."
        )
    if huggingface_hub.is_offline_mode():
        raise HubError(f"HF_HUB_OFFLINE is set, so nothing was sent to {repo_id}. Unset it to upload.")
    names = published_files(folder)
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token, library_name="hf_compress")

    def upload() -> str:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=[glob.escape(name) for name in names],
            commit_message="Upload model with hf_compress",
        )
        return str(commit.commit_url)

    for attempt in range(retries + 1):
        try:
            return upload()
        except Exception as error:
            status, is_transient = _diagnose(error)
            if is_transient and attempt < retries:
                time.sleep(_FIRST_WAIT * 2**attempt)
                continue
            reason = " ".join(str(error).split())[:400].rstrip(".") or type(error).__name__
            remedy = _REMEDIES.get(status or 0, "Try again later." if is_transient else "Correct it and push again.")
            tries = f" after {attempt + 1} tries" if is_transient else ""
            raise HubError(f"{repo_id} could not be uploaded{tries}: {reason}. {remedy}") from error
    raise AssertionError("unreachable")


def published_files(folder: str | Path) -> list[str]:
    """Names of the files in a model folder that go to the Hub.

    Raises:
        HubError: when the folder holds no model.
    """
    folder = Path(folder)
    found = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    if "config.json" not in found:
        raise HubError(
            f"{folder} holds no config.json, so it is not a finished model. Give the folder that `save_pretrained` or "
            "`hf-compress run` wrote."
        )
    return [name for name in found if not name.startswith(".") and any(fnmatch(name, pattern) for pattern in PUBLISHED)]


def _diagnose(error: BaseException) -> tuple[int | None, bool]:
    """HTTP status, if there was one, and whether trying again may help. Follows the chain of causes."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    cause: Any = error
    while cause is not None:
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            return status, status in _TRANSIENT
        # a proxy's page where the Hub's JSON should be is a server in trouble, too
        if isinstance(cause, (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)):
            return None, True
        cause = cause.__cause__ or cause.__context__
    return None, False
