"""Weights that wait on the host: every bit as without, and few of them on the device at once."""

from __future__ import annotations

import copy
import errno
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fwdlearn.allocator import Plan
from fwdlearn.allocators import Uniform
from fwdlearn.baselines import Backpropagation, BaselineTrainer
from fwdlearn.blackbox import BlackBox
from fwdlearn.data import Data, DataInfo, Rows
from fwdlearn.engine import Engine, stores
from fwdlearn.engine.footprint import LiveBytes
from fwdlearn.engine.offload import Offload, Resident, is_offloaded
from fwdlearn.errors import StorageError, UsageError
from fwdlearn.estimators import (
    SPSA,
    ActivityForwardGradient,
    ForwardGradient,
    LikelihoodRatio,
    NodePerturbation,
    RandomPerturbation,
)
from fwdlearn.keys import Key
from fwdlearn.noise import SiteNoise
from fwdlearn.objectives import cross_entropy
from fwdlearn.oracle import ModelOracle
from fwdlearn.trainer import Trainer
from tests.engine.models import CASES, built

CPU = torch.device("cpu")


def answers(name: str, offloaded: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What an oracle and an engine say of a model."""
    model, case = built(name, dtype), CASES[name]
    batch = case.batch(4).map(lambda v: v.to(dtype) if v.is_floating_point() else v)
    home = Offload(model, "cpu") if offloaded else Resident()
    engine = Engine(model, case.objective)
    oracle = ModelOracle(engine, batch)
    row = torch.arange(4).repeat_interleave(2)
    found: dict[str, Any] = {}
    family = RandomPerturbation(sigma=1e-2)
    for sharing in (1, 4):
        plan = Plan.uniform(4, 2, sharing)
        made, _ = family.estimate(oracle, oracle.params, None, key=Key.root(1), plan=plan)
        found[f"losses {sharing}"] = {"loss": made.loss, **dict(made.grad)}
    found["clean"] = oracle.losses(row)
    made, _ = ForwardGradient().estimate(
        oracle, oracle.params, None, key=Key.root(2), plan=Plan.uniform(4, 2)
    )
    found["slopes"] = {"loss": made.loss, **dict(made.grad)}
    try:
        noise = SiteNoise(Key.root(3), oracle.sites, 8)
        found["noisy"] = oracle.noisy_losses(row, noise, torch.arange(8), 0.1)
        clean = oracle.clean(outputs=True)
        cotangents = {site: value * 0.01 for site, value in clean.outputs.items()}
        with home.passing():
            found["kept"] = dict(clean.gather(cotangents))
        found["gathered"] = dict(oracle.gather(cotangents))
    except UsageError as error:
        found["refused"] = str(error)
    with torch.inference_mode(), home.passing():
        found["evaluated"] = engine.evaluate(batch)[0]
    found["rungs"] = (engine.choice, engine.exact.choice)
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_answer_is_that_of_a_resident_model(name: str, dtype: torch.dtype) -> None:
    if name == "odd" and dtype == torch.bfloat16:
        pytest.skip("its table stays in float32")
    resident, offloaded = (answers(name, way, dtype) for way in (False, True))
    differing = [key for key in resident if not same(resident[key], offloaded.get(key))]
    assert not differing
    assert len(resident) >= 7


def llama(dtype: torch.dtype) -> tuple[nn.Module, Data]:
    """With tied embeddings."""
    model = built("llama", dtype)
    model.lm_head.weight = model.model.embed_tokens.weight  # type: ignore[union-attr, assignment]
    ids = torch.randint(1, 60, (24, 7), generator=torch.Generator().manual_seed(0))
    targets = torch.arange(24) % 3
    info = DataInfo("features", (7,), 3)
    return model, Data(info, Rows(ids[:16], targets[:16]), Rows(ids[16:], targets[16:]))


def mlp(dtype: torch.dtype) -> tuple[nn.Module, Data]:
    model = built("mlp", dtype)
    x = torch.randn(24, 10, generator=torch.Generator().manual_seed(0), dtype=dtype)
    targets = torch.arange(24) % 5
    info = DataInfo("features", (10,), 5)
    return model, Data(info, Rows(x[:16], targets[:16]), Rows(x[16:], targets[16:]))


def token_loss(output: Any, targets: Tensor) -> Tensor:
    return CASES["llama"].objective(output, targets)


MODELS: dict[str, tuple[Callable[[torch.dtype], tuple[nn.Module, Data]], Any]] = {
    "llama": (llama, token_loss),
    "mlp": (mlp, cross_entropy),
}
ESTIMATORS = {
    "perturbation": RandomPerturbation(sigma=1e-2),
    "dense": RandomPerturbation(sigma=1e-2, rank=None),
    "spsa": SPSA(sigma=1e-2),
    "slopes": ForwardGradient(),
    "node": NodePerturbation(sigma=1e-1),
    "activity": ActivityForwardGradient(),
    "ratio": LikelihoodRatio(sigma=1e-1),
}
OPTIMIZERS: dict[str, Any] = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "plain": lambda params: torch.optim.SGD(params, lr=0.01),
}


class Told:
    """A sink that keeps what depends on no clock."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def start(self, meta: dict[str, Any]) -> None:
        self.records.append(meta)

    def log(self, record: dict[str, Any]) -> None:
        self.records.append({k: repr(v) for k, v in record.items() if "second" not in k})

    def finish(self, summary: dict[str, Any]) -> None:
        pass


def trainer(
    model: str = "mlp",
    estimator: str = "perturbation",
    optimizer: str = "momentum",
    dtype: torch.dtype = torch.float32,
    sharing: str = "private",
    **settings: Any,
) -> Trainer:
    make, objective = MODELS[model]
    module, data = make(dtype)
    settings = {"batch_size": 4, "steps": 3, "log_every": 1, "evaluate_every": 2} | settings
    if settings.get("offload") is None:
        module.to(settings.get("device", "cpu"))
    return Trainer(
        module,
        data,
        objective,
        ESTIMATORS[estimator],
        Uniform(2, sharing=sharing),
        OPTIMIZERS[optimizer](module.parameters()),
        **settings,
    )


def outcome(run: Trainer) -> dict[str, Any]:
    told = Told()
    run.sinks = [told]
    estimate = run.estimate()
    gradient = {name: estimate.grad[name] for name in estimate.grad}
    run.train()
    state = run.optimizer.state_dict()["state"]
    return {
        "gradient": {"loss": estimate.loss, **gradient},
        "records": told.records,
        "weights": {name: value.clone() for name, value in run.model.state_dict().items()},
        "state": {f"{n} {k}": v for n, kept in state.items() for k, v in kept.items()},
    }


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PAGE", 16)


# Every pair of two settings is in the quick half.
WAYS = [
    ("momentum", torch.float32, "private"),
    ("adam", torch.bfloat16, "private"),
    ("adam", torch.float32, "shared"),
    ("momentum", torch.bfloat16, "shared"),
    *(
        pytest.param(*way, marks=pytest.mark.slow)
        for way in (
            ("momentum", torch.float32, "shared"),
            ("adam", torch.bfloat16, "shared"),
            ("adam", torch.float32, "private"),
            ("momentum", torch.bfloat16, "private"),
        )
    ),
]


@pytest.mark.parametrize(("optimizer", "dtype", "sharing"), WAYS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("model", MODELS)
def test_a_run_is_that_of_a_resident_model(
    model: str, estimator: str, optimizer: str, dtype: torch.dtype, sharing: str, tmp_path: Path
) -> None:
    if estimator == "activity" and dtype == torch.bfloat16:
        pytest.skip("differences in bfloat16 are too rough to check its slopes against")

    def run(offload: str | None) -> dict[str, Any]:
        return outcome(trainer(model, estimator, optimizer, dtype, sharing, offload=offload))

    resident, in_memory, on_disk = (run(where) for where in (None, "cpu", str(tmp_path)))
    assert [key for key in resident if not same(resident[key], in_memory[key])] == []
    assert [key for key in resident if not same(resident[key], on_disk[key])] == []
    # No file has a name, not even while the run is there.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rung", ["copies", "sequential"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_other_rungs_are_those_of_a_resident_model(rung: str, optimizer: str) -> None:
    resident, offloaded = (
        outcome(trainer("mlp", "perturbation", optimizer, rung=rung, offload=offload))
        for offload in (None, "cpu")
    )
    assert same(resident, offloaded)


def test_torchs_own_transformer_takes_its_own_path() -> None:
    """Its layers round otherwise when a mode looks on."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        model = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(32)).eval()
        x = torch.randn(4, 6, 32)
    padded = torch.zeros(4, 6, dtype=torch.bool)
    padded[1, -2:] = True
    with torch.inference_mode():
        plain = [model(x), model(x, src_key_padding_mask=padded)]
    home = Offload(model, "cpu")
    with torch.inference_mode(), home.passing():
        found = [model(x), model(x, src_key_padding_mask=padded)]
    assert same(dict(enumerate(plain)), dict(enumerate(found)))
    home._units = ()
    with torch.inference_mode(), home.passing():
        assert not torch.equal(plain[0], model(x))


def test_tensors_that_share_memory_go_on_sharing_it(tmp_path: Path) -> None:
    """Two parameters in one piece of memory, one of them turned; they are one on the host too."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.arange(12.0)
            self.first = nn.Parameter(whole[:6].view(2, 3))
            self.second = nn.Parameter(whole[3:].view(3, 3).T)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.first @ self.second

    x = torch.ones(1, 2)
    for folder in (None, tmp_path):
        model = Shared()
        plain = model(x)
        home = Offload(model, "cpu", folder)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with home.passing(), torch.no_grad():
            assert torch.equal(model(x), plain)
        with torch.no_grad(), home.updating(optimizer, model.first):
            model.first.zero_()
        assert model.second.stride() == (1, 3)
        assert torch.equal(model.second[:, 0], torch.tensor([0.0, 0.0, 0.0]))


LAYERS, WIDTH = 8, 64
LAYER = 4 * (WIDTH * WIDTH + WIDTH)


def deep(offload: str | None, optimizer: str = "adam", rung: str = "auto") -> Trainer:
    """Layers of the same size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)]
        model = nn.Sequential(*layers)
        x = torch.randn(8, WIDTH)
    data = Data(DataInfo("features", (WIDTH,), WIDTH), Rows(x, torch.arange(8)))
    estimator = ForwardGradient() if rung == "dual" else RandomPerturbation(sigma=1e-2)
    made = OPTIMIZERS[optimizer](model.parameters())
    rung = "auto" if rung == "dual" else rung
    return Trainer(
        model,
        data,
        cross_entropy,
        estimator,
        Uniform(1),
        made,
        batch_size=2,
        steps=2,
        offload=offload,
        rung=rung,
    )


def peak(run: Callable[[], object]) -> int:
    with torch.no_grad(), LiveBytes(CPU) as live:
        run()
    return live.peak


@pytest.mark.parametrize("rung", ["fold", "sequential", "dual"])
def test_a_layer_or_so_is_on_the_device_at_once(rung: str) -> None:
    """What lives beside the host's weights, which were there before and do not count."""
    taken: dict[str | None, tuple[int, int, int]] = {}
    for offload in (None, "cpu"):
        run = deep(offload, rung=rung)
        # What a rung is chosen by may take a copy of a model that is as small as this.
        run.estimate()
        evaluated = peak(lambda: run.evaluate(run.data.train))  # noqa: B023
        made: list[Any] = []
        passes = peak(lambda: made.append(run.estimate()))  # noqa: B023
        run._update(made[0], run.engine.params)
        # Of the second step, when Adam has its moments.
        update = peak(lambda: run._update(made[0], run.engine.params))  # noqa: B023
        taken[offload] = evaluated, passes, update
    for resident, offloaded in zip(taken[None][:2], taken["cpu"][:2], strict=True):
        assert 0 < offloaded - resident <= LAYER
    # The weight and its two moments, of the largest parameter.
    assert 0 < taken["cpu"][2] - taken[None][2] <= 3.1 * 4 * WIDTH * WIDTH


def test_a_model_is_an_ordinary_one_between_passes() -> None:
    run = deep("cpu")
    before = [(p.data_ptr(), p.device, p.detach().clone()) for p in run.model.parameters()]
    run.estimate()
    with pytest.raises(RuntimeError, match="stopped"), run.home.passing():
        first = next(iter(run.model.parameters()))
        assert first.detach().isfinite().all(), "an operation sees numbers"
        with torch._C.DisableTorchFunction():
            assert first.untyped_storage().nbytes() == 4, "and the parameter holds one that is none"
        raise RuntimeError("stopped")
    for (place, device, value), parameter in zip(before, run.model.parameters(), strict=True):
        assert (parameter.data_ptr(), parameter.device) == (place, device)
        assert torch.equal(parameter, value)


def test_what_an_optimizer_keeps_lies_in_the_folder(tmp_path: Path) -> None:
    run = deep(str(tmp_path))
    run.train()
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not say what is mapped")
    spans = [line.split() for line in maps.read_text().splitlines() if str(tmp_path) in line]
    bounds = [[int(side, 16) for side in span[0].split("-")] for span in spans]

    def mapped(value: Tensor) -> bool:
        return any(low <= value.data_ptr() < high for low, high in bounds)

    for parameter in run.model.parameters():
        kept = run.optimizer.state[parameter]
        assert mapped(parameter)
        assert mapped(kept["exp_avg"])
        assert mapped(kept["exp_avg_sq"])
        assert not mapped(kept["step"])
    # One place each, however many steps there are.
    assert len(spans) == 3 * 2 * LAYERS


def test_what_is_read_back_goes_into_the_folder(tmp_path: Path) -> None:
    run = deep(str(tmp_path))
    value = run.home.empty(1000)
    value.fill_(3)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not say what is mapped")
    at = f"{value.data_ptr():x}-"
    assert any(
        line.startswith(at) and str(tmp_path) in line for line in maps.read_text().splitlines()
    )
    assert int(value.sum()) == 3000


@pytest.mark.parametrize("named", [False, True])
def test_no_file_is_left(named: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system has no files without names, they lose theirs at once."""
    if named:
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    model, x = nn.Linear(8, 8), torch.ones(1, 8)
    plain = model(x)
    home = Offload(model, "cpu", tmp_path)
    assert list(tmp_path.iterdir()) == []
    with home.passing(), torch.no_grad():
        assert torch.equal(model(x), plain)


def test_a_copy_of_a_model_is_resident() -> None:
    run = deep("cpu")
    for copied in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):
        assert not any(is_offloaded(p) for p in copied.parameters())
        assert same(dict(copied.state_dict()), dict(run.model.state_dict()))
    assert all(is_offloaded(p) for p in run.model.parameters())


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4, max_norm=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.table(ids).mean(1)


class Unseen(nn.Module):
    """Uses a parameter where no torch function shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            x = x @ self.first.weight.T
        return self.second(x)


def refusing(model: nn.Module, x: Tensor, **settings: Any) -> Trainer:
    data = Data(DataInfo("features", tuple(x.shape[1:]), 4), Rows(x, torch.arange(len(x)) % 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = (cross_entropy, RandomPerturbation(sigma=0.01), Uniform(1), optimizer)
    return Trainer(
        model, data, *parts, **{"batch_size": 4, "steps": 1, "offload": "cpu"} | settings
    )


def test_a_model_that_hides_a_weight_is_refused() -> None:
    run = refusing(Unseen(), torch.randn(4, 3))
    with pytest.raises(UsageError, match=r"none was seen to take first\.weight"):
        run.train()
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_a_model_that_writes_into_a_weight_is_refused() -> None:
    run = refusing(Overwriting(), torch.ones(4, 2, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"embedding\(\) writes into a weight"):
        run.train()


def test_compiled_models_are_refused() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(UsageError, match="compile=True makes graphs"):
        refusing(nn.Linear(3, 4), x, compile=True)
    inner = nn.Linear(3, 4)
    inner.compile(backend="eager")
    with pytest.raises(UsageError, match="0 is compiled, so that they cannot be seen"):
        refusing(nn.Sequential(inner), x)
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.script(nn.Linear(3, 4))
    with pytest.raises(UsageError, match="is compiled"):
        refusing(scripted, x)


def test_other_refusals() -> None:
    x = torch.randn(4, 3)
    with pytest.raises(UsageError, match=r"offload=\.\.\..*black box runs elsewhere"):
        refusing(BlackBox({"w": torch.zeros(2)}, lambda params, rows: rows), x)
    with torch.device("meta"):
        empty = nn.Linear(3, 4)
    with pytest.raises(UsageError, match="weight is on the meta device"):
        Offload(empty, "cpu")
    model = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = Data(DataInfo("features", (3,), 4), Rows(x, torch.arange(4)))
    with pytest.raises(UsageError, match="Backpropagation holds a graph of the whole model"):
        BaselineTrainer(
            model,
            data,
            cross_entropy,
            Backpropagation(),
            Uniform(1),
            optimizer,
            steps=1,
            offload="cpu",
        )


def test_a_folder_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StorageError, match=r"file: cannot be used: .*trainer\.offload=FOLDER"):
        deep(str(file))

    def full(handle: int, start: int, size: int) -> None:
        if size > 4096:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match=r"for 16384 bytes of weights: No space left on device"):
        deep(str(tmp_path))
    assert list(tmp_path.iterdir()) == [file]


def test_a_model_under_offload_can_be_offloaded_elsewhere(tmp_path: Path) -> None:
    model, x = nn.Linear(3, 4), torch.randn(4, 3)
    plain = model(x)
    for folder in (None, tmp_path, None):
        home = Offload(model, "cpu", folder)
        with home.passing(), torch.no_grad():
            assert torch.equal(model(x), plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    @pytest.mark.parametrize(("optimizer", "dtype", "sharing"), WAYS[:4])
    @pytest.mark.parametrize("estimator", ESTIMATORS)
    @pytest.mark.parametrize("model", MODELS)
    def test_a_run_is_that_of_a_resident_model(
        self,
        model: str,
        estimator: str,
        optimizer: str,
        dtype: torch.dtype,
        sharing: str,
        tmp_path: Path,
    ) -> None:
        if estimator == "activity" and dtype == torch.bfloat16:
            pytest.skip("differences in bfloat16 are too rough to check its slopes against")

        def run(offload: str | None) -> dict[str, Any]:
            where = {"device": "cuda", "offload": offload, "evaluate_every": None}
            made = trainer(model, estimator, optimizer, dtype, sharing, **where)
            found = outcome(made)
            if offload is not None:
                assert all(p.device.type == "cpu" for p in made.model.parameters())
            for part in ("weights", "state"):
                found[part] = {name: value.cpu() for name, value in found[part].items()}
            return found

        resident, *others = (run(where) for where in (None, "cpu", str(tmp_path)))
        for other in others:
            assert [key for key in resident if not same(resident[key], other[key])] == []

    def test_two_weights_and_a_block_are_on_the_device(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(16)))
            x = torch.randn(8, 2048)
        data = Data(DataInfo("features", (2048,), 2048), Rows(x, torch.arange(8)))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
        parts = (cross_entropy, RandomPerturbation(sigma=1e-2), Uniform(1), optimizer)
        run = Trainer(model, data, *parts, batch_size=4, steps=3, device="cuda", offload="cpu")
        largest = 4 * 2048 * 2048
        assert model[0].weight.is_pinned()
        run.train()
        assert model[0].weight.is_pinned()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        made = run.estimate()
        # Activations of a few rows are small beside these weights.
        assert torch.cuda.max_memory_allocated() - before < 2.5 * largest
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            run._update(made, run.engine.params)
        # The weight, its two moments, its gradient, and what Adam makes in between.
        assert torch.cuda.max_memory_allocated() - before < 7 * largest
        facts = run.explain()
        assert facts["memory_parts"]["weights"] == 0
        assert facts["offloaded_bytes"] >= 3 * 16 * largest
