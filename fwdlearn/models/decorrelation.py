"""Inputs of layers made uncorrelated, by a rule that needs no gradient.

Papers: S. Dalm, M. van Gerven and N. Ahmad, "Effective learning with node perturbation in deep
neural networks" (arXiv 2310.00965); S. Dalm, J. Offergeld, N. Ahmad and M. van Gerven, "Efficient
deep learning with decorrelated backpropagation" (arXiv 2405.02385).

A layer sees R x in the place of x. R begins as the identity and follows

    R <- R - lr [(1 - kappa) offdiag(C) R + kappa diag(v) R]

with C = mean(x' x'^T), v = mean(x'^2) - 1 and x' = R x: correlations go to zero, and variances to
one at the rate kappa. R and the weights that follow are one matrix to whoever uses the network,
`fold_into_weights`.

Differs from the papers in: the variance term scales the rows of R, as the rule wants (the published
code scales its columns); R is no parameter and no optimizer sees it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fwdlearn.errors import UsageError


class Decorrelation(nn.Module):
    """Maps x to R x along the last axis, and learns R; see `fwdlearn.local`.

    Args:
        features: length of the last axis.
        lr: size of a step, positive. Steps much larger than 1 / features diverge.
        kappa: weight of unit variances against zero correlations, 0 to 1.
        share: of the rows of a batch from which it learns, above 0 and at most 1.

    Attributes:
        matrix: R, [features, features], a buffer.

    Raises:
        UsageError: a setting is out of range.

    Example:
        >>> layer = Decorrelation(2, lr=0.1)
        >>> x = torch.tensor([[1.0, 1.0], [-1.0, -1.0], [1.0, 0.5], [-1.0, -0.5]])
        >>> for _ in range(100):
        ...     layer.learn_from(x)
        >>> covariance = layer(x).T @ layer(x) / len(x)
        >>> bool(covariance[0, 1].abs() < 0.01 * covariance[0, 0])
        True
    """

    matrix: Tensor

    def __init__(
        self, features: int, lr: float = 1e-3, kappa: float = 1e-3, share: float = 0.1
    ) -> None:
        super().__init__()
        rules = {
            "features": (features >= 1, "at least 1", features),
            "lr": (0 < lr < float("inf"), "positive", lr),
            "kappa": (0 <= kappa <= 1, "between 0 and 1", kappa),
            "share": (0 < share <= 1, "above 0 and at most 1", share),
        }
        for name, (kept, rule, value) in rules.items():
            if not kept:
                raise UsageError(f"Decorrelation({name}=...) must be {rule}, got {value!r}.")
        self.lr, self.kappa, self.share = lr, kappa, share
        self.register_buffer("matrix", torch.eye(features))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix)

    @torch.no_grad()
    def learn_from(self, inputs: Tensor) -> None:
        """One step of the rule, from inputs [..., features]."""
        wide = torch.promote_types(self.matrix.dtype, torch.float32)
        matrix = self.matrix.to(wide)
        seen = inputs.reshape(-1, len(matrix)).to(wide) @ matrix.T
        covariance = seen.T @ seen / len(seen)
        variance = covariance.diagonal().clone()
        push = (1 - self.kappa) * (covariance.fill_diagonal_(0) @ matrix)
        push += self.kappa * (variance - 1).unsqueeze(1) * matrix
        self.matrix.copy_(matrix - self.lr * push)

    def extra_repr(self) -> str:
        return f"{len(self.matrix)}, lr={self.lr}, kappa={self.kappa}, share={self.share}"


class DecorrelatedLinear(nn.Module):
    """A linear layer behind a decorrelation."""

    def __init__(self, layer: nn.Linear, decorrelation: Decorrelation) -> None:
        super().__init__()
        self.decorrelation, self.layer = decorrelation, layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(self.decorrelation(x))
        return out


class DecorrelatedConv2d(nn.Module):
    """A convolution whose patches are decorrelated: R acts on the kernel, the image stays as it is.

    `decorrelation` learns from the patches, taken apart for the rows of that pass alone.
    """

    def __init__(self, layer: nn.Conv2d, decorrelation: Decorrelation) -> None:
        super().__init__()
        self.decorrelation, self.layer = decorrelation, layer

    @property
    def share(self) -> float:
        """Of the rows of a batch from which it learns."""
        return self.decorrelation.share

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        kernel = (layer.weight.flatten(1) @ self.decorrelation.matrix).view(layer.weight.shape)
        out: Tensor = layer._conv_forward(x, kernel, layer.bias)
        return out

    def learn_from(self, inputs: Tensor) -> None:
        """One step of the rule, from images [rows, channels, height, width]."""
        layer = self.layer
        places = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        patches = F.unfold(inputs, *places)  # type: ignore[arg-type]
        self.decorrelation.learn_from(patches.mT)


def decorrelated(
    model: nn.Module, lr: float = 1e-3, kappa: float = 1e-3, share: float = 0.1
) -> nn.Module:
    """A copy of a model with a decorrelation before each linear layer and convolution.

    It computes what the model does until something is learned. Layers inside
    nn.MultiheadAttention, grouped convolutions and those with padding of another kind than zeros
    of a given number stay as they are.

    Args:
        model: any module.
        lr, kappa, share: see `Decorrelation`.

    Raises:
        UsageError: a setting is out of range, or there is no layer to decorrelate.
    """

    def wrapped(layer: nn.Module) -> nn.Module | None:
        if type(layer) is nn.Linear:
            made = Decorrelation(layer.in_features, lr, kappa, share).to(layer.weight)
            return DecorrelatedLinear(layer, made)
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            if isinstance(layer.padding, str):
                return None
            made = Decorrelation(layer.weight[0].numel(), lr, kappa, share).to(layer.weight)
            return DecorrelatedConv2d(layer, made)
        return None

    made, count = _replaced(model, wrapped)
    if not count:
        raise UsageError(
            f"decorrelated({type(model).__name__}) finds no nn.Linear and no plain nn.Conv2d."
        )
    return made


def fold_into_weights(model: nn.Module) -> nn.Module:
    """A copy of a model with each decorrelation multiplied into the weights that follow it.

    The copy has the layers, names and outputs of a model that knows nothing of decorrelation.

    Raises:
        UsageError: a Decorrelation stands alone, so that there is nothing to fold it into.
    """

    def folded(module: nn.Module) -> nn.Module | None:
        if not isinstance(module, DecorrelatedLinear | DecorrelatedConv2d):
            return None
        weight = module.layer.weight
        product = weight.data.flatten(1).double() @ module.decorrelation.matrix.double()
        weight.data = product.view_as(weight).to(weight.dtype)
        return module.layer

    made, _ = _replaced(model, folded)
    for name, module in made.named_modules():
        if isinstance(module, Decorrelation):
            raise UsageError(
                f"{name or 'the model'} is a Decorrelation without a layer of its own; use "
                "decorrelated(model), or multiply it into the next weights yourself."
            )
    return made


def _replaced(
    model: nn.Module, other: Callable[[nn.Module], nn.Module | None]
) -> tuple[nn.Module, int]:
    """A deep copy with modules replaced, each once however often it is used; and how many."""
    root = nn.ModuleList([copy.deepcopy(model)])
    known: dict[int, nn.Module] = {}
    for parent in list(root.modules()):
        if isinstance(parent, DecorrelatedLinear | DecorrelatedConv2d):
            continue
        # Of all names, where named_children() gives each module once.
        for name, child in list(parent._modules.items()):
            if child is None:
                continue
            if id(child) not in known and (new := other(child)) is not None:
                known[id(child)] = new
            if id(child) in known:
                setattr(parent, name, known[id(child)])
    return root[0], len(known)
