import json
from dataclasses import replace

import pytest
import torch
from helpers import (
    SHAPE,
    adamw,
    base_for,
    batch_of,
    context,
    counted,
    logits,
    prepared,
    storage_hash,
    tiny_model,
    train,
    window,
)
from peft import AdaLoraConfig, PeftModel, get_peft_model

from effbench.api.cost import cost_of
from effbench.api.footprint import Pass, step_flops, training_of
from effbench.api.schema import build
from effbench.api.shape import LINEARS
from effbench.api.slices import planned_slice, sliced_shape
from effbench.methods.adapters.adalora import AdaLoRA
from effbench.methods.adapters.lora import LoRA
from effbench.methods.chain import chain_cost, shape_of
from effbench.nn.adapters.lowrank import LowRankLinear, low_rank_layers
from effbench.nn.adapters.peft_lora import peft_adapters
from effbench.nn.adapters.rank_budget import BudgetSchedule, best, no_averages, observe, scores
from effbench.nn.adapters.svd import SVDLinear, orthogonality, svd_layers
from effbench.nn.quant.formats.nf4 import NF4Format
from effbench.nn.quant.linears import pack_linears
from effbench.resources.counting import flops
from effbench.results.events import read_events
from effbench.runner.stages import train as stage
from effbench.runner.worker import run_here
from effbench.testing.bench import Bench
from effbench.util.errors import StoppedError, UserError

STEPS = 10
LAYERS = 14
METHOD = AdaLoRA(rank=2, first_rank=4, begin=0.2, end=0.8, interval=2)


def trained(method=METHOD, steps=STEPS, total=STEPS, **settings):
    model, ctx = prepared(method, **settings, steps=total)
    train(method, model, ctx, steps)
    return model, ctx


def lambdas(model):
    return torch.stack([layer.lora_E.detach() for layer in svd_layers(model).values()])


# -- the start ---------------------------------------------------------------------------------


def test_the_untrained_adapter_changes_nothing():
    model, _ = prepared(METHOD)
    assert len(svd_layers(model)) == LAYERS
    assert logits(model).equal(logits(tiny_model()))


def test_q_starts_as_a_of_lora_and_p_is_neither_zero_nor_the_same():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    model, _ = prepared(METHOD)
    assert torch.get_rng_state().equal(state)
    expected = {n: a.weight for n, a, _ in peft_adapters(prepared(LoRA(rank=2))[0])}
    for name, layer in svd_layers(model).items():
        assert layer.lora_A[:2].equal(expected[name])
        assert layer.lora_B.std().item() == pytest.approx((3 * layer.out_features) ** -0.5, rel=0.2)
        if layer.in_features == layer.out_features:
            assert not layer.lora_B.T.equal(layer.lora_A)


def test_the_base_is_frozen():
    model, ctx = prepared(METHOD, steps=STEPS)
    before = storage_hash(model)
    train(METHOD, model, ctx, STEPS)
    assert storage_hash(model) == before
    assert all("lora_" in n for n, p in model.named_parameters() if p.requires_grad)


def test_on_a_base_in_4_bits():
    base = tiny_model()
    pack_linears(base, NF4Format(), torch.float32)
    expected = logits(base)
    ctx = context()
    ctx.total_steps = STEPS
    model = METHOD.prepare(base, ctx)
    assert logits(model).equal(expected)
    losses = train(METHOD, model, ctx, STEPS, same_batch=True)
    assert losses[-1] < losses[0] - 0.01


# -- the schedule ------------------------------------------------------------------------------


def test_budgets_follow_the_cube_and_end_at_the_target():
    schedule = BudgetSchedule(first=120, target=80, begin=10, end=50, interval=5)
    assert [schedule.budget(s) for s in (1, 10)] == [120, 120]
    assert schedule.budget(20) == int(80 + 40 * 0.75**3)
    assert schedule.budget(30) == 80 + 40 // 8
    assert [schedule.budget(s) for s in (50, 51, 1000)] == [80, 80, 80]
    budgets = [schedule.budget(s) for s in range(1, 80)]
    assert budgets == sorted(budgets, reverse=True)
    assert min(budgets) == 80
    assert [s for s in range(1, 80) if schedule.chooses(s)] == [15, 20, 25, 30, 35, 40, 45, 50]


