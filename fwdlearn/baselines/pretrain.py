"""A small causal language model of a text, trained by backpropagation: something to start from.

    python -m fwdlearn.baselines.pretrain TEXT FOLDER

TEXT is a file, or .jsonl with a text a line. FOLDER gets a Llama of transformers and a byte-level
tokenizer of the text, for `model: {name: transformers, path: FOLDER}`. With the sizes that it has
when nothing is said, and a text of a megabyte, it takes a few minutes of one core.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fwdlearn.data.corpus import corpus
from fwdlearn.data.files import existing_file, text_of
from fwdlearn.data.lines import objects
from fwdlearn.data.types import Dataset
from fwdlearn.errors import FwdlearnError, MissingError, UsageError
from fwdlearn.keys import Key
from fwdlearn.metrics import Scores
from fwdlearn.models.built import weights_from
from fwdlearn.models.transformers import quiet, transformers
from fwdlearn.objectives import cross_entropy

END = "<end>"


def bpe_tokenizer(texts: Iterable[str], vocabulary: int, longest: int) -> Any:
    """A byte-level tokenizer of some texts, so that any other text has tokens too.

    Args:
        texts: what its tokens are learned from.
        vocabulary: how many they are, above 256: one for each byte, the end, and what comes often.
        longest: tokens that the model reads.

    Raises:
        MissingError: transformers is not installed.
        UsageError: the vocabulary is too small.
    """
    if vocabulary < 257:
        raise UsageError(f"vocabulary must be at least 257, got {vocabulary}.")
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast
    except ImportError as error:
        raise MissingError('a tokenizer needs transformers: pip install "fwdlearn[hf]".') from error
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=END, pad_token=END, model_max_length=longest
    )


def write_untrained(folder: Path, tokenizer: Any, width: int, layers: int, seed: int = 0) -> None:
    """A Llama with first weights, and its tokenizer, as `save_pretrained` leaves them.

    Args:
        folder: where.
        tokenizer: from `bpe_tokenizer`.
        width: of a token's state, a multiple of 16.
        layers: at least 1.
        seed: of the weights.

    Raises:
        UsageError: a size is out of range.
    """
    if width < 16 or width % 16 or layers < 1:
        raise UsageError(
            f"width must be a multiple of 16 and layers at least 1, got {width} and {layers}."
        )
    import transformers as library

    config = library.LlamaConfig(
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with quiet(library), weights_from(seed):
        library.LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def pretrain(
    path: Path,
    folder: Path,
    vocabulary: int = 512,
    width: int = 64,
    layers: int = 2,
    tokens: int = 65,
    steps: int = 2000,
    batch_size: int = 32,
    lr: float = 3e-3,
    seed: int = 0,
    tell: Callable[[str], None] = print,
) -> dict[str, float]:
    """Trains a model of a text and writes its folder.

    Args:
        path: the text.
        folder: a new one.
        vocabulary, width, layers: see `bpe_tokenizer` and `write_untrained`.
        tokens: of a row; a tenth of the rows is held out.
        steps, batch_size, lr: of Adam, whose rate falls to nothing along half a cosine.
        seed: of the weights and the order of rows.
        tell: told how far it is.

    Returns:
        Figures of the rows held out: `bits` and `perplexity` of a token, and others.

    Raises:
        UsageError: the folder is there already, or an argument is out of range.
    """
    if folder.exists():
        raise UsageError(f"{folder} is there already; choose another name.")
    file = existing_file(path, "TEXT", "a text, or a .jsonl file with a text a line")
    texts = [text_of(file)]
    if file.suffix == ".jsonl":
        texts = [line.text("text") for line in objects(file, '{"text": "..."}')]
    write_untrained(folder, bpe_tokenizer(texts, vocabulary, 4 * tokens), width, layers, seed)
    data = corpus(file, evaluation_fraction=0.1, tokens=tokens)
    built = transformers(data.info, folder)
    data = data.prepared(built.processor)
    descend(built.module, data.train, steps, batch_size, lr, Key.root(seed), tell)
    scores = Scores()
    assert data.evaluation is not None and built.save is not None
    with torch.inference_mode():
        for index in torch.arange(len(data.evaluation)).split(256):
            batch = data.evaluation.batch(index)
            output = built.module(**batch.kwargs)
            scores.add(cross_entropy(output, batch.targets), output, batch.targets)
    built.save(folder)
    return scores.result()


def descend(
    model: nn.Module,
    rows: Dataset,
    steps: int,
    batch_size: int,
    lr: float,
    key: Key,
    tell: Callable[[str], None],
) -> None:
    """Backpropagation with Adam, whose rate falls to nothing along half a cosine."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch_size = min(batch_size, len(rows))
    per_epoch, losses = len(rows) // batch_size, []
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if not place:
            order = key.fold(epoch).permutation(len(rows))
        batch = rows.batch(order[place * batch_size : (place + 1) * batch_size])
        loss = cross_entropy(model(**batch.kwargs), batch.targets).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if (step + 1) % max(1, steps // 10) == 0:
            tell(f"step {step + 1} of {steps}: {torch.stack(losses).mean():.3f} nats")
            losses = []


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fwdlearn.baselines.pretrain",
        description="Trains a small causal language model of a text by backpropagation.",
    )
    parser.add_argument("text", type=Path, help="a file, or .jsonl with a text a line")
    parser.add_argument("folder", type=Path, help="a new one, for the model and its tokenizer")
    sizes = {"vocabulary": 512, "width": 64, "layers": 2, "tokens": 65, "steps": 2000, "seed": 0}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size, help=f"{size} if not given")
    asked = vars(parser.parse_args())
    try:
        figures = pretrain(asked.pop("text"), asked.pop("folder"), **asked)
    except FwdlearnError as error:
        sys.exit(f"error: {error}")
    print(f"{figures['bits']:.3f} bits a token of the rows held out")


if __name__ == "__main__":
    main()
