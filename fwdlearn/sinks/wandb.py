"""Weights & Biases, offline unless asked otherwise; it never prompts."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fwdlearn.errors import MissingError
from fwdlearn.sinks import Record
from fwdlearn.sinks.jsonl import plain

# Seconds for the server to answer at the start.
_PATIENCE = 30.0


@dataclass
class Wandb:
    """Weights & Biases; offline unless `mode: online`.

    Args:
        project: where the run is filed.
        mode: `offline` writes under the run's folder, for `wandb sync` to upload later; `online`
            uploads, and falls back to offline where no API key is configured or the server does
            not answer.
        entity, name, group, notes, tags: as in `wandb.init`.
        folder: the run's folder.
        config: the resolved recipe.
        process: the run's, whose memory and processor time are shown; this one if not given.
        warn: told when `online` is not possible, and why.
    """

    project: str = "fwdlearn"
    mode: Literal["offline", "online"] = "offline"
    entity: str | None = None
    name: str | None = None
    group: str | None = None
    notes: str | None = None
    tags: tuple[str, ...] = ()
    folder: Path = Path(".")
    config: Mapping[str, Any] = field(default_factory=dict)
    process: int | None = None
    warn: Callable[[str], None] = print

    def start(self, meta: Record) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb
        except ImportError as error:
            raise MissingError("not installed; pip install fwdlearn[wandb]") from error
        if self.mode == "online" and _has_key():
            try:
                self._begin(wandb, "online", meta)
                return
            except wandb.errors.CommError as error:
                reason = str(error).partition("\n")[0]
                self.warn(
                    f"wandb cannot go online, so it records offline; wandb sync later ({reason})"
                )
        elif self.mode == "online":
            self.warn("wandb has no API key, so it records offline; wandb login, then wandb sync")
        self._begin(wandb, "offline", meta)

    def log(self, record: Record) -> None:
        values = {name.replace(".", "/"): value for name, value in record.items()}
        self._run.log(values, step=int(record["step"]) if "step" in record else None)

    def finish(self, summary: Record) -> None:
        self._run.summary.update(plain(dict(summary)))
        self._run.finish(exit_code=0 if summary.get("status") == "finished" else 1)

    def _begin(self, wandb: Any, mode: str, meta: Record) -> None:
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            name=self.name or self.folder.name or None,
            group=self.group,
            notes=self.notes,
            tags=list(self.tags),
            dir=str(self.folder),
            mode=mode,
            config={**self.config, "run": plain(dict(meta))},
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                init_timeout=_PATIENCE,
                x_stats_pid=self.process or os.getpid(),
            ),
        )


def _has_key() -> bool:
    """Whether wandb can log in by itself; otherwise it would ask on the terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    files = (os.environ.get("NETRC"), "~/.netrc", "~/_netrc")
    for file in (Path(name).expanduser() for name in files if name):
        try:
            if any("wandb" in host for host in netrc.netrc(file).hosts):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
