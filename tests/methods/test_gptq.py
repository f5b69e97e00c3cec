"""GPTQ: the paper's equations, the blocks' inputs, resume and memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import HeldBytes, batch_of, context, logits, tiny_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from effbench.api.batch import Batch
from effbench.methods.compresses import compress_whole
from effbench.methods.quant.gptq import GPTQ
from effbench.nn.llama.stack import as_linears, decoder_layers
from effbench.nn.quant import gptq, groupwise
from effbench.nn.quant.calibration import Walk
from effbench.nn.quant.linears import PackedLinear, dense_linears, storage_bytes
from effbench.nn.quant.packing import unpack
from effbench.util.errors import UserError

ROWS = [batch_of(seed) for seed in range(3)]
OTHERS = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "gpt_neox": {"intermediate_size": 48},
    "gemma3_text": {"intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 2},
    "phi3": {"intermediate_size": 48, "num_key_value_heads": 2},
}
SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def frozen(model: Any = None) -> Any:
    return (model or tiny_model()).eval().requires_grad_(False)


def compressed(method: GPTQ, rows: list[Batch] = ROWS) -> Any:
    model = frozen()
    compress_whole(method, model, rows, context())
    return model


def problem(d_out: int, d_in: int, rank: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and the Gram matrix of correlated inputs, float64."""
    draws = torch.Generator().manual_seed(d_in + rank)
    mixing = torch.randn(d_in, rank or d_in, generator=draws, dtype=torch.float64)
    x = mixing @ torch.randn(rank or d_in, 200, generator=draws, dtype=torch.float64)
    return torch.randn(d_out, d_in, generator=draws, dtype=torch.float64), x @ x.T


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    return 2 * gram + damping * (2 * gram).diagonal().mean() * torch.eye(len(gram))


def surgeon(
    weight: torch.Tensor, gram: torch.Tensor, bits: int, group: int, symmetric: bool, damping: float
) -> torch.Tensor:
    """Optimal brain quantisation in a fixed order: the inverse is there and loses a row a step."""
    w, inverse = weight.clone(), torch.linalg.inv(damped(gram, damping))
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    for i in range(w.shape[1]):
        if i % group == 0:
            now = w[:, i : i + group]
            if symmetric:
                zero = torch.full((len(w),), 2.0 ** (bits - 1) - 1, dtype=w.dtype)
                scale = (now.abs().amax(1) / zero).half().double()
                top = 2 * zero[0]
            else:
                top = torch.tensor(2.0**bits - 1)
                low, high = now.amin(1).clamp(max=0), now.amax(1).clamp(min=0)
                scale = ((high - low) / top).half().double()
                zero = (-low / scale).round()
        code = torch.minimum((w[:, i] / scale).round() + zero, top).clamp(min=0)
        codes[:, i] = code.to(torch.uint8)
        error = (w[:, i] - scale * (code - zero)) / inverse[i, i]
        w[:, i:] -= error[:, None] * inverse[i, i:]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    return codes


