"""Trials of tunings on the disk: `results/tunings/NAME.json`, by arm the key of each trial."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from effbench.util.errors import UserError
from effbench.util.files import write_atomic


@dataclass(frozen=True)
class Trials:
    """What was tried for each arm."""

    arms: dict[str, dict[str, str]]
    """Key of each trial, by arm and by the words that it tried."""

    def runs(self) -> list[str]:
        """Return the keys of all trials, each once; arms may have trials in common."""
        return list(dict.fromkeys(key for trials in self.arms.values() for key in trials.values()))

    def write(self, path: Path) -> None:
        """Write them, whole or not at all."""
        write_atomic(path, json.dumps(self.arms, indent=1) + "\n")


def trials_file(results: Path, name: str) -> Path:
    """Return where the trials of a tuning are."""
    return results / "tunings" / f"{name}.json"


def read_trials(path: Path) -> Trials:
    """Return the trials in a file.

    Raises:
        UserError: When it is damaged.
    """
    try:
        arms = json.loads(path.read_text())
        return Trials({arm: dict(trials) for arm, trials in arms.items()})
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{path} cannot be read.", "Remove it, and tune again.") from None


def tuned_together(results: Path) -> list[frozenset[str]]:
    """Return the keys of the trials of each arm of each tuning."""
    files = sorted((results / "tunings").glob("*.json"))
    return [frozenset(t.values()) for path in files for t in read_trials(path).arms.values()]
