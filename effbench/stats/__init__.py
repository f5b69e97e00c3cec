"""Intervals, tests and power over per-item outcomes; the same seed gives the same numbers.

Every interval is held to cover in 95 ± 1 % of simulated sets (`effbench selfcheck coverage`), and
every test to equal SciPy's or statsmodels' where they have it.
"""

from effbench.stats.base import ALPHA, DRAWS, LEVEL, UNBOUNDED, Bounds, Estimate, Interval, Student
from effbench.stats.bootstrap import Studentised, studentised
from effbench.stats.intervals import (
    FEWEST,
    FEWEST_REPEATS,
    mean_interval,
    median_interval,
    ratio_interval,
)
from effbench.stats.paired import (
    Better,
    Difference,
    Equivalence,
    equivalence,
    mcnemar_exact,
    paired_difference,
    paired_test,
)
from effbench.stats.seeds import (
    FEWEST_SEEDS,
    OverSeeds,
    over_seeds,
    paired_seeds,
    seeds_and_items,
    seeds_interval,
    welch,
    wilcoxon_exact,
)
from effbench.stats.verdicts import equivalent, finding, holm, letters, verdict

__all__ = [
    "ALPHA",
    "DRAWS",
    "FEWEST",
    "FEWEST_REPEATS",
    "FEWEST_SEEDS",
    "LEVEL",
    "UNBOUNDED",
    "Better",
    "Bounds",
    "Difference",
    "Equivalence",
    "Estimate",
    "Interval",
    "OverSeeds",
    "Student",
    "Studentised",
    "equivalence",
    "equivalent",
    "finding",
    "holm",
    "letters",
    "mcnemar_exact",
    "mean_interval",
    "median_interval",
    "over_seeds",
    "paired_difference",
    "paired_seeds",
    "paired_test",
    "ratio_interval",
    "seeds_and_items",
    "seeds_interval",
    "studentised",
    "verdict",
    "welch",
    "wilcoxon_exact",
]
