"""Scores of requests that share tokens are those of each request on its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import SHAPE, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from effbench.api.batch import make_batch
from effbench.api.points import UNNAMED, Point
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.methods.decodes import Forward
from effbench.nn.decode.decoder import forward_logits
from effbench.nn.scoring import prefix_tree
from effbench.nn.scoring.prefix_tree import (
    Plan,
    Request,
    Score,
    has_trees,
    padded_scores,
    tree_scores,
)
from effbench.results.journal import Journal
from effbench.util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model(dtype=torch.float64).eval().requires_grad_(False)


def alone(model: Any, request: Request) -> Score:
    """Score one request by the definition."""
    ids = torch.tensor([request.context + request.continuation])
    with torch.no_grad():
        logs = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
    start = len(request.context) - 1
    places = range(start, start + len(request.continuation))
    picked = [logs[p, t].item() for p, t in zip(places, request.continuation, strict=True)]
    greedy = all(
        int(logs[p].argmax()) == t for p, t in zip(places, request.continuation, strict=True)
    )
    return Score(sum(picked), greedy)


def close(found: Sequence[Score], expected: Sequence[Score], tolerance: float = 1e-9) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.loglikelihood == pytest.approx(theirs.loglikelihood, rel=0, abs=tolerance)
        assert ours.greedy == theirs.greedy


def by_tree(model: Any, requests: list[Request], **sizes: int) -> list[Score]:
    plan = Plan(requests, **{"batch_tokens": 128, **sizes})
    found: dict[int, Score] = {}
    for scores in tree_scores(model, plan, iter(plan.groups), CPU):
        assert not found.keys() & scores.keys()
        found |= scores
    return [found[i] for i in range(len(requests))]


def benchmark(
    draw: random.Random, items: int, prefix: int, question: int, answer: int
) -> list[Request]:
    """Questions behind one prefix, with four answers of up to `answer` tokens each."""
    start = tokens(draw, prefix)
    requests = []
    for _ in range(items):
        context = start + tokens(draw, draw.randint(1, question))
        requests += [Request(context, tokens(draw, draw.randint(1, answer))) for _ in range(4)]
    return requests


def tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(3, SHAPE.vocab_size) for _ in range(count)]


few = st.lists(st.integers(3, 6), min_size=1, max_size=7)
"""Few different tokens, so that sequences share their starts, and are starts of each other."""


@settings(max_examples=30, deadline=None)
@given(
    requests=st.lists(st.builds(Request, few, few), min_size=1, max_size=14),
    row=st.sampled_from([3, 8, 24]),
    batch=st.sampled_from([4, 40]),
    smallest=st.sampled_from([(1, 1), (8, 64), (2, 4)]),
)
def test_any_tree_gives_the_scores_of_its_requests(
    model: Any, requests: list[Request], row: int, batch: int, smallest: tuple[int, int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_tree, "LEAST_SHARED", smallest[0])
        patch.setattr(prefix_tree, "LEAST_SAVING", smallest[1])
        found = by_tree(model, requests, row_tokens=row, batch_tokens=batch)
    close(found, [alone(model, r) for r in requests])


@pytest.mark.parametrize("attention", ["pieces", "sdpa", "eager"])
@pytest.mark.parametrize(
    ("prefix", "question", "answer"), [(0, 20, 9), (90, 12, 1), (40, 30, 5), (200, 4, 1)]
)
def test_benchmarks_give_the_scores_of_their_requests(
    model: Any,
    attention: str,
    prefix: int,
    question: int,
    answer: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = benchmark(random.Random(prefix), 12, prefix, question, answer)
    random.Random(1).shuffle(requests)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager" if attention == "eager" else "sdpa")
    if attention == "pieces":
        monkeypatch.setattr("effbench.nn.scoring.attention.PIECE", 500)  # several in every row
    else:
        monkeypatch.setattr(prefix_tree, "in_pieces", lambda model, device: nullcontext())
    try:
        expected = [alone(model, r) for r in requests]
        # Eager attention takes its softmax in float32, whatever the model's dtype.
        close(
            by_tree(model, requests, row_tokens=48), expected, 1e-9 if attention == "sdpa" else 1e-5
        )
    finally:
        model.set_attn_implementation(before)


def test_what_is_shared_is_computed_once(model: Any) -> None:
    draw = random.Random(3)
    start = tokens(draw, 100)
    requests = [
        Request(start + question, [answer])
        for question in (tokens(draw, 20) for _ in range(30))
        for answer in (3, 4, 5, 6)
    ]
    plan = Plan(requests, batch_tokens=256, row_tokens=64)
    read = sum(b.size for g in plan.groups for row in g.rows for b in row)
    assert {g.stem for g in plan.groups} == {tuple(start)}
    assert read == 30 * 20  # one-token answers to a question are all predicted at one place
    assert sum(len(g.rows) * g.width for g in plan.groups) <= 1.1 * read
    assert all(len(g.rows) * g.width <= 256 for g in plan.groups)
    calls: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    by_tree(model, requests, batch_tokens=256, row_tokens=64)
    hook.remove()
    assert sum(calls) == 100 + sum(len(g.rows) * g.width for g in plan.groups)


def test_answers_share_their_question() -> None:
    draw = random.Random(4)
    requests = benchmark(draw, 10, 0, 1, 6)
    question = tokens(draw, 40)
    requests += [Request(question, tokens(draw, 10)) for _ in range(4)]
    plan = Plan(requests, batch_tokens=4096)
    sizes = [b.size for g in plan.groups for row in g.rows for b in row]
    assert max(sizes) == 40 + 4 * 9
    assert sorted(i for g in plan.groups for i in g.requests) == list(range(len(requests)))


def test_a_token_sees_its_own_past_alone() -> None:
    plan = Plan([Request([7, 8], [9, 3]), Request([7, 8], [5, 3]), Request([4], [6, 3])], 100)
    (group,) = plan.groups
    (branches,) = group.rows
    row = plan.row(branches, 0)
    seen = prefix_tree.visible(row, group.width + 1)
    for at, token in enumerate(row.tokens):
        past = [row.tokens[other] for other in np.flatnonzero(seen[at])]
        assert past in ([7], [7, 8], [7, 8, 9], [7, 8, 5], [4], [4, 6])
        assert past[-1] == token
        assert row.positions[at] == len(past) - 1
    assert seen[-1].sum() == 1  # padding


# -- as an evaluator sees it -----------------------------------------------------------------------


def subject(model: Any, method: Method | None = None, journal: Any = None) -> Subject:
    made = Subject(model, method or Method(), UNNAMED, None, CPU, 0, 0)  # type: ignore[arg-type]
    if journal:
        made.journal = journal
    return made


class OwnLogits(Method):
    """A method with logits of its own."""

    def forward(self, point: Point = UNNAMED) -> Forward:
        return Forward(lambda model, batch: 2 * forward_logits(model, batch))


def test_a_method_with_logits_of_its_own_is_scored_by_them(model: Any) -> None:
    requests = benchmark(random.Random(5), 4, 10, 5, 4)
    plain, own = (
        subject(model).score(requests, "a"),
        subject(model, OwnLogits()).score(requests, "a"),
    )
    doubled = list(
        padded_scores(
            lambda batch: 2 * Method().logits(model, batch),
            lambda rows: make_batch(rows, 0),
            requests,
            iter([range(len(requests))]),
        )
    )
    close(own, [doubled[0][i] for i in range(len(requests))])
    assert abs(own[0].loglikelihood - plain[0].loglikelihood) > 0.1


@pytest.mark.parametrize(("method", "items"), [(Method(), 30), (OwnLogits(), 4)])
def test_interrupted_scoring_goes_on_bit_for_bit(
    model: Any, tmp_path: Path, method: Method, items: int
) -> None:
    requests = benchmark(random.Random(6), items, 60, 9, 4)

    def journal(name: str) -> Callable[..., Journal]:
        return lambda _, items: Journal(place(name), items)

    def place(name: str) -> Path:
        folder = tmp_path / name / "run" / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / "a.items"

    whole = subject(model, method, journal("whole")).score(requests, "a", 64)
    lines = place("whole").read_bytes().split(b"\n")
    assert len(lines) > 6
    for kept in range(1, len(lines)):
        place("part").write_bytes(b"\n".join(lines[:kept]) + b"\n")
        computed: list[int] = []
        again = subject(model, method, journal("part"))
        again.progress = lambda what, done, total, computed=computed: computed.append(done)
        assert again.score(requests, "a", 64) == whole
        assert len(computed) == len(lines) - 1 - kept  # one line per group, none computed twice
        place("part").unlink()


def test_numbers_that_are_not_finite_name_their_layer(model: Any) -> None:
    requests = benchmark(random.Random(7), 6, 100, 5, 2)
    weight = model.model.layers[1].mlp.down_proj.weight
    kept = weight.clone()
    try:
        weight[3, 3] = float("nan")
        with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.down_proj"):
            subject(model).score(requests, "a", 128)
    finally:
        weight.copy_(kept)


def test_models_that_trees_do_not_fit() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MistralConfig, MistralForCausalLM

    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "vocab_size": SHAPE.vocab_size,
    }
    window = MistralForCausalLM(MistralConfig(**sizes, sliding_window=4)).double().eval()
    mixed = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=4)).double().eval()
    requests = benchmark(random.Random(8), 4, 12, 4, 3)
    for other in (window, mixed):
        assert not has_trees(other)
        close(subject(other).score(requests, "a"), [alone(other, r) for r in requests])
    assert has_trees(MistralForCausalLM(MistralConfig(**sizes, sliding_window=None)))
