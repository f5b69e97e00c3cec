from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper

from effbench.cli.launching import _shared
from effbench.config.compose import compose
from effbench.report.labels import command_of
from effbench.results.records import read
from effbench.results.sweeps import outcomes_in, tunings
from effbench.runner import sweep
from effbench.runner.grid.work import Outcome
from effbench.runner.objective import objective_in
from effbench.util.errors import UserError
from hydra_plugins.effbench_launchers._cells import Cell, ClusterLauncher

RUN = ["model=tiny", "dataset=arithmetic", "run.progress=false", "dataset.limit.test=8"]
STEPS = ["train.max_steps=1", "train.batch_size=2", "method.rank=2"]


def outcomes() -> list[dict]:
    return [o for grid in sorted(Path("results/sweeps").iterdir()) for o in outcomes_in(grid)]


def test_a_grid_runs_once_and_the_second_time_not_at_all(cli, inline) -> None:
    status, out, _ = cli("train", "-m", "seed=0,1", *RUN, *STEPS)
    assert status == 0
    assert inline == [0, 0]
    keys = [line.split()[0] for line in out.strip().splitlines()[-2:]]
    assert sorted(keys) == sorted(p.stem for p in Path("results/records").glob("*.json"))
    assert "seed=0" in out
    assert "++" not in out
    assert not any("++" in command_of(read(p)) for p in Path("results/records").glob("*.json"))
    assert cli("train", "-m", "seed=0,1", *RUN, *STEPS)[0] == 0
    assert len(inline) == 2, "what is done is not run again"
    assert len(list(Path("results/sweeps").iterdir())) == 2
    assert cli("train", "-m", "seed=0,1,2", *RUN, *STEPS)[0] == 0
    assert len(inline) == 3, "a further seed is one run"
    assert cli("train", "-m", "--fresh", "seed=0,1", *RUN, *STEPS)[0] == 0
    assert inline == [0] * 5


def test_a_grid_starts_from_a_file_or_from_an_earlier_run(cli, inline) -> None:
    Path("my.yaml").write_text(
        "method: {name: lora, rank: 2}\nmodel: tiny\ndataset: {name: arithmetic, max_length: 32}\n"
        "evaluator: []\ntrain: {max_steps: 1, batch_size: 2}\nhardware: cpu\n"
    )
    quiet = "run.progress=false"
    status, out, _ = cli("train", "-m", "my.yaml", "seed=0,1", quiet)
    assert (status, inline) == (0, [0, 0])
    alone = [compose("train", ["my.yaml", f"seed={n}"]).spec.key for n in (0, 1)]
    assert [line.split()[0] for line in out.strip().splitlines()[-2:]] == alone
    # What has the latest run's own values is that run; the others differ in what is typed.
    status, out, _ = cli("train", "-m", "--like", alone[1], "train.max_steps=1,2", quiet)
    assert (status, inline) == (0, [0, 0, 0])
    [first, second] = [line.split()[0] for line in out.strip().splitlines()[-2:]]
    assert first == alone[1]
    assert second == compose("train", ["train.max_steps=2"], like=alone[1]).spec.key
    status, _, said = cli("train", "-m", "my.yaml", "seed=0,1", "launcher=slurm")
    assert status == 2 and "are made here" in said


def test_a_run_that_fails_does_not_stop_the_others(cli, inline, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("no\n")
    (tmp_path / "good.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{i}", "answer": "a"}) + "\n" for i in range(60))
    )
    files = "dataset.files.all=bad.jsonl,good.jsonl"
    words = ["train", "-m", "dataset=file", files, "model=tiny", "run.progress=false", *STEPS]
    status, out, said = cli(*words)
    assert status == 2
    assert inline == [2, 0]
    assert "1 of 2 runs failed" in said
    assert "bad.jsonl, line 1" in said
    first, second = out.strip().splitlines()[-2:]
    assert "failed" in first
    assert second.endswith("done")
    assert [bool(o["error"]) for o in outcomes()] == [True, False]
    assert len(list(Path("results/runs").glob("[!.]*"))) == 1, "the failed one leaves no folder"
    (tmp_path / "bad.jsonl").write_text((tmp_path / "good.jsonl").read_text() + "\n")
    assert cli(*words)[0] == 0
    assert inline == [2, 0, 0]


def test_in_a_terminal_a_grid_ends_with_what_tells_its_runs_apart() -> None:
    shared = ["model=folder", "model.path=my-model"]
    outcomes = [Outcome([*shared, f"method.rank={n}"], "0" * 16) for n in (2, 4)]
    assert _shared(outcomes) == set(shared)
    assert not _shared(outcomes[:1])


def test_a_run_that_cannot_be_composed_does_not_stop_the_others(cli, inline) -> None:
    status, out, said = cli("train", "-m", "method.rank=999,2", *RUN, *STEPS[:2])
    assert status == 2
    assert inline == [0]
    assert "1 of 2 runs failed" in said
    assert "method.rank=999 is more than q_proj can have" in out


