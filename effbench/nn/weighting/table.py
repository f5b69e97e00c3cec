"""What is known of each training pair, and its weight, as a table that a person can read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from effbench.nn.weighting.grouping import Evidence, Groups

NAME = "pair_weights"
"""Of the table in a model."""
FILE = "pair_weights.jsonl"
"""Its file in an artefact: a JSON line for each pair."""
SHOWN = 6
"""Groups that are told of in a sentence."""


class PairTable(nn.Module):
    """Rides along in a model until its artefact is saved; it computes nothing.

    Args:
        ids: Content hash of each pair, [n].
        sources: Where each comes from, [n].
        evidence: What proxies say of it.
        groups: Which group it is in.
        weights: [n], mean 1; those of stage 1 until others are found.
    """

    def __init__(
        self,
        ids: Sequence[str],
        sources: Sequence[str],
        evidence: Evidence,
        groups: Groups,
        weights: torch.Tensor,
    ) -> None:
        super().__init__()
        self.ids, self.sources = list(ids), list(sources)
        self.evidence, self.groups, self.weights = evidence, groups, weights

    def state(self) -> dict[str, Any]:
        """Return all of it as plain values and tensors."""
        return {
            "ids": self.ids,
            "sources": self.sources,
            "evidence": list(self.evidence),
            "groups": self.groups.of,
            "names": list(self.groups.names),
            "weights": self.weights,
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Self:
        """Return the table of a `state`."""
        evidence = Evidence(*(x.cpu() for x in state["evidence"]))
        groups = Groups(state["groups"].cpu(), tuple(state["names"]))
        return cls(state["ids"], state["sources"], evidence, groups, state["weights"].cpu())

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each pair, in the order of training."""
        columns = (*self.evidence, self.weights)
        return [
            {
                "id": id_,
                "source": source,
                "uncertainty": round(u, 6),
                "disagreement": round(d, 6),
                "group": self.groups.names[group],
                "weight": round(weight, 6),
            }
            for id_, source, group, u, d, weight in zip(
                self.ids,
                self.sources,
                self.groups.of.tolist(),
                *(column.tolist() for column in columns),
                strict=True,
            )
        ]

    def told(self) -> str:
        """Return the weights in a sentence: the groups of highest and of lowest mean weight."""
        sizes = self.groups.sizes
        means = (self.groups.totals(self.weights.double()) / sizes).tolist()
        order = sorted(range(len(means)), key=lambda g: -means[g])
        half = SHOWN // 2
        some = order if len(order) <= SHOWN else [*order[:half], *order[-half:]]
        words = (f"{self.groups.names[g]}: {means[g]:.3g} ({int(sizes[g])} pairs)" for g in some)
        return f"mean weight of a pair in {len(order)} groups: {'; '.join(words)}"

    def write(self, folder: Path) -> None:
        """Write the table into a folder."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())
        (folder / FILE).write_text("".join(lines), encoding="utf-8")
