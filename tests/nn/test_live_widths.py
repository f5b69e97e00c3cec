"""Packed weights that change in the middle of a text: each step reads them as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import generator, some_ids, tiny_model

from effbench.methods.cache.streaming import SinkWindow
from effbench.nn.decode import native, static
from effbench.nn.decode.cuda_graph import StepGraph
from effbench.nn.decode.policy import EVERYTHING
from effbench.nn.decode.staged import WholeSession
from effbench.nn.decode.static import StaticSession
from effbench.nn.llama.surgery import replace_linears
from effbench.nn.quant.linears import lay_together
from effbench.nn.quant.nested_linear import NestedLinear, read_at

WIDTHS = (4, 2, 2, 3, 4, 4, 2)
"""At which one step after the other reads, of 2 to 4."""
NEAR = 1e-4
"""Largest difference of a logit, in float32."""


def nested(linear: torch.nn.Linear) -> NestedLinear:
    """A layer with codes and levels by lot, which a fit to weights would take long to find."""
    layer, draws = NestedLinear.empty(linear, 2, 4), generator(linear.out_features)
    layer.planes.random_(generator=draws)
    for name, buffer in layer.named_buffers():
        if name.startswith("table"):
            buffer.copy_(0.05 * torch.randn(buffer.shape, generator=draws))
    return layer


def nested_model() -> Any:
    model = tiny_model().eval().requires_grad_(False)
    replace_linears(model, lambda _, linear: nested(linear))
    model.lm_head = nested(model.lm_head)
    return model


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[NestedLinear]:
    """The layers whose layouts were looked up."""
    found = list[NestedLinear]()
    lookup = NestedLinear.layout

    def watched(self: NestedLinear) -> Any:
        found.append(self)
        return lookup(self)

    monkeypatch.setattr(NestedLinear, "layout", watched)
    return found


@contextmanager
def at(model: Any, bits: int) -> Iterator[None]:
    """`read_at`, which sets widths alone where they are others."""
    if model.lm_head.bits == bits:
        yield
    else:
        with read_at(model, bits):
            yield


def assert_follows(live: Any, model: Any, widths: Sequence[int] = WIDTHS) -> None:
    """Hold each step of a session against that of the modules, which read the same text so far."""
    walk, still = (StaticSession(model, use_native=False) for _ in range(2))
    ids = some_ids(1, 9 + len(widths))
    for session in (live, walk, still):
        session.prefill(ids[:, :9])
    for token, bits in zip(ids[:, 9:].split(1, 1), widths, strict=True):
        unread = still.step(token)
        with at(model, bits):
            found, expected = live.step(token), walk.step(token)
        torch.testing.assert_close(found, expected, atol=NEAR, rtol=0)
    assert (unread - expected).abs().max() > 0.1, "widths make no difference"


@pytest.mark.parametrize("reserved", [False, True])
def test_a_step_of_the_kernel_reads_the_width_of_the_moment(reserved: bool) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model = nested_model()
    session = StaticSession(model)
    if reserved:
        session.reserve(1, 32)
    assert session.engine == "native"
    assert_follows(session, model)


def test_layouts_are_looked_up_where_something_changed_and_nowhere_else(
    layouts: list[NestedLinear],
) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model = nested_model()
    session, ids = StaticSession(model), some_ids(1, 9)
    session.reserve(1, 32)
    session.prefill(ids), session.step(ids[:, :1])
    for bits in (4, 2, 4):
        with at(model, bits):
            session.step(ids[:, :1])
            layouts.clear()
            for _ in range(3):
                session.step(ids[:, :1])
            assert layouts == []
        session.step(ids[:, :1])
        assert set(layouts) == (set() if bits == 4 else set(session.packed))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: lay_together([m for m in model.modules() if isinstance(m, NestedLinear)]),
        lambda model: setattr(model.lm_head, "planes", ~model.lm_head.planes),
        lambda model: model.load_state_dict(
            {n: t.flip(0) for n, t in model.state_dict().items()}, assign=True
        ),
        lambda model: model.lm_head.planes.bitwise_not_(),
        lambda model: model.lm_head._apply(lambda t: t if t.is_floating_point() else ~t),
        lambda model: model.lm_head._set([("planes", ~model.lm_head.planes)]),
    ],
    ids=["moved", "one buffer", "loaded", "in place", "applied", "set"],
)
def test_a_step_reads_weights_where_they_lie_by_now(change: Any) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model, ids = nested_model(), some_ids(1, 9)
    live, walk = StaticSession(model), StaticSession(model, use_native=False)
    for session in (live, walk):
        session.prefill(ids), session.step(ids[:, :1])
    change(model)
    found, expected = live.step(ids[:, 1:2]), walk.step(ids[:, 1:2])
    torch.testing.assert_close(found, expected, atol=NEAR, rtol=0)


def test_what_is_reserved_takes_dense_weights_as_they_are_by_then() -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model, ids = nested_model(), some_ids(1, 9)
    live = StaticSession(model)
    for weight in (model.model.embed_tokens.weight, model.model.norm.weight):
        weight.data = 0.5 - weight.data
    live.reserve(1, 16)
    walk = StaticSession(model, use_native=False)
    for session in (live, walk):
        session.prefill(ids)
    found, expected = live.step(ids[:, :1]), walk.step(ids[:, :1])
    torch.testing.assert_close(found, expected, atol=NEAR, rtol=0)


@pytest.mark.parametrize("policy", [SinkWindow(4, 60), EVERYTHING], ids=["window", "everything"])
def test_products_around_a_cache_of_any_kind_follow(policy: Any) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    model = nested_model()
    session = WholeSession(model, policy)
    assert session.staged.between is not None or session.staged.engine is not None
    assert_follows(session, model)


class Recorded(StepGraph):
    """A graph as it is on a CUDA device: what it does is what was true when it was captured."""

    made = 0

    def __init__(self, session: Any) -> None:
        super().__init__(session)
        Recorded.made += 1

    def capture(self, session: Any, runs: Any) -> None:
        self._captured.setdefault(runs, session.model.lm_head.bits)

    def run(self, session: Any, input_ids: torch.Tensor, runs: Any) -> torch.Tensor:
        self.capture(session, runs)
        self._step.token.copy_(input_ids)
        with at(session.model, self._captured[runs]):
            logits = self._step.logits(session, runs)
        self._step.advance(session, runs)
        return logits


class Graphed(StaticSession):
    """As on a CUDA device."""

    engine = property(lambda self: "graph")  # type: ignore[assignment]


def test_a_captured_step_is_captured_anew_at_another_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "StepGraph", Recorded)
    monkeypatch.setattr(Recorded, "made", 0)
    model = nested_model()
    session = Graphed(model, use_native=False)
    session.reserve(1, 32)
    assert_follows(session, model)
    assert Recorded.made == 5, "at 4, 2, 3, 4 and 2 bits"
