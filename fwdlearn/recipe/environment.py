"""What a run ran on: versions, machine, threads, the commit of the current folder."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import fwdlearn

PACKAGES = (
    "torch numpy scipy PyYAML pydantic rich typer safetensors transformers scikit-learn pillow "
    "wandb tensorboard matplotlib"
).split()


def installed(package: str) -> str | None:
    """The version of an installed package, without importing it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: str) -> dict[str, Any]:
    """The content of `env.json`.

    Args:
        device: where the run goes, such as `cpu` or `cuda:0`.
    """
    import torch

    versions = {package: installed(package) for package in PACKAGES}
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.processor()
    return {
        "fwdlearn": fwdlearn.__version__,
        "python": platform.python_version(),
        "packages": {package: found for package, found in versions.items() if found},
        "platform": platform.platform(),
        "cpus": cpus(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch_threads": torch.get_num_threads(),
        "device": device,
        "device_name": name or platform.machine(),
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
        "argv": sys.argv,
    }


def cpus() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def git_commit() -> str | None:
    """The commit of the current folder, with `+` when files differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()
