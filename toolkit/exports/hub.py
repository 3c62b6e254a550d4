"""Upload a folder with a model card to the Hugging Face Hub: a direction, a plan, an adapter or an edited model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.store.texts import read_text

CARD = "README.md"
TOKENIZERS = ("tokenizer", "vocab", "special_tokens_map", "added_tokens")  # their texts are tokens
SKIPPED = (".lock", ".partial", ".tmp", ".writable")  # of running or dead processes
_REPO = re.compile(r"[\w.-]{1,96}/[\w.-]{1,96}", re.ASCII)


@dataclass(frozen=True)
class Upload:
    """A planned upload, from ``plan_upload``.

    Attributes:
        folder: The folder.
        repo: Repository on the Hub, ``USER/NAME``.
        files: Path inside the folder and size in bytes of each file, in order of path.
        card: Text of ``README.md``, the model card.
    """

    folder: Path
    repo: str
    files: tuple[tuple[str, int], ...]
    card: str


def plan_upload(folder: str | Path, repo: str) -> Upload:
    """Check a folder, and return the upload that ``push`` takes. Nothing is sent.

    Raises:
        FileNotFoundError: there is no such folder, or it has no card.
        ValueError: the name of the repository is malformed, the card has no front matter (YAML header) with ``base_model``, the folder
            holds a link or a hidden file, or the card or a JSON file contains the path of a file on this machine.
        store.StoreError: the card cannot be read.
    """
    path = Path(folder)
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise ValueError(f"{repo!r} is not a repository of the Hub: give USER/NAME, of letters, digits and - _ .")
    if not path.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a directory. A folder with a card is written by `toolkit export --to folder`, plan, adapter or merged."
        )
    if not (path / CARD).is_file():
        raise FileNotFoundError(
            f"{folder} has no {CARD}, the card that says what it holds. `toolkit thinkedit` and `toolkit export --to folder`, plan, adapter or "
            "merged write one."
        )
    files = sorted(file for file in path.rglob("*") if (file.is_symlink() or not file.is_dir()) and not file.name.endswith(SKIPPED))
    for file in files:
        inside = file.relative_to(path)
        if file.is_symlink() or any(part.startswith(".") for part in inside.parts):
            raise ValueError(f"{folder} holds {inside}, a link or a hidden file, which is not uploaded: remove it first.")
    card = read_text(path / CARD)
    if not card.startswith("---\n") or "\nbase_model:" not in card:
        raise ValueError(
            f"{path / CARD} has no front matter with base_model, so the Hub could not tell what it belongs to: write it again."
        )
    _check_places(files)
    return Upload(path, repo, tuple((file.relative_to(path).as_posix(), file.stat().st_size) for file in files), card)


def _check_places(files: Sequence[Path]) -> None:
    """Raise ValueError if the card or a JSON file contains a path that exists on this machine: readers of the Hub do not have it."""
    from huggingface_hub import RepoCard

    for file in files:
        if file.name == CARD:
            fields = RepoCard(read_text(file)).data.to_dict()
        elif file.suffix == ".json" and not file.name.startswith(TOKENIZERS):
            fields = json.loads(read_text(file))
        else:
            continue
        for text in _texts(fields):
            if text[:1] in ("/", "~", ".") and len(Path(text).parts) > 1 and os.path.exists(os.path.expanduser(text)):
                raise ValueError(
                    f"{file} names {text}, a place on this machine, which readers of the Hub do not have. Load the base model by its hub id and "
                    "export again, or write the hub id into the file."
                )


def _texts(value: Any) -> Iterator[str]:
    """Yield every text inside a value read from JSON or YAML."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def push(upload: Upload, *, public: bool = False, api: Any = None) -> str:
    """Upload a folder to the Hub and return the URL of the commit. A repository that does not exist is created, private by default.

    Args:
        upload: Result of ``plan_upload``.
        public: True to create a public repository, or to allow an existing one that is public.
        api: Object with the methods of ``huggingface_hub.HfApi``; ``None`` makes one, which uses the token of ``hf auth login``.

    Raises:
        ValueError: the repository exists and is public, but ``public`` is False.
        OSError: the Hub cannot be reached, refuses the upload, or no token was found.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalTokenNotFoundError

    hub = api or huggingface_hub.HfApi()
    try:
        hub.create_repo(upload.repo, private=not public, repo_type="model", exist_ok=True)
        if not public and not hub.model_info(upload.repo).private:
            raise ValueError(f"{upload.repo} exists and is public. Choose another name, or give --public to upload there.")
        commit = hub.upload_folder(
            repo_id=upload.repo,
            folder_path=str(upload.folder),
            repo_type="model",
            allow_patterns=_escaped([name for name, _ in upload.files]),
            commit_message="Upload with reasoning-length-toolkit",
        )
    except LocalTokenNotFoundError as error:
        raise OSError("No token of the Hugging Face Hub was found: run `hf auth login`, or set HF_TOKEN.") from error
    except OSError as error:
        raise OSError(
            f"The Hub did not take {upload.repo}: {' '.join(str(error).split())[:200]}. Check name, token and network."
        ) from error
    return str(commit.commit_url)


def _escaped(names: Sequence[str]) -> list[str]:
    """Return file names as glob patterns, each of which matches only its file name."""
    return [re.sub(r"([*?\[])", r"[\1]", name) for name in names]
