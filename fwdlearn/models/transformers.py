"""Any model of the transformers library, with the tokenizer or the image size it expects."""

from __future__ import annotations

import fnmatch
import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fwdlearn.data.passages import LanguageProcessor
from fwdlearn.data.types import DataInfo
from fwdlearn.engine.quantized import quantized_layers
from fwdlearn.errors import FwdlearnError, MissingError, UsageError
from fwdlearn.models.built import Built, weights_from
from fwdlearn.models.images import ImageProcessor
from fwdlearn.models.language import LanguageModel
from fwdlearn.models.location import local_folder
from fwdlearn.models.lora import ADAPTER, adapt, folded_state, save_adapter
from fwdlearn.models.peft_adapters import folds, save_with_peft, with_peft
from fwdlearn.models.pooled import MeanPooled
from fwdlearn.models.readout import Look, Reader
from fwdlearn.models.scales import train_scales as trained_scales
from fwdlearn.models.scales import written

_HEADS = {
    "text": "AutoModelForSequenceClassification",
    "language": "AutoModelForCausalLM",
    "image": "AutoModelForImageClassification",
}
# Those that read texts whose targets are words.
_LANGUAGE = {"causal": "AutoModelForCausalLM", "masked": "AutoModelForMaskedLM"}
_DTYPES = ("float32", "bfloat16", "float16")


