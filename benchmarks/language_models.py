"""A small language model goes over to another text, and learns what a reward wants, forward-only.

    python -m benchmarks.language_models adapt MODEL TEXT
    python -m benchmarks.language_models reward MODEL FOLDER

MODEL is a folder as `python -m fwdlearn.baselines.pretrain` leaves it. `adapt` takes the recipe
causal-lm to TEXT, at equal queries, and beside it its last layer alone, exact slopes and one-sided
differences of all weights, the published recipe (one shared Gaussian direction, two sides, SGD) and
backpropagation. Each has three learning rates on seed 0; the one with the lowest training loss at
the end runs on the other seeds. `reward` takes the
recipe reward to the texts of FOLDER (train.jsonl and validation.jsonl), with what there is without
it beside: the model as it was, hill climbing in its weights at equal queries, and backpropagation
of the cross entropy on the tenth of the texts that the reward likes best (20,000 queries). Both
write records/language-models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from math import inf
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.logs import Log
from benchmarks.results import write
from fwdlearn.data.language import SaidRows
from fwdlearn.data.passages import TokenSequences
from fwdlearn.errors import NonFiniteError
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy, score
from fwdlearn.oracle import forbid_backward
from fwdlearn.recipe.build import Assembly, assemble
from fwdlearn.recipe.load import load_recipe
from fwdlearn.scoring import without_letter

RECORD = Path(__file__).parent.parent / "records" / "language-models"
SEEDS = (0, 1, 2)
SHARED = "allocator={name: Uniform, directions: 1, sharing: shared}"
# What differs from the recipe, and learning rates.
TIED = ["model.untie=false", "~optimizer.groups"]
HEAD = ["model.train=['model.lm_head.*']", "~optimizer.groups"]
ADAPT: dict[str, tuple[list[str], tuple[float, ...]]] = {
    "the recipe": ([], (3e-3, 1e-2, 3e-2)),
    "the layer over the vocabulary alone": (HEAD, (3e-3, 1e-2, 3e-2)),
    "exact slopes": (
        [*TIED, "estimator=ForwardGradient", "allocator.directions=8"],
        (1e-3, 3e-3, 1e-2),
    ),
    "one-sided differences": (
        [
            *TIED,
            "estimator={name: RandomPerturbation, sigma: 0.01}",
            "allocator.directions=16",
        ],
        (1e-3, 3e-3, 1e-2),
    ),
    "published recipe": (
        [
            *TIED,
            "estimator={name: SPSA, sigma: 1e-3, law: gaussian, rank: null}",
            SHARED,
            "optimizer={name: SGD}",
        ],
        (1e-4, 3e-4, 1e-3),
    ),
    "backpropagation": (
        [*TIED, "estimator=fwdlearn.baselines:Backpropagation"],
        (3e-3, 1e-2, 3e-2),
    ),
}


def adapted(model: str, text: str, words: list[str], lr: float, seed: int) -> dict[str, Any]:
    log = Log()
    given = [f"model.path={model}", f"data.path={text}", f"seed={seed}", "trainer.device=cpu"]
    # The rate goes in last, since another optimizer has none of its own.
    recipe = load_recipe("causal-lm", [*given, *words, f"optimizer.lr={lr}"])
    trainer = assemble(recipe, [log]).trainer
    begun = trainer.evaluate()["bits"]
    try:
        summary = trainer.train()
    except NonFiniteError:
        return {"lr": lr, "seed": seed, "before": begun, "training": None}
    return {
        "lr": lr,
        "seed": seed,
        "before": begun,
        "bits": summary["eval.bits"],
        "training": summary["train.loss"],
        "queries": summary["queries"],
        "seconds": summary["seconds"],
        "curve": log.curve("eval.bits"),
    }


def adapt(model: str, text: str) -> None:
    results: dict[str, Any] = {}
    for name, (words, rates) in ADAPT.items():
        first = [adapted(model, text, words, lr, SEEDS[0]) for lr in rates]
        best = min(first, key=lambda run: run["training"] or inf)
        runs = [best, *(adapted(model, text, words, best["lr"], seed) for seed in SEEDS[1:])]
        results[name] = {"tried": first, "runs": runs}
        bits = [run["bits"] for run in runs]
        told = " ".join(f"{value:.3f}" for value in bits)
        print(
            f"{name:24} lr {best['lr']:<7g} {best['queries']:>8,} queries {best['seconds']:5.0f} s "
            f"bits a token {best['before']:.3f} -> {told} ({mean(bits):.3f})",
            flush=True,
        )
        write(RECORD / "adapt.json", results)
    curves = {name: found["runs"] for name, found in results.items()}
    begun = results["the recipe"]["runs"][0]["before"]
    plot("adapt", curves, "bits a token of the new text", {"as it was": begun})


def figures(assembly: Assembly) -> dict[str, float]:
    """Of the evaluation rows: the reward, and what a token of the texts costs."""
    found = assembly.trainer.evaluate()
    return {"reward": found["without_letter"], "bits": found["bits"]}


def rewarded(assembly: Assembly) -> tuple[int, float]:
    """The recipe itself; its queries and its last training loss."""
    summary = assembly.trainer.train()
    return summary["queries"], summary["train.loss"]


@torch.no_grad()
def climbed(assembly: Assembly, queries: int, seed: int, sigma: float = 0.01) -> None:
    """A random step is kept where it does better on 64 rows than the model without it."""
    trainer, rows, size = assembly.trainer, assembly.trainer.data.train, 64
    steps = Key.root(seed)
    order = torch.cat([steps.fold(epoch).permutation(len(rows)) for epoch in range(4)])
    params = list(trainer.engine.params.values())
    generator = torch.Generator().manual_seed(seed)

    def loss(step: int) -> float:
        batch = rows.batch(order[step * size : (step + 1) * size])
        return float(score(trainer.model(**batch.kwargs), batch.targets, without_letter).mean())

    for step in range(queries // (2 * size * trainer.batch(0).passes)):
        noise = [torch.randn(p.shape, generator=generator) * sigma for p in params]
        before = loss(step)
        for parameter, change in zip(params, noise, strict=True):
            parameter.add_(change)
        if loss(step) >= before:
            for parameter, change in zip(params, noise, strict=True):
                parameter.sub_(change)


def imitated(assembly: Assembly, queries: int, seed: int) -> None:
    """Backpropagation on the tenth of the training texts that the reward likes best."""
    trainer = assembly.trainer
    rows: Any = trainer.data.train
    texts: TokenSequences = rows.texts
    processor: Any = assembly.built.processor
    split = texts.tokens.split(texts.lengths.tolist())
    asked = texts.asked.split(texts.lengths.tolist())
    said = [
        processor.tokenizer.decode(t[a], skip_special_tokens=True)
        for t, a in zip(split, asked, strict=True)
    ]
    worth = torch.tensor([without_letter(text, "") for text in said])
    best = worth.argsort(descending=True, stable=True)[: len(rows) // 10]
    chosen = SaidRows(texts, rows.pad, rows.limit, rows.multiple)
    generator, size = torch.Generator().manual_seed(seed), trainer.batch_size
    optimizer = torch.optim.Adam(trainer.model.parameters(), lr=1e-3)
    for _ in range(queries // (3 * size)):
        index = best[torch.randint(len(best), (size,), generator=generator)]
        batch = chosen.batch(index)
        cross_entropy(trainer.model(**batch.kwargs), batch.targets).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def reward(model: str, folder: str) -> None:
    results: dict[str, list[Any]] = {}
    budget = 0
    methods: dict[str, Callable[[Assembly, int], Any]] = {
        "as it was": lambda made, seed: None,
        "the recipe": lambda made, seed: rewarded(made),
        "hill climbing": lambda made, seed: climbed(made, budget, seed),
        # Nine times through the tenth.
        "backpropagation on the best tenth": lambda made, seed: imitated(made, 20_000, seed),
    }
    for name, method in methods.items():
        runs = results.setdefault(name, [])
        for seed in SEEDS:
            log = Log()
            words = [f"model.path={model}", f"data.path={folder}", f"seed={seed}"]
            made = assemble(load_recipe("reward", [*words, "trainer.device=cpu"]), [log])
            found = method(made, seed)
            if name == "the recipe":
                budget = found[0]
            batch = made.trainer.data.evaluation.batch(torch.arange(3))  # type: ignore[union-attr]
            with forbid_backward():
                answers = made.trainer.model(**batch.kwargs).texts()
            runs.append({"seed": seed, **figures(made), "answers": answers})
            runs[-1]["curve"] = log.curve("eval.without_letter")
            if name == "as it was":
                break
        rewards, bits = ([run[key] for run in runs] for key in ("reward", "bits"))
        told = " ".join(f"{value:.3f}" for value in rewards)
        print(
            f"{name:36} reward {told} ({mean(rewards):.3f})  bits a token of the texts "
            f"{mean(bits):.3f}   {runs[0]['answers']}",
            flush=True,
        )
        write(RECORD / "reward.json", {"queries": budget, **results})
    ends = {name: mean(run["reward"] for run in runs) for name, runs in results.items()}
    learned = {"the recipe": results["the recipe"]}
    del ends["the recipe"]
    plot("reward", learned, "reward of unseen prompts", ends)


def plot(name: str, runs: dict[str, list[Any]], label: str, flat: dict[str, float]) -> None:
    """Curves against queries; `flat` are methods of which the end alone is known."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for colour, (method, several) in enumerate(runs.items()):
        for number, run in enumerate(several):
            told = method if number == 0 else None
            axes.plot(*zip(*run["curve"], strict=True), f"C{colour}", label=told, alpha=0.8)
    for colour, (method, value) in enumerate(flat.items(), len(runs)):
        axes.axhline(value, color=f"C{colour}", linestyle=":", label=method)
    axes.set(xlabel="queries", ylabel=label)
    axes.legend()
    figure.tight_layout()
    figure.savefig(RECORD / f"{name}.png", dpi=110)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language_models")
    parser.add_argument("what", choices=("adapt", "reward"))
    parser.add_argument("model", help="a folder")
    parser.add_argument("text", help="the text, or the folder of texts")
    asked = parser.parse_args()
    {"adapt": adapt, "reward": reward}[asked.what](asked.model, asked.text)


if __name__ == "__main__":
    main()
