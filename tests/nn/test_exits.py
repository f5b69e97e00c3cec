"""Decoding that leaves a model early, and decoding that drafts with its first layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import SHAPE, generator, tiny_model

from effbench.nn.decode.early_exit import ExitSession, confident, exit_logits, stepwise_logits
from effbench.nn.decode.native import LARGEST_BATCH, kernels
from effbench.nn.decode.scratch import MOST_DRAFTS
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.speculative import SpeculativeSession
from effbench.nn.decode.staged import StagedDecoder
from effbench.nn.decode.static import StaticSession
from effbench.nn.depth.exit_heads import attach_heads
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=5)
EXITS = (2, 3, 5)
PROMPT = torch.randint(3, 128, (1, 6), generator=generator(1))
PADDED = torch.randint(3, 128, (2, 6), generator=generator(2))
LEFT = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


@pytest.fixture(params=["kernel", "modules"], autouse=True)
def way_of_stages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the C++ kernel and without it."""
    if request.param == "modules":
        monkeypatch.setenv("EFFBENCH_NATIVE", "0")
    elif kernels() is None:
        pytest.skip("there is no C++ compiler")
    return str(request.param)


def model_of(quiet: float = 0.3, kind: str = "sdpa") -> Any:
    """Return a model whose layers above the second change little, so that exits often agree."""
    model: Any = tiny_model(shape=DEEP).eval().requires_grad_(False)
    model.set_attn_implementation(kind)
    for layer in model.model.layers[2:]:
        layer.self_attn.o_proj.weight.mul_(quiet)
        layer.mlp.down_proj.weight.mul_(quiet)
    return model


def by_turns(number: int, logits: torch.Tensor) -> torch.Tensor:
    """A rule without reason: depends on the most likely token alone."""
    return (logits.argmax(-1) + number) % 3 == 0


