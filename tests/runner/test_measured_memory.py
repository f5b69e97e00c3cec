"""What a measured peak holds: tensors, each once, and no library that came after the start."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers import SHAPE, tiny_model

from effbench.api.footprint import Pass
from effbench.api.shape import ModelShape
from effbench.evaluators.choices import Choices
from effbench.evaluators.generation import Generation
from effbench.evaluators.perplexity import Perplexity
from effbench.nn.decode import native
from effbench.nn.decode.policy import EVERYTHING
from effbench.nn.decode.static import StaticSession
from effbench.resources.peaks import Caching
from effbench.runner import open as opening
from effbench.testing.bench import Bench

WHAT_COMES_LATER = """
import sys
from pathlib import Path
import effbench.runner.open as opening
from effbench.testing.bench import Bench

measured, there = opening.memory_in_use, set()

def noted(device):
    there.update(sys.modules)
    return measured(device)

opening.memory_in_use = noted
Bench(Path(sys.argv[1])).run(*sys.argv[2:])
print({name.partition(".")[0] for name in sys.modules.keys() - there})
"""


@pytest.mark.parametrize("made_anew", ["reorder", "grow"])
def test_a_cache_that_is_made_anew_is_not_there_twice(made_anew: str) -> None:
    session = StaticSession(tiny_model().eval())
    session.reserve(3, 8, 4)
    session.prefill(torch.ones(3, 4, dtype=torch.long))
    session.step(torch.ones(3, 1, dtype=torch.long))
    assert session.engine == ("native" if native.kernels() else "walk")
    old = [weakref.ref(t) for layer in session.layers for t in layer.buffers]
    if made_anew == "reorder":
        session.reorder(torch.tensor([0, 2]))
    else:
        session._make_room(session.layers, 1000)
    assert [ref() for ref in old] == [None] * len(old)


@pytest.mark.parametrize(("prompt", "new"), [(5, 3), (100, 28), (100, 29), (130, 300)])
def test_the_room_that_is_made_for_an_answer_is_planned(prompt: int, new: int) -> None:
    session = StaticSession(tiny_model().eval())
    session.reserve(2, prompt + new, prompt)
    caching = Caching(ModelShape.of(SHAPE), EVERYTHING)
    for one in (
        Pass("prefill", 2, prompt, 2, after=new),
        Pass("decode", 2, prompt + new, 2, prompt),
    ):
        assert caching.held(one, 4) + caching.spare(one, 4) == session.reserved_bytes()


def test_what_evaluators_import_is_there_before_memory_is_measured(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(opening, "import_uncompiled", asked.append)
    monkeypatch.setattr(Perplexity, "libraries", lambda self: ("these", "those"))
    bench.run("eval", "evaluator=perplexity")
    assert asked == ["these", "those"]


def test_tasks_need_lm_eval_and_other_data_does_not() -> None:
    for evaluator in (Generation(tasks=()), Choices(), Perplexity()):
        assert evaluator.libraries() == ()
    for evaluator in (Generation(tasks=("gsm8k",)), Choices(tasks=("piqa",))):
        assert "lm_eval.tasks" in evaluator.libraries()


@pytest.mark.slow
def test_no_library_is_imported_after_memory_is_measured(tmp_path: Path) -> None:
    words = "train", "method=lora", "evaluator=[perplexity,memory]"
    command = [sys.executable, "-c", WHAT_COMES_LATER, str(tmp_path), *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert eval(said.splitlines()[-1]) <= {"effbench", "peft", "torch"}
