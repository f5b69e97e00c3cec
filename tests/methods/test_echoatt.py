"""EchoAtt: every invariant of its spec."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    batch_of,
    begun,
    context,
    counted,
    example_of,
    generator,
    logits,
    stated,
    tiny_model,
    train,
    window,
)

from effbench.api.batch import Batch
from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.method_types import Context
from effbench.api.points import UNNAMED
from effbench.config.compose import compose
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost, shape_of
from effbench.methods.full import Full
from effbench.methods.sharing.echoatt import EchoAtt
from effbench.nn.decode.copied_maps import CopyingSession
from effbench.nn.decode.session import greedy
from effbench.nn.decode.shared import SharedSession
from effbench.nn.llama.shared_attention import copying, map_of
from effbench.nn.losses.self_distill import captured
from effbench.nn.sharing.ranking import ranking
from effbench.nn.sharing.similarity import layer_similarity, mean_attention
from effbench.resources.counting import flops
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

DEEP = replace(SHAPE, num_layers=6)
SHARED = (2, 3, 5)


def base(seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model(seed, dtype, DEEP)


def student(method: EchoAtt, seed: int = 0, steps: int = 10) -> tuple[Any, Context]:
    ctx = context()
    ctx.total_steps = steps
    return begun(method, base(seed), ctx), ctx


def shared(dtype: torch.dtype = torch.float64, layers: tuple[int, ...] = SHARED) -> Any:
    """Return a model whose layers share, frozen, in eval mode."""
    model = EchoAtt(layers=layers, refine=1.0).prepare(base(dtype=dtype), context())
    return model.requires_grad_(False).eval()


def tokens(rows: int = 2, length: int = 14) -> torch.Tensor:
    return torch.randint(3, SHAPE.vocab_size, (rows, length), generator=generator(5))


# -- 1: nothing shared -------------------------------------------------------------------------


def test_no_shared_layer_changes_nothing() -> None:
    model, _ = student(EchoAtt(layers=(), refine=1.0))
    assert logits(model).equal(logits(base()))
    assert counted(model)["params"] == DEEP.params
    assert type(EchoAtt().session(model)) is type(Full().session(base()))


# -- 2: where sharing is exact -----------------------------------------------------------------


@torch.no_grad()
def test_sharing_is_exact_where_queries_and_keys_are_the_sources() -> None:
    model = base(dtype=torch.float64).eval()
    layers = model.model.layers
    for linear in (layers[1].self_attn.o_proj, layers[1].mlp.down_proj):
        linear.weight.zero_()
    layers[2].input_layernorm.weight.copy_(layers[1].input_layernorm.weight)
    for name in ("q_proj", "k_proj"):
        getattr(layers[2].self_attn, name).weight.copy_(getattr(layers[1].self_attn, name).weight)
    expected = logits(model)
    found = logits(EchoAtt(layers=(2,), refine=1.0).prepare(model, context()))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_elsewhere_it_is_not() -> None:
    assert not torch.allclose(logits(shared()), logits(base(dtype=torch.float64)), atol=1e-3)


# -- 3: a copied map and stored queries and keys are one ---------------------------------------


@pytest.mark.parametrize(("attention", "bound"), [("sdpa", 1e-12), ("eager", 1e-6)])
@torch.no_grad()
def test_a_copied_map_gives_what_stored_queries_and_keys_give(attention: str, bound: float) -> None:
    model = shared()
    model.set_attn_implementation(attention)
    taken = logits(model)
    with copying(model):
        copied = logits(model)
    torch.testing.assert_close(copied, taken, atol=bound, rtol=0)  # eager's softmax is float32


# -- 4: what is gone ---------------------------------------------------------------------------


def test_shared_layers_have_neither_queries_nor_keys(tmp_path: Path) -> None:
    method = EchoAtt(layers=SHARED)
    model, _ = student(method)
    width = SHAPE.head_dim * (SHAPE.num_heads + SHAPE.num_kv_heads)
    removed = sum(p.numel() for p in base().parameters()) - counted(model)["params"]
    assert removed == len(SHARED) * SHAPE.hidden_size * width
    names = {n.rsplit(".weight")[0] for n in model.state_dict()}
    for layer in range(DEEP.num_layers):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            gone = layer in SHARED and name in ("q_proj", "k_proj")
            assert (f"model.layers.{layer}.self_attn.{name}" in names) != gone
    method.save(model, tmp_path)
    again = method.load(base(seed=3), tmp_path, context(load_model=no_model))
    assert logits(again).equal(logits(model))
    assert map_of(again) == map_of(model)
    assert shape_of(method, DEEP, folder=tmp_path) == shape_of(method, DEEP)


def no_model(name: str) -> torch.nn.Module:
    raise AssertionError("the artefact needs no other model")


def test_the_parameters_are_the_papers() -> None:
    shape = compose("train", ["method=echoatt", "model=tinyllama-1.1b"]).spec.model.shape
    assert shape is not None
    listed = (2, 5, 4, 3, 7, 6, 18, 9, 8, 11, 12, 1, 17, 10, 14, 13, 16)
    for count, millions in ((5, 23.6), (9, 42.5), (17, 80.2)):
        left = shape_of(EchoAtt(layers=listed[:count]), shape)
        assert (shape.params - left.params) / 1e6 == pytest.approx(millions, abs=0.05)


def test_an_exported_folder_is_refused_by_name_elsewhere(tmp_path: Path) -> None:
    method = EchoAtt(layers=SHARED)
    model, _ = student(method)
    method.export(model, UNNAMED, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "shared_llama"
    assert config["layer_sources"] == [0, 1, 1, 1, 4, 4]


# -- 5, 6: the cache ---------------------------------------------------------------------------


@pytest.mark.parametrize("session", [SharedSession, CopyingSession])
@torch.no_grad()
def test_shared_layers_cache_values_alone(session: Any) -> None:
    method, ids = EchoAtt(layers=SHARED), tokens()
    found = session(shared())
    found.prefill(ids[:, :9])
    found.step(ids[:, 9:10])
    whole = DEEP.kv_bytes_per_token(8) * 2 * 10
    assert found.kv_bytes() == whole * (12 - len(SHARED)) // 12
    shape = shape_of(method, DEEP)
    assert shape.kv_bytes_per_token(8) == DEEP.kv_bytes_per_token(8) * (12 - len(SHARED)) // 12


@pytest.mark.parametrize("session", [SharedSession, CopyingSession])
@torch.no_grad()
def test_cached_steps_are_one_pass(session: Any) -> None:
    model, ids = shared(), tokens()
    mask = torch.ones_like(ids)
    mask[1, :3] = 0  # left padding
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    found = session(model)
    steps = [found.prefill(ids[:, :8], mask[:, :8])]
    steps += [found.step(ids[:, t : t + 1]) for t in range(8, 14)]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 7:], atol=1e-12, rtol=0)


@torch.no_grad()
def test_the_cache_is_reordered_and_cropped() -> None:
    model, ids = shared(), tokens()
    found, turned = CopyingSession(model), CopyingSession(model)
    found.prefill(ids[:, :9])
    found.reorder(torch.tensor([1, 0]))
    turned.prefill(ids[[1, 0], :9])
    token = ids[:, 9:10]
    expected = turned.step(token)
    torch.testing.assert_close(found.step(token), expected, atol=1e-12, rtol=0)
    found.cache.crop(-1)
    torch.testing.assert_close(found.step(token), expected, atol=1e-12, rtol=0)
    assert found.kv_bytes() == turned.kv_bytes()


def test_a_session_leaves_no_copying_behind() -> None:
    model = shared()
    greedy(CopyingSession(model), tokens(1), 4)
    assert not any(getattr(m, "copies", False) for m in model.modules())


# -- 7, 9: the loss ----------------------------------------------------------------------------


def test_nothing_shared_leaves_the_teachers_own_entropy() -> None:
    batch = batch_of()
    for weights, expected in (((1, 1, 0), 0.0), ((0, 0, 1), None)):
        a, b, c = weights
        method = EchoAtt(layers=(), block_weight=a, soft_weight=b, hard_weight=c)
        model, ctx = student(method)
        found = float(method.loss(model, batch, ctx).detach())
        if expected is None:
            at = logits(base(), batch)[:, :-1][batch.labels[:, 1:] != -100]
            own = torch.nn.functional.cross_entropy(at, at.argmax(-1), reduction="mean")
            expected = float(own)
        assert found == pytest.approx(expected, rel=1e-6, abs=0)


def test_the_hard_term_alone_is_cross_entropy_to_the_teachers_argmax() -> None:
    method = EchoAtt(layers=SHARED, block_weight=0, soft_weight=0, hard_weight=1)
    model, ctx = student(method)
    batch = batch_of()
    labels = logits(base(), batch).argmax(-1)
    counts = batch.labels[:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(
        logits(model, batch)[:, :-1][counts], labels[:, :-1][counts]
    )
    found = method.loss(model, batch, ctx)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kl", ["student_teacher", "teacher_student"])
def test_the_soft_term_alone_is_the_divergence_of_the_setting(kl: Any) -> None:
    method = EchoAtt(layers=SHARED, block_weight=0, soft_weight=1, hard_weight=0, kl=kl)
    model, ctx = student(method)
    batch = batch_of()
    log_s, log_t = (
        logits(m, batch)[:, :-1][batch.labels[:, 1:] != -100].log_softmax(-1)
        for m in (model, base())
    )
    first, second = (log_s, log_t) if kl == "student_teacher" else (log_t, log_s)
    expected = (first.exp() * (first - second)).sum(-1).mean()
    found = method.loss(model, batch, ctx)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_the_weights_of_the_terms_add_up() -> None:
    batch = batch_of()

    def loss(a: float, b: float, c: float) -> float:
        method = EchoAtt(layers=SHARED, block_weight=a, soft_weight=b, hard_weight=c)
        model, ctx = student(method)
        return float(method.loss(model, batch, ctx).detach())

    parts = 0.3 * loss(1, 0, 0) + 0.2 * loss(0, 1, 0) + 0.9 * loss(0, 0, 1)
    assert loss(0.3, 0.2, 0.9) == pytest.approx(parts, rel=1e-6)


def test_the_first_term_looks_at_the_last_layer_of_each_run() -> None:
    method = EchoAtt(layers=SHARED, block_weight=1, soft_weight=0, hard_weight=0)
    model, ctx = student(method)
    batch, outputs = batch_of(), []
    for one in (model, base()):
        with captured(one) as seen, torch.no_grad():
            Method().logits(one, batch)
        outputs.append(seen)
    counts = batch.labels[:, 1:] != -100
    errors = [(outputs[0][end] - outputs[1][end])[:, :-1][counts].square().mean() for end in (3, 5)]
    expected = float(sum(errors)) / 2
    assert float(method.loss(model, batch, ctx).detach()) == pytest.approx(expected, rel=1e-5)


def test_the_teacher_is_neither_trained_nor_saved_nor_counted() -> None:
    method = EchoAtt(layers=SHARED)
    model, ctx = student(method)
    teacher = ctx.aux["teacher"]
    assert not any("teacher" in n for n in method.trained_tensors(model))
    train(method, model, ctx, 3)
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert logits(teacher).equal(logits(base()))
    assert method.holds() == ("",)


def test_the_teacher_is_cast_but_for_its_rotary_frequencies() -> None:
    ctx = context(dtype=torch.bfloat16)
    begun(EchoAtt(layers=SHARED), base(), ctx)
    teacher = ctx.aux["teacher"]
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert teacher.model.rotary_emb.inv_freq.dtype == torch.float32


def test_micro_batches_add_up() -> None:
    method = EchoAtt(layers=SHARED)
    model, ctx = student(method)
    parts = window()
    total = sum(float(method.loss(model, p, ctx).detach()) for p in parts)
    rows = [
        torch.cat([getattr(p, n) for p in parts])
        for n in Batch.__dataclass_fields__
        if n in ("input_ids", "attention_mask", "labels")
    ]
    whole = Batch(*rows, rows=[0, 1, 2, 3], window_tokens=parts[0].window_tokens)
    assert float(method.loss(model, whole, ctx).detach()) == pytest.approx(total, rel=1e-5)


# -- the stages --------------------------------------------------------------------------------


def test_the_second_stage_is_plain_training_without_a_teacher() -> None:
    method = EchoAtt(layers=SHARED, refine=0.4)
    model, ctx = student(method)
    stages = []
    for step in range(10):
        ctx.step = step
        ctx.evolution.before_step()
        stages.append("teacher" in ctx.aux)
    assert stages == [True] * 6 + [False] * 4
    batch = batch_of()
    assert method.loss(model, batch, ctx).equal(Full().loss(model, batch, ctx))


def test_without_distillation_there_is_no_teacher() -> None:
    method = EchoAtt(layers=SHARED, refine=1.0)
    _, ctx = student(method)
    assert not ctx.aux
    assert method.holds() == ()


def test_distillation_brings_the_student_nearer() -> None:
    method = EchoAtt(layers=SHARED, refine=0.0)
    model, ctx = student(method, steps=100)
    losses = train(method, model, ctx, 15, adamw(model, lr=2e-3), same_batch=True)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("use", [False, True])
def test_gradients_are_the_same_when_activations_are_recomputed(use: bool) -> None:
    method = EchoAtt(layers=SHARED)
    found = []
    for recompute in (False, use):
        model, ctx = student(method)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        method.loss(model, batch_of(), ctx).backward()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_that_is_too_small_changes_no_weight() -> None:
    method = EchoAtt(layers=SHARED, refine=1.0)
    model, ctx = student(method)
    before = [p.detach().clone() for p in model.parameters()]
    train(method, model, ctx, 1, adamw(model, lr=1e-30))
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))


# -- 8: the maps -------------------------------------------------------------------------------


@torch.no_grad()
def test_shared_maps_are_distributions_over_earlier_positions() -> None:
    model = shared()
    model.set_attn_implementation("eager")
    with copying(model):
        seen = maps_of(model)
    for layer in SHARED:
        weights = seen[layer]
        assert weights.equal(seen[map_of(model).sources[layer]])
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
        assert float(weights.triu(1).abs().max()) == 0.0


def maps_of(model: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.register_forward_hook(lambda _, __, out: found.append(out[1]))
        for layer in model.model.layers
    ]
    model(input_ids=tokens())
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits() -> None:
    model, ids = shared(), tokens()
    other = ids.clone()
    other[:, 9] = 3
    one, two = (model(input_ids=i).logits for i in (ids, other))
    assert one[:, :9].equal(two[:, :9])
    assert not one[:, 9:].equal(two[:, 9:])


# -- 10: similarity, and the choice of layers --------------------------------------------------


def test_similarity_sees_what_is_shared() -> None:
    found = layer_similarity(shared(torch.float32), tokens(1)[0])
    for layer, source in ((2, 1), (3, 1), (5, 4)):
        assert float(found.attention[layer, source]) == pytest.approx(1, abs=1e-6)
        assert float(found.keys[layer, source]) == pytest.approx(1, abs=1e-6)
        assert 0 < float(found.values[layer, source]) < 0.99


def test_the_most_similar_layers_of_the_training_rows_are_chosen() -> None:
    method = EchoAtt(ratio=0.34, samples=3, tokens=9)
    model, ctx = base(), context()
    examples = [example_of(i, length=12) for i in range(5)]
    assert method.dataset(examples, model, ctx) == examples
    texts = [torch.tensor(e.ids[:9]) for e in examples[:3]]
    expected = sorted(ranking(mean_attention(base(), texts))[:2])
    assert ctx.state == {"shared": expected}
    assert map_of(begun(method, model, ctx)).consumers == tuple(expected)
    assert model.training
    for kept, shared_ in (({"keep_first": 3}, [3, 4]), ({"keep_last": 3}, [1, 2])):
        replace(method, **kept).dataset(examples, base(), ctx)
        assert ctx.state == {"shared": shared_}


def test_random_layers_follow_the_seed() -> None:
    method = EchoAtt(choice="random", ratio=0.5)
    drawn = [method.chosen(30, context(seed=s)) for s in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 15
    assert 0 not in drawn[0]
    assert 29 not in drawn[0]


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (EchoAtt(layers=(0,)), "method.layers"),
        (EchoAtt(layers=(6,)), "method.layers"),
        (EchoAtt(layers=(2, 2)), "method.layers"),
        (EchoAtt(ratio=0.9), "only 4 may be chosen"),
        (EchoAtt(ratio=0.5, keep_first=4), "only 1 may be chosen"),
        (EchoAtt(block_weight=0, soft_weight=0, hard_weight=0), "All three weights"),
    ],
)
def test_what_cannot_be_is_refused(method: EchoAtt, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.resolve(DEEP)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(UserError, match=r"fewer than method\.tokens=256"):
        EchoAtt().dataset([example_of()], base(), context())


# -- what it costs -----------------------------------------------------------------------------


def test_cost_is_what_is_counted() -> None:
    method = EchoAtt(layers=SHARED)
    model, _ = student(method)
    assert stated(method, shape=shape_of(method, DEEP)) == counted(model)
    assert chain_cost([method], DEEP, "float32").saving == "physical"
    assert chain_cost([EchoAtt(layers=())], DEEP, "float32").saving == "none"


def test_a_training_step_has_the_stated_flops() -> None:
    method = EchoAtt(layers=SHARED)
    model, ctx = student(method)
    batch = replace(batch_of(), attention_mask=torch.ones(2, 12, dtype=torch.int64))
    batch = replace(batch, labels=batch.input_ids, window_tokens=22)
    own = step_flops(
        training_of(shape_of(method, DEEP, phase="train"), "float32"),
        Pass("train", 2, 12, 22),
        square=True,
    )
    # torch counts no attention on a CPU: 12 positions of 24 tokens, three times in training.
    own -= 3 * (DEEP.flops_per_token(12) - DEEP.flops_per_token()) * 24
    head = 2 * DEEP.vocab_size * DEEP.hidden_size
    teacher = 2 * DEEP.linear_params * 24 + head * 22
    assert flops(lambda: method.loss(model, batch, ctx).backward()) == own + teacher


# -- a run -------------------------------------------------------------------------------------


def test_a_run_chooses_trains_and_is_evaluated_again(bench: Bench) -> None:
    words = ["method=echoatt", "method.tokens=16", "method.samples=4", "method.ratio=0.5"]
    words += ["train.max_steps=4", "train.checkpoint_every=2", "method.refine=0.5"]
    words += ["hardware.device=cpu", "hardware.dtype=float32", "+dataset.limit.train=24"]
    record = bench.run("train", *words)
    found = {m.name: m.value for m in record.metrics}
    artefact = bench.folder(bench.job("train", *words)).artefact
    own = json.loads((artefact / "sharing.json").read_text())
    consumers = [i for i, s in enumerate(own["layer_sources"]) if s != i]
    assert len(consumers) == 2
    assert set(consumers) <= {1, 2}
    again = bench.run("eval", f"from={record.key}", *words[-3:-1])
    assert next(m.value for m in again.metrics if m.name == "loss") == found["loss"]
    assert found["params_total"] == found["params"]
