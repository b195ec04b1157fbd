"""Push a checkpoint directory, or a model in memory (``push_to_hub``), to the Hub, always with its model card."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..runs.progress import stage
from ..runs.record import FILE_NAME, Record
from ..runs.run import find_run, require_sound
from ..trust.bounds import first_line, shown
from ..trust.files import require_publishable
from .save_methods import call_former

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from huggingface_hub.errors import HfHubHTTPError
    from transformers import PreTrainedModel

# Left over from training or editors, or pickles: never published.
IGNORED_PATTERNS = ["checkpoint-*", "checkpoint-*/**", "runs/**", ".*", "*.bin", "*.pt", "*.pth", "*.pkl", "*.tmp"]
# Weights of an earlier push. Stock transformers prefers a single file over shards, so a stale one would be loaded.
WEIGHT_PATTERNS = ["model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]


def push(
    directory: Path | str, repo_id: str, *, private: bool = False, revision: str | None = None, message: str = ""
) -> str:
    """Upload a checkpoint, and create the repository if it does not exist. Returns the URL of the commit.

    The token comes from ``hf auth login`` or ``HF_TOKEN``. Weights of an earlier push that are not in ``directory`` are
    deleted from the repository.

    Raises ``CheckpointError`` if ``directory`` is not a finished hf_optim checkpoint, if there is no token, or if the
    Hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import get_token

    directory = Path(directory)
    _require_finished(directory)
    if get_token() is None:
        raise CheckpointError(f"cannot push to {repo_id} without a token: run `hf auth login`, or set HF_TOKEN")
    with _readable_errors(repo_id):
        commit = _upload(
            directory,
            repo_id,
            private=private or None,
            revision=revision,
            commit_message=message or "Upload with hf-optim",
        )
    return str(commit.commit_url)


def push_to_hub(self: PreTrainedModel, repo_id: str, **kwargs: Any) -> CommitInfo:
    """Upload the optimized model like ``PreTrainedModel.push_to_hub``, with hf_optim's record and card.

    Takes ``commit_message, commit_description, private, token, revision, create_pr, max_shard_size, tags`` and returns
    the ``CommitInfo``, like the stock method. The stock method is not used, since it would overwrite the card.
    """
    run = find_run(self)
    if run is not None:
        require_sound(run)
    if run is None or not run.finished:
        return call_former(self, "push_to_hub", repo_id, **kwargs)
    kwargs.setdefault("commit_message", None)
    kwargs["commit_message"] = kwargs["commit_message"] or "Upload model"
    shard, tags = kwargs.pop("max_shard_size", None), kwargs.pop("tags", None)
    with tempfile.TemporaryDirectory() as home:
        self.save_pretrained(home, **({} if shard is None else {"max_shard_size": shard}))
        if tags:
            _add_tags(Path(home) / "README.md", tags)
        return _upload(Path(home), repo_id, **kwargs)


def _upload(
    directory: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    **kwargs: Any,
) -> CommitInfo:
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # The client counts in threads of its own, too.
    with stage(f"uploading to {repo_id}", everywhere=True):
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=directory,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=list(IGNORED_PATTERNS),
            delete_patterns=list(WEIGHT_PATTERNS),
            **kwargs,
        )


def local_directory(source: str, revision: str | None = None) -> Path | None:
    """Return the directory with the files of a model: its own, or the one in the Hub's cache; None if not cached."""
    from transformers.utils.hub import cached_file

    try:
        path = cached_file(source, "config.json", revision=revision, local_files_only=True)
    except OSError:
        return None
    return Path(path).parent if path is not None else None


def commit_of(source: str, revision: str | None = None) -> str | None:
    """Return the commit of a Hub model whose configuration is in the cache; None for a local directory."""
    from transformers.utils.hub import extract_commit_hash

    home = None if os.path.isdir(source) else local_directory(source, revision)
    return extract_commit_hash(str(home / "config.json"), None) if home is not None else None


@contextmanager
def _readable_errors(repo_id: str) -> Iterator[None]:
    """Translate the errors of the Hub client into ``CheckpointError`` with a one-line message and the remedy."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    from huggingface_hub.utils import httpx

    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo_id!r} is not a valid repository id ({first_line(error)}); use owner/name"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(f"the Hub refused {repo_id}: {_reason(error)}") from error
    except OfflineModeIsEnabled as error:
        raise CheckpointError(f"cannot push to {repo_id}: HF_HUB_OFFLINE is set") from error
    except httpx.HTTPError as error:
        raise CheckpointError(f"cannot reach the Hub to push {repo_id}: {first_line(error)}") from error
    except ValueError as error:
        raise CheckpointError(f"the Hub client refused {repo_id}: {first_line(error)}") from error


def _reason(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    message = error.server_message or first_line(error)
    remedy = {
        401: "; check the token with `hf auth whoami`",
        403: "; the token needs write access to this repository",
    }.get(status, "")
    return f"{status}: {' '.join(message.split())}{remedy}"


def _add_tags(card: Path, tags: list[str]) -> None:
    from huggingface_hub import ModelCard

    loaded = ModelCard.load(card)
    known = list(loaded.data.tags or [])
    loaded.data.tags = known + [tag for tag in tags if tag not in known]
    loaded.save(card)


def _require_finished(directory: Path) -> None:
    """Raise ``CheckpointError`` unless ``directory`` is the checkpoint of a finished run, with its record and card."""
    if not os.path.isdir(directory):
        raise CheckpointError(f"no directory {shown(str(directory))}")
    require_publishable(directory)
    for name in ("config.json", FILE_NAME, "README.md"):
        if not (directory / name).is_file():
            raise CheckpointError(
                f"{directory} has no {name}: push a directory written by `hf-optim compress` or save_pretrained"
            )
    if not list(directory.glob("*.safetensors")):
        raise CheckpointError(f"{directory} has no safetensors weights")
    if not Record.read(directory).finished:
        raise CheckpointError(f"{directory} is a checkpoint from the middle of a recipe; finish the recipe and save it")