@pytest.mark.parametrize("group", [16, 13, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("lazy", [128, 5])
def test_it_is_the_paper_in_float64(
    group: int, symmetric: bool, lazy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "LAZY", lazy)
    weight, gram = problem(6, 48)
    found = gptq.solve(weight, gram, 3, group, symmetric, 0.01)
    assert torch.equal(found.codes, surgeon(weight, gram, 3, group, symmetric, 0.01))
    assert not torch.equal(found.codes, groupwise.rounded(weight, 3, group, symmetric).codes)


@pytest.mark.parametrize("by_activity", [False, True])
def test_the_identity_gives_plain_rounding(by_activity: bool) -> None:
    weight = problem(6, 48)[0].float()
    found = gptq.solve(weight, torch.eye(48), 4, 16, by_activity=by_activity)
    plain = groupwise.rounded(weight, 4, 16, False)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_columns_by_activity_are_the_paper_on_turned_columns() -> None:
    weight, gram = problem(6, 24)
    order = gram.diagonal().argsort(descending=True)
    found = gptq.solve(weight, gram, 3, 24, by_activity=True)
    turned = surgeon(weight[:, order], gram[order][:, order], 3, 24, False, 0.01)
    assert torch.equal(found.codes[:, order], turned)


def test_columns_by_activity_have_the_scales_of_their_neighbours() -> None:
    """Of the weights as they came, however the columns are taken."""
    weight, gram = problem(6, 24)
    order = gram.diagonal().argsort(descending=True)
    low = weight.unflatten(1, (-1, 8)).amin(2).clamp(max=0)
    high = weight.unflatten(1, (-1, 8)).amax(2).clamp(min=0)
    scales = ((high - low) / 7).half().double()
    zeros = (-low / scales).round()
    left, inverse = weight.clone(), torch.linalg.inv(damped(gram, 0.05))
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    for i in order.tolist():
        scale, zero = scales[:, i // 8], zeros[:, i // 8]
        code = ((left[:, i] / scale).round() + zero).clamp(0, 7)
        codes[:, i] = code.to(torch.uint8)
        error = (left[:, i] - scale * (code - zero)) / inverse[i, i]
        left -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    found = gptq.solve(weight, gram, 3, 8, damping=0.05, by_activity=True)
    assert torch.equal(found.codes, codes)


@pytest.mark.parametrize("settings", [{"percdamp": 0.4}, {"act_order": True}])
def test_settings_reach_the_solver_and_no_row_is_left_worse_than_rounded(settings: Any) -> None:
    draws = torch.Generator().manual_seed(1)
    x, weight = (torch.randn(n, 40, generator=draws) for n in (200, 32))
    gram = x.T @ x  # columns have so little to do with each other that rounding is often as good
    found = GPTQ(bits=2, group_size=8, **settings)._rounded([weight[:12], weight[12:]], gram)
    damping, order = settings.get("percdamp", 0.01), settings.get("act_order", False)
    solved = gptq.solve(weight, gram, 2, 8, False, damping, order)
    plain = groupwise.rounded(weight, 2, 8, False)
    kept = (gptq.errors(weight, solved, 8, gram) <= gptq.errors(weight, plain, 8, gram))[:, None]
    assert 0 < kept.sum() < 32
    codes = torch.where(kept, solved.codes, plain.codes)
    for own, expected in zip(found, codes.split([12, 20]), strict=True):
        assert torch.equal(unpack(own["codes"], 2, expected.numel()).view_as(expected), expected)
    assert not torch.equal(solved.codes, gptq.solve(weight, gram, 2, 8).codes)


def test_a_matrix_without_an_inverse_has_the_least_damping_that_gives_one() -> None:
    gram = torch.ones(4, 4, dtype=torch.float64)
    factor = gptq.inverse_factor(gram, torch.arange(4), 0.0)
    expected = torch.linalg.inv(2 * gram + 1e-6 * 2 * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(factor.T @ factor, expected, rtol=1e-6, atol=0)
    assert torch.equal(factor, factor.triu())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("rank", [0, 4])
def test_no_row_is_worse_than_rounded(bits: int, rank: int) -> None:
    weight, gram = problem(32, 40, rank)
    plain = groupwise.rounded(weight, bits, 8, False)
    solved = gptq.solve(weight, gram, bits, 8)
    best = gptq.better(solved, plain, weight, 8, gram)
    least = gptq.errors(weight, plain, 8, gram)
    assert (gptq.errors(weight, best, 8, gram) <= least).all()
    assert gptq.errors(weight, best, 8, gram).sum() < 0.8 * least.sum()
    worse = gptq.better(plain, solved, weight, 8, gram)
    assert torch.equal(worse.codes, best.codes)


def test_columns_that_nothing_reaches_are_rounded_and_leave_the_others_alone() -> None:
    weight, gram = problem(6, 32)
    gram[5], gram[:, 5] = 0, 0
    for damping in (0.01, 0.0):
        found = gptq.solve(weight, gram, 4, 32, damping=damping)
        plain = groupwise.nearest(weight[:, 5], found.scales[:, 0], found.zeros[:, 0], 15)
        assert torch.equal(found.codes[:, 5], plain.to(torch.uint8))
    assert torch.equal(
        gptq.solve(weight, torch.zeros_like(gram), 4, 32).codes,
        groupwise.rounded(weight, 4, 32, False).codes,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_matrix_is_damped_until_it_is_not(dtype: torch.dtype) -> None:
    weight, gram = (t.to(dtype) for t in problem(16, 32, rank=1))
    found = gptq.solve(weight, gram, 3, 32, damping=0.0)
    plain = groupwise.rounded(weight, 3, 32, False)
    ours, theirs = (gptq.errors(weight, c, 32, gram).sum() for c in (found, plain))
    assert ours < theirs


# -- blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_the_walk_gives_what_linears_read_in_a_whole_pass(name: str) -> None:
    model = tiny_model() if name == "llama" else other(name)
    frozen(model)
    read: dict[str, list[torch.Tensor]] = {}
    hooks = [
        linear.register_forward_pre_hook(
            lambda _, args, n=n: read.setdefault(n, []).append(args[0])
        )
        for n, linear in dense_linears(model)
    ]
    for batch in ROWS:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for hook in hooks:
        hook.remove()
    walk, seen = Walk(model, ROWS), set()
    for index, block in enumerate(decoder_layers(model)):
        for group in walk.groups():
            found = walk.inputs(group)
            for name in group:
                path = next(n for n, m in model.named_modules() if m is block.get_submodule(name))
                x = torch.cat(
                    [
                        one.reshape(-1, one.shape[-1])[batch.attention_mask.bool().view(-1)]
                        for one, batch in zip(read[path], ROWS, strict=True)
                    ]
                )
                torch.testing.assert_close(found.gram, x.T @ x, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(found.magnitude, x.abs().mean(0))
                seen.add(path)
        walk.advance()
        assert walk.index == index + 1
    assert seen == {n for n, _ in dense_linears(model)}


def other(name: str) -> Any:
    sizes: Any = {**SIZES, **TOKENS, **OTHERS[name]}
    if name in ("gpt2", "bloom"):
        sizes = {"vocab_size": 128, **TOKENS, **OTHERS[name]}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**sizes))
    as_linears(model)
    return model


def test_blocks_that_do_not_follow_each_other_are_refused() -> None:
    model = frozen()
    layers = model.model.layers

    class Scaled(type(layers[1])):  # type: ignore[misc]
        def __call__(self, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(2 * states, *args, **kwargs)

    layers[1].__class__ = Scaled
    with pytest.raises(UserError, match="cannot be calibrated one after the other"):
        Walk(model, ROWS)
    assert not any("forward" in vars(layer) for layer in layers)


@pytest.mark.parametrize("propagate", [True, False])
def test_a_block_is_calibrated_on_what_those_before_it_make(propagate: bool) -> None:
    method, seen = GPTQ(bits=2, group_size=32, propagate=propagate), []

    class Watched(GPTQ):
        def block_tensors(self, walk: Walk) -> dict[str, torch.Tensor]:
            seen.append(walk._states[0].clone())
            return super().block_tensors(walk)

    model = frozen()
    compress_whole(Watched(bits=2, group_size=32, propagate=propagate), model, ROWS, context())
    first = (model if propagate else frozen()).model
    batch, states = ROWS[0], []
    first.layers[0].register_forward_hook(lambda _, args, out: states.append(out))
    first(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(seen[1], states[0])
    dense = compressed(GPTQ(bits=2, group_size=32, propagate=not propagate))
    assert not torch.equal(logits(dense), logits(compressed(method)))


@pytest.mark.parametrize("propagate", [True, False])
def test_interrupted_after_any_block_it_ends_with_the_same_bytes(propagate: bool) -> None:
    method = GPTQ(bits=3, group_size=32, propagate=propagate)
    whole = {n: t.clone() for n, t in method.artefact_tensors(compressed(method)).items()}
    kept: dict[str, dict[str, torch.Tensor]] = {}
    made: list[str] = []
    for stop in (1, 2):
        model = frozen()
        for count, part in enumerate(method.compress(model, ROWS, context()), 1):
            if part.name not in kept:
                kept[part.name] = {n: t.clone() for n, t in part.make().items()}
                made.append(part.name)
            part.put(kept[part.name])
            if count == stop:
                break
    assert made == ["blocks.0", "blocks.1"]
    found = method.artefact_tensors(model)
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[n], whole[n]) for n in whole)


def test_making_a_part_changes_nothing() -> None:
    model = frozen()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    part = next(iter(GPTQ(group_size=32).compress(model, ROWS, context())))
    one, two = part.make(), part.make()
    assert all(torch.equal(one[n], two[n]) for n in one)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_in_memory_are_two_blocks_and_the_activations_at_the_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gptq, "LAZY", 8)  # in the proportion that 128 has to a larger model
    model, element = frozen(), 4
    with HeldBytes() as counted:
        compress_whole(GPTQ(group_size=32), model, ROWS, context())
    block = sum(p.numel() for p in frozen().model.layers[0].parameters()) * element
    states = sum(batch.input_ids.numel() for batch in ROWS) * 64 * element
    assert block < counted.peak <= 2 * block + 2 * states


def test_without_rows_or_with_broken_weights_it_is_refused() -> None:
    with pytest.raises(UserError, match="no calibration rows"):
        compressed(GPTQ(), [])
    model = frozen()
    model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"of mlp.up_proj of block 1 are not finite"):
        compress_whole(GPTQ(), model, ROWS, context())
    assert isinstance(model.model.layers[1].mlp.up_proj, torch.nn.Linear)


def test_a_group_that_does_not_divide_is_shorter_at_the_end() -> None:
    model = compressed(GPTQ(bits=3, group_size=48))
    down = model.model.layers[0].mlp.down_proj
    assert isinstance(down, PackedLinear) and down.scales.shape == (64, 3)
    assert storage_bytes(model) < storage_bytes(frozen())