def transformers(
    info: DataInfo,
    path: str | Path,
    head: str = "auto",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    attention: str | None = None,
    train: tuple[str, ...] | None = None,
    layer: int | None = None,
    detectors: int = 32,
    cache: str | None = None,
    lora: int | None = None,
    lora_on: tuple[str, ...] = ("*",),
    lora_alpha: float | None = None,
    peft: str | None = None,
    train_scales: tuple[str, ...] | None = None,
    untie: bool = False,
    seed: int = 0,
) -> Built:
    """Loads a pretrained model and gives it a head for the data at hand.

    A head that the folder lacks, or one for another number of classes, is drawn from `seed`. Code
    that a model brings along is never run, and weights are read from safetensors only.

    Args:
        info: of the data; text, language or images.
        path: a folder that `save_pretrained` wrote, `package:NAME/FOLDER` for a folder inside an
            installed Python package, or a model's name on the hub (the local cache comes first).
        head: `auto` chooses by the kind of data: sequence or image classification, or a causal
            language model; `causal` and `masked` are the language models, which get no new head
            (see `fwdlearn.models.language`); `mean` puts a linear classifier on the mean over
            tokens, the natural reading of sentence encoders; `reader` freezes the model and trains
            a `Readout` of its layers' means and of single tokens. Otherwise the name of a class
            with `from_pretrained`, such as
            `AutoModelForSequenceClassification`.
        dtype: of the weights.
        attention: transformers' `attn_implementation`; None leaves the choice to transformers.
        train: patterns of the names of the parameters to be trained; None trains them all, with
            `lora` the adapters and the head.
        layer: whose tokens the detectors of `reader` see; None is two thirds of the way up.
        detectors: of `reader`, at least 1.
        cache: a folder for what the frozen model of `reader` says of each row, kept for other runs;
            None keeps it in memory.
        lora: the rank of adapters (see `fwdlearn.models.lora`), or None for none. What is saved has
            them folded into its weights, and beside them in a folder `adapter` that PEFT loads.
        lora_on: patterns of the names of the linear layers that get one, inside the model without
            its head.
        lora_alpha: the adapters' product counts this over the rank; None is twice the rank.
        peft: `adapter_config.json` of any adapter of the library PEFT, or its folder; it and the
            head are trained. See `fwdlearn.models.peft_adapters`.
        train_scales: patterns of the names of quantised layers, inside the model without its head,
            of which the scales are trained, with the head (see `fwdlearn.models.scales`); `["*"]`
            is all of them. What is saved is quantised as the model was.
        untie: whether the layer over the vocabulary of a language model gets weights of its own
            where it shares those of the embedding. Its gradient is exact with estimators that have
            noise at outputs, and an embedding's is not.
        seed: of the new head's and the adapters' weights.

    Returns:
        The model in evaluation mode, a tokenizer or an `ImageProcessor`, and a `save` that writes
        a folder for `from_pretrained`.

    Raises:
        MissingError: transformers is not installed, or there is no such model, tokenizer or hub.
        UsageError: features, an unknown head or dtype, a pattern that matches nothing, or a folder
            that cannot be loaded.
    """
    if info.kind not in _HEADS:
        raise UsageError(f"transformers reads text or images, not {info.kind}; mlp reads features.")
    if (head in _LANGUAGE) != (info.kind == "language") and head != "auto":
        raise UsageError(_mismatch(head, info.kind))
    if dtype not in _DTYPES:
        raise UsageError(
            f"transformers(dtype=...) must be one of {', '.join(_DTYPES)}, got {dtype!r}."
        )
    others = {"lora": lora, "peft": peft, "head='reader'": head == "reader" or None}
    other = next((name for name, value in others.items() if value is not None), None)
    if train_scales is not None and other is not None:
        raise UsageError(
            f"transformers(train_scales=...) and {other} exclude each other; leave one out."
        )
    path = str(path)
    folder = local_folder(path)
    library = _library()
    if head in ("mean", "reader") and info.kind != "text":
        raise UsageError(f"transformers(head={head!r}) reads text; head='auto' reads images.")
    named = {"auto": _HEADS[info.kind], "mean": "AutoModel", "reader": "AutoModel", **_LANGUAGE}
    loader: Any = getattr(library, named.get(head, head), None)
    if not hasattr(loader, "from_pretrained"):
        raise UsageError(
            "transformers(head=...) must be auto, causal, masked, mean, reader or the name of a "
            f"transformers model class, got {head!r}; {_HEADS[info.kind]} is what auto means here."
        )
    with quiet(library):
        source = _on_hub(path) if folder is None else str(folder)
        with _translated(path):
            config = library.AutoConfig.from_pretrained(source, trust_remote_code=False)
            if info.kind != "language":
                _set_head(config, info)
            tokenizer = None if info.kind == "image" else _tokenizer(library, source, config)
            extra = {} if attention is None else {"attn_implementation": attention}
            with weights_from(seed):
                module = loader.from_pretrained(
                    source,
                    config=config,
                    dtype=getattr(torch, dtype),
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    trust_remote_code=False,
                    **extra,
                )
                forward = module.forward
                if head == "mean":
                    module = MeanPooled(module, info.outputs)
                    module.load_head(Path(source))
                if head == "reader":
                    module = Reader(Look(module, layer), info.outputs, detectors)
                    module.load_head(Path(source))
                if untie:
                    _untie(module, info.kind)
                if info.kind == "language":
                    module = LanguageModel(module, tokenizer)
                inner = None if lora is None else _adapted(module, lora, lora_on, lora_alpha)
                if peft is not None:
                    module = _with_peft(module, lora, Path(peft), Path(source), info.kind)
                if train_scales is not None:
                    _with_scales(module, train_scales)
    if tokenizer is not None:
        # Tokenizers and models are mixed freely: what the model cannot take is not handed to it.
        known = inspect.signature(forward).parameters
        names = [name for name in tokenizer.model_input_names if name in known]
        tokenizer.model_input_names = names
    processor = tokenizer if tokenizer is not None else _image_processor(Path(source), module)
    if info.kind == "language":
        processor = LanguageProcessor(tokenizer, head == "masked")

    def save(target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        with quiet(library):
            if peft is not None:
                _save_peft(module, target)
            elif isinstance(module, MeanPooled | Reader):
                with written(module):
                    module.save_pretrained(target)
            else:
                own = module.model if isinstance(module, LanguageModel) else module
                # Quantised tensors are taken apart by transformers, which must see them itself, and
                # cannot bring what it has loaded so back into the form of before.
                state = None if inner is None else folded_state(own)
                with written(own):
                    plain = not quantized_layers(own)
                    own.save_pretrained(target, state_dict=state, save_original_format=plain)
            if inner is not None:
                _save_adapter(module, inner, target / ADAPTER, path)
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
            else:
                processor.save(target)

    module.eval()
    if head == "reader":
        built = Built(module.readout, processor, save, module.look.requires_grad_(False), cache)
    else:
        built = Built(module, processor, save)
    _train(built.module, train)
    return built


def _adapted(
    module: nn.Module, rank: int, patterns: tuple[str, ...], alpha: float | None
) -> nn.Module:
    """Leaves adapters and the head to training; the model without its head."""
    if isinstance(module, Reader):
        raise UsageError(
            "transformers(lora=...): head='reader' freezes the model; leave lora out, or choose "
            "head='mean' or 'auto'."
        )
    inner = _without_head(module)
    adapt(inner, rank, patterns, alpha)
    # A language model has no head of its own making.
    whole = module if isinstance(module, LanguageModel) else inner
    for name, value in whole.named_parameters():
        value.requires_grad_(name.endswith((".lora_A", ".lora_B")))
    return inner


def _without_head(module: Any) -> nn.Module:
    if isinstance(module, LanguageModel):
        module = module.model
    inner: nn.Module = module.encoder if isinstance(module, MeanPooled) else module.base_model
    return inner


def _with_scales(module: nn.Module, patterns: tuple[str, ...]) -> None:
    """Leaves scales and the head to training."""
    inner = _without_head(module)
    new = set(trained_scales(inner, patterns))
    if isinstance(module, LanguageModel):
        module.requires_grad_(False)
    for name, value in inner.named_parameters():
        value.requires_grad_(name in new)


def _with_peft(
    module: nn.Module, lora: int | None, path: Path, source: Path, kind: str
) -> nn.Module:
    """The module with adapters of PEFT in it or around it."""
    if lora is not None or isinstance(module, Reader):
        other = "lora" if lora is not None else "head='reader'"
        raise UsageError(f"transformers(peft=...) and {other} exclude each other; leave one out.")
    saved = source / ADAPTER
    host: Any = module
    if isinstance(module, MeanPooled):
        host = module.encoder = with_peft(module.encoder, path, "FEATURE_EXTRACTION", (), saved)
    elif isinstance(module, LanguageModel):
        host = module.model = with_peft(module.model, path, "CAUSAL_LM", (), saved)
    if host is not module:
        if not folds(host.peft_config["default"]):
            raise UsageError(
                "transformers(peft=...): prompts and prefixes of PEFT change how many tokens a "
                "model answers with; take head='auto' for classes, or adapters of layers."
            )
        return module
    inner: Any = module.base_model
    own = {id(value) for value in inner.parameters()}
    parts = module.named_children()
    heads = [n for n, part in parts if any(id(value) not in own for value in part.parameters())]
    task = "SEQ_CLS" if kind == "text" else "FEATURE_EXTRACTION"
    return with_peft(module, path, task, tuple(heads), saved)


def _save_peft(module: Any, target: Path) -> None:
    if isinstance(module, MeanPooled):
        save_with_peft(module.encoder, target, target / ADAPTER)
        module.save_head(target)
    else:
        own = module.model if isinstance(module, LanguageModel) else module
        save_with_peft(own, target, target / ADAPTER)


def _save_adapter(module: nn.Module, inner: nn.Module, folder: Path, base: str) -> None:
    """For PEFT; a head of ours goes beside it."""
    if isinstance(module, MeanPooled):
        save_adapter(inner, folder, base)
        module.save_head(folder)
        return
    if isinstance(module, LanguageModel):
        save_adapter(module.model, folder, base)
        return
    own = {id(value) for value in inner.parameters()}
    heads = tuple(
        name
        for name, child in module.named_children()
        if any(id(value) not in own for value in child.parameters())
    )
    save_adapter(module, folder, base, heads)


def _untie(module: Any, kind: str) -> None:
    if kind != "language":
        raise UsageError(
            f"transformers(untie=true) is for language models, and data of kind {kind} get a head "
            "of their own; leave it out."
        )
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()
    if head is not None and head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.detach().clone())
        module.config.tie_word_embeddings = False