def test_budgets_are_those_of_peft():
    config = AdaLoraConfig(
        init_r=4, target_r=2, tinit=7, tfinal=20, deltaT=3, total_step=60, target_modules=["q_proj"]
    )
    theirs = get_peft_model(tiny_model(), config).base_model.rankallocator
    ours = BudgetSchedule(first=8, target=4, begin=7, end=40, interval=3)
    for step in range(1, 40):
        assert theirs.budget_schedule(step) == (ours.budget(step), ours.chooses(step))


@pytest.mark.parametrize(("total", "begin", "end"), [(1, 0, 1), (4, 0, 2), (200, 20, 100)])
def test_the_window_is_a_share_of_the_run(total, begin, end):
    schedule = AdaLoRA().schedule(LAYERS, total)
    assert (schedule.begin, schedule.end) == (begin, end)
    assert (schedule.first, schedule.target) == (24 * LAYERS, 16 * LAYERS)


def test_the_budget_is_kept_at_every_choice_and_met_at_the_end():
    model, ctx = prepared(METHOD, steps=STEPS)
    schedule, optimizer = METHOD.schedule(LAYERS, STEPS), adamw(model)
    for step in range(1, STEPS + 1):
        train(METHOD, model, ctx, 1, optimizer)
        left = int((lambdas(model) != 0).sum())
        assert left >= schedule.target
        assert ctx.evolution.final == (step >= schedule.end)
        if schedule.chooses(step) or step >= schedule.end:
            assert left == schedule.budget(step)
        ctx.step -= 1
        assert ctx.evolution.metrics() == {"rank_budget": schedule.budget(step)}
        ctx.step += 1
    assert left == 2 * LAYERS
    assert len({len(k) for k in ctx.evolution.kept.values()}) > 1
    assert ctx.evolution.averages == no_averages()


def test_a_pruned_rank_can_come_back_until_the_end():
    model, ctx = prepared(METHOD, steps=STEPS)
    optimizer = adamw(model)
    train(METHOD, model, ctx, 4, optimizer)
    out = lambdas(model) == 0
    assert out.any()
    train(METHOD, model, ctx, 1, optimizer)  # no choice after this one
    assert not (lambdas(model) == 0)[out].any()
    train(METHOD, model, ctx, 3, optimizer)
    out = lambdas(model) == 0
    train(METHOD, model, ctx, 2, optimizer)
    assert (lambdas(model) == 0).equal(out)


# -- importance --------------------------------------------------------------------------------


def test_equal_scores_leave_the_same_ranks_everywhere():
    assert best(torch.zeros(3, 4), 6).tolist() == [[True, True, False, False]] * 3
    assert best(torch.zeros(3, 4), 7).sum(1).tolist() == [3, 2, 2]
    assert best(torch.tensor([[0.0, 5.0], [3.0, 4.0]]), 2).tolist() == [
        [False, True],
        [False, True],
    ]
    assert int(best(torch.rand(5, 6), 30).sum()) == 30


def test_scores_are_the_definition():
    base = torch.nn.Linear(5, 3)
    layer = SVDLinear(base, 2, 1.0, 0.0, 0, "x")
    averages, history = no_averages(), {}
    torch.manual_seed(0)
    for _ in range(3):
        for part in ("lora_A", "lora_E", "lora_B"):
            weight = getattr(layer, part)
            weight.data.normal_()
            weight.grad = torch.randn_like(weight)
            history.setdefault(part, []).append((weight * weight.grad).abs().detach())
        observe({"x": layer}, averages, 0.6, 0.7)
    score = {}
    for part, seen in history.items():
        smooth = unsure = torch.zeros_like(seen[0])
        for now in seen:
            smooth = 0.6 * smooth + 0.4 * now
            unsure = 0.7 * unsure + 0.3 * (now - smooth).abs()
        score[part] = smooth * unsure
    expected = score["lora_E"] + score["lora_A"].mean(1) + score["lora_B"].mean(0)
    torch.testing.assert_close(scores({"x": layer}, averages)[0], expected)