def entries(session: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the keys and values of each layer that are in use."""
    cache = getattr(session, "staged", session).cache
    used = [slice(layer.get_seq_length()) for layer in cache.layers]
    layers = zip(cache.layers, used, strict=True)
    return [(layer.keys[:, :, s], layer.values[:, :, s]) for layer, s in layers]


def full_run(model: Any, ids: torch.Tensor, mask: Any = None, prompt: int = 6) -> CachedSession:
    session = CachedSession(model)
    session.prefill(ids[:, :prompt], mask)
    for t in range(prompt, ids.shape[1]):
        session.step(ids[:, t : t + 1])
    return session


# -- stages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
def test_late_stages_build_the_cache_of_full_decoding(kind: str, padded: bool) -> None:
    model = model_of(kind=kind)
    ids, mask = (PADDED, LEFT) if padded else (PROMPT, None)
    more = torch.randint(3, 128, (len(ids), 5), generator=generator(3))
    staged = StagedDecoder(model, EXITS)
    with torch.inference_mode():
        staged.read(ids, mask)
        staged.run(0)
        for t in range(5):
            staged.read(more[:, t : t + 1])
            staged.run(0)
            if t == 2:
                staged.run(1)
        assert staged.kv_lengths() == [11, 11, 9, 0, 0]
        staged.run(1)
        hidden = staged.run(2)
        logits = staged.logits(2, hidden)[:, -1]
    full = full_run(model, torch.cat([ids, more], 1), mask)
    seen = slice(None) if mask is None else torch.cat([mask, torch.ones(2, 5)], 1).bool()
    for ours, theirs in zip(entries(staged), entries(full), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if mask is None:
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
            else:
                a, b = (x.transpose(1, 2)[seen] for x in (a, b))
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    again = full_run(model, torch.cat([ids, more[:, :-1]], 1), mask)
    torch.testing.assert_close(logits, again.step(more[:, -1:]), atol=1e-5, rtol=1e-4)


def test_nothing_can_run_that_does_not_wait() -> None:
    staged = StagedDecoder(model_of(), EXITS)
    with pytest.raises(RuntimeError, match="nothing waits"):
        staged.run(0)


@torch.inference_mode()
def test_cropped_tokens_are_forgotten_in_every_stage() -> None:
    model = model_of()
    more = torch.randint(3, 128, (1, 4), generator=generator(3))
    staged, short = StagedDecoder(model, EXITS), StagedDecoder(model, EXITS)
    for decoder, width in ((staged, 4), (short, 2)):
        decoder.read(PROMPT)
        decoder.run(0)
        decoder.run(1)
        decoder.read(more[:, :width])
        decoder.run(0)
    staged.crop(8)
    assert staged.length == 8 and staged.kv_lengths() == [8, 8, 6, 0, 0]
    for decoder in (staged, short):
        decoder.read(more[:, 3:])
    both = [[d.run(stage) for stage in range(3)] for d in (staged, short)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


@torch.inference_mode()
def test_propagated_keys_are_exact_in_the_first_skipped_layer(way_of_stages: str) -> None:
    model = model_of()
    staged, exact = StagedDecoder(model, EXITS), StagedDecoder(model, EXITS)
    for decoder in (staged, exact):
        decoder.read(PROMPT)
        decoder.run(0)
    staged.propagate(1)
    staged.propagate(2)
    exact.run(1)
    exact.run(2)
    assert staged.kv_lengths() == exact.kv_lengths() == [6] * 5
    own, other = entries(staged), entries(exact)
    # The kernel, which reads short prompts, rounds in another order than modules do.
    within = 0.0 if way_of_stages == "modules" else 1e-6
    for a, b in zip(own[2], other[2], strict=True):
        torch.testing.assert_close(a, b, atol=within, rtol=within)
    assert not torch.allclose(own[4][1], other[4][1])
    assert staged.work.passes == 2


def test_an_attention_whose_mask_is_unknown_is_refused() -> None:
    model = model_of()
    staged = StagedDecoder(model, EXITS)
    staged.read(PADDED, LEFT)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(UserError, match="flash_attention_2"):
        staged.run(0)


def test_rows_that_the_kernel_has_no_room_for_go_through_the_modules() -> None:
    model = model_of()
    ids = torch.randint(3, 128, (1, 8 + LARGEST_BATCH + 1), generator=generator(5))
    staged = StagedDecoder(model, EXITS)
    with torch.inference_mode():
        staged.read(ids[:, :5])
        staged.run(0)
        for begin, end in ((5, 8), (8, ids.shape[1])):
            staged.read(ids[:, begin:end])
            hidden = staged.run(0)
        first = model.model(ids, output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(hidden, first[:, 8:], atol=1e-5, rtol=1e-4)
    whole = entries(full_run(model, ids))
    for ours, theirs in zip(entries(staged)[:2], whole[:2], strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_caches_grow_and_batches_change() -> None:
    model = model_of()
    ids = torch.randint(3, 128, (1, 400), generator=generator(5))
    staged, whole = StagedDecoder(model, EXITS), full_run(model, ids.repeat(3, 1))
    with torch.inference_mode():
        staged.read(ids[:, :4])
        for begin in range(4, 396, 4):  # beyond the room of the first buffers
            staged.run(0)
            staged.read(ids[:, begin : begin + 4])
        staged.run(0)
        staged.reorder(torch.tensor([0, 0, 0]))  # before anything has entered the later stages
        staged.run(1)
        staged.read(ids[:, 396:].repeat(3, 1))
        for stage in range(3):
            hidden = staged.run(stage)
    assert hidden.shape == (3, 400, SHAPE.hidden_size)
    for ours, theirs in zip(entries(staged), entries(whole), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_an_exit_with_a_head_of_its_own_reads_out_through_it() -> None:
    model = model_of()
    attach_heads(model, [2])
    own = model.exit_heads["2"]
    own.head.weight.data.mul_(-2)
    staged = StagedDecoder(model, EXITS)
    staged.read(PROMPT)
    hidden = staged.run(0)
    torch.testing.assert_close(staged.logits(0, hidden), own(hidden), atol=1e-5, rtol=1e-4)
    hidden = staged.run(1)
    shared = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(staged.logits(1, hidden), shared, atol=1e-5, rtol=1e-4)


# -- early exit --------------------------------------------------------------------------------


@pytest.mark.parametrize("propagate", [False, True])
def test_thresholds_above_one_are_the_full_model(propagate: bool) -> None:
    model = model_of()
    session = ExitSession(model, EXITS, confident((1.1, 1.1)), propagate)
    expected = greedy(CachedSession(model), PROMPT, 16)
    assert greedy(session, PROMPT, 16).equal(expected)
    assert session.counts()["exit_depth"] == 5
    assert session.counts()["layer_passes"] == session.counts()["layer_positions"] == 5


@pytest.mark.parametrize("propagate", [False, True])
def test_a_threshold_of_zero_is_the_shallowest_exit(propagate: bool) -> None:
    model = model_of()
    session = ExitSession(model, EXITS, confident((0.0, 0.0)), propagate)
    ours = greedy(session, PROMPT, 16)
    model.config.num_hidden_layers = 2
    assert ours.equal(greedy(CachedSession(model), PROMPT, 16))
    assert session.counts()["exit_depth"] == 2
    assert session.counts()["layer_passes"] == 2
    assert session.staged.kv_lengths()[2:] == ([21] * 3 if propagate else [0] * 3)


def test_confidence_is_the_probability_of_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    best = float(torch.e**2 / (torch.e**2 + 2))
    assert confident((best - 1e-4, 0.0))(0, logits).tolist() == [True, False]
    assert confident((best + 1e-4, 0.0))(0, logits).tolist() == [False, False]
    assert confident((2.0, 0.3))(1, logits).tolist() == [True, True]


def test_after_early_exits_the_cache_is_that_of_full_decoding() -> None:
    model = model_of()
    session = ExitSession(model, EXITS, by_turns)
    tokens = greedy(session, PROMPT, 24)
    assert 2 < session.counts()["exit_depth"] < 5
    with torch.inference_mode():
        for stage in (1, 2):  # what still waits
            if session.staged.waiting[stage] is not None:
                session.staged.run(stage)
    full = full_run(model, torch.cat([PROMPT, tokens[:, :-1]], 1))
    for (k, v), (key, value) in zip(entries(session), entries(full), strict=True):
        torch.testing.assert_close(k, key, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(v, value, atol=1e-5, rtol=1e-4)
    assert session.kv_bytes() == full.kv_bytes()


def test_a_session_that_leaves_early_gives_what_one_pass_gives() -> None:
    model = model_of()
    ids = torch.randint(3, 128, (2, 20), generator=generator(4))
    session = ExitSession(model, EXITS, by_turns)
    steps = [session.prefill(ids[:, :6])]
    steps += [session.step(ids[:, t : t + 1]) for t in range(6, 20)]
    logits, depths = exit_logits(model, EXITS, by_turns, ids, torch.ones_like(ids))
    torch.testing.assert_close(torch.stack(steps, 1), logits[:, 5:], atol=1e-5, rtol=1e-4)
    assert set(depths[:, 5:].flatten().tolist()) == set(EXITS)
    assert session.counts()["exit_depth"] == pytest.approx(float(depths[:, 6:].double().mean()))


def test_left_padding_changes_nothing() -> None:
    model = model_of()
    both = ExitSession(model, EXITS, by_turns)
    logits = [both.prefill(PADDED, LEFT)]
    alone = ExitSession(model, EXITS, by_turns)
    single = [alone.prefill(PADDED[1:, 2:])]
    for t in range(6):
        logits.append(both.step(torch.tensor([[t + 5], [t + 9]])))
        single.append(alone.step(torch.tensor([[t + 9]])))
    for a, b in zip(logits, single, strict=True):
        torch.testing.assert_close(a[1:], b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["exit", "speculative"])
def test_reordered_sequences_go_on_as_their_own(way: str) -> None:
    model = model_of()
    rows = torch.tensor([1, 1, 0])

    def start() -> Any:
        if way == "exit":
            return ExitSession(model, EXITS, by_turns)
        return SpeculativeSession(model, (2, 5))

    a, b = start(), start()
    a.prefill(PADDED)
    b.prefill(PADDED[rows])
    follow = torch.tensor([[9], [17]])
    a.step(follow), b.step(follow[rows])
    a.reorder(rows)
    for token in ([[4], [5], [6]], [[8], [3], [7]]):
        torch.testing.assert_close(
            a.step(torch.tensor(token)), b.step(torch.tensor(token)), atol=1e-5, rtol=1e-4
        )


def test_stepwise_logits_stand_where_one_pass_has_them() -> None:
    model = model_of()
    ids, mask = PADDED, torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    prompts = torch.tensor([2, 3])
    found = stepwise_logits(lambda: CachedSession(model), ids, mask, prompts)
    whole = model(input_ids=ids, attention_mask=mask).logits
    assert found.shape == whole.shape
    for row, (first, end) in enumerate(((1, 6), (2, 4))):
        torch.testing.assert_close(
            found[row, first:end], whole[row, first:end], atol=1e-5, rtol=1e-4
        )
        assert not found[row, :first].any() and not found[row, end:].any()


# -- self-speculation --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quiet", "adaptive", "ids"),
    [(0.3, True, PROMPT), (0.3, False, PADDED), (1.0, True, PADDED), (1.0, False, PROMPT)],
)
def test_speculation_gives_the_full_models_tokens(
    quiet: float, adaptive: bool, ids: torch.Tensor
) -> None:
    model = model_of(quiet)
    session = SpeculativeSession(model, (2, 5), 4, adaptive)
    assert greedy(session, ids, 24).equal(greedy(CachedSession(model), ids, 24))
    assert 0 < session.kept < session.drafted or quiet == 1
    assert session.counts()["acceptance_length"] == 1 + session.kept / session.rounds
    assert session.steps == session.rounds + session.kept - len(session.ahead)


def test_layers_that_change_nothing_agree_with_every_draft() -> None:
    model = model_of(0.0)
    session = SpeculativeSession(model, (2, 5), 14)
    assert greedy(session, PROMPT, 34).equal(greedy(CachedSession(model), PROMPT, 34))
    assert session.counts()["acceptance_rate"] == 1
    assert session.window == MOST_DRAFTS


def test_transformers_speculates_to_the_same_tokens() -> None:
    model = model_of()
    model.generation_config.eos_token_id = None
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    theirs = model.generate(PROMPT, assistant_early_exit=2, **settings)
    ours = greedy(SpeculativeSession(model, (2, 5)), PROMPT, 24)
    assert theirs[:, 6:].equal(ours)
    assert model.config.num_hidden_layers == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_our_engine_speculation_has_the_bits_of_single_steps(
    dtype: torch.dtype, way_of_stages: str
) -> None:
    if way_of_stages == "modules":
        pytest.skip("products of several rows round otherwise there")
    model = model_of().to(dtype)
    ours, steps = SpeculativeSession(model, (2, 5), 4), StaticSession(model)
    ours.prefill(PROMPT)
    token = steps.prefill(PROMPT).argmax(-1, keepdim=True)
    for _ in range(40):
        logits = steps.step(token)
        assert ours.step(token).equal(logits)
        token = logits.argmax(-1, keepdim=True)
    assert 0 < ours.kept < ours.drafted


def test_any_token_can_follow() -> None:
    # Sampled tokens differ from the drafts: what was computed ahead of them must not count.
    model = model_of(0.0)
    ids = torch.randint(3, 128, (1, 30), generator=generator(6))
    session = SpeculativeSession(model, (2, 5), 3)
    steps = [session.prefill(PROMPT)]
    token = steps[-1].argmax(-1, keepdim=True)
    fed = []
    for t in range(30):
        fed.append(ids[:, t : t + 1] if t % 4 == 2 else token)
        steps.append(session.step(fed[-1]))
        token = steps[-1].argmax(-1, keepdim=True)
        assert session.kv_bytes() == 2 * 5 * SHAPE.num_kv_heads * SHAPE.head_dim * 4 * (7 + t)
    whole = model(torch.cat([PROMPT, *fed], 1)).logits[:, 5:]
    torch.testing.assert_close(torch.stack(steps, 1), whole, atol=1e-5, rtol=1e-4)


def test_the_window_follows_what_was_kept() -> None:
    session = SpeculativeSession(model_of(), (2, 5), 4)
    for kept, window in ((4, 6), (6, 8), (3, 7), (0, 6)):
        session._adapt(kept)
        assert session.window == window
    for _ in range(9):
        session._adapt(0)
    assert session.window == 1


def test_draft_and_verification_share_the_first_layers() -> None:
    # A round of K drafts reads the first layers K + 1 times and the others once.
    session = SpeculativeSession(model_of(), (2, 5), 4, adaptive=False)
    session.prefill(PROMPT)
    assert session.prompt.passes == 5
    session.step(torch.tensor([[7]]))
    assert session.staged.work.passes - 5 == 2 * 5 + 3
    assert session.staged.work.positions - 5 * 6 == 5 * 5


def test_the_cache_after_speculation_is_that_of_full_decoding() -> None:
    model = model_of()
    session = SpeculativeSession(model, (2, 5))
    tokens = greedy(session, PROMPT, 20)
    session.staged.crop(session.length)
    full = full_run(model, torch.cat([PROMPT, tokens[:, :-1]], 1))
    for (k, v), (key, value) in zip(entries(session), entries(full), strict=True):
        torch.testing.assert_close(k, key, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(v, value, atol=1e-5, rtol=1e-4)
