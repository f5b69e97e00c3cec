"""What is fitted to labels before a distillation begins, once in a run, and kept with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.nn.losses.labelled import Labelled
from effbench.nn.losses.perturbed import Groups
from effbench.nn.losses.proxy_search import Found, search
from effbench.nn.losses.recalibration import Recalibration, fitted

What = Literal["eps", "temperature", "vector", "none"]
"""The loss's coefficients; the teacher's temperature; it and a bias for each class; nothing."""

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Fit:
    """What a loss is made with, and where it comes from."""

    eps: Rows
    """Coefficients, M of each of G groups."""
    factor: float = 1.0
    """Of the teacher's log-probabilities."""
    bias: tuple[float, ...] = ()
    """Of each class."""
    labels: int = 0
    """Labels that it was fitted to; 0 where it was given."""
    teacher_passes: int = 0
    """Sequences that the teacher read for it."""
    facts: Mapping[str, float] | None = None
    """What a search found, by the names of `Found`."""

    @property
    def recalibration(self) -> Recalibration:
        """What is done to the teacher's distribution."""
        return Recalibration(self.factor, self.bias)

    def coefficients(self, device: torch.device) -> torch.Tensor:
        """Return eps as a tensor [G, M], float64."""
        return torch.tensor(self.eps, dtype=torch.float64, device=device)

    def told(self) -> str:
        """Return it as a sentence."""
        read = f"{self.labels} labels, {self.teacher_passes} sequences read by the teacher"
        if not self.facts:
            bias = f", bias {_shown([self.bias])}" if self.bias else ""
            return f"teacher recalibrated on {read}: factor {self.factor:.3g}{bias}"
        scores = f"Brier score {self.facts['teacher']:.4f} to {self.facts['proxy']:.4f}"
        gain = f"held-out gain {self.facts['gain']:.2g} (standard error {self.facts['error']:.2g})"
        return (
            f"eps {_shown(self.eps)} after {self.facts['candidates']:.0f} candidates on {read}: "
            f"{scores}, {gain}"
        )


def _shown(rows: Sequence[Sequence[float]]) -> str:
    return "; ".join("[" + ", ".join(f"{v:.3g}" for v in row) + "]" for row in rows)


def zeros(groups: int, orders: int) -> Rows:
    """Return coefficients that perturb nothing."""
    return ((0.0,) * orders,) * groups


def fit(
    data: Labelled,
    what: What,
    by: Groups,
    start: Fit,
    draws: int,
    seed: int,
    passes: int,
) -> Fit:
    """Return what labels ask for.

    Args:
        data: The teacher's distributions, with labels.
        what: Is fitted.
        by: Which classes share coefficients.
        start: With coefficients of the shape that is wanted, which stay where none are fitted.
        draws: Random candidates of a search.
        seed: Of the search.
        passes: Sequences that the teacher read.
    """
    if what == "eps":
        generator = torch.Generator().manual_seed(seed)
        found = search(data, by, (len(start.eps), len(start.eps[0])), draws, generator)
        return _of_search(found, len(data.labels), passes)
    mended = fitted(data, with_bias=what == "vector")
    return Fit(start.eps, mended.factor, mended.bias, len(data.labels), passes)


def _of_search(found: Found, labels: int, passes: int) -> Fit:
    names = ("teacher", "proxy", "gain", "error", "candidates")
    facts = {name: float(getattr(found, name)) for name in names}
    eps = tuple(map(tuple, found.eps.tolist()))
    return Fit(eps, labels=labels, teacher_passes=passes, facts=facts)


class Fitting(Evolution):
    """Fits before the first step; what it found is in every checkpoint, and never found again.

    Args:
        fit: What holds without looking at labels.
        how: Fits to labels; None where nothing has to be.
        note: Takes a sentence for the record.
    """

    def __init__(
        self,
        fit: Fit,
        how: Callable[[], Fit] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.fit, self.how, self.note = fit, how, note

    def begin(self, window: Sequence[Batch]) -> None:
        """Fit, and say what was found."""
        if self.how is not None:
            self.fit = self.how()
            self.note(self.fit.told())

    def costs(self) -> dict[str, tuple[float, str]]:
        """Return the labels and the passes of the teacher that fitting took, if any."""
        if not self.fit.labels:
            return {}
        return {
            "fitted_labels": (self.fit.labels, "labels"),
            "fit_passes": (self.fit.teacher_passes, "sequences"),
        }

    def state_dict(self) -> dict[str, Any]:
        """Return what was fitted, as plain values."""
        return asdict(self.fit)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what was fitted."""
        self.fit = Fit(**state)
