"""What every cache that evicts promises: bits, true positions, bytes, rows, what goes with it."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from evictions import BUDGET, FirstLayer, evicting, exact_model, held_columns, small
from helpers import SHAPE, decoded, some_ids

from effbench.api.batch import make_batch
from effbench.api.cost import cost_of
from effbench.api.footprint import Pass
from effbench.api.points import UNNAMED
from effbench.api.shape import ModelShape
from effbench.api.sharing import listed_map, shared_shape
from effbench.evaluators.serving import Serving
from effbench.evaluators.simulator import Scene
from effbench.methods.cache.snapkv import SnapKV
from effbench.methods.cache.streaming import SinkWindow
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.evicts import Evicts, EvictsPrompt, EvictsSteadily
from effbench.nn.decode.decoder import Decoder, Drafts, Exits
from effbench.nn.decode.selection import best
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.staged import StagedDecoder, WholeSession
from effbench.resources.peaks import Caching
from effbench.resources.roofline import decode_bytes
from effbench.util.errors import UserError

METHODS = list(evicting())
EXACT = {"atol": 1e-9, "rtol": 1e-9}
every = pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)


def policy_of(method: Evicts) -> Any:
    [point] = method.points()
    return method.decoder(point).cache


def even(number: int, logits: torch.Tensor) -> torch.Tensor:
    """Let a token leave whose most likely successor has an even number."""
    return logits.argmax(-1) % 2 == 0


def held_bytes(session: WholeSession) -> int:
    """Return the bytes of all storages that the cache holds."""
    layers: Any = session.staged.cache.layers
    inner = [getattr(layer, "inner", layer) for layer in layers]
    tensors = [t for layer in inner for t in (layer.keys, layer.values)]
    tensors += [t for layer in inner for p in getattr(layer, "packed", None) or () for t in p]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.usefixtures("without_kernels")
@every
def test_within_its_budget_no_bit_changes(cls: type[Evicts]) -> None:
    model, ids = exact_model(torch.float32), some_ids(2, 16)
    method = small(cls, budget=14)
    ours, theirs = WholeSession(model, policy_of(method)), CachedSession(model)
    assert decoded(ours, ids[:, :14], 9).equal(decoded(theirs, ids[:, :14], 9))
    assert ours.kv_bytes() == theirs.kv_bytes()
    batch = make_batch([(row[:14].tolist(), row[:14].tolist()) for row in ids], 0)
    [point] = method.points()
    for here in (point, UNNAMED):
        assert method.logits(model, batch, here).equal(model(ids[:, :14]).logits)


@every
def test_entries_stay_as_they_were_stored_and_never_come_back(cls: type[Evicts]) -> None:
    """The keys that are held are those of their tokens at true positions, in the order of time."""
    model, ids, prompt = exact_model(), some_ids(1, 24), 15
    first, session = FirstLayer.of(model, ids[0]), WholeSession(model, policy_of(small(cls)))
    session.prefill(ids[:, :prompt])
    before = held_columns(session, first)
    assert all(len(held) == BUDGET and held == sorted(held) for held in before)
    for t in range(prompt, 24):
        session.step(ids[:, t : t + 1])
        now = held_columns(session, first)
        for old, new in zip(before, now, strict=True):
            assert set(new) <= {*old, t} and new == sorted(new)
            expected = BUDGET if issubclass(cls, EvictsSteadily) else BUDGET + t + 1 - prompt
            assert len(new) == expected
        before = now


@every
def test_decoding_is_what_a_text_is_scored_by_and_prompts_see_all_of_themselves(
    cls: type[Evicts],
) -> None:
    model, ids, method = exact_model(), some_ids(2, 26), small(cls)
    [point] = method.points()
    rows = [(ids[0].tolist(), [-100] * 13 + ids[0, 13:].tolist())]
    rows += [(ids[1, :23].tolist(), [-100] * 5 + ids[1, 5:23].tolist())]
    found = method.logits(model, make_batch(rows, 0), point)
    for row, (prompt, end) in enumerate([(13, 26), (5, 23)]):
        steps = decoded(WholeSession(model, policy_of(method)), ids[row : row + 1, :end], prompt)
        torch.testing.assert_close(found[row, prompt - 1 : end], steps[0], **EXACT)
    dense = model(ids[:1]).logits
    torch.testing.assert_close(found[:1, :13], dense[:, :13], **EXACT)
    assert (found[0, 13:] - dense[0, 13:]).abs().max() > 0.01


@every
def test_padded_rows_decode_as_alone_and_are_reordered(cls: type[Evicts]) -> None:
    model, ids, prompt = exact_model(), some_ids(4, 30), 15
    pads, policy = [3, 0, 14, 9], policy_of(small(cls))
    mask = torch.tensor([[0] * p + [1] * (prompt - p) for p in pads])
    session = WholeSession(model, policy)
    found = decoded(session, ids[:, :22], prompt, mask)
    alone = [WholeSession(model, policy) for _ in pads]
    for row, start in enumerate(pads):
        expected = decoded(alone[row], ids[row : row + 1, start:22], prompt - start)
        torch.testing.assert_close(found[row], expected[0], **EXACT)
    rows = torch.tensor([2, 0, 2])
    session.reorder(rows)
    for t in range(22, 30):
        expected = torch.cat([s.step(ids[r : r + 1, t : t + 1]) for r, s in enumerate(alone)])
        torch.testing.assert_close(session.step(ids[rows, t : t + 1]), expected[rows], **EXACT)


@every
def test_its_bytes_are_those_of_its_tensors_and_as_counted(cls: type[Evicts]) -> None:
    model, ids, method = exact_model(torch.float32), some_ids(2, 40), small(cls)
    [point] = method.points()
    shape = method.shape(ModelShape.of(SHAPE), point, "use", None)
    session, per_token = WholeSession(model, policy_of(method)), 2 * 2 * 2 * 16 * 4
    cost, caching, read = cost_of(shape, "float32"), Caching(shape, policy_of(method)), 0
    session.prefill(ids[:, :20])
    assert session.kv_bytes() == caching.held(Pass("prefill", 2, 20, 2), 4)
    for t in range(20, 40):
        session.step(ids[:, t : t + 1])
        later = 0 if issubclass(cls, EvictsSteadily) else t - 19
        assert session.kv_bytes() == held_bytes(session) == 2 * (BUDGET + later) * per_token
        assert session.kv_bytes() == cost.cached(t + 1, 2, prompt=20)
        assert session.kv_bytes() == caching.held(Pass("decode", 2, t + 1, 2, 20), 4)
        read += session.kv_bytes()
    assert decode_bytes(cost, 2, 20, 20) == 20 * cost.bytes_per_token + read
    room = cost.cached(40, 3, prompt=20) + cost.resident_bytes
    serving = Serving(memory_gib=room / 2**30, prompt_tokens=20, new_tokens=20)
    assert serving.slots(Scene(SHAPE, cost, cost)) == 3
    assert cost.kv_bytes_per_token == per_token
    assert all(layer.view is None for layer in session.staged.cache.layers)  # type: ignore[union-attr]


@every
def test_a_layer_is_freed_before_the_next_one_reads_the_prompt(cls: type[Evicts]) -> None:
    session, found = WholeSession(exact_model(), policy_of(small(cls))), list[int]()

    def look(*_: Any) -> None:
        layer: Any = session.staged.cache.layers[0]
        found.append(layer.get_seq_length() if layer.view is None else -1)

    hook = session.staged.decoder.layers[1].register_forward_pre_hook(look)
    session.prefill(some_ids(1, 20))
    hook.remove()
    assert found == [BUDGET]


@every
def test_exits_see_in_one_pass_what_decoding_sees(cls: type[Evicts]) -> None:
    """Tokens that left early are read later, behind the prompt or together with it."""
    model, ids, policy = exact_model(), some_ids(1, 24), policy_of(small(cls))
    decoder = Decoder(Exits((1,), lambda exits: even), cache=policy)
    session: Any = decoder.session(model)
    steps = decoded(session, ids, 11)[0]
    batch = make_batch([(ids[0].tolist(), [-100] * 11 + ids[0, 11:].tolist())], 0)
    assert decoder.logits is not None
    found = decoder.logits(model, batch)[0, 10:]
    torch.testing.assert_close(found, steps, **EXACT)
    assert 1 < session.counts()["exit_depth"] < 2


@every
def test_drafts_are_taken_back_or_refused(cls: type[Evicts]) -> None:
    policy = policy_of(small(cls))
    if issubclass(cls, EvictsSteadily):
        with pytest.raises(UserError, match="cannot be taken back"):
            Decoder(driver=Drafts(1), cache=policy)
        return
    model, ids = exact_model(), some_ids(2, 12)
    full = greedy(WholeSession(model, policy), ids, 20)
    assert greedy(Decoder(driver=Drafts(1), cache=policy).session(model), ids, 20).equal(full)
    assert not greedy(CachedSession(model), ids, 20).equal(full)


@every
def test_what_is_gone_cannot_be_taken_back(cls: type[Evicts]) -> None:
    model, ids, policy = exact_model(), some_ids(1, 20), policy_of(small(cls))
    staged = StagedDecoder(model, [2], policy, undo=4)
    staged.read(ids[:, :15])
    staged.run(0)
    staged.read(ids[:, 15:])
    staged.run(0)
    if issubclass(cls, EvictsPrompt):
        staged.crop(15)  # all that came after the prompt
    with pytest.raises(ValueError, match=r"come back|taken back"):
        staged.crop(14)


@pytest.mark.parametrize("cls", [c for c in METHODS if issubclass(c, EvictsPrompt)])
def test_what_stays_may_be_held_in_codes(cls: type[Evicts]) -> None:
    """As another cache holds it; its rows decode as alone, and its bytes are counted."""
    model, ids = exact_model(), some_ids(2, 40)
    method = small(cls, budget=12, bits=4, group_size=4, recent=4)
    policy, pads = policy_of(method), [9, 0]
    mask = torch.tensor([[0] * p + [1] * (20 - p) for p in pads])
    session = WholeSession(model, policy)
    found = decoded(session, ids, 20, mask)
    for row, start in enumerate(pads):
        alone = WholeSession(model, policy)
        expected = decoded(alone, ids[row : row + 1, start:], 20 - start)
        torch.testing.assert_close(found[row], expected[0], **EXACT)
    plain = decoded(WholeSession(model, replace(policy, then=Decoder().cache)), ids, 20, mask)
    assert 0 < (found - plain)[:, 1:].abs().max() < 1
    assert session.kv_bytes() == held_bytes(session)
    shape = method.shape(ModelShape.of(SHAPE), method.points()[0], "use", None)
    lone = WholeSession(model.float(), policy)
    decoded(lone, ids[:1], 20)
    assert lone.kv_bytes() == cost_of(shape, "float32").cached(40, prompt=20)
    full = greedy(WholeSession(model, policy), ids[:, :20], 12)
    drafts = Decoder(driver=Drafts(1), cache=policy).session(model)
    assert greedy(drafts, ids[:, :20], 12).equal(full)
    with pytest.raises(UserError, match="fills no whole bytes"):
        small(cls, bits=2, group_size=1).resolve(replace(SHAPE, head_dim=2))


def test_equal_scores_keep_the_earlier_entry_and_empty_columns_come_last() -> None:
    scores = torch.tensor([[[1.0, 0.0, 0.0, 0.0]], [[9.0, 9.0, -5.0, 0.0]]])
    assert best(scores, 2, None)[0].tolist() == [[0, 1]]
    assert best(scores, 3, torch.tensor([0, 2]))[1].tolist() == [[0, 2, 3]]


@every
def test_budgets_and_models_that_cannot_be_are_refused_before_loading(cls: type[Evicts]) -> None:
    deep = replace(SHAPE, num_layers=4)
    with pytest.raises(UserError, match="names no budget"):
        replace(small(cls), budget=()).resolve(deep)
    method = small(cls)
    assert method.resolve(deep) == method
    if method.pinned:
        fits = replace(method, budget=(method.pinned, 9))
        assert fits.resolve(deep) == fits
        with pytest.raises(UserError, match=f"less than the {method.pinned} tokens") as error:
            replace(method, budget=(9, method.pinned - 1)).resolve(deep)
        assert f"method.budget=[{method.pinned}]" in error.value.hint
    with pytest.raises(UserError, match="take states from others"):
        method.resolve(shared_shape(deep, listed_map(4, [2], "kv")))
    with pytest.raises(UserError, match="decodes in a way of its own at k0"):
        method.check_start([LoRADrop()])
    assert all(f.name != "bits" for f in fields(cls)) or issubclass(cls, EvictsPrompt)


def test_a_method_that_follows_an_evicting_one_is_refused() -> None:
    with pytest.raises(UserError, match="way of its own at b1024"):
        SnapKV().check_start([SnapKV()])
    assert SinkWindow(1, 1) != policy_of(SnapKV())


def test_one_entry_leaves_as_it_would_with_others() -> None:
    """The worst is found without sorting: of equal ones the last, and an empty one before any."""
    draws = torch.Generator().manual_seed(3)
    for _ in range(20):
        scores = torch.randint(3, (2, 2, 7), generator=draws).double()
        for empty in (None, torch.tensor([0, 3])):
            own = scores.clone()
            if empty is not None:
                own[1, :, :3] = -torch.inf
            order = own.sort(dim=2, descending=True, stable=True).indices[..., :6]
            assert best(scores, 6, empty).equal(order.sort(dim=2).values)