def _mismatch(head: str, kind: str) -> str:
    if kind == "language":
        return (
            f"transformers(head={head!r}) does not say words, and the data ask for some; choose "
            "head=causal, or head=masked for label_words."
        )
    return (
        f"transformers(head={head!r}) is a language model, and the data, of kind {kind}, ask for "
        "no words; corpus, completions, chats, label_words and multiple_choice do."
    )


def _train(module: nn.Module, patterns: tuple[str, ...] | None) -> None:
    """Leaves to training what the patterns match."""
    if patterns is None:
        return
    names = [name for name, _ in module.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise UsageError(
                f"transformers(train=...): the pattern {pattern!r} matches no parameter; the first "
                f"are {', '.join(names[:3])}."
            )
    for name, value in module.named_parameters():
        value.requires_grad_(any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))


def _library() -> Any:
    try:
        import transformers as library
    except ImportError as error:
        raise MissingError(
            "the model transformers needs the library of that name, which is not installed: "
            'pip install "fwdlearn[hf]".'
        ) from error
    return library


def _set_head(config: Any, info: DataInfo) -> None:
    config.num_labels = info.outputs
    if info.labels is not None:
        config.id2label = dict(enumerate(info.labels))
        config.label2id = {label: i for i, label in enumerate(info.labels)}
    config.problem_type = "regression" if info.classes is None else "single_label_classification"


