"""Noise at the outputs of layers equals a slow reference, and local products equal autograd's."""

from __future__ import annotations

import weakref
from collections import ChainMap
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fwdlearn import noise as noise_module
from fwdlearn.batch import Batch
from fwdlearn.engine import Engine
from fwdlearn.engine.queries import masks
from fwdlearn.engine.sites import Activations
from fwdlearn.engine.trace import tensors
from fwdlearn.engine.visits import Noisy
from fwdlearn.errors import BackwardError, UsageError
from fwdlearn.keys import Key
from fwdlearn.noise import GivenNoise, Noise, NoiseSum, SiteNoise
from fwdlearn.oracle import ActivationOracle, ModelOracle, forbid_backward

from .models import CASES, built, cross_entropy, features, images, series, tokens

ROW = torch.tensor([3, 0, 0, 1, 2, 3, 3])
INDEX = torch.tensor([0, 1, 2, 2, 3, 4, 0])
SCALE = torch.tensor([0.03, -0.03, 0.01, 0.02, 0.0, -0.01, -0.03], dtype=torch.float64)


def oracle_of(name: str, rows: int = 4, dtype: torch.dtype = torch.float64) -> ModelOracle:
    case = CASES[name]
    engine = Engine(built(name, dtype), case.objective)
    return ModelOracle(engine, case.batch(rows).to("cpu", dtype))