@pytest.mark.parametrize(
    "words, part",
    [
        (["method.rnak=4,8"], "Unknown key 'method.rnak'"),
        (["method.rank=100,200"], "method.rank=100 is more"),
        (["model=tiny,tniy"], "'tniy'"),
        (["seed=0,1", "--config-dir", "nowhere"], "nowhere is not a folder"),
        (["seed=range(2,2)"], "so the grid has no run"),
        (["seed=range(100000)"], "The grid has 100,000 runs"),
        (["method=glob(x*)"], "method=glob(x*) fits nothing"),
        (["seed=0,1", "sweep.jobs=2", "launcher=joblib"], "sweep.jobs is for runs of this process"),
        (["sweep=nothing"], "There is no grid called 'nothing'"),
        (["sweep.jobs=none", "seed=0,1"], "sweep.jobs=none is not possible"),
        (["seed=1", "launcher=slurm"], "pip install 'effbench[slurm]'"),
        (["seed=1,2", "launcher=joblib"], "pip install 'effbench[joblib]'"),
        (["seed=1,2", "launcher=ray"], "pip install 'effbench[ray]'"),
    ],
)
def test_a_grid_with_no_possible_run_says_why_and_leaves_nothing(cli, words, part) -> None:
    flag = ["-m"] if words[0] != "seed=1" else []
    status, _, said = cli("train", *flag, *RUN[:0], "model=tiny", *words)
    assert status == 2
    assert part in said
    assert len(said.strip().splitlines()) <= 6
    assert not list(Path().iterdir())


def test_a_grid_none_of_whose_runs_began_leaves_nothing(cli, inline) -> None:
    words = ["train", "-m", "seed=0,1", *RUN, *STEPS, "dataset.cut.train=0"]
    words += ["dataset=file", "dataset.files.all=rows.jsonl"]
    Path("rows.jsonl").write_text('{"prompt": "a", "answer": "b"}\n' * 9)
    assert cli(*words)[0] == 2
    assert inline == [2, 2]
    assert [*Path().iterdir()] == [Path("rows.jsonl")]


def test_latest_means_the_run_before_the_grid(cli, inline) -> None:
    assert cli("train", *RUN, *STEPS)[0] == 0
    [first] = Path("results/records").glob("*.json")
    assert cli("eval", "-m", "from=latest", "seed=1,2", "run.progress=false")[0] == 0
    files = set(Path("results/records").glob("*.json")) - {first}
    assert [json.loads(f.read_text())["parent"] for f in files] == [first.stem] * 2


def test_stopping_a_grid_stops_it(cli, monkeypatch) -> None:
    monkeypatch.setattr("effbench.runner.local._run_process", lambda *_: 130)
    assert cli("train", "-m", "seed=0,1", *RUN, *STEPS)[0] == 130
    assert outcomes() == []


def test_keys_that_look_like_numbers_are_swept_as_text(cli) -> None:
    status, _, said = cli("eval", "-m", "from=0e09,8065", "run.progress=false")
    assert status == 2
    assert "There is no run '0e09'" in said


def test_a_grid_here_is_composed_without_hydra_and_there_with_it(
    cli, inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "-m", "seed=0,1", *RUN, *STEPS]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "_hand_to_hydra", None)
        assert cli(*words)[0] == 0
    assert [o["overrides"][0] for o in outcomes()] == ["seed=0", "seed=1"]
    assert cli(*words, "launcher=local")[0] == 0
    assert len(outcomes()) == 4
    first, second, *there = outcomes()
    assert [o["key"] for o in there] == [first["key"], second["key"]]


class Drawing(Sweeper):
    """Runs two values one after the other, and keeps what each of them returned."""

    returned: ClassVar[list[float]] = []

    def __init__(self, direction: str) -> None:
        self.direction, self.launcher = direction, None

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        fixed = [a for a in arguments if "train.learning_rate=" not in a]
        for number, rate in enumerate((1e-1, 1e-4)):
            point = [*fixed, f"++train.learning_rate={rate}"]
            (done,) = self.launcher.launch([point], initial_job_idx=number)
            self.returned.append(done.return_value)


