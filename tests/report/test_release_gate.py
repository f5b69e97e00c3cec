"""One verdict over the metrics and limits of a policy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_report import ITEMS, run
from typer.testing import CliRunner

from effbench.cli.gate import evaluators_of, judgement_of
from effbench.cli.main import app
from effbench.report.comparison.contrast import contrast
from effbench.report.gate.arms import arm
from effbench.report.gate.lacking import Measures
from effbench.report.gate.policy import policy_in
from effbench.report.gate.verdict import STATUS, Judgement, judge
from effbench.results.records import Metric, Outcomes, Record, write
from effbench.stats import holm
from effbench.util.errors import UserError
from effbench.util.package_data import conf_dir

ROOT = Path(__file__).parents[2]
BASE, SAME, WORSE, NEAR, TWO, FAMILY = "0000", "0001", "0002", "0003", "0004", "0009"
JOINED = "0005+0006+0007"
MEASURE = "Measure it: effbench eval from="
Judge = Callable[..., Judgement]


def speed(record: Record, value: float, low: float, high: float) -> Record:
    """Return a record with a speed and where it was measured."""
    metric = Metric("decode_tokens_per_second", value, "tokens/s", "", "", 7, low, high)
    return replace(record, metrics=[*record.metrics, replace(metric, phase="decode")])


def right(record: Record, wrong: int) -> Record:
    """Return a record with 120 answers, the first of them wrong."""
    values = [0.0] * wrong + [1.0] * (120 - wrong)
    metric = Metric("accuracy", float(np.mean(values)), "", "", "test", 120)
    kept = Outcomes("choices", "accuracy", "", "test", "aa", values)
    return replace(record, metrics=[*record.metrics, metric], outcomes=[*record.outcomes, kept])


def scored(record: Record, point: str) -> Record:
    """Return a record with a metric whose name says no direction, at one point."""
    values = [0.5] * 120
    metric = Metric("margin_of_score", 0.5, "", point, "test", 120)
    kept = Outcomes("mine", "margin_of_score", point, "test", "aa", values)
    return replace(record, metrics=[*record.metrics, metric], outcomes=[*record.outcomes, kept])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of records to be judged."""
    runs = [
        right(speed(run("none", {"": 0.0}), 100, 98, 102), 30),
        right(speed(run("lora", {"": 0.001}, number=1), 130, 126, 134), 31),
        right(speed(run("rtn", {"": 0.3}, number=2), 121, 110, 132), 60),
        run("dylora", {"r1": 0.05, "r8": 0.0}, number=3),
        scored(run("other", {"": 0.0}, number=4, ids="bb"), ""),
        *(run("seeds", {"": 0.001}, number=n, seed=n - 5) for n in (5, 6, 7)),
        replace(
            speed(run("far", {"": 0.0}, number=8), 500, 499, 501),
            environment={"cpu": {"model": "another"}},
        ),
        scored(run("dylora", {"r1": 0.05, "r8": 0.0}, number=9), "r1"),
    ]
    there = tmp_path_factory.mktemp("gate") / "records"
    for record in runs:
        write(record, there)
    return there


@pytest.fixture
def judged(folder: Path, tmp_path: Path) -> Judge:
    """Return a function that judges runs by a policy, given as plain values."""

    def call(policy: Any, ref: str = SAME, base: str = BASE) -> Judgement:
        path = tmp_path / "policy.yaml"
        path.write_text(
            policy if isinstance(policy, str) else yaml.safe_dump(policy, sort_keys=False)
        )
        sides = [arm(r, folder) for r in (ref, base)]
        known = {m: ["perplexity"] for m in ("loss", "bits_per_byte")}
        known |= {"kl": ["fidelity"], "accuracy": ["choices"]}
        known["exact_match"] = ["best_of_n", "generation"]
        measures = Measures(lambda m: known.get(m, []), frozenset(known))
        return judge(policy_in(path), sides[0], sides[1], measures)

    return call


def metrics(**rules: Any) -> dict[str, Any]:
    return {"metrics": rules}


def test_a_run_as_good_goes(judged: Judge) -> None:
    found = judged(metrics(loss="1 %", accuracy={"margin": 0.05}))
    assert found.verdict == "GO" and [c.state for c in found.checks] == ["kept", "kept"]
    assert found.lines() == ["GO: shown to be kept: loss on test, accuracy on test."]