class Reference:
    """Runs one row at a time, with noise added by hooks on modules.

    The projections of nn.MultiheadAttention are calls of F.linear that no hook sees, so that
    function is replaced there.
    """

    def __init__(self, oracle: ModelOracle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.batch = oracle._engine.model, oracle._batch
        self.objective = oracle._engine.objective
        self.patch = monkeypatch
        modules = dict(self.model.named_modules())
        attention = [m for m in modules.values() if isinstance(m, nn.MultiheadAttention)]
        inside = {id(w) for m in attention for w in (m.in_proj_weight, m.out_proj.weight)}
        self.by_weight, self.by_module = {}, {}
        for site in oracle.sites:
            name, kind = site.partition("#")[0].rpartition(".")[::2]
            weight = self.model.get_parameter(site.partition("#")[0])
            if id(weight) in inside:
                self.by_weight[id(weight)] = site
            elif (
                name
                and kind == "weight"
                and "#" not in site
                and name + ".weight#1" not in oracle.sites
            ):
                self.by_module[site] = modules[name]

    @property
    def sites(self) -> list[str]:
        return [*self.by_module, *self.by_weight.values()]

    def loss(self, noise: Noise, row: Tensor, index: Tensor, scale: Tensor) -> Tensor:
        def added(site: str, out: Tensor) -> Tensor:
            # Of a single row, so that only the axes of size one can differ.
            return out + (scale * noise.dense(site, index)).reshape(out.shape)

        def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            out = torch._C._nn.linear(input, weight, bias)
            site = self.by_weight.get(id(weight))
            return out if site is None else added(site, out)

        handles = []
        for site, module in self.by_module.items():
            hook = lambda module, args, out, site=site: added(site, out)  # noqa: E731
            handles.append(module.register_forward_hook(hook))
        rows = self.batch.select(row)
        with self.patch.context() as patch:
            patch.setattr(F, "linear", linear)
            # With gradients enabled, attention takes no fused path.
            losses = self.objective(self.model(*rows.args, **rows.kwargs), rows.targets)
        for handle in handles:
            handle.remove()
        return losses.detach()


@pytest.mark.parametrize("name", [name for name in CASES if name != "tied"])
def test_noisy_losses_equal_one_perturbed_pass_a_query(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = oracle_of(name)
    reference = Reference(oracle, monkeypatch)
    assert len(reference.sites) > 0.6 * len(oracle.sites) or name == "odd", reference.sites
    scales = {reference.sites[0]: 0.5}
    noise = SiteNoise(Key.root(1), oracle.sites, 5, scales=scales, only=reference.sites)
    losses = oracle.noisy_losses(ROW, noise, INDEX, SCALE)
    one_by_one = [
        reference.loss(noise, ROW[j : j + 1], INDEX[j : j + 1], SCALE[j]) for j in range(len(ROW))
    ]
    torch.testing.assert_close(losses, torch.cat(one_by_one), rtol=1e-10, atol=1e-12)
    clean = oracle.losses(ROW)
    assert ((losses - clean).abs() > 1e-7)[SCALE != 0].all()
    torch.testing.assert_close(losses[SCALE == 0], clean[SCALE == 0], rtol=1e-12, atol=0)


def differentiated(oracle: ModelOracle) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Autograd's derivative of the summed losses by every site's output and every parameter."""
    engine, batch = oracle._engine, oracle._batch
    rows = torch.arange(oracle.rows)
    sites = dict(oracle.sites)
    values = {n: torch.zeros(len(rows), *s.shape, dtype=s.dtype) for n, s in sites.items()}
    for value in values.values():
        value.requires_grad_()
    activations = engine.activations
    noise, one = GivenNoise(values), torch.ones(len(rows), dtype=torch.float64)
    mode = Noisy(
        *activations._model(len(rows)),
        sites=activations._sites,
        noise=noise,
        index=rows,
        scale=one,
    )
    with masks(None, rows), mode:
        output = engine.model(*batch.args, **batch.kwargs)
    losses = engine.row_losses(output, batch)
    wanted = [*values.values(), *engine.params.values()]
    found = torch.autograd.grad(losses.sum(), wanted, allow_unused=True)
    found = [torch.zeros_like(w) if f is None else f for w, f in zip(wanted, found, strict=True)]
    by_site = dict(zip(values, found, strict=False))
    by_param = dict(zip(engine.params, found[len(values) :], strict=True))
    return by_site, by_param, losses


@pytest.mark.parametrize("name", list(CASES))
def test_gathered_cotangents_are_the_gradient(name: str) -> None:
    """With the exact cotangent of every site, the local products make up the whole gradient."""
    oracle = oracle_of(name)
    cotangents, exact, losses = differentiated(oracle)
    clean = oracle.clean()
    torch.testing.assert_close(clean.losses, losses.detach(), rtol=1e-12, atol=0)
    missing = set(oracle.left_out)
    for gradients in (oracle.gather(cotangents), clean.gather(cotangents)):
        assert set(gradients) | missing == set(exact)
        for parameter in set(exact) - missing:
            # It goes through float32 in the model, and so does autograd.
            tolerance = 1e-6 if (name, parameter) == ("odd", "gain") else 1e-10
            torch.testing.assert_close(
                gradients[parameter], exact[parameter], rtol=tolerance, atol=1e-12, msg=parameter
            )
    assert clean.exact, "the head is a site in every model of the matrix"
    for site, cotangent in clean.exact.items():
        torch.testing.assert_close(cotangent, cotangents[site], rtol=1e-10, atol=1e-12)
    if name == "odd":
        assert set(oracle.left_out.values()) == {"gru has no single output"}
    else:
        assert not missing


class Zoo(nn.Module):
    """Operations with parameters that the matrix lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(3, 6, 3, stride=2, padding=2, dilation=2, groups=3)
        self.same = nn.Conv2d(6, 4, (2, 3), padding="same", dilation=(1, 2), groups=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
        self.cube = nn.Conv3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 1))
        self.one = nn.PReLU()
        self.experts = nn.Parameter(torch.randn(5, 4, 4) * 0.3)
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.factor = nn.Parameter(torch.randn(4))
        self.shift = nn.Parameter(torch.randn(4))
        self.mixer = nn.Parameter(torch.randn(5, 5))
        self.batch = nn.BatchNorm1d(4)
        self.batch.running_mean += 0.2
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.line(x.flatten(2)[:, :3])
        y = self.up(self.same(y.unflatten(2, (2, -1))))
        y = self.one(self.cube(y.unflatten(1, (2, 3))))
        rows = self.batch(F.adaptive_avg_pool1d(y.flatten(1).unsqueeze(1), 20).view(-1, 4))
        rows = rows.view(len(x), 5, 4)
        rows = self.mixer @ rows
        rows = torch.bmm(rows.transpose(0, 1), self.experts).transpose(0, 1)
        index = (x[:, 0, 0, :5] > 0).long() * 2 + 1
        rows = rows * torch.sigmoid(self.factor) - self.shift + self.table(index - 1)
        rows += self.factor[None, None]
        weights = torch.cat([self.shift[:2], self.shift[2:]])
        return self.head(rows.mean(1)) + weights.sum()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_gathered_cotangents_of_rarer_operations() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Zoo().double().eval()
    engine = Engine(model, cross_entropy)
    oracle = ModelOracle(engine, images(4, size=8).to("cpu", torch.float64))
    cotangents, exact, _ = differentiated(oracle)
    # padding_idx is a rule of training: autograd leaves that row out, and so do the products.
    assert dict(oracle.left_out) == {"shift": "cat has no local product"}
    gradients = oracle.gather(cotangents)
    for parameter in set(exact) - {"shift"}:
        torch.testing.assert_close(
            gradients[parameter], exact[parameter], rtol=1e-10, atol=1e-12, msg=parameter
        )


def test_products_in_low_precision_are_summed_in_float32() -> None:
    batch = features(64).to("cpu", torch.bfloat16)
    wide = batch.map(lambda t: t.float() if t.is_floating_point() else t)
    layer, twin = nn.Linear(10, 5).bfloat16(), nn.Linear(10, 5)
    twin.load_state_dict(layer.state_dict())
    cotangents = {"weight": torch.randn(64, 5)}
    found = [
        ModelOracle(Engine(model, cross_entropy), rows).gather(cotangents)["weight"]
        for model, rows in ((layer, batch), (twin, wide))
    ]
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["bert", "cnn", "multihead_attention"])
def test_blocks_change_nothing_but_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither losses nor gradients, and a sum over queries forms only the rows of a block."""
    found = []
    for size in (3, 100):
        monkeypatch.setattr(Activations, "_block", lambda self, *batch, size=size: size)
        oracle = oracle_of(name)
        noise = SiteNoise(Key.root(1), oracle.sites, 5)
        losses = oracle.noisy_losses(ROW, noise, INDEX, SCALE)
        asked: list[tuple[int, int]] = []

        class Told(NoiseSum):
            def part(self, site: str, start: int, stop: int, asked: list = asked) -> Tensor:
                asked.append((start, stop))
                return super().part(site, start, stop)

        total = Told(noise, ROW, INDEX, losses, 4)
        clean = oracle.clean()
        head = {site: value * 0.5 for site, value in clean.exact.items()}
        mixed: ChainMap[str, Tensor] = ChainMap(head, total)  # type: ignore[arg-type]
        kept, streamed = clean.gather(mixed), oracle.gather(mixed)
        plain = oracle.gather({**total, **head})
        found.append((losses, clean.losses, *clean.rms.values(), *kept.values()))
        for gradient, same, other in zip(
            kept.values(), streamed.values(), plain.values(), strict=True
        ):
            torch.testing.assert_close(gradient, same, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(gradient, other, rtol=1e-12, atol=1e-14)
        # The plain dictionary asks for all rows at once.
        assert set(asked) == ({(0, 3), (3, 4), (0, 4)} if size == 3 else {(0, 4)})
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_every_query_is_counted() -> None:
    oracle = oracle_of("mlp")
    assert isinstance(oracle, ActivationOracle)
    noise = SiteNoise(Key.root(0), oracle.sites, 5)
    assert dict(oracle.left_out) == {} and oracle.queries == 0
    oracle.noisy_losses(ROW, noise, INDEX, 0.1)
    assert oracle.queries == 7
    clean = oracle.clean()
    assert oracle.queries == 11
    clean.gather(clean.exact)
    assert oracle.queries == 11
    oracle.gather(clean.exact)
    assert oracle.queries == 15


def test_asking_what_is_offered_runs_no_model() -> None:
    class Never(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            raise AssertionError("it ran")

    oracle = ModelOracle(Engine(Never(2, 2), cross_entropy), features(2, 2))
    assert isinstance(oracle, ActivationOracle)


def test_lengths_and_training_mode() -> None:
    """Other lengths have other shapes under one trace; dropout has one mask for all of a row."""
    case, model = CASES["bert"], built("bert").train()
    engine = Engine(model, case.objective)
    for length in (7, 4, 9):
        oracle = ModelOracle(engine, tokens(4, length), Key.root(5))
        noise = SiteNoise(Key.root(1), oracle.sites, 5)
        shape = oracle.sites["bert.encoder.layer.0.output.dense.weight"].shape
        assert shape == (length, 16)
        still = oracle.noisy_losses(ROW, noise, INDEX, 0.0)
        clean = oracle.clean()
        torch.testing.assert_close(still, clean.losses[ROW], rtol=1e-12, atol=0)
        torch.testing.assert_close(clean.losses, oracle.losses(torch.arange(4)))
        noisy = oracle.noisy_losses(ROW, noise, INDEX, SCALE)
        torch.testing.assert_close(
            noisy[1:3],
            oracle.noisy_losses(ROW[1:3], noise, INDEX[1:3], SCALE[1:3]),
            rtol=1e-12,
            atol=0,
        )
    eval_losses = ModelOracle(Engine(built("bert"), case.objective), tokens(4, 9)).clean().losses
    assert not torch.allclose(clean.losses, eval_losses)


class Live(TorchDispatchMode):
    """The most bytes of tensors made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for value in tensors(out):
            storage = value.untyped_storage()
            if storage._cdata not in known | self.seen:
                size, key = storage.nbytes(), storage._cdata
                self.seen.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key, size)
        return out

    def _gone(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@pytest.mark.parametrize("kept", [False, True])
def test_memory_does_not_grow_with_copies(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does that of a gradient with depth, beside the gradient itself."""
    monkeypatch.setattr(noise_module, "_NUMBERS", {"cpu": 2**12})
    monkeypatch.setattr(noise_module, "_WORDS", 2**10)
    monkeypatch.setattr(noise_module, "_KEEP_BYTES", 2**16 if kept else 0)
    batch = series(4, 8, 32).map(lambda t: t.clamp(max=4) if t.dtype == torch.int64 else t)

    def peaks(copies: int, depth: int) -> tuple[int, int]:
        layers = [nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for _ in range(depth)]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 5))
        engine = Engine(model, cross_entropy, memory_budget=2**16)
        oracle = ModelOracle(engine, batch)
        row = torch.arange(4).repeat_interleave(copies)
        index = torch.arange(4 * copies)
        noise = SiteNoise(Key.root(0), dict(oracle.sites), 4 * copies)
        oracle.noisy_losses(row[:1], noise, index[:1], 0.1)
        with Live() as forward:
            losses = oracle.noisy_losses(row, noise, index, 0.1)
        assert forward.live <= 64 * len(row)
        with Live() as product:
            gradients = oracle.gather(NoiseSum(noise, row, index, losses, 4))
        size = sum(gradient.numel() * 4 for gradient in gradients.values())
        return forward.peak, product.peak - size

    few, many = peaks(16, 3), peaks(128, 3)
    # Vectors over queries are all that may grow: rows, numbers, scales, losses and their order.
    assert many[0] - few[0] <= 64 * 4 * 112
    assert many[1] - few[1] <= 128 * 4 * 112
    # The inputs of 27 more layers would be 110,592 bytes.
    assert peaks(16, 30)[1] < few[1] + 4096


class Overwriting(nn.Module):
    """What the first layer reads is overwritten before the second one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.sin()
        y = self.first(x)
        x.mul_(2).add_(y)
        return self.second(x)


def test_an_overwritten_input_is_noticed_and_streaming_is_exact() -> None:
    batch = features(4).to("cpu", torch.float64)
    model = Overwriting().double()
    oracle = ModelOracle(Engine(model, cross_entropy), batch)
    cotangents = {"first.weight": torch.randn(4, 10).double()}
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            clean = oracle.clean()
            with pytest.raises(UsageError, match="overwrites the input of first.weight.*gather"):
                clean.gather(cotangents)
    exact = cotangents["first.weight"].T @ batch.args[0].sin()
    torch.testing.assert_close(oracle.gather(cotangents)["first.weight"], exact)


def test_nothing_runs_backward_and_whoever_tries_is_told() -> None:
    oracle = oracle_of("cnn")
    noise = SiteNoise(Key.root(1), oracle.sites, 5)
    with forbid_backward():
        clean = oracle.clean()
        total = NoiseSum(noise, ROW, INDEX, SCALE, 4)
        for gradients in (clean.gather(clean.exact), oracle.gather(total)):
            assert not any(value.requires_grad for value in gradients.values())
            assert not any(value.is_inference() for value in gradients.values())

    def objective(output: Tensor, targets: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = output.clone().requires_grad_()
            torch.autograd.grad(leaf.sum(), leaf)
        return cross_entropy(output, targets)

    oracle = ModelOracle(Engine(nn.Linear(10, 5), objective), features(4))
    for ask in (oracle.clean, lambda: oracle.noisy_losses(ROW, GivenNoise({}), INDEX, 0.1)):
        with pytest.raises(BackwardError):
            ask()


def test_an_objective_without_slope_has_no_exact_cotangent() -> None:
    from fwdlearn.objectives import zero_one

    oracle = ModelOracle(Engine(nn.Linear(10, 5), zero_one), features(4))
    assert oracle.clean().exact == {}
    wide = ModelOracle(Engine(nn.Linear(10, 5000), cross_entropy), features(4))
    assert wide.clean().exact == {}


def test_mistakes_are_named() -> None:
    oracle = oracle_of("mlp")
    ids = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UsageError, match="'tail' is no layer's output; the first of them are 0.w"):
        oracle.noisy_losses(ids, GivenNoise({"tail": torch.zeros(1, 5)}), ids, 0.1)
    with pytest.raises(UsageError, match=r"noise of 3.weight has shape \(4,\) a row, but its"):
        oracle.noisy_losses(ids, GivenNoise({"3.weight": torch.zeros(1, 4)}), ids, 0.1)
    with pytest.raises(UsageError, match="'tail' is no layer's output"):
        oracle.gather({"tail": torch.zeros(4, 5)})
    for gather in (oracle.gather, oracle.clean().gather):
        with pytest.raises(UsageError, match=r"cotangent of 3.weight has shape \(3, 5\), but its"):
            gather({"3.weight": torch.zeros(3, 5)})
    mixing = ModelOracle(Engine(nn.BatchNorm1d(10), cross_entropy), features(4))
    with pytest.raises(UsageError, match="batch normalisation in training mode mixes"):
        mixing.clean()

    class Escaping(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input * float(self.weight.sum())

    escaping = ModelOracle(Engine(Escaping(10, 10), cross_entropy), features(4))
    with pytest.raises(UsageError, match="noise cannot be added .* out of torch.* weights"):
        dict(escaping.sites)


@pytest.mark.parametrize(("law", "given"), [("rademacher", False), ("gaussian", True)])
def test_the_mean_of_many_estimates_is_the_gradient(law: str, given: bool) -> None:
    """A z-test of every parameter of a tiny network, Bonferroni-corrected, false alarm 1e-6.

    One-sided with clean baseline, all layers at once, unequal counts; 150 estimates.
    """
    from fwdlearn.allocator import Plan
    from fwdlearn.testing.estimator_statistics import mean_figure

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3))
    model.double()
    x = torch.linspace(-1, 2, 12, dtype=torch.float64).view(4, 3).sin()
    batch = Batch((x,), torch.tensor([0, 1, 2, 0]))
    oracle = ModelOracle(Engine(model, cross_entropy), batch)
    plan, sigma, estimates = Plan(torch.tensor([16, 36, 8, 12])), 1e-4, []
    clean = oracle.clean()
    for number in range(150):
        noise: Noise = SiteNoise(Key.root(number), oracle.sites, plan.directions, law)
        if given:
            every = torch.arange(noise.count)
            noise = GivenNoise({site: noise.dense(site, every) for site in noise.names})
        noisy = oracle.noisy_losses(plan.row, noise, plan.direction, sigma)
        slopes = plan.weight * (noisy - clean.losses[plan.row]) / sigma
        gradients = clean.gather(NoiseSum(noise, plan.row, plan.direction, slopes, plan.rows))
        estimates.append(torch.cat([gradients[name].flatten() for name in oracle.params]))
    with torch.enable_grad():
        exact = torch.autograd.grad(
            cross_entropy(model(x), batch.targets).mean(), model.parameters()
        )
    by_name = dict(zip(dict(model.named_parameters()), exact, strict=True))
    target = torch.cat([by_name[name].flatten() for name in oracle.params])
    # Curvature adds some sigma squared to the mean.
    figure = mean_figure(torch.stack(estimates), target, error=1e-6)
    assert figure.holds, str(figure)
    wrong = mean_figure(torch.stack(estimates), 0.5 * target, error=1e-6)
    assert not wrong.holds, str(wrong)
