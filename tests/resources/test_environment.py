"""The fingerprint, and the counters that stand beside it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from effbench.resources import environment
from effbench.resources.counting import flops, parameters


def fake_output(answers: dict[str, str | None]):  # type: ignore[no-untyped-def]
    def output(*command: str) -> str | None:
        return next((a for word, a in answers.items() if word in command), None)

    return output


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_output", fake_output({}))


@pytest.mark.usefixtures("quiet")
def test_the_fingerprint_is_json_and_names_no_host_or_path() -> None:
    found = environment.fingerprint()
    text = json.dumps(found)
    assert found["packages"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= 1 and found["memory_bytes"] > 2**20
    assert found["gpus"] == []
    assert str(Path.home()) not in text and str(Path.cwd()) not in text
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text


def test_it_needs_no_torch() -> None:
    script = (
        "import sys; from effbench.resources import environment as e; e._output = lambda *c: None;"
        "e.fingerprint(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize(("changes", "dirty"), [("", False), (" M effbench/api/spec.py\n", True)])
def test_commit_and_changes_of_a_checkout(
    changes: str, dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    answers = {"rev-parse": "0123abc\n", "status": changes}
    monkeypatch.setattr(environment, "_output", fake_output(answers))
    assert environment._code(tmp_path) == {"commit": "0123abc", "dirty": dirty}
    assert environment._code(tmp_path / "elsewhere") == {}


def test_devices_as_the_driver_lists_them(monkeypatch: pytest.MonkeyPatch) -> None:
    listing = "NVIDIA A100-SXM4-80GB, 550.54.15, 81920\nNVIDIA A100-SXM4-80GB, 550.54.15, 81920\n"
    monkeypatch.setattr(environment, "_output", fake_output({"nvidia-smi": listing}))
    gpus = environment._gpus()
    assert len(gpus) == 2
    assert gpus[0] == {
        "name": "NVIDIA A100-SXM4-80GB",
        "driver": "550.54.15",
        "memory_mib": "81920",
    }


def test_a_command_that_is_not_there_gives_nothing() -> None:
    assert environment._output("effbench-has-no-such-command") is None
    assert environment._output(sys.executable, "-c", "raise SystemExit(3)") is None
    assert environment._output(sys.executable, "-c", "print('yes')") == "yes\n"


# -- counting ----------------------------------------------------------------------------------


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 8)
        self.inner = torch.nn.Linear(8, 8)
        self.head = torch.nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight


def test_tied_parameters_count_once() -> None:
    model = Tied()
    assert parameters(model) == (50 * 8 + 8 * 8 + 8, 50 * 8 + 8 * 8 + 8)
    model.head.weight = torch.nn.Parameter(model.embedding.weight.data)  # the same storage only
    assert parameters(model).total == 50 * 8 + 8 * 8 + 8
    model.inner.requires_grad_(False)
    assert parameters(model).trainable == 50 * 8
    assert parameters(model.to("meta")).total >= 50 * 8 + 8 * 8 + 8


class Packed(torch.nn.Module):
    logical_params = 64

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.zeros(32, dtype=torch.uint8))
        self.scale = torch.nn.Parameter(torch.ones(8), requires_grad=False)
        self.adapter = torch.nn.Linear(8, 2, bias=False)


def test_packed_modules_count_what_they_stand_for() -> None:
    assert parameters(Packed()) == (64 + 16, 16)


def test_four_bit_weights_count_before_packing() -> None:
    layer = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
    layer.weight = torch.nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = type("State", (), {"shape": torch.Size([8, 8])})()  # type: ignore
    assert parameters(layer) == (64, 0)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_flops_are_those_of_torchs_own_counter(mode: Any) -> None:
    """Compositions are looked into, as `linear` has to be in inference mode."""
    model = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)

    def work() -> None:
        with mode():
            out = torch.nn.functional.linear(model(x), torch.ones(3, 8)) @ torch.ones(3, 2)
            out = torch.einsum("btc,dc->btd", out, torch.ones(4, 2))
        if out.requires_grad:
            out.sum().backward()

    with FlopCounterMode(display=False) as theirs:
        work()
    assert flops(work) == theirs.get_total_flops() > 0


def test_flops_of_a_linear_layer_forward_and_backward() -> None:
    layer = torch.nn.Linear(16, 32, bias=False)
    x = torch.randn(4, 16, requires_grad=True)
    forward = 2 * 4 * 16 * 32
    assert flops(lambda: layer(x)) == forward
    assert flops(lambda: layer(x).sum().backward()) == 3 * forward
