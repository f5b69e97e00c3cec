"""The file of a table in conf/table: by which commands each arm is made, and what a paper says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from effbench.api.schema import build
from effbench.report.campaign import Campaign
from effbench.util import yamls
from effbench.util.errors import UserError


def campaign_in(path: Path) -> Campaign:
    """Return the campaign of a file.

    Raises:
        UserError: When it cannot be read, has unknown keys, a claim without a source, or a verdict
            that rests on nothing.
    """
    values = yamls.read(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys.", "It needs seeds: and arms:.")
    words = values.pop("words", {})
    scales = values.get("scales")
    for part in (values, *(scales.values() if isinstance(scales, dict) else ())):
        if isinstance(part, dict) and isinstance(arms := part.get("arms"), dict):
            part["arms"] = {str(arm): _filled(steps, words, path) for arm, steps in arms.items()}
    own = {"name": path.stem, "title": title_of(path)}
    campaign = build(Campaign, {"experiment": path.stem, **values, **own}, path.name, path.name)
    if campaign.verdict:
        campaign.verdict.check(campaign.arms, path.name)
    return campaign


def _filled(steps: Any, words: Any, path: Path) -> Any:
    """Return the commands of an arm with the words that they name; other values as they are."""
    if not (isinstance(steps, list) and isinstance(words, dict)):
        return steps
    try:
        return [str(step).format(**words) for step in steps]
    except (LookupError, ValueError) as error:
        raise UserError(
            f"{path} names words that it does not have: {error}.", "Add it to words:."
        ) from None


def title_of(path: Path) -> str:
    """Return the first line of a file, as a sentence or question."""
    first = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return first if first.endswith("?") else f"{first}."
