"""An export on its way to a hub, by huggingface_hub: to huggingface.co, or to the server that HF_ENDPOINT names."""

from pathlib import Path
from typing import NamedTuple

from data_pipeline.errors import ConfigError, RunError
from data_pipeline.places import EXPORT, mistaken
from pretrain.export.hugging_face.card import LICENSE


class Upload(NamedTuple):
    """A file that goes."""

    name: str
    bytes: int


def uploads(folder: Path) -> list[Upload]:
    """What would go of a folder, in order of the names.

    Raises:
        ConfigError: it is not a model's folder, as `duet checkpoint export` writes them.
    """
    if not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
        told = mistaken(folder, EXPORT) or "no config.json and no weights (*.safetensors) in it"
        raise ConfigError(f"{folder}: {told}; `duet checkpoint export RUN --to FOLDER` writes what can be pushed")
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)
    return [Upload(file.relative_to(folder).as_posix(), file.stat().st_size) for file in files]


def is_licensed(folder: Path) -> bool:
    """Whether somebody has filled in the licence of its model card."""
    card = folder / "README.md"
    return card.is_file() and LICENSE not in card.read_text(errors="replace")


def check_name(repo: str) -> None:
    """That a repository may be called so.

    Raises:
        ConfigError: it may not; huggingface_hub is missing.
    """
    try:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id
    except ImportError:
        raise ConfigError("duet push needs huggingface_hub: pip install 'duet-pretrain[hf]'") from None
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ConfigError(f"{repo}: {error}; a repository is called NAME/MODEL") from None


def push(folder: Path, repo: str, *, private: bool) -> str:
    """Upload what `uploads` names, as one commit, into a repository that is made if it is not there.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: as `uploads` and `check_name`.
        RunError: the server refuses it, or cannot be reached.
    """
    files = uploads(folder)
    check_name(repo)
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi()
    try:
        named = api.create_repo(repo, private=private, exist_ok=True).repo_id
        text = f"{len(files)} files, {sum(file.bytes for file in files):,} bytes"
        done = api.upload_folder(
            repo_id=named,
            folder_path=folder,
            commit_message=f"Upload by duet push: {text}",
            ignore_patterns=["**/__pycache__/**", "__pycache__/**"],
        )
    except (HTTPError, OSError) as error:  # what huggingface_hub raises for servers, and what sockets raise
        raise RunError(
            f"{repo}: not uploaded: {error}\n`hf auth login`, or HF_TOKEN, says who you are; what went already is kept"
        ) from error
    return str(done.commit_url)
