"""How a student is held against a teacher: over a question's answers, or token by token.

    z_t' = recalibrated(z_t)     p_t = softmax(z_t' / T), smoothed     p_s = softmax(z_s / T)

z are logits of tokens, or log-likelihoods of answers. The loss of an example is T^2 times the
divergence of the two, which keeps its gradients as large as those of labels (Hinton et al., 2015).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from effbench.api.batch import Batch
from effbench.api.examples import IGNORED
from effbench.nn.losses import perturbed
from effbench.nn.losses.distill import in_chunks
from effbench.nn.losses.fitting import Fit
from effbench.nn.losses.proxy import proxy
from effbench.nn.losses.recalibration import AS_IS, Recalibration
from effbench.nn.losses.token import Readout, counted_readout

Divergence = Literal["kl", "reverse_kl", "focal"]


@dataclass(frozen=True)
class Teaching:
    """What is minimised, apart from what is fitted to labels."""

    groups: perturbed.Groups = "all"
    """Classes that share coefficients."""
    divergence: Divergence = "kl"
    """`kl` is perturbed by the coefficients of the fit."""
    gamma: float = 2.0
    """Exponent of `focal`."""
    temperature: float = 1.0
    """T."""
    beta: float = 0.0
    """Weight of the cross-entropy to known labels."""
    smoothing: float = 0.0
    """Share of the uniform distribution in the teacher's."""
    to_proxy: bool = False
    """Whether the proxy is solved for and taught by plain KL, in the perturbed loss's place."""
    spoiled: Recalibration = AS_IS
    """What is done to the teacher on purpose."""

    def teacher(self, scores: torch.Tensor, mended: Recalibration = AS_IS) -> torch.Tensor:
        """Return log p_t of the teacher's logits [N, C]."""
        changed = mended(self.spoiled(scores))
        log_t = (changed / self.temperature).log_softmax(-1)
        return perturbed.smoothed(log_t, self.smoothing)

    def losses(
        self, teacher: torch.Tensor, student: torch.Tensor, labels: torch.Tensor, fit: Fit
    ) -> torch.Tensor:
        """Return the loss of each example, [N].

        Args:
            teacher: Its logits [N, C].
            student: Likewise.
            labels: The right classes, [N]; below 0 where that is not known.
            fit: To labels.
        """
        with torch.no_grad():
            log_t = self.teacher(teacher, fit.recalibration)
        log_s = (student / self.temperature).log_softmax(-1)
        losses = self.temperature**2 * self._divergence(log_t, log_s, fit)
        return losses + self.beta * known_nll(student, labels) if self.beta else losses

    def _divergence(self, log_t: torch.Tensor, log_s: torch.Tensor, fit: Fit) -> torch.Tensor:
        if self.divergence == "reverse_kl":
            return perturbed.reverse_kl(log_t, log_s)
        if self.divergence == "focal":
            return perturbed.focal(log_t, log_s, self.gamma)
        eps = fit.coefficients(log_t.device)
        groups = perturbed.groups_of(log_t, self.groups)
        if self.to_proxy:
            aim = proxy(log_t.double().softmax(-1), eps, groups)
            return perturbed.kl(aim.log().to(log_t.dtype), log_s)
        return perturbed.perturbed_kl(log_t, log_s, eps, groups)

    def token_loss(
        self,
        teacher: Readout,
        student: Readout,
        labels: torch.Tensor,
        weights: torch.Tensor,
        fit: Fit,
    ) -> torch.Tensor:
        """Return the sum of the losses of all positions, a scalar; logits are never whole.

        Args:
            teacher: Of N positions.
            student: Likewise.
            labels: Their tokens, [N].
            weights: Of each position, [N].
            fit: To labels.
        """

        def piece(
            t: torch.Tensor, s: torch.Tensor, right: torch.Tensor, weight: torch.Tensor
        ) -> torch.Tensor:
            losses = self.losses(teacher.head(t).float(), student.head(s).float(), right, fit)
            return (weight * losses).sum()

        return in_chunks(piece, teacher.states, student.states, labels, weights)


def known_nll(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return -log softmax(scores)[label] of each example, [N]; 0 where the label is below 0."""
    right = scores.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    return torch.where(labels >= 0, -right, 0.0)


def readout(model: torch.nn.Module, batch: Batch) -> Readout:
    """Return what a model's logits are made of where a token counts."""
    return counted_readout(model, batch.input_ids, batch.attention_mask, batch.labels)


def counted_labels(batch: Batch) -> torch.Tensor:
    """Return the labels that count, [N], in the order of `readout`."""
    targets = batch.labels[:, 1:]
    return targets[targets != IGNORED]
