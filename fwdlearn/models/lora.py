"""Low-rank adapters of linear layers, in the format of PEFT.

Paper: E. Hu et al., "LoRA: low-rank adaptation of large language models" (arXiv 2106.09685).

A linear layer W becomes W + alpha / r B A with thin A [r, in] and B [out, r], B zero at first; W is
not trained. Folded into W when a model is saved, so that whoever loads it needs no adapter, and
written beside it for those who want the adapter alone.
"""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fwdlearn.errors import UsageError

A, B = "lora_A", "lora_B"
ADAPTER = "adapter"
"""The folder of an adapter, beside the model that has it folded in."""


class Adapted(nn.Linear):
    """A linear layer with an adapter; its own weight and bias are those of `linear`.

    Args:
        linear: the layer.
        rank: r, at least 1.
        alpha: the product counts alpha / r.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.rank, self.alpha = rank, alpha
        new = linear.weight.new_empty
        self.lora_A = nn.Parameter(new(rank, linear.in_features))
        self.lora_B = nn.Parameter(new(linear.out_features, rank))
        nn.init.normal_(self.lora_A, std=linear.in_features**-0.5)
        nn.init.zeros_(self.lora_B)

    def forward(self, input: Tensor) -> Tensor:
        thin = F.linear(input, self.lora_A)
        return F.linear(input, self.weight, self.bias) + self.scale * F.linear(thin, self.lora_B)

    @property
    def scale(self) -> float:
        """alpha / r."""
        return self.alpha / self.rank

    @torch.no_grad()
    def folded(self) -> Tensor:
        """[out, in]: the weight of a plain layer that does the same."""
        product = self.lora_B.float() @ self.lora_A.float()
        return (self.weight.float() + self.scale * product).to(self.weight.dtype)


def adapt(
    module: nn.Module, rank: int, patterns: tuple[str, ...], alpha: float | None = None
) -> None:
    """Gives adapters to linear layers, in place, and freezes what they stand on.

    Args:
        module: the model.
        rank: r, at least 1.
        patterns: of the names of layers.
        alpha: None is twice the rank.

    Raises:
        UsageError: the rank is no rank, or a pattern matches no linear layer.
    """
    if isinstance(rank, bool) or rank < 1:
        raise UsageError(f"lora must be a rank of at least 1, got {rank!r}.")
    layers = {name: one for name, one in module.named_modules() if type(one) is nn.Linear}
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            first = ", ".join(list(layers)[:3]) or "none: it has no nn.Linear"
            raise UsageError(
                f"lora_on: the pattern {pattern!r} matches no linear layer; the first are {first}."
            )
    for name, layer in layers.items():
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            parent, _, own = name.rpartition(".")
            made = Adapted(layer, rank, 2.0 * rank if alpha is None else alpha)
            setattr(module.get_submodule(parent), own, made)
            layer.requires_grad_(False)


def adapters(module: nn.Module) -> dict[str, Adapted]:
    """Name -> layer with an adapter."""
    return {name: one for name, one in module.named_modules() if isinstance(one, Adapted)}


def folded_state(module: nn.Module) -> dict[str, Tensor]:
    """The state of the same model without adapters."""
    state = {
        name: value
        for name, value in module.state_dict().items()
        if name.rpartition(".")[2] not in (A, B)
    }
    return state | {f"{name}.weight": one.folded() for name, one in adapters(module).items()}


def save_adapter(module: nn.Module, folder: Path, base: str, saved: tuple[str, ...] = ()) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`, which PEFT loads.

    Args:
        module: the model that PEFT is to put the adapter on, with ours in it.
        folder: where.
        base: name or path of the model without it.
        saved: modules that are trained whole and kept with the adapter, such as a classifier.
    """
    found = adapters(module)
    first = next(iter(found.values()))
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(found),
        "modules_to_save": list(saved) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors = {}
    for name, one in found.items():
        tensors[f"base_model.model.{name}.{A}.weight"] = one.lora_A
        tensors[f"base_model.model.{name}.{B}.weight"] = one.lora_B
    for name in saved:
        for own, value in module.get_submodule(name).state_dict().items():
            tensors[f"base_model.model.{name}.{own}"] = value
    folder.mkdir(parents=True, exist_ok=True)
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(kept, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
