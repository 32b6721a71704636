"""Adapters of the library PEFT: whatever a configuration file of it describes.

LoRA, IA3 and the others that change layers are folded into the weights when a model is saved.
Prompts and prefixes cannot be: they are saved beside the model they were trained on.
"""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fwdlearn.errors import FwdlearnError, MissingError, UsageError

# Prompts that are parameters themselves.
_PROMPTS = ("PROMPT_TUNING", "PREFIX_TUNING")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def with_peft(
    model: nn.Module, path: Path, task: str, heads: tuple[str, ...] = (), saved: Path | None = None
) -> Any:
    """A model with adapters that are trained, and the rest of it frozen.

    Args:
        model: of transformers; changed in place.
        path: `adapter_config.json`, or the folder that holds it. Adapters whose weights lie beside
            it go on from these.
        task: PEFT's name of what the model is for, where the configuration names none.
        heads: modules that are trained whole and saved with the adapter.
        saved: a folder with the adapter of a model that has been trained, if it is one.

    Raises:
        MissingError: PEFT is not installed, or there is no such file.
        UsageError: PEFT knows no such adapter, or not for this model.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingError(
            'model.peft needs the library PEFT, which is not installed: pip install "peft>=0.17". '
            "model.lora=RANK gives adapters of low rank without it."
        ) from error
    folder = path.parent if path.name == CONFIG else path
    if not (folder / CONFIG).is_file():
        raise MissingError(
            f"model.peft: there is no {folder / CONFIG}; give the file that PEFT's save_pretrained "
            "writes, or its folder."
        )
    try:
        kind = json.loads((folder / CONFIG).read_text("utf-8")).get("peft_type")
        config = peft.PeftConfig.from_pretrained(str(folder))
        config.inference_mode = False
        projected = getattr(config, "prefix_projection", False)
        if projected or (kind not in _PROMPTS and not folds(config)):
            raise UsageError(
                f"model.peft: of {kind} with a network that makes the prompt, PEFT saves what the "
                f"network puts out and not the network; choose {' or '.join(_PROMPTS)} without one."
            )
        config.task_type = config.task_type or task
        if heads and hasattr(config, "modules_to_save") and not config.modules_to_save:
            config.modules_to_save = list(heads)
        trained = [one for one in (saved, folder) if one is not None and (one / WEIGHTS).is_file()]
        made = peft.get_peft_model(model, config)
        if trained and (trained[0] == folder or not folds(config)):
            peft.set_peft_model_state_dict(made, load_file(trained[0] / WEIGHTS))
        elif kind == "PREFIX_TUNING":
            start_from_words(made, config)
    except FwdlearnError:
        raise
    except Exception as error:  # of a library that checks little before it starts
        reason = " ".join(str(error).split())
        raise UsageError(
            f"model.peft: {folder / CONFIG} ({kind}) cannot be used: {reason}"
        ) from error
    return made.eval()


@torch.no_grad()
def start_from_words(model: Any, config: Any) -> None:
    """Makes a prefix of the keys and values that the model itself has of some of its words.

    Noise in the place of a prefix is nothing that a model has seen. Words are drawn from torch's
    generator. A model that keeps no keys and values, an encoder, starts as PEFT has it.
    """
    plain, encoder = model.get_base_model(), model.prompt_encoder["default"]
    if "use_cache" not in inspect.signature(plain.forward).parameters:
        return
    count = config.num_virtual_tokens
    words = torch.randint(plain.config.vocab_size, (1, count), device=plain.device)
    cache = getattr(plain(input_ids=words, use_cache=True), "past_key_values", None)
    if cache is None:
        return
    # [tokens, layers * 2, heads, size], as PEFT divides it.
    pairs = [side[0].transpose(0, 1) for one in cache.layers for side in (one.keys, one.values)]
    encoder.embedding.weight.copy_(torch.stack(pairs, 1).reshape(count, -1))


def folds(config: Any) -> bool:
    """Whether what it adds can be folded into the weights of the model."""
    return not getattr(config, "is_prompt_learning", False)


def save_with_peft(model: Any, folder: Path, adapter: Path) -> None:
    """Writes a model for `from_pretrained`, with what was learned folded in where it can be.

    Args:
        model: from `with_peft`.
        folder: of the model.
        adapter: for what PEFT loads.
    """
    model.save_pretrained(str(adapter))
    if folds(model.peft_config["default"]):
        copy.deepcopy(model).merge_and_unload().save_pretrained(str(folder))
        return
    plain = model.get_base_model()
    # PEFT keeps a head that is trained inside a wrapper of its own.
    state = {
        name.replace(".modules_to_save.default.", "."): value
        for name, value in plain.state_dict().items()
        if ".original_module." not in name
    }
    plain.save_pretrained(str(folder), state_dict=state)
