"""How many items and seeds: from stated numbers, from records, and on the command line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_report import LORA, run

from effbench.report.plots.power import power_plot
from effbench.report.power import (
    STATED,
    Case,
    Wanted,
    estimate,
    needed,
    render,
    smallest_difference,
    stated,
)
from effbench.results.records import Metric, Outcomes, Record, write
from effbench.stats.power import mcnemar_power, paired_power, seeds_power
from effbench.util.errors import UserError


def answers(number: int, right: list[float], seed: int = 0, **changes: object) -> Record:
    made = run("lora" if number < 50 else "full", {"": 0.0}, number=number, seed=seed)
    kept = Outcomes("choices", "accuracy", "", "test", "cc", right)
    kept = replace(kept, **changes)  # type: ignore[arg-type]
    share = Metric("accuracy", float(np.mean(right)), "", "", "test", len(right), 0.0, 1.0)
    return replace(made, metrics=[*made.metrics, share], outcomes=[*made.outcomes, kept])


RIGHT = [1.0, 1.0, 1.0, 0.0] * 250
OTHER = [*(1 - v for v in RIGHT[:80]), *RIGHT[80:]]


def test_two_runs_tell_how_many_items_differ() -> None:
    case = estimate([answers(1, RIGHT), answers(51, OTHER)], "accuracy")
    assert case.discordance == pytest.approx(0.08)
    assert (case.items, case.sd, case.seed_sd, case.grouping) == (1000, None, None, 1.0)
    assert case.sources == ("From lora and full on 1,000 items.",)


def test_one_run_tells_it_as_if_the_other_were_independent() -> None:
    case = estimate([answers(1, RIGHT)], "accuracy")
    assert case.discordance == pytest.approx(2 * 0.75 * 0.25)
    assert "independently" in case.sources[0]
    assert stated(0.75, None, None, None).discordance == case.discordance
    loss = estimate([LORA], "loss")
    assert loss.sd == pytest.approx(2**0.5 * np.std(LORA.outcomes[0].values, ddof=1))
    assert loss.unit == "nats/token" and not loss.shares


def test_seeds_tell_the_spread_over_seeds() -> None:
    one = [answers(n, [1.0] * r + [0.0] * (100 - r), n) for n, r in ((1, 70), (2, 74), (3, 72))]
    case = estimate(one, "accuracy")
    assert case.seed_sd == pytest.approx(0.02)
    assert case.discordance == pytest.approx(0.04)
    assert "two seeds of lora" in case.sources[0] and "a rough estimate" in case.sources[1]


def test_items_in_groups_tell_less() -> None:
    groups = {"clusters": [i // 10 for i in range(1000)]}
    other = [1 - v if i // 10 % 12 == 0 else v for i, v in enumerate(RIGHT)]
    case = estimate([answers(1, RIGHT, **groups), answers(51, other, **groups)], "accuracy")
    alone = estimate([answers(1, RIGHT), answers(51, other)], "accuracy")
    assert case.grouping > 1.5 and alone.grouping == 1.0
    assert case.over_items(1000, 0.03) < alone.over_items(1000, 0.03)


def test_what_cannot_be_estimated_is_said() -> None:
    with pytest.raises(UserError, match="kept no outcomes of acuracy") as caught:
        estimate([answers(1, RIGHT)], "acuracy")
    assert "'accuracy'" in caught.value.hint
    with pytest.raises(UserError, match="accuracy of copa"):
        estimate([answers(1, RIGHT, task="piqa")], "accuracy", "copa")
    with pytest.raises(UserError, match="same items"):
        estimate([answers(1, RIGHT), answers(51, RIGHT, ids="dd")], "accuracy")
    with pytest.raises(UserError, match="not known"):
        stated(None, None, None, 0.1)
    with pytest.raises(UserError, match="--sd is for"):
        stated(0.5, None, 0.1, None)
    for difference in (0.0, 101.0):
        with pytest.raises(UserError, match="cannot be looked for"):
            needed(Case("accuracy", discordance=0.1), Wanted((difference,)))


def test_the_table_holds_what_the_tests_need() -> None:
    case = Case("accuracy", discordance=0.1, seed_sd=0.01, items=4000)
    rows = {str(row[0]): row[1:] for row in needed(case, Wanted((2.0, 0.1))).rows}
    items, seeds = (int(str(cell).replace(",", "")) for cell in rows["2"])
    assert mcnemar_power(items, 0.1, 0.02) >= 0.8 > mcnemar_power(items - 3, 0.1, 0.02)
    sd = (0.1 - 0.02**2) ** 0.5
    enough = [seeds_power(s, 0.01, 0.02, items=4000, sd=sd) >= 0.8 for s in (seeds, seeds - 1)]
    assert enough == [True, False]
    assert rows["0.1"][1] == "too few items"


def test_the_smallest_difference_is_seen_as_often_as_asked() -> None:
    case, wanted = Case("loss", unit="nats/token", sd=0.3, seed_sd=0.02), Wanted(power=0.9)
    alone = smallest_difference(case, 500, None, wanted)
    assert alone and paired_power(500, 0.3, alone) == pytest.approx(0.9, abs=1e-6)
    seeds = smallest_difference(case, 500, 3, wanted)
    assert seeds and seeds > alone
    text = render(case, Wanted((0.05,), items=500, seeds=3))
    assert "difference, nats/token" in text and "500 items and 3 seeds each:" in text
    assert render(case, Wanted((0.05,)), "csv").startswith('"difference, nats/token",items,')
    assert render(case, Wanted((0.05,)), "md").startswith("**To see a difference of loss in 80%")


@pytest.mark.parametrize("case", [Case("accuracy", discordance=0.1, seed_sd=0.01)])
def test_the_plot(case: Case, tmp_path: Path) -> None:
    assert power_plot(case, Wanted(), tmp_path / "power.png").stat().st_size > 5000


@pytest.mark.parametrize(("metric", "said"), [(STATED, "Difference that"), ("kl", "of KL that")])
def test_what_is_seen_is_named_once(metric: str, said: str, tmp_path: Path) -> None:
    case = Case(metric, sd=0.3)
    assert said in power_plot(case, Wanted(), tmp_path / "power.svg").read_text()
    assert "difference of difference" not in render(case, Wanted((0.05,)), "md")


def test_the_command(cli, tmp_path: Path) -> None:
    for record in (answers(1, RIGHT), answers(51, OTHER)):
        write(record, tmp_path / "results" / "records")
    status, out, _ = cli("power", "--from", "0001", "0033", "--difference", "1")
    assert status == 0
    assert "From lora and full on 1,000 items." in out
    assert "Items that only one run gets right: 8.00%." in out
    line = next(text for text in out.splitlines() if text.startswith("1  "))
    items = int(line.split()[1].replace(",", ""))
    assert mcnemar_power(items, 0.08, 0.01) >= 0.8 > mcnemar_power(items - 20, 0.08, 0.01)
    status, _, err = cli("power")
    assert status == 2 and "--discordance" in err
    status, out, _ = cli("power", "--discordance", "0.08", "--plot", str(tmp_path / "p.png"))
    assert status == 0 and (tmp_path / "p.png").is_file()
    status, out, _ = cli("compare", "0001", "0033", "--margin", "accuracy=0.05", "--format", "md")
    assert status == 0
    assert "accuracy on test within a margin of 0.05. Not shown to be equivalent" in out
    assert cli("compare", "0001", "0033", "--margin", "x")[0] == 2
