"""A key changes with everything that changes a result, and with nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from effbench.config.compose import compose

CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 512,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return a folder that can be composed with, though not loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "1 + 1 =", "answer": "2"}\n')
    return path


def key(*words: str) -> str:
    return compose("eval", ["hardware=cpu", "evaluator=perplexity", *words]).spec.key


def of_model(folder: Path) -> str:
    return key("model=folder", f"model.path={folder}", "dataset=arithmetic")


def of_rows(**files: Path) -> str:
    cut = "dataset.cut={}" if "all" not in files else "dataset.cut={test: 1}"
    words = [f"dataset.files.{split}={path}" for split, path in files.items()]
    return key("model=tiny", "dataset=file", cut, *words)


def test_a_copy_of_a_model_elsewhere_has_the_same_key(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "other.name")
    assert of_model(copy) == of_model(model)


def test_a_changed_weight_in_the_middle_of_a_model_is_another_key(model: Path) -> None:
    before = of_model(model)
    weights = bytearray(3 << 20)
    weights[len(weights) // 2] = 1
    (model / "model.safetensors").write_bytes(weights)
    assert of_model(model) != before


def test_the_same_rows_elsewhere_have_the_same_key(rows: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(rows, tmp_path / "other.jsonl"))
    assert of_rows(all=rows) == of_rows(all=copy)
    copy.write_text('{"prompt": "1 + 1 =", "answer": "3"}\n')
    assert of_rows(all=rows) != of_rows(all=copy)


def test_how_rows_are_read_and_which_split_they_are_is_in_the_key(
    rows: Path, tmp_path: Path
) -> None:
    csv = Path(shutil.copy(rows, tmp_path / "rows.csv"))
    assert of_rows(all=rows) != of_rows(all=csv)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "2 + 2 =", "answer": "4"}\n')
    assert of_rows(train=rows, test=other) != of_rows(train=other, test=rows)
