"""How much less data one arm of a campaign takes than another for the same accuracy.

Arms that end in `, N pairs` are sizes of the arm before the comma, which itself has all of them.
From records alone; the interval resamples seeds and test rows (`effbench.stats.reaching`).

    python scripts/data_ratio.py TABLE OURS THEIRS [...]
    python scripts/data_ratio.py dorm "DORM by source" Pooled "Pairs alike"
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from effbench.cli.tables import campaign_named
from effbench.report.campaign import Campaign
from effbench.report.table import Table
from effbench.results.records import Record
from effbench.stats.base import Floats
from effbench.stats.reaching import data_ratio

RESULTS = Path("results")


def sizes_of(campaign: Campaign, arm: str, most: int) -> dict[int, str]:
    """Return the arms that are sizes of an arm, by size."""
    found = {most: arm}
    for name in campaign.arms:
        if match := re.fullmatch(re.escape(arm) + r", (\d+) pairs", name):
            found[int(match[1])] = name
    return dict(sorted(found.items()))


def outcomes(records: list[Record], metric: str) -> Floats:
    """Return the outcomes of an arm's test rows, [seeds, items]."""
    return np.array(
        [
            next(o.values for o in r.outcomes if o.metric == metric)
            for r in sorted(records, key=lambda r: r.seeds)
        ],
        dtype=np.float64,
    )


def main() -> None:
    """Print accuracy over size, and the ratio for each arm that is held against."""
    name, ours, *others = sys.argv[1:]
    campaign = campaign_named(name)
    metric, rows, ratios = campaign.metrics[0], [], []
    whole = campaign.records(RESULTS, [ours])[ours]
    most = max(r.data["splits"]["train"]["rows"] for r in whole)
    mine = sizes_of(campaign, ours, most)
    for arm in (ours, *others):
        sizes = sizes_of(campaign, arm, most)
        records = campaign.records(RESULTS, list(sizes.values()))
        curve = np.stack([outcomes(records[a], metric) for a in sizes.values()], 1)
        means = dict(zip(sizes, curve.mean((0, 2)), strict=True))
        rows.append((arm, *(f"{means[n]:.3f}" if n in means else "" for n in mine)))
        if arm == ours:
            own = curve
            continue
        ratio = data_ratio(list(mine), own, curve)
        shown = (f"{x:.1f}" if x else "none" for x in ratio)
        value, low, high = shown
        ratios.append((arm, f"{value} [{low}, {high}]"))
    print(Table(f"{metric} over pairs", ("arm", *(f"{n:,}" for n in mine)), rows).markdown())
    print()
    title = f"times fewer pairs with {ours} (at most {most / min(mine):g})"
    print(Table(title, (f"for what it reaches with {most:,}", "ratio"), ratios).markdown())


if __name__ == "__main__":
    main()
