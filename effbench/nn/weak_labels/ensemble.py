"""Linear classifiers on a frozen model's mean states, which vote."""

from __future__ import annotations

import torch

from effbench.api.batch import Batch
from effbench.nn.model_kinds.base import kind_of
from effbench.nn.weak_labels import samme
from effbench.nn.weak_labels.rules import Rule


class Ensemble(torch.nn.Module):
    """Heads on standardised states, all zero at first, and their votes; all float32.

    Args:
        width: Of a state, d.
        classes: K.
        members: Heads, T.
    """

    def __init__(self, width: int, classes: int, members: int) -> None:
        super().__init__()
        self.classes = classes
        self.heads = torch.nn.ModuleList(
            torch.nn.Linear(width, classes, dtype=torch.float32) for _ in range(members)
        )
        for parameter in self.heads.parameters():
            torch.nn.init.zeros_(parameter)
        self.votes = torch.nn.Parameter(torch.zeros(members), requires_grad=False)
        self.mean = torch.nn.Parameter(torch.zeros(width), requires_grad=False)
        self.scale = torch.nn.Parameter(torch.ones(width), requires_grad=False)
        self.rules: list[Rule] = []
        """What was judged to make it, for the artefact."""

    @torch.no_grad()
    def standardise_by(self, features: torch.Tensor) -> None:
        """Take mean and standard deviation of states, [N, d]; both are saved with the heads."""
        self.mean.copy_(features.mean(0))
        self.scale.copy_(features.std(0, correction=0).clamp(min=1e-6))

    def standardised(self, features: torch.Tensor) -> torch.Tensor:
        """Return states as the heads read them, [N, d]."""
        return (features - self.mean) / self.scale

    def probabilities(self, features: torch.Tensor, how: samme.Vote) -> torch.Tensor:
        """Return the ensemble's probabilities of states [N, d], [N, K]."""
        inputs = self.standardised(features)
        each = torch.stack([head(inputs).softmax(1) for head in self.heads])
        return samme.combined(each, self.votes, how)


def mean_states(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean last hidden state over the prompts of a batch, [E, d] float32.

    Of the sequences of an example, which share their prompt, the first is read.
    """
    firsts = [sum(batch.sizes[:i]) for i in range(len(batch.sizes))]
    rows = torch.tensor(firsts or range(len(batch.input_ids)), device=batch.input_ids.device)
    ids, mask = batch.input_ids[rows], batch.attention_mask[rows]
    asked = mask * (batch.labels[rows] == -100)
    kind = kind_of(model)
    seen = mask if kind.caches else asked  # where nothing looks ahead, the answer does not matter
    return pooled(kind.states(model, ids, seen), asked)


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of states [B, T, d] where a mask [B, T] is 1, [B, d] float32."""
    weights = mask.float()
    total = torch.einsum("btd,bt->bd", states.float(), weights)
    return total / weights.sum(1, keepdim=True).clamp(min=1)