def test_a_run_that_is_worse_does_not(judged: Judge) -> None:
    found = judged(metrics(loss="1 %"), WORSE)
    assert found.verdict == "NO-GO" and found.checks[0].finding == "worse"
    assert found.lines()[-1] == "NO-GO: not kept: loss on test."


def test_the_direction_is_that_of_the_metric(judged: Judge) -> None:
    """Better by far is not worse, whichever way better is."""
    assert judged(metrics(loss=0.01, accuracy=0.01), BASE, WORSE).verdict == "GO"
    assert judged(metrics(loss={"margin": 0.01, "direction": "higher"}), WORSE).verdict == "GO"
    both = judged(metrics(loss={"margin": 0.01, "direction": "either"}), BASE, WORSE)
    assert both.verdict == "NO-GO", "far from equivalent"
    assert judged(metrics(loss={"margin": 0.05, "direction": "either"})).verdict == "GO"


def test_what_is_open_says_what_would_settle_it(judged: Judge) -> None:
    found = judged(metrics(accuracy=0.01))
    assert found.verdict == "INCONCLUSIVE" and STATUS[found.verdict] == 3
    [said] = re.findall(r"about ([\d,]+) items \(120 now\)", found.lines()[0])
    assert int(said.replace(",", "")) > 120


def test_more_metrics_that_must_be_kept_take_more_items(judged: Judge) -> None:
    def wanted(**rules: Any) -> int:
        [check] = [c for c in judged(metrics(**rules)).checks if c.name.startswith("accuracy")]
        return int(re.findall(r"about ([\d,]+) items", check.settles)[0].replace(",", ""))

    assert wanted(accuracy=0.01) < wanted(accuracy=0.01, loss=1.0)


def test_a_limit_is_on_the_point_that_is_named(tmp_path: Path) -> None:
    family = run("dylora", {"r1": 0.0, "r8": 0.0})
    speeds = [
        Metric("decode_tokens_per_second", v, "tokens/s", p, phase="decode")
        for p, v in (("r1", 200.0), ("r8", 100.0))
    ]
    write(replace(family, metrics=[*family.metrics, *speeds]), tmp_path)
    found = [arm(f"0000@{p}", tmp_path).values("decode_tokens_per_second") for p in ("r1", "r8")]
    assert [[m.value for m in own] for (own,) in found] == [[200.0], [100.0]]


def test_only_what_must_be_kept_decides(judged: Judge) -> None:
    soft = {"margin": 0.01, "tier": "should"}
    found = judged(metrics(loss={"margin": 1.0}, accuracy=soft), WORSE)
    assert found.verdict == "GO"
    assert found.lines()[-1].endswith("what should be kept and is not: accuracy on test.")


def test_p_values_are_those_of_the_comparison_after_holm(judged: Judge) -> None:
    found = judged(metrics(loss=0.004, accuracy=0.02))
    sides = [judged(metrics(loss=1.0), ref).checks[0].run for ref in (SAME, BASE)]
    assert found.checks[0].run == sides[0] and found.checks[0].base == sides[1]
    rules = {"loss": (0.004, "lower"), "accuracy": (0.02, "higher")}
    alone = []
    for name, (margin, better) in rules.items():
        [one] = judged(metrics(**{name: margin})).checks
        assert one.difference is not None and better
        alone.append(one.p)
    assert [c.p for c in found.checks] == pytest.approx(holm([p or 0.0 for p in alone]))
    assert found.checks[1].p != alone[1], "two metrics are held to a stricter level than one"


def test_a_relative_margin_is_of_the_other_run(judged: Judge) -> None:
    [check] = judged(metrics(loss="2 %")).checks
    assert check.base is not None
    assert check.wanted == f"+{check.base.value * 0.02:.4g}"


def test_seeds_are_joined(judged: Judge, folder: Path) -> None:
    [check] = judged(metrics(loss="1 %"), "0005+0006+0007").checks
    own, other = arm("0005+0006+0007", folder), arm(BASE, folder)
    place = own.places("loss")[0]
    direct = contrast(own.side("loss", place, 0), other.side("loss", place, 1), 0.1, "lower")
    assert check.difference is not None and check.difference.value == direct.difference.value
    assert check.covers == direct.covers
    with pytest.raises(UserError, match="not runs of one spec"):
        judged(metrics(loss=1.0), f"{SAME}+{WORSE}")


