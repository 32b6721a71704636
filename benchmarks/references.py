"""Straight-through and ReinMax gradients of discrete units: references, in comparisons only.

Papers: Y. Bengio, N. Léonard and A. Courville, "Estimating or propagating gradients through
stochastic neurons" (arXiv 1308.3432); L. Liu, C. Dong, X. Liu, B. Yu and J. Gao, "Bridging discrete
and backpropagation: straight-through and beyond" (arXiv 2304.08612).

A sample D, one of several unit vectors with probabilities pi = softmax(theta), has no derivative.
With g the gradient of the loss by D and J_p g = p * (g - <p, g>), which is the derivative of a
softmax at p,

    straight-through   J_pi g                                    exact where the loss is linear
    ReinMax            2 J_q g - 1/2 J_pi g,  q = (pi + D) / 2   exact where it is quadratic in D

on average over D. Both need a backward pass, so that neither is an estimator of fwdlearn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def straight_through(logits: Tensor, sample: Tensor) -> Tensor:
    """The sample, with the derivative of the probabilities.

    Args:
        logits: [..., choices].
        sample: [..., choices], one-hot.
    """
    out: Tensor = _StraightThrough.apply(logits, sample)
    return out


def reinmax(logits: Tensor, sample: Tensor) -> Tensor:
    """The sample, with ReinMax's derivative; arguments as `straight_through`."""
    out: Tensor = _ReinMax.apply(logits, sample)
    return out


def one_hot_sample(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One of the unit vectors for each row of logits [..., choices], by their softmax."""
    uniform = torch.rand(logits.shape, generator=generator, dtype=logits.dtype).clamp(min=1e-20)
    return one_hot(logits - torch.log(-torch.log(uniform)))


def one_hot(logits: Tensor) -> Tensor:
    """The unit vector of the largest logit; the first of them where several are."""
    chosen = logits.argmax(-1, keepdim=True)
    return torch.zeros_like(logits).scatter_(-1, chosen, 1.0)


def _softmax_slope(p: Tensor, g: Tensor) -> Tensor:
    return p * (g - (p * g).sum(-1, keepdim=True))


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, sample: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1))
        return sample.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (pi,) = ctx.saved_tensors
        return _softmax_slope(pi, grads[0]), None


class _ReinMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, sample: Tensor) -> Tensor:
        ctx.save_for_backward(logits.softmax(-1), sample)
        return sample.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        pi, sample = ctx.saved_tensors
        middle = _softmax_slope((pi + sample) / 2, grads[0])
        return 2 * middle - _softmax_slope(pi, grads[0]) / 2, None
