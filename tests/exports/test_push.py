"""Uploads: what would be sent is said first, nothing else is sent, private unless asked otherwise."""

from __future__ import annotations

import inspect
import json
import shutil
import socket
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects
from typer.testing import CliRunner

from toolkit import cli
from toolkit.exports import hub

CARD = "---\nbase_model: tiny-reasoner\n---\n# A card\n\nIts text.\n"


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "README.md").write_text(CARD)
    (path / "weights[1].safetensors").write_bytes(b"12345")
    (path / "weights1.safetensors.partial").write_bytes(b"left over")
    (path / "sub" / "a.json").write_text("{}")
    return path


class PretendedHub:
    """A hub in a local folder, with the methods of ``HfApi`` that an upload needs."""

    def __init__(self, root: Path, *, exists: str | None = None) -> None:
        self.root, self.visible, self.calls = root, exists, []

    def create_repo(self, repo_id, *, private, repo_type, exist_ok):
        self.calls.append(("create_repo", repo_id, private, repo_type))
        if self.visible is None:
            self.visible = "private" if private else "public"
        assert exist_ok

    def model_info(self, repo_id):
        return SimpleNamespace(private=self.visible == "private")

    def upload_folder(self, *, repo_id, folder_path, repo_type, allow_patterns, commit_message):
        self.calls.append(("upload_folder", repo_id))
        for file in Path(folder_path).rglob("*"):
            name = file.relative_to(folder_path).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.root / name)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")


def contents(root: Path) -> dict[str, bytes]:
    return {file.relative_to(root).as_posix(): file.read_bytes() for file in root.rglob("*") if file.is_file()}


SENT = ("README.md", "sub/a.json", "weights[1].safetensors")


def test_exactly_the_listed_files_arrive_in_a_private_repository(folder, tmp_path):
    api = PretendedHub(tmp_path / "hub")
    upload = hub.plan_upload(folder, "me/vector")
    assert upload.files == (("README.md", len(CARD)), ("sub/a.json", 2), ("weights[1].safetensors", 5)) and upload.card == CARD
    assert hub.push(upload, api=api) == "https://huggingface.co/me/vector/commit/1"
    assert contents(tmp_path / "hub") == {name: (folder / name).read_bytes() for name in SENT}
    assert api.visible == "private" and [call[0] for call in api.calls] == ["create_repo", "upload_folder"]


def test_a_public_repository_is_used_only_when_asked(folder, tmp_path):
    api = PretendedHub(tmp_path / "hub", exists="public")
    with pytest.raises(ValueError, match=r"me/vector exists and is public.*--public"):
        hub.push(hub.plan_upload(folder, "me/vector"), api=api)
    assert not (tmp_path / "hub").exists()
    hub.push(hub.plan_upload(folder, "me/vector"), public=True, api=api)
    assert set(contents(tmp_path / "hub")) == set(SENT)
    fresh = PretendedHub(tmp_path / "hub2")
    hub.push(hub.plan_upload(folder, "me/vector"), public=True, api=fresh)
    assert fresh.visible == "public"


def test_the_real_library_takes_these_calls_and_these_patterns(folder):
    """Arguments are bound to the signatures of huggingface_hub, and its own filter chooses the files."""
    calls = {}

    class Recorder:
        def __getattr__(self, name):
            def call(*args, **fields):
                calls[name] = inspect.signature(getattr(HfApi, name)).bind(self, *args, **fields)
                return SimpleNamespace(private=True, commit_url="https://huggingface.co/me/vector/commit/2")

            return call

    hub.push(hub.plan_upload(folder, "me/vector"), api=Recorder())
    assert calls.keys() == {"create_repo", "model_info", "upload_folder"}
    assert calls["create_repo"].arguments["private"] is True
    there = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    chosen = filter_repo_objects(there, allow_patterns=calls["upload_folder"].arguments["allow_patterns"])
    assert sorted(chosen) == sorted(SENT) and len(there) > len(SENT)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalTokenNotFoundError("no token"), "hf auth login"),
        (OfflineModeIsEnabled("offline mode is enabled"), "The Hub did not take me/vector: offline mode is enabled"),
        (ConnectionResetError("reset by peer"), "reset by peer. Check name, token and network"),
    ],
    ids=str,
)
def test_what_the_hub_refuses_is_one_sentence(folder, tmp_path, error, says):
    class Broken(PretendedHub):
        def create_repo(self, *args, **fields):
            raise error

    with pytest.raises(OSError, match=says):
        hub.push(hub.plan_upload(folder, "me/vector"), api=Broken(tmp_path / "hub"))


@pytest.mark.parametrize("repo", ["", "a/b/c", "me/", "/vector", "me/ve ctor", "../x", "me/..", "https://huggingface.co/me/x"])
def test_a_malformed_repository_is_refused(folder, repo):
    with pytest.raises(ValueError, match="is not a repository of the Hub: give USER/NAME"):
        hub.plan_upload(folder, repo)


def test_a_folder_that_is_not_for_the_hub_is_refused(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        hub.plan_upload(tmp_path / "nowhere", "me/x")
    (folder / ".env").write_text("TOKEN=1")
    with pytest.raises(ValueError, match=r"holds \.env, a link or a hidden file"):
        hub.plan_upload(folder, "me/x")
    (folder / ".env").unlink()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="holds link, a link or a hidden file"):
        hub.plan_upload(folder, "me/x")
    (folder / "link").unlink()
    (folder / "README.md").write_text("# No front matter\n")
    with pytest.raises(ValueError, match="no front matter with base_model"):
        hub.plan_upload(folder, "me/x")
    (folder / "README.md").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no README\.md, the card"):
        hub.plan_upload(folder, "me/x")


@pytest.mark.parametrize("where", ["card", "json"])
def test_a_place_on_this_machine_is_not_uploaded(folder, tmp_path, where):
    if where == "card":
        (folder / "README.md").write_text(CARD.replace("tiny-reasoner", str(tmp_path)))
    else:
        (folder / "sub" / "a.json").write_text(json.dumps({"provenance": {"notes": ["no", {"model": str(tmp_path)}]}}))
    with pytest.raises(ValueError, match="a place on this machine") as caught:
        hub.plan_upload(folder, "me/vector")
    assert str(tmp_path) in str(caught.value)
    (folder / "README.md").write_text(CARD.replace("tiny-reasoner", "someone/model"))
    (folder / "sub" / "a.json").write_text(json.dumps({"think": "</think>", "path": "/no/such/place", "tokens": [".", "/"]}))
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": ["/", "."]}))
    hub.plan_upload(folder, "me/vector")


def test_a_dry_run_prints_files_sizes_and_card_and_opens_no_connection(folder, monkeypatch):
    def refuse(*args, **fields):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(HfApi, "create_repo", refuse)
    result = CliRunner().invoke(cli.app, ["push", str(folder), "me/vector", "--dry-run"])
    assert result.exit_code == 0, result.output
    for text in (*SENT, "5", "private repository", "base_model: tiny-reasoner", "Its text.", "Nothing was sent"):
        assert text in result.output
    assert "partial" not in result.output


def test_the_command_sends_privately(folder, tmp_path, monkeypatch):
    api = PretendedHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: api)
    result = CliRunner().invoke(cli.app, ["push", str(folder), "me/vector"])
    assert result.exit_code == 0 and "/me/vector/commit/1" in result.output
    assert api.visible == "private" and set(contents(tmp_path / "hub")) == set(SENT)