def test_a_grid_returns_its_objective(cli, inline, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "hydra_plugins.drawing.Drawing"
    monkeypatch.setitem(Plugins.instance().class_name_to_class, name, Drawing)
    node = {"_target_": name, "direction": "maximize"}
    ConfigStore.instance().store(group="hydra/sweeper", name="drawing", node=node)
    words = ["train", "-m", *RUN, *STEPS, "evaluator.perplexity.split=validation"]
    words += ["sweep.metric=loss@validation", "hydra/sweeper=drawing"]
    status, out, said = cli(*words, "train.learning_rate=interval(0.0001,0.1)")
    assert status == 0, (said, outcomes())
    values = [o["value"] for o in outcomes()]
    assert Drawing.returned == values and all(3 < v < 9 for v in values)
    assert f"{values[0]:.5g}" in out
    assert "Best by loss on validation" in said + out
    assert tunings(Path("results")) == [{o["key"] for o in outcomes()}]


class Here(ClusterLauncher):
    """A cluster that is this process."""

    sent: ClassVar[list[list[str]]] = []

    def run(self, cells: Sequence[Cell]) -> list[JobReturn]:
        words = [str(word) for cell in cells for word in cell.config.hydra.overrides.task]
        self.sent.append([word for word in words if "seed=" in word])
        return [cell.answer(cell.run()) for cell in cells]


def test_a_launcher_gets_the_runs_that_are_not_done(
    cli, inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "hydra_plugins.here.Here"
    ConfigStore.instance().store(group="hydra/launcher", name="here", node={"_target_": name})

    def train(*words: str) -> int:
        monkeypatch.setitem(Plugins.instance().class_name_to_class, name, Here)
        return cli("train", "-m", *RUN, *STEPS[:2], "hydra/launcher=here", *words)[0]

    assert train("seed=1", "method.rank=2") == 0
    assert train("seed=0,1,2", "method.rank=999,2") == 2
    assert Here.sent == [["seed=1"], ["seed=0", "seed=2"]]
    assert inline == [0] * 3
    last = max(Path("results/sweeps").iterdir())
    told = outcomes_in(last)
    for number, outcome in enumerate(told):
        words = {f"seed={number // 2}", f"method.rank={(999, 2)[number % 2]}"}
        assert words < set(outcome["overrides"])
    assert [bool(t["error"]) for t in told] == [True, False] * 3
    assert train("--fresh", "seed=1", "method.rank=2") == 0
    assert Here.sent[2:] == [["seed=1"]]


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("sweep.metric=loss", "is no metric on a split"),
        ("sweep.metric=loss@test", "would choose on the split that is reported"),
        ("sweep.metrics=loss@validation", "Unknown key 'sweep.metrics'"),
        ("sweep.direction=minimize", "is of no metric"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(word: str, part: str) -> None:
    with pytest.raises(UserError, match=part):
        objective_in([word])


def test_optuna_is_told_the_direction() -> None:
    objective, rest = objective_in(["sweep.metric=accuracy@validation", "seed=0,1"])
    assert objective and rest == ["seed=0,1"]
    assert objective.direction == "maximize"
    assert objective.for_sweeper(["hydra/sweeper=optuna"]) == ["hydra.sweeper.direction=maximize"]
    assert objective.for_sweeper(["hydra/sweeper=basic"]) == []
    assert objective.best([0.1, float("nan"), 0.4]) == 2


@pytest.mark.slow
def test_the_runs_of_a_grid_go_side_by_side(tmp_path: Path) -> None:
    """And what lies in the folder of the command is no module of theirs."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs effbench[joblib]")
    for name in ("json", "random", "torch", "yaml", "joblib", "cloudpickle", "hydra", "effbench"):
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write('{name} ')"
        )
    words = ["seed=0,1", *RUN, *STEPS, "launcher=joblib", "hydra.launcher.n_jobs=2"]
    code = "from effbench.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "train", "-m", *words, "hardware.threads=1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
    keys = {line.split()[0] for line in done.stdout.splitlines() if line.endswith("done")}
    assert keys == {p.stem for p in (tmp_path / "results" / "records").iterdir()}
    assert len(keys) == 2


def grid_of(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Begin a grid as a shell does, in a group of processes of its own."""
    code = "from effbench.cli.main import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", "-m", "model=tiny", "dataset=arithmetic", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_saves_what_runs_and_begins_no_other(jobs: int, tmp_path: Path) -> None:
    words = ["seed=0,1,2", "method.rank=2", "dataset.limit.test=8", f"sweep.jobs={jobs}"]
    words += ["train.max_steps=30000", "train.checkpoint_every=30000", "hardware.threads=1"]
    process = grid_of(tmp_path, *words)
    for _ in range(1200):
        logs = [p.read_text() for p in tmp_path.glob("results/runs/*/events.jsonl")]
        if len(logs) == jobs and all('"step"' in log for log in logs):
            break
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert f"3 runs: 0 done, {3 - jobs} waiting, {jobs} interrupted" in said
    assert "The same command goes on." in said
    assert len(list(tmp_path.glob("results/runs/*/checkpoint.pt"))) == jobs
    assert "Traceback" not in said


@pytest.mark.slow
def test_two_launchers_of_one_grid_run_each_run_once(tmp_path: Path) -> None:
    words = ["seed=0,1", "method.rank=2", "dataset.limit.test=8", "train.max_steps=2"]
    both = [grid_of(tmp_path, *words) for _ in range(2)]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all(out.count("  done") == 2 for out, _ in said)
    logs = [p.read_text() for p in tmp_path.glob("results/runs/*/events.jsonl")]
    assert [log.count('"name": "train"') for log in logs] == [1, 1]