def test_the_distance_is_zero_for_orthonormal_factors_alone():
    layer = SVDLinear(torch.nn.Linear(6, 9), 4, 1.0, 0.0, 0, "x")
    torch.nn.init.orthogonal_(layer.lora_A)
    torch.nn.init.orthogonal_(layer.lora_B)
    assert orthogonality([layer]).item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        layer.lora_A.copy_(torch.eye(4, 6))
        layer.lora_B.copy_(torch.eye(9, 4))
    distance = orthogonality([layer])
    distance.backward()
    assert distance.item() == 0
    assert layer.lora_A.grad.abs().max() == 0  # and not NaN
    with torch.no_grad():
        layer.lora_B[0, 1] = 0.5
    # P^T P - I has 0.5 twice and 0.25 on its diagonal; half of the factors are off.
    assert orthogonality([layer]).item() == pytest.approx((0.5 + 0.0625) ** 0.5 / 2)


def test_the_distance_gives_the_loss_its_gradient_and_not_its_value():
    with_it, without = replace(METHOD, orthogonality=0.5), replace(METHOD, orthogonality=0.0)
    model, ctx = prepared(METHOD)
    found = []
    for method in (with_it, without):
        model.zero_grad()
        losses = [method.loss(model, batch, ctx) for batch in window()]
        sum(losses).backward()
        grads = [x.lora_A.grad.clone() for x in svd_layers(model).values()]
        found.append(([x.item() for x in losses], grads))
    assert found[0][0] == found[1][0]
    model.zero_grad()
    (0.5 * orthogonality(svd_layers(model).values())).backward()
    layers = svd_layers(model).values()
    for more, less, layer in zip(found[0][1], found[1][1], layers, strict=True):
        torch.testing.assert_close(more - less, layer.lora_A.grad)


def test_the_distance_shrinks():
    far = {}
    for gamma in (0.0, 5.0):
        model, _ = trained(replace(METHOD, orthogonality=gamma))
        far[gamma] = orthogonality(svd_layers(model).values()).item()
    assert far[5.0] < 0.9 * far[0.0]


# -- against peft ------------------------------------------------------------------------------


def test_same_weights_and_ranks_as_peft():
    method = replace(METHOD, orthogonality=0.5, alpha=8.0)
    model, ctx = prepared(method, steps=STEPS)
    schedule = method.schedule(LAYERS, STEPS)
    config = AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=schedule.begin,
        tfinal=STEPS - schedule.end,
        deltaT=2,
        total_step=STEPS,
        lora_alpha=8 * (4 + 1e-5) / 4,  # peft divides by r + 1e-5
        orth_reg_weight=0.5,
        target_modules=list(LINEARS),
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(tiny_model(), config)
    ours = svd_layers(model)
    pairs = [(ours[n], theirs.base_model.model.get_submodule(n)) for n in ours]
    for layer, other in pairs:
        other.lora_A["default"].data.copy_(layer.lora_A)
        other.lora_B["default"].data.copy_(layer.lora_B)
    optimizers = adamw(model), adamw(theirs)
    for step in range(1, STEPS + 1):
        batch = batch_of(step)
        ctx.step = step - 1
        method.update(model, optimizers[0], [batch], ctx)
        output = theirs(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
        )
        output.loss.backward()
        optimizers[1].step()
        theirs.base_model.update_and_allocate(step)
        optimizers[1].zero_grad()
        for layer, other in pairs:
            for part in ("lora_A", "lora_E", "lora_B"):
                weight = getattr(other, part)["default"].view_as(getattr(layer, part))
                torch.testing.assert_close(getattr(layer, part), weight, atol=2e-4, rtol=0)
            assert (layer.lora_E == 0).equal(other.lora_E["default"][:, 0] == 0)
    assert int((lambdas(model) != 0).sum()) == 2 * LAYERS