@pytest.mark.parametrize(
    ("limit", "ref", "state"),
    [
        (">= 1.2x", SAME, "kept"),
        (">= 1.4x", SAME, "broken"),
        (">= 1.3x", SAME, "open"),
        (">= 1.25x", SAME, "open"),
        (">= 120", WORSE, "open"),
        (">= 100 tokens/s", WORSE, "kept"),
        ("< 110", WORSE, "broken"),
        ("<= 110", WORSE, "open"),
    ],
)
def test_limits_take_the_interval(judged: Judge, limit: str, ref: str, state: str) -> None:
    """130 [126, 134] and 121 [110, 132] tokens/s, of 100 [98, 102]: 1.26 times 98, 1.24 of 102."""
    [check] = judged({"limits": {"decode_tokens_per_second": limit}}, ref).checks
    assert check.state == state


def test_limits_of_bytes_have_units(judged: Judge) -> None:
    kept = judged({"limits": {"peak_bytes": "<= 3 GiB", "weight_bytes": "<= 4MiB"}})
    assert kept.verdict == "GO"
    assert judged({"limits": {"peak_bytes": "<= 3 GB"}}).verdict == "NO-GO"
    assert judged({"limits": {"weight_bytes": "<= 1x"}}).verdict == "GO"


def test_speeds_of_two_machines_show_nothing(judged: Judge) -> None:
    rule = {"limits": {"decode_tokens_per_second": ">= 1.2x", "weight_bytes": "<= 1x"}}
    found = judged(rule, "0008")
    assert [c.state for c in found.checks] == ["open", "kept"], "counts hold everywhere"
    assert "measured on one machine" in found.lines()[0]


