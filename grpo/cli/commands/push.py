"""`quartet export --push_to_hub OWNER/NAME`: an exported folder becomes a model repository of the hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from grpo.cli.commands.export import ExportError, export
from policies.files import hub


def export_and_push(run: Path, destination: Path | None, repo_id: str, *, adapter: bool = False) -> str:
    """Writes `destination` (None: a folder that is removed afterwards) and uploads it; returns what to tell the user.

    A repository that is not there is made, and is private. The token is the one of `hf auth login` or HF_TOKEN. Raises
    ExportError for a name or token that cannot be used, before anything is written, and where the hub refuses.
    """
    api = HfApi(endpoint=constants.ENDPOINT)
    check(api, repo_id)
    with tempfile.TemporaryDirectory() as scratch:
        folder = destination or Path(scratch) / repo_id.rpartition("/")[2]
        said = export(run, folder, adapter=adapter, hub_id=repo_id)
        try:
            api.create_repo(repo_id, private=True, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=f"quartet export of {run.name}"
            )
        except (HfHubHTTPError, OSError) as error:
            kept = f"; the export is in {destination}" if destination else ""
            raise ExportError(f"--push_to_hub {repo_id}: the hub refused it: {error}{kept}") from error
    return f"{said}\npushed to {commit.repo_url.url if commit.repo_url else repo_id} (a new repository is private)"


def run_export(run: Path, destination: Path | None, repo_id: str | None, *, adapter: bool = False) -> str:
    """Runs the command: writes a folder, uploads it, or both. Raises ExportError where neither is asked for."""
    if repo_id is not None:
        return export_and_push(run, destination, repo_id, adapter=adapter)
    if destination is None:
        raise ExportError("name the folder to write, DST, or a repository: --push_to_hub OWNER/NAME")
    return export(run, destination, adapter=adapter)


def check(api: HfApi, repo_id: str) -> None:
    """Raises ExportError unless this can be pushed to."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ExportError(f"--push_to_hub {repo_id!r} is no name of a repository: {error}") from None
    if "/" not in repo_id:
        raise ExportError(f"--push_to_hub {repo_id!r} has no owner: write OWNER/NAME")
    if why := hub.unreachable():
        raise ExportError(
            f"--push_to_hub {repo_id}: {why}. Leave it out, and where there is a network: hf upload {repo_id} FOLDER"
        )
    try:
        api.whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:
        raise ExportError(
            f"--push_to_hub {repo_id}: the hub does not know who you are ({type(error).__name__}); log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may write"
        ) from error