# -- what is left ------------------------------------------------------------------------------


def test_what_was_pruned_is_dropped_and_nothing_else_changes():
    model, ctx = trained()
    before = logits(model)
    kept = ctx.evolution.kept
    model = METHOD.finalize(model, ctx)
    assert not svd_layers(model)
    left = {n: len(layer.lora_A) for n, layer in low_rank_layers(model)}
    assert left == {n: len(ranks) for n, ranks in kept.items() if ranks}
    assert sum(left.values()) == 2 * LAYERS
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)


def test_a_layer_without_ranks_is_its_base():
    model, ctx = prepared(METHOD)
    ctx.evolution.kept = {n: [] if "v_proj" in n else [1] for n in svd_layers(model)}
    model = METHOD.finalize(model, ctx)
    kinds = {type(m) for n, m in model.named_modules() if n.endswith("v_proj")}
    assert kinds == {torch.nn.Linear}
    assert sum(isinstance(m, LowRankLinear) for m in model.modules()) == LAYERS - 2


def test_save_and_load_give_the_same_logits(tmp_path):
    model, ctx = trained()
    model = METHOD.finalize(model, ctx)
    METHOD.save(model, tmp_path)
    again = METHOD.load(base_for(METHOD), tmp_path, context(seed=9))
    assert logits(again).equal(logits(model))
    assert all("lora_" in n for n, p in again.named_parameters() if p.requires_grad)


