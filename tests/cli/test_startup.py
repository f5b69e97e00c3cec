"""What is used before or after a run starts at once: it imports nothing heavy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from results.test_records import record

from effbench.results.records import write

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "accelerate", "peft", "datasets", "matplotlib"}
CONFIG = {"hydra", "omegaconf", "pydantic"}
NUMBERS = {"numpy", "duckdb", "pyarrow"}
CODE = """
import sys
sys.argv[0] = "effbench"
from effbench.cli.main import main
try:
    main()
finally:
    tops = {m.partition(".")[0] for m in sys.modules}
    own = {m for m in sys.modules if m.startswith("effbench.")}
    print("LOADED", *sorted(tops | own), file=sys.stderr)
"""


def loaded(folder: Path, *words: str, **environment: str) -> tuple[str, set[str]]:
    """Run a command in a process of its own; return what it printed and the packages it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.stdout, set(done.stderr.rpartition("LOADED")[2].split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("startup")
    for key in ("aaaa0000aaaa0000", "bbbb0000bbbb0000"):
        write(record(key=key), place / "results" / "records")
    return place


@pytest.mark.parametrize(
    "line, said",
    [
        ("--help", "compress"),
        ("train --help", "--dry-run"),
        ("runs --help", "query"),
        ("list methods", "qdylora"),
        ("list models", "tiny"),
        ("list datasets", "arithmetic"),
        ("list evaluators", "perplexity"),
        ("list hardware", "v100-32gb"),
        ("list launchers", "slurm"),
        ("list experiments", "qdylora_paper"),
        ("table", "qdylora_tuned"),
        ("runs", "aaaa0000"),
        ("runs show aaaa", "Key aaaa0000aaaa0000"),
    ],
)
def test_help_lists_and_runs_load_neither_models_nor_configs(folder, line, said) -> None:
    out, packages = loaded(folder, *line.split())
    assert said in out
    assert not packages & (HEAVY | CONFIG | NUMBERS)
    assert not line.endswith("--help") or "effbench.api.spec" not in packages


@pytest.mark.parametrize(
    "line, said",
    [("gate default 8148 --against 39c1", "NO-GO"), ("table lora_drop_tuning", "Asked: ")],
)
def test_verdicts_and_tables_load_no_models(line: str, said: str) -> None:
    out, packages = loaded(ROOT, *line.split())
    assert said in out
    assert not packages & HEAVY


@pytest.mark.parametrize(
    "line, said",
    [
        ("train method=q", "method=qdylora"),
        ("train model=", "model=tiny"),
        ("train method.ra", "method.rank="),
        ("eval from=aa", "from=aaaa0000aaaa0000"),
        ("runs show bb", "bbbb0000bbbb0000"),
    ],
)
def test_completion_loads_neither_models_nor_configs(folder, line, said) -> None:
    words = f"effbench {line}"
    out, packages = loaded(
        folder,
        _EFFBENCH_COMPLETE="complete_bash",
        COMP_WORDS=words,
        COMP_CWORD=str(len(words.split()) - 1),
    )
    assert said in out.split()
    assert not packages & (HEAVY | CONFIG | NUMBERS)


@pytest.mark.parametrize(
    "line, said",
    [
        ("show method qdylora", "method.rank = 16"),
        pytest.param("show model tiny", "hidden_size: 64", marks=pytest.mark.slow),
        ("power --accuracy 0.5", "points"),
        ("plan method=qdylora model=tiny", "peak"),
        pytest.param("plan experiment=qdylora_paper", "V100", marks=pytest.mark.slow),
        pytest.param("train model=tiny --dry-run", "peak", marks=pytest.mark.slow),
        ("train model=tiny --print-key", ""),
        ("runs query 'select 1'", ""),
        ("report --against aaaa", ""),
    ],
)
def test_plans_and_pages_load_no_model_library(folder, line, said) -> None:
    words = ["runs", "query", "select 1"] if "query" in line else line.split()
    out, packages = loaded(folder, *words)
    assert said in out
    assert not packages & HEAVY


PLANS = """
import sys
from effbench.api.registry import find, names
from effbench.api.schema import build
from effbench.api.shape import ModelShape, Shape

shape = Shape(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_layers=4, num_heads=4,
    num_kv_heads=2, head_dim=16, tied=False,
)
for name in names("methods"):
    kind = find("methods", name)
    method = build(kind, kind.needs, name).resolve(shape)
    for phase in ("train", "use"):
        method.shape(ModelShape.of(shape), method.full_point(shape), phase, None)
print(*sorted({m.partition(".")[0] for m in sys.modules}))
"""


def test_no_method_loads_a_model_library_before_it_has_a_model(folder) -> None:
    line = [sys.executable, "-c", PLANS]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, check=True)
    assert not set(done.stdout.split()) & HEAVY


def test_comparing_loads_no_model_library(folder) -> None:
    out, packages = loaded(folder, "compare", "aaaa", "bbbb")
    assert "aaaa" in out
    assert not packages & (HEAVY | CONFIG)


def test_the_version_is_printed(cli) -> None:
    from effbench import __version__

    assert cli("--version")[:2] == (0, f"effbench {__version__}\n")
