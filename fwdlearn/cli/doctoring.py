"""`fwdlearn doctor`: the machine, the packages, and known traps."""

from __future__ import annotations

import importlib
import os
import platform
import tempfile

import fwdlearn
from fwdlearn.cli.tables import show_pairs, size
from fwdlearn.recipe.environment import cpus, installed

CORE = "torch numpy scipy PyYAML pydantic rich typer safetensors".split()
EXTRAS = {
    "hf": ("transformers",),
    "wandb": ("wandb",),
    "tensorboard": ("tensorboard",),
    "data": ("scikit-learn", "pillow"),
    "plots": ("matplotlib",),
}


def examine() -> bool:
    """Prints the report; false when something stands in the way."""
    core = {package: installed(package) for package in CORE}
    missing = [package for package, found in core.items() if not found]
    troubles = [f"{package} is missing: pip install fwdlearn" for package in missing]
    pairs = [("python", f"{platform.python_version()} on {platform.platform()}")]
    pairs += [(package, found or "missing") for package, found in core.items()]
    show_pairs(f"fwdlearn {fwdlearn.__version__}", pairs)
    show_pairs("extras", [(f"[{name}]", _extra(name)) for name in EXTRAS])
    show_pairs("machine", _machine(troubles))
    trap = torchvision_trap()
    troubles += [trap] if trap else []
    try:
        with tempfile.TemporaryFile(dir="."):
            pass
    except OSError as error:
        troubles.append(
            f"the current folder {os.getcwd()} cannot be written ({error.strerror}); runs need "
            "output.dir=DIR elsewhere"
        )
    show_pairs("trouble", [("-", each) for each in troubles] or [("-", "none found")])
    return not troubles


def torchvision_trap() -> str | None:
    """What is wrong when a torchvision is installed that does not fit this torch.

    transformers and timm then fail on import, with messages that name neither.
    """
    found = installed("torchvision")
    if found is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # a mismatch shows as RuntimeError, AttributeError or OSError
        reason = " ".join(str(error).split())
        return (
            f"torchvision {found} does not fit torch {installed('torch')} ({reason}), and breaks "
            "transformers' image models; nothing here needs it: pip uninstall torchvision"
        )
    return None


def _extra(name: str) -> str:
    versions = {package: installed(package) for package in EXTRAS[name]}
    if all(versions.values()):
        return ", ".join(f"{package} {found}" for package, found in versions.items())
    missing = ", ".join(package for package, found in versions.items() if not found)
    return f'{missing} missing: pip install "fwdlearn[{name}]"'


def _machine(troubles: list[str]) -> list[tuple[str, str]]:
    pairs = [("processors", f"{cpus()} for this process")]
    try:
        import torch
    except (ImportError, OSError) as error:
        troubles.append(f"torch cannot be imported: {error}; install it again")
        return pairs
    pairs.append(("torch threads", str(torch.get_num_threads())))
    if not torch.cuda.is_available():
        return [*pairs, ("devices", "cpu alone")]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        pairs.append((f"cuda:{index}", f"{facts.name}, {size(facts.total_memory)}"))
    return pairs
