"""wandb: offline without being told, never a prompt."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from fwdlearn.sinks import wandb as ours
from fwdlearn.sinks.wandb import Wandb


def test_offline_is_the_default(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    sink = Wandb(folder=tmp_path, config={"seed": 0})
    assert sink.mode == "offline"
    sink.start({"steps": 2})
    sink.log({"step": 1, "train.loss": 1.0})
    sink.log({"step": 2, "eval.loss": 0.5})
    sink.finish({"status": "finished", "eval.loss": 0.5})
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


def test_online_without_a_key_records_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    told: list[str] = []
    sink = Wandb(mode="online", folder=tmp_path, warn=told.append)
    sink.start({})
    sink.finish({"status": "finished"})
    assert told == ["wandb has no API key, so it records offline; wandb login, then wandb sync"]
    assert list((tmp_path / "wandb").glob("offline-run-*"))


def test_online_without_a_server_records_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(ours, "_PATIENCE", 1.0)
    told: list[str] = []
    # An address that nobody listens at.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        sink = Wandb(mode="online", folder=tmp_path, warn=told.append)
        sink.start({})
        sink.log({"step": 1, "train.loss": 1.0})
        sink.finish({"status": "finished"})
    (warning,) = told
    assert warning.startswith("wandb cannot go online, so it records offline; wandb sync later (")
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))


def test_keys_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "netrc"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(file))
    assert not ours._has_key()
    file.write_text("machine api.wandb.ai login user password secret\n")
    file.chmod(0o600)
    assert ours._has_key()
    file.write_text("not a netrc {\n")
    assert not ours._has_key()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert ours._has_key()
