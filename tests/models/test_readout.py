"""The reader of a frozen encoder: what it reads, what noise it takes, how it is saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fwdlearn.allocator import Plan
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.estimators import LikelihoodRatio
from fwdlearn.keys import Key
from fwdlearn.models.readout import Look, Reader, Readout
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle, forbid_backward

library = pytest.importorskip("transformers")


@pytest.fixture
def encoder() -> Any:
    config = library.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return library.BertModel(config).eval()


def words(rows: int = 6, length: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 30, (rows, length), generator=generator)
    sizes = torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(length) < sizes).long()}


def readout(width: int = 8, means: int = 32, detectors: int = 4) -> Readout:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Readout(width, means, 2, detectors)


def test_look_shows_a_layer_and_every_mean(encoder: Any) -> None:
    look, batch = Look(encoder, 1), words()
    with torch.no_grad():
        states = encoder(**batch, output_hidden_states=True).hidden_states
        shown = look(**batch)
    torch.testing.assert_close(shown["tokens"], states[1])
    sizes = batch["attention_mask"].sum(1)
    for row in range(6):
        wanted = torch.cat([state[row, : sizes[row]].mean(0) for state in states])
        torch.testing.assert_close(shown["means"][row], wanted)


def test_calibrated_features_have_mean_zero_and_variance_one(encoder: Any) -> None:
    look, batch = Look(encoder), words(40)
    for _ in range(2):
        # A second time changes nothing: what was set before does not count.
        look.calibrate(**batch, least=1e-6)
        with torch.no_grad():
            shown = look(**batch)
        tokens = shown["tokens"][shown["mask"] > 0]
        for values in (tokens, shown["means"]):
            torch.testing.assert_close(
                values.mean(0), torch.zeros(values.shape[1]), atol=1e-4, rtol=0
            )
            torch.testing.assert_close(
                values.std(0), torch.ones(values.shape[1]), atol=1e-3, rtol=0
            )


def test_detectors_see_the_strongest_token_of_those_there_are() -> None:
    model = readout()
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(3, 5, 8, generator=generator)
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    means = torch.randn(3, 32, generator=generator)
    with torch.no_grad():
        answers = (tokens @ model.detectors.T).masked_fill(mask.unsqueeze(-1) == 0, -torch.inf)
        most = nn.functional.gelu(answers.amax(1))
        wanted = model.head(torch.cat((means, most), 1))
        torch.testing.assert_close(model(tokens, mask, means), wanted)


def test_noise_has_one_number_a_detector_and_the_gradient_is_that_of_backprop() -> None:
    model = readout().double()
    generator = torch.Generator().manual_seed(3)
    batch = Batch(
        (),
        torch.arange(6) % 2,
        {
            "tokens": torch.randn(6, 5, 8, generator=generator, dtype=torch.float64),
            "mask": torch.ones(6, 5, dtype=torch.int64),
            "means": torch.randn(6, 32, generator=generator, dtype=torch.float64),
        },
    )
    loss = cross_entropy(model(**batch.kwargs), batch.targets).mean()
    wanted = dict(
        zip(("d", "w", "b"), torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )
    oracle = ModelOracle(Engine(model, cross_entropy), batch)
    assert [tuple(output.shape) for output in oracle.sites.values()] == [(4,), (2,)]
    with forbid_backward():
        # All signs of four numbers are few enough that their mean is near: the error of a
        # detector's row falls as 1 / sqrt(directions).
        estimate, _ = LikelihoodRatio(1e-4).estimate(
            oracle,
            oracle.params,
            LikelihoodRatio(1e-4).init(oracle.params),
            key=Key.root(0),
            plan=Plan.uniform(6, 4096),
        )
        found = {name: estimate.grad[name] for name in oracle.params}
    torch.testing.assert_close(found["head.weight"], wanted["w"])
    torch.testing.assert_close(found["head.bias"], wanted["b"])
    error = (found["detectors"] - wanted["d"]).norm() / wanted["d"].norm()
    assert float(error) < 0.1


def test_the_choice_follows_the_weights_wherever_they_go() -> None:
    model = readout()
    for moved in (model, copy.deepcopy(model), readout().double().float()):
        with torch.no_grad():
            moved.detectors.mul_(-2)
        assert torch.equal(moved.eyes, moved.detectors)


def test_folded_queries_equal_sequential_ones() -> None:
    tokens = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(4))
    inputs = {"tokens": tokens, "mask": torch.ones(6, 5).long(), "means": torch.zeros(6, 32)}
    batch = Batch((), torch.arange(6) % 2, inputs)
    with forbid_backward():
        assert Engine(readout(), cross_entropy).choose(batch).rung == "fold"


def test_saved_and_loaded_gives_the_same_logits(encoder: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        model, batch = Reader(Look(encoder), 2, 4), words()
    model.look.calibrate(**batch)
    with torch.no_grad():
        model.readout.detectors.add_(1)
        wanted = model(**batch)
    model.save_pretrained(tmp_path)
    with torch.random.fork_rng(devices=[]):
        again = Reader(Look(library.AutoModel.from_pretrained(tmp_path).eval()), 2, 4)
    again.load_head(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**batch), wanted)


def test_a_layer_that_is_not_there(encoder: Any) -> None:
    with pytest.raises(UsageError, match=r"Look\(layer=...\) must be 0 .* to 3, got 4"):
        Look(encoder, 4)