def _tokenizer(library: Any, source: str, config: Any) -> Any:
    try:
        tokenizer = library.AutoTokenizer.from_pretrained(
            source, use_fast=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MissingError(
            f"transformers(path=...): {source} has a model but no tokenizer that can be loaded "
            f"({_first_line(error)}); put tokenizer.json and tokenizer_config.json beside it."
        ) from error
    # Generative models have no padding token; with right padding and a mask any token serves.
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    config.pad_token_id = tokenizer.pad_token_id
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def _image_processor(folder: Path, module: Any) -> ImageProcessor:
    file = folder / "preprocessor_config.json"
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{file}: not JSON ({error}); restore the file or remove it.") from error
    size = getattr(module.config, "image_size", None)
    channels = getattr(module.config, "num_channels", 3)
    return replace(ImageProcessor.from_config(settings, size, channels), dtype=module.dtype)


def _on_hub(path: str) -> str:
    """The folder of a hub model's files: from the cache if they are there, else downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        cached = snapshot_download(path, allow_patterns=patterns, local_files_only=True)
        if any(Path(cached).glob("*.safetensors")):
            return str(cached)
    except (OSError, ValueError):
        cached = None
    try:
        # One question without retries: with no network the answer comes at once.
        HfApi().model_info(path, timeout=10)
        return str(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:  # the client's HTTP library, and its errors, vary with its version
        raise MissingError(
            f"transformers(path=...): there is no folder {path}, and the hub gave no model of "
            f"that name ({_first_line(error)}). Check the spelling and the network, or give a "
            "folder written by save_pretrained."
        ) from error


@contextmanager
def _translated(path: str) -> Iterator[None]:
    """Turns the ways in which loading fails into one error that names the path."""
    from safetensors import SafetensorError

    try:
        yield
    except FwdlearnError:
        raise
    except OSError as error:
        raise MissingError(
            f"transformers(path=...): {path} cannot be loaded ({_first_line(error)}). The folder "
            "must hold config.json and model.safetensors; weights in other formats are refused."
        ) from error
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"transformers(path=...): {path} cannot be loaded ({_first_line(error)}). The folder "
            "may be damaged, or of a kind of model that this head or version does not know."
        ) from error


@contextmanager
def quiet(library: Any) -> Iterator[None]:
    """No progress bars and no notes about new heads within the block; afterwards as before."""
    settings = library.utils.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    hub = logging.getLogger("huggingface_hub")
    hub_level = hub.level
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        hub.setLevel(hub_level)
        if bars:
            settings.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
