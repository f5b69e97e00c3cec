"""A teacher's distribution scaled and shifted: to spoil it on purpose, or to mend it by labels.

    p' = softmax(a z + b)        z logits, or log-probabilities, a a number, b [C]

Temperature scaling is a = 1 / T alone, vector scaling here one temperature and a bias for each
class; both are fitted by the labels' likelihood. Guo et al., On Calibration of Modern Neural
Networks, ICML 2017, arXiv 1706.04599, whose vector scaling has a factor for each class too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from effbench.nn.losses.labelled import Labelled

MOST_STEPS = 100


@dataclass(frozen=True)
class Recalibration:
    """A factor and biases of log-probabilities; as it stands it changes nothing."""

    factor: float = 1.0
    """a; above 1 is sharper."""
    bias: tuple[float, ...] = ()
    """b; empty is none."""

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the changed logits of some [N, C]; their sum of probabilities is left open."""
        scores = self.factor * logits
        if self.bias:
            scores = scores + torch.tensor(self.bias, dtype=logits.dtype, device=logits.device)
        return scores


AS_IS = Recalibration()
"""Changes nothing."""


def fitted(data: Labelled, with_bias: bool) -> Recalibration:
    """Return the temperature, and biases where wanted, that make the labels most likely."""
    rate = data.log_t.new_zeros(1).requires_grad_()
    bias = data.log_t.new_zeros(data.log_t.shape[-1]).requires_grad_()
    parameters = [rate, bias] if with_bias else [rate]
    optimizer = torch.optim.LBFGS(parameters, max_iter=MOST_STEPS, line_search_fn="strong_wolfe")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = data.nll(rate.exp() * data.log_t + bias).mean()
        loss.backward()
        return loss

    optimizer.step(step)
    factor, biases = float(rate.detach().exp()), tuple(bias.tolist())
    return Recalibration(factor, biases if with_bias else ())
