"""Models that nobody thought of: each lands on a rung that equals the reference, and says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.utils.checkpoint import checkpoint

from fwdlearn.batch import Batch
from fwdlearn.directions import Directions
from fwdlearn.engine import Engine
from fwdlearn.errors import UsageError
from fwdlearn.keys import Key

from .models import cross_entropy, features, series, tokens

ROW = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 5, 5])
DIRECTION = torch.tensor([0, 1, 2, 3, 4, 5, 6, 0, 1, 9])


@torch.library.custom_op("fwdlearn_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.t()


class Linear(nn.Module):
    """A linear layer that its subclasses put to odd uses."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)


class CustomOperation(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.inner.weight) + self.inner.bias


class OwnFunction(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Product.apply(x, self.inner.weight) + self.inner.bias


class CustomOperationThatMixes(CustomOperation):
    """The fold cannot follow; under `vmap` the operation has no rule."""

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x - 0.2 * x.mean(0)


class BranchOnOutput(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y.tanh() if y.sum() > 0 else y


class BranchOnWeight(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (2 if self.inner.bias.sum() > 0 else 3)


class BranchByRow(Linear):
    """Some rows leave early."""

    def forward(self, x: Tensor) -> Tensor:
        out, hard = self.inner(x), x[:, 0] > 0
        out = out.clone()
        out[hard] = self.inner(x[hard].tanh())
        return out


class Until(nn.Module):
    """As many steps as the row at hand needs."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(10, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = torch.tanh(self.step(x))
            if x.abs().max() < 0.7:
                break
        return self.head(x)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell = kind(8, 6, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Clipping(Linear):
    """Writes on its own weight, as critics of Wasserstein do."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.inner.weight.clamp_(-0.2, 0.2)
        return self.inner(x)


class ShortVectors(nn.Module):
    """An embedding that shortens its vectors where they lie."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(60, 8, max_norm=0.5), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids).mean(1))


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(60, 8), nn.Linear(8, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


class Detached(Linear):
    """Hides its uses of parameters from autograd."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.inner.weight.data) + self.inner.bias.detach()


@dataclass
class Output:
    logits: Tensor
    others: dict[str, Tensor]


class Structured(Linear):
    def forward(self, x: Tensor) -> Output:
        return Output(self.inner(x), {"input": x})


class Quantised(Linear):
    """Parameters of integers, of booleans and of complex numbers, none of them trained."""

    def __init__(self) -> None:
        super().__init__()

        def fixed(value: Tensor) -> nn.Parameter:
            return nn.Parameter(value, requires_grad=False)

        self.codes = fixed(torch.randint(-3, 4, (5, 10), dtype=torch.int8))
        self.order, self.kept = fixed(torch.randperm(5)), fixed(torch.arange(5) != 1)
        self.wave = fixed(torch.randn(6, dtype=torch.cfloat))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.fft.irfft(torch.fft.rfft(x) * self.wave.to(torch.cfloat), n=10).to(x.dtype)
        return (self.inner(x) + F.linear(x, self.codes.to(x.dtype)))[:, self.order] * self.kept


class Mapped(Linear):
    """Maps over the rows itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.inner)(x)


class Functional(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.inner, dict(self.inner.named_parameters()), (x,))


class Checkpointed(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


class Numpy(Linear):
    def forward(self, x: Tensor) -> Tensor:
        product = x.numpy() @ self.inner.weight.detach().numpy().T
        return torch.from_numpy(product) + self.inner.bias


class Pairwise(Linear):
    """Compares the rows with each other."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + 0.3 * (y @ y.T).mean(1, keepdim=True) * torch.arange(5)


def normed(kind: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        return nn.Sequential(kind(nn.Linear(10, 8)), nn.Tanh(), nn.Linear(8, 5))

    return make


def scripted_inside() -> nn.Module:
    return nn.Sequential(torch.jit.script(nn.Linear(10, 8)), nn.Tanh(), nn.Linear(8, 5))


# What it is, its rows, the rung it lands on, and what is said beside that it equals the reference.
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Batch], str, str]] = {
    "custom operation": (CustomOperation, features, "fold", ""),
    "own function": (OwnFunction, features, "fold", ""),
    "custom operation that mixes rows": (
        CustomOperationThatMixes,
        features,
        "copies",
        "fwdlearn_tests::product runs one copy at a time",
    ),
    "branch on output": (BranchOnOutput, features, "sequential", "data-dependent control flow"),
    "branch on weight": (BranchOnWeight, features, "sequential", "fold: __bool__() takes a param"),
    "branch by row": (BranchByRow, features, "sequential", "fold: "),
    "loop until": (Until, features, "sequential", "copies: "),
    "gru": (lambda: Recurrent(nn.GRU), series, "fold", ""),
    "lstm": (lambda: Recurrent(nn.LSTM), series, "fold", ""),
    "rnn": (lambda: Recurrent(nn.RNN), series, "fold", ""),
    "clipping": (Clipping, features, "copies", "fold: clamp_() writes into a parameter"),
    "max_norm": (ShortVectors, tokens, "copies", "fold: an embedding with max_norm writes"),
    "embedding bag": (Bag, tokens, "copies", "fold: "),
    "spectral norm": (normed(parametrizations.spectral_norm), features, "fold", ""),
    "spectral norm, old": (normed(old_spectral_norm), features, "fold", ""),
    "weight norm": (normed(parametrizations.weight_norm), features, "fold", ""),
    "orthogonal": (normed(parametrizations.orthogonal), features, "fold", ""),
    "detached": (Detached, features, "fold", ""),
    "dataclass": (Structured, features, "fold", ""),
    "integers and complex numbers": (Quantised, features, "fold", ""),
    "vmap of its own": (Mapped, features, "copies", "fold: differs from the reference"),
    "functional_call of its own": (Functional, features, "fold", ""),
    "checkpoint": (Checkpointed, features, "fold", ""),
    "numpy": (Numpy, features, "sequential", "fold: numpy() takes a parameter out of torch"),
    "pairs of rows": (Pairwise, features, "copies", "fold: "),
    "script inside": (scripted_inside, features, "copies", "fold: differs from the reference"),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", list(ZOO))
def test_it_lands_on_a_rung_that_is_right(name: str) -> None:
    make, rows, rung, reason = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double().eval()
    batch = rows(6).to("cpu", torch.float64)
    batch = Batch(batch.args, batch.targets % 5, batch.kwargs)
    auto, reference = Engine(model, cross_entropy), Engine(model, cross_entropy, "sequential")
    family = Directions(Key.root(1), dict(auto.params), 10)
    with torch.inference_mode():
        # Models that write on their weights have done so after one pass.
        clean = reference.losses(batch, ROW)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        other = reference.losses(batch, ROW, family, DIRECTION, 0.03)
        one = auto.losses(batch, ROW, family, DIRECTION, 0.03)
    assert auto.choice is not None
    said = auto.choice.reason
    assert auto.choice.rung == rung, said
    assert reason in said
    assert rung == "sequential" or "equals the sequential reference" in said
    torch.testing.assert_close(one, other, rtol=1e-9, atol=0)
    # The comparison means something only if the perturbation is seen.
    assert (other - clean).abs().median() > 1e-3
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "compile", [torch.jit.script, lambda m: torch.jit.trace(m, torch.ones(3, 10))]
)
def test_a_scripted_module_is_refused_with_a_way_out(compile: Any) -> None:
    engine = Engine(compile(nn.Sequential(nn.Linear(10, 5))), cross_entropy)
    family = Directions(Key.root(1), dict(engine.params), 10)
    with pytest.raises(UsageError, match="is compiled by torch.jit; put it inside an nn.Module"):
        engine.losses(features(6), ROW, family, DIRECTION, 0.03)
