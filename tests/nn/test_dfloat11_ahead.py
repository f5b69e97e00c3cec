"""DFloat11 units decoded ahead: the same weights, and two streams that wait where they must."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from helpers import generator

from effbench.nn.quant import dfloat11, dfloat11_ahead
from effbench.nn.quant.dfloat11 import Encoded, Unit
from effbench.nn.quant.dfloat11_ahead import decoded_ahead
from effbench.util.errors import UserError

BF16 = torch.bfloat16


class Line:
    """Stands for a stream: knows the work that is done before whatever it does next."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def wait_stream(self, other: Line) -> None:
        self.known |= other.known


class Watch:
    """Notes which work reads or writes which buffer, on which line, and what is done before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main, self.aside = Line(), Line()
        self.now = self.main
        self.work: list[tuple[str, int, frozenset[int]]] = []
        self.kept: set[int] = set()
        decode = dfloat11.decode

        def watched(encoded: Encoded, out: torch.Tensor, trusted: bool) -> None:
            assert trusted or self.now is self.main  # the second stream is never waited for
            self.note("write", out)
            decode(encoded, out, trusted)

        monkeypatch.setattr(dfloat11, "decode", watched)
        monkeypatch.setattr(dfloat11_ahead, "_overlaps", lambda device: True)
        monkeypatch.setattr(dfloat11_ahead, "_aside", lambda device: self.aside)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.now)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *given: self.keep(*given))

    def note(self, kind: str, buffer: torch.Tensor) -> None:
        self.work.append((kind, buffer.data_ptr(), frozenset(self.now.known)))
        self.now.known.add(len(self.work) - 1)

    def keep(self, tensor: torch.Tensor, stream: Line) -> None:
        assert stream is self.aside
        self.kept.add(tensor.data_ptr())

    @contextmanager
    def on(self, line: Line) -> Iterator[None]:
        before, self.now = self.now, line
        yield
        self.now = before


def units(*counts: int) -> tuple[torch.nn.ModuleList, list[torch.Tensor]]:
    """Return units of one linear each, and their weights."""
    scratch, made = dfloat11.Scratch(), []
    weights = [torch.randn(1, n, generator=generator(n)).to(BF16) for n in counts]
    for weight in weights:
        encoded = dfloat11.encode({"w": weight})
        made.append(Unit(encoded, [tuple(weight.shape)], scratch))
    return torch.nn.ModuleList(made), weights


def passes(model: Any, weights: list[torch.Tensor], order: list[int], watch: Watch | None) -> None:
    """Use the units in an order, each twice, as the linears of a block do."""
    for index in order * 2:
        for _ in range(2):
            found = model[index].weight(0, BF16)
            assert found.view(torch.int16).equal(weights[index].view(torch.int16))
            if watch:
                watch.note("read", found)


def test_streams_wait_for_each_other_where_a_buffer_changes_hands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = Watch(monkeypatch)
    model, weights = units(300, 500, 400, 600, 200)
    with decoded_ahead(model):
        for order in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [4, 2, 0], [3], [1, 0, 2]):
            passes(model, weights, order, watch)
    for (i, (one, place, _)), (_, (other, its, known)) in combinations(enumerate(watch.work), 2):
        assert place != its or (one, other) == ("read", "read") or i in known
    written = [place for kind, place, _ in watch.work if kind == "write"]
    assert watch.kept >= set(written[-2:])
    codes = {t.data_ptr() for unit in model for t in unit.encoded}
    assert watch.kept >= codes - {0}


def test_the_next_unit_is_decoded_while_this_one_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    model, weights = units(400, 400, 400)
    with decoded_ahead(model):
        passes(model, weights, [0, 1, 2], watch)
        begun = len(watch.work)
        passes(model, weights, [0, 1, 2], watch)
    kinds = [kind for kind, *_ in watch.work[begun:]]
    assert kinds == ["write", "read", "read"] * 6
    for i, (kind, _, known) in enumerate(watch.work):
        if i >= begun and kind == "write":
            assert not {i + 1, i + 2} & known and i - 1 in known
    assert len({place for _, place, _ in watch.work[begun:]}) == 2


def test_a_change_of_what_lies_decoded_and_of_what_comes_next_is_seen() -> None:
    model, weights = units(400, 300, 500)
    other, others = units(200, 350, 450)
    before = model[0].scratch
    passes(model, weights, [0], None)
    with decoded_ahead(model):
        assert before.buffer.numel() == 0
        passes(model, weights, [0, 1, 2], None)  # unit 0 is decoded by now, and 1 comes after it
        for index in (0, 1):
            model[index].load_state_dict(other[index].state_dict())
            model[index].sizes = other[index].sizes
        model[1].get_buffer("tables").zero_()
        passes(model, [others[0], *weights[1:]], [0], None)
        with pytest.raises(UserError, match="damaged"):
            model[1].weight(0, BF16)
        passes(model, [others[0], *weights[1:]], [2, 0], None)
    assert {unit.scratch for unit in model} == {before}
    passes(model, [others[0], *weights[1:]], [2, 0], None)