@pytest.mark.parametrize(
    ("policy", "ref", "said"),
    [
        ({"metric": {}}, SAME, "Unknown key 'policy.yaml.metric'.\nDid you mean 'metrics'"),
        (metrics(loss={"margn": 1}), SAME, "margn'.\nDid you mean 'margin'"),
        (metrics(loss={"margin": 1, "tier": "may"}), SAME, "metrics.loss.tier"),
        (metrics(loss="little"), SAME, "metrics.loss.margin: 'little'"),
        (metrics(loss=0), SAME, "is no number above zero"),
        (metrics(margin_of_score=1), TWO, "0000 has no margin_of_score.\n0004 has it"),
        (metrics(loss={"margin": 1, "tier": "should"}), SAME, "no metric or limit that must"),
        ({"limits": {"peak_bytes": "2 GiB"}}, SAME, "'2 GiB' is no limit"),
        ({"limits": {"peak_bytes": "<= 2 s"}}, SAME, "It is measured in B, MiB"),
        ({"limits": {"peak_bytes": {"limit": "< 9", "phase": "trai"}}}, SAME, "mean 'train'"),
        ({"limits": {"peak_byte": "<= 2"}}, SAME, "it.\nDid you mean 'peak_bytes'"),
        (metrics(bits_per_byte=1), SAME, "Nobody measured bits_per_byte: neither 0001 nor 0000"),
        (metrics(kl=0.1), SAME, f"{MEASURE}00010000 evaluator=fidelity; effbench eval from=0000"),
        (metrics(loss=1, kl=1), SAME, f"{MEASURE}00010000 evaluator=[perplexity,fidelity]; "),
        (metrics(accuracy=1), TWO, f"{TWO} has no accuracy.\n{MEASURE}{TWO}0000 evaluator=choices"),
        (metrics(exact_match=1), SAME, "=NAME (NAME: for exact_match best_of_n or generation)"),
        (metrics(kl=1), JOINED, "effbench eval -m from=00050000,00060000,00070000 evaluator=fid"),
        (metrics(acuracy=1), SAME, "has it.\nDid you mean 'accuracy'?"),
        (metrics(bits_per_bite=1), SAME, "has it.\nDid you mean 'bits_per_byte'?"),
        (metrics(colour=1), SAME, "No evaluator is known to give it. Known: accuracy, decode"),
        ({"limits": {"kl": "<= 1"}}, SAME, f"{MEASURE}00010000 evaluator=fidelity"),
        ({"limits": {"decode_tokens_per_second": "> 1x"}}, f"{NEAR}@r1", "0003@r1 has no decode_"),
        (metrics(loss={"margin": 1, "split": "validation"}), SAME, "It has loss on test"),
        (metrics(loss={"margin": 1, "split": "tset"}), SAME, "Did you mean 'test'? It has loss"),
        (metrics(loss={"margin": 1, "task": "piqa"}), SAME, "has no loss of piqa.\nIt has loss on"),
        (metrics(loss=1), "0004", "did not see the same items of loss on test (120 and 120)"),
        (metrics(loss=1), NEAR, "Name one of r1, r8: 0003@r8"),
        (metrics(loss=1), f"{NEAR}@r9", "no operating point 'r9'"),
        ("metrics:\n  loss: [1\n", SAME, "cannot be read as YAML: line 3, column 1"),
        ("- loss\n", SAME, "holds no keys"),
    ],
)
def test_mistakes_are_named(judged: Judge, policy: Any, ref: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        judged(policy, ref)
    assert said in str(caught.value)


def test_a_metric_of_another_point_is_named(judged: Judge) -> None:
    with pytest.raises(UserError, match=r"at this point\.\nIt has it at r1\. Judge 0009@r1"):
        judged(metrics(margin_of_score=1), f"{FAMILY}@r8", f"{FAMILY}@r1")


def test_a_metric_that_was_measured_needs_a_direction(judged: Judge) -> None:
    with pytest.raises(UserError, match="Whether more or less of margin_of_score is better"):
        judged(metrics(margin_of_score=1), TWO, TWO)
    rule = {"margin": 1, "direction": "lower"}
    assert judged(metrics(margin_of_score=rule), TWO, TWO).verdict == "GO"


def test_points_of_one_run_can_be_held_against_each_other(judged: Judge) -> None:
    found = judged(metrics(loss="1 %"), f"{NEAR}@r1", f"{NEAR}@r8")
    assert found.verdict == "NO-GO" and found.run == "0003@r1"
    assert len(ITEMS) == found.checks[0].items


def test_json_holds_what_the_table_says(judged: Judge) -> None:
    found = judged(metrics(loss="1 %") | {"limits": {"peak_bytes": "<= 3 GiB"}}, WORSE)
    whole = json.loads(found.json())
    assert whole["verdict"] == "NO-GO" and whole["words"] == found.lines()
    assert [c["finding"] for c in whole["checks"]] == ["worse", "kept"]
    assert whole["checks"][0]["difference"]["low"] > 0


# -- the command -------------------------------------------------------------------------------


def gate(*words: str) -> Any:
    return CliRunner().invoke(app, ["gate", *words, "--results", str(ROOT / "results")])


def test_the_page_shows_what_the_command_prints() -> None:
    text = (ROOT / "docs" / "gate.md").read_text()
    [block] = re.findall(r"<!-- output of the command -->\n```console\n(.*?)```", text, re.S)
    command, _, shown = block.partition("\n")
    done = gate(*command.split()[3:])
    assert done.exit_code == 0 and done.stdout.rstrip() == shown.rstrip()


def test_the_exit_status_is_that_of_the_verdict() -> None:
    assert gate("default", "8148", "--against", "39c1").exit_code == 1
    assert sorted(STATUS.values()) == [0, 1, 3], "2 is that of a mistake"


def test_what_measures_a_metric_is_known(tmp_path: Path) -> None:
    known = {"accuracy": "choices", "decode_tokens_per_second": "speed", "kl": "fidelity"}
    assert {name: evaluators_of(name, tmp_path) for name in known} == {
        name: [evaluator] for name, evaluator in known.items()
    }
    assert evaluators_of("nothing", ROOT / "results" / "records") == []
    assert "generation" in evaluators_of("exact_match", tmp_path)


def test_what_measured_a_metric_is_seen_in_records(tmp_path: Path) -> None:
    """Of what all records with it were evaluated by, one must be left."""
    both = [{"name": "perplexity", "settings": {}}, {"name": "mine", "settings": {}}]
    for number, parts in enumerate((both, both[1:])):
        record = run("none", {"": 0.0}, number=number)
        colour = [*record.metrics, Metric("colour", 1.0, "")]
        spec = {**record.spec, "evaluators": parts}
        write(replace(record, spec=spec, metrics=colour), tmp_path)
    assert evaluators_of("colour", tmp_path) == ["mine"]


def test_the_policies_that_come_along_can_be_read() -> None:
    for path in (conf_dir() / "policy").glob("*.yaml"):
        assert policy_in(path).metrics


def test_a_policy_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no policy 'defalt'") as refused:
        judgement_of(Path("defalt"), "latest", "latest", tmp_path)
    assert "'default'" in (refused.value.hint or "")