def test_peft_loads_the_export_with_a_rank_for_each_layer(tmp_path):
    model, ctx = trained()
    ctx.evolution.kept["model.layers.1.self_attn.k_proj"] = []
    model = METHOD.finalize(model, ctx)
    METHOD.export(model, "", tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert "model.layers.1.self_attn.k_proj" not in config["target_modules"]
    theirs = PeftModel.from_pretrained(base_for(METHOD), tmp_path)
    ranks = {
        n.removeprefix("base_model.model."): len(a.weight) for n, a, _ in peft_adapters(theirs)
    }
    assert ranks == {n: len(x.lora_A) for n, x in low_rank_layers(model)}
    assert len(set(ranks.values())) > 1
    torch.testing.assert_close(logits(theirs), logits(model), atol=2e-6, rtol=0)
    assert not torch.allclose(logits(model), logits(tiny_model()), atol=1e-3)


# -- accounting --------------------------------------------------------------------------------


def test_cost_is_what_is_counted(tmp_path):
    model, ctx = trained()
    model = METHOD.finalize(model, ctx)
    METHOD.save(model, tmp_path)
    shape = shape_of(METHOD, SHAPE, folder=tmp_path)
    assert shape.params == SHAPE.params
    found = counted(model)
    for cost, equal in (
        (cost_of(shape, "float32"), True),
        (chain_cost([METHOD], SHAPE, "float32"), False),
    ):
        stated = {k: getattr(cost, k) for k in found}
        assert (stated == found) == equal
    assert shape_of(METHOD, SHAPE) == shape_of(METHOD, SHAPE, folder=tmp_path / "nowhere")


def test_blocks_that_differ_in_size_are_counted_as_they_are(tmp_path):
    model, ctx = trained()
    METHOD.save(METHOD.finalize(model, ctx), tmp_path)
    whole, sliced = shape_of(METHOD, SHAPE, folder=tmp_path), planned_slice(SHAPE, 0.8)
    layers = (SHAPE.layer(0), sliced.layer(1))
    mixed = sliced_shape(SHAPE, SHAPE.hidden_size, layers)
    shape = shape_of(METHOD, mixed, folder=tmp_path)
    assert list(shape.linears()) == list(mixed.linears())
    more, less = (cost_of(after, "float32").trainable for after in (whole, shape))
    ranks = {
        (i, x.name): x.adapter.factors[0].d_out
        for i, layer in enumerate(whole.layers)
        for x in layer.linears
    }
    lost = zip(SHAPE.linears(), mixed.linears(), strict=True)
    assert more - less == sum(
        ranks[layer, name] * (i + o - i2 - o2) for (layer, name, i, o), (_, _, i2, o2) in lost
    )


def test_before_training_all_ranks_are_expected_to_be_alike():
    method = AdaLoRA(rank=4)
    planned, plain = (chain_cost([m], SHAPE, "bfloat16") for m in (method, LoRA(rank=4)))
    assert planned == plain
    training = cost_of(shape_of(method, SHAPE, phase="train"), "float32")
    model, ctx = prepared(method, steps=100)
    held = counted(model)
    assert (training.params, training.trainable) == (held["params"], held["trainable"])
    train(method, model, ctx, 1)
    averages = [t for kind in ctx.evolution.averages.values() for t in kind.values()]
    more = sum(t.numel() * t.element_size() for t in averages)
    assert training.resident_bytes == held["resident_bytes"] + more


@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_the_products_of_a_step_are_counted(gamma):
    method = replace(METHOD, orthogonality=gamma)
    model, ctx = prepared(method)
    model.set_attn_implementation("eager")  # whose products torch counts
    batch = batch_of()
    counted_flops = flops(lambda: method.loss(model, batch, ctx).backward())
    one = Pass("train", *batch.input_ids.shape, batch.loss_tokens)
    stated = step_flops(
        training_of(shape_of(method, SHAPE, phase="train"), "float32"), one, square=True
    )
    assert stated == pytest.approx(counted_flops, rel=0.002)


# -- whole runs --------------------------------------------------------------------------------

RUN = [
    "method=adalora",
    "method.rank=2",
    "method.first_rank=4",
    "method.begin=0.2",
    "method.end=0.8",
    "method.interval=2",
    "method.dropout=0.1",
    "dataset=arithmetic",
    "train.max_steps=10",
    "train.batch_size=2",
    "train.checkpoint_every=3",
    "+dataset.limit.train=16",
    "evaluator=[]",
    "hardware.device=cpu",
    "hardware.dtype=float32",
    "hardware.threads=1",
]


def stop_before(monkeypatch, job, step):
    """Run a job as if its process ended at once before a step."""
    one_step = stage.one_step

    def stopping(trainer):
        if trainer.done.step == step:
            raise StoppedError("here")
        return one_step(trainer)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(stage, "one_step", stopping)
        run_here(job)


def test_stopped_within_the_schedule_and_after_it_it_ends_the_same(bench, tmp_path, monkeypatch):
    whole = Bench(tmp_path / "whole")
    whole.run("train", *RUN)
    job = bench.job("train", *RUN)
    stop_before(monkeypatch, job, 5)  # goes on from step 3, between two choices
    stop_before(monkeypatch, job, 9)  # goes on from step 9, after the last one
    run_here(job)
    folders = [b.folder(b.job("train", *RUN)) for b in (bench, whole)]
    for name in ("weights.safetensors", "ranks.json"):
        ours, theirs = ((f.artefact / name).read_bytes() for f in folders)
        assert ours == theirs
    ours, theirs = (list(read_events(f.path / "events.jsonl", "step")) for f in folders)
    for key in ("loss", "rank_budget"):
        assert [e[key] for e in ours] == [e[key] for e in theirs]
    ranks = json.loads((folders[0].artefact / "ranks.json").read_text())
    assert sum(ranks.values()) == ours[-1]["rank_budget"] == 2 * len(ranks)


# -- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"first_rank": 8}, "method.first_rank=8"),
        ({"begin": 0.6}, "method.begin=0.6"),
        ({"beta1": 1.0}, "method.beta1"),
        ({"interval": 0}, "method.interval"),
        ({"targets": ["q_porj"]}, "q_proj"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, named):
    with pytest.raises(UserError, match=named):
        build(AdaLoRA, settings, "method").resolve(SHAPE)


def test_a_first_rank_above_what_a_layer_can_have_is_refused():
    with pytest.raises(UserError, match=r"method\.first_rank=33 .* k_proj"):
        AdaLoRA(rank=22).resolve(SHAPE)
