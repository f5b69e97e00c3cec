from __future__ import annotations

import pytest
from helpers import SHAPE

from effbench.api.cost import cost_of
from effbench.api.footprint import Pass
from effbench.api.parts import LayerSize
from effbench.api.shape import ModelShape
from effbench.api.slices import sliced_shape
from effbench.api.spec import Job, Machine, Parallelism
from effbench.cli.plan_text import render
from effbench.config.compose import compose, model_named
from effbench.data.dataset import known_rows
from effbench.models.load import known_shape
from effbench.resources import predict as plan
from effbench.resources.parallel import held_by_one
from effbench.resources.peaks import HOLES, KERNEL_BYTES, MAPPED, Peaks
from effbench.resources.predict import Prediction, Workload, at_most, predict
from effbench.resources.usage import PhaseUsage, format_bytes

LLAMA = ["model=llama2-7b", "dataset=arithmetic", "hardware=cpu", "hardware.dtype=bfloat16"]


def job(*words: str) -> Job:
    return compose(None, [*LLAMA, *words])


def predicted(*words: str, machine: Machine | None = None) -> Prediction:
    spec = job(*words).spec
    shape = known_shape(spec.model)
    assert shape is not None
    return predict(spec, shape, machine or Machine())


def train(*words: str) -> dict[str, int]:
    phase = predicted(*words).phase("train")
    assert phase is not None
    return phase.memory


def text(*words: str) -> str:
    one = job(*words)
    shape = known_shape(one.spec.model)
    assert shape is not None
    return render(predict(one.spec, shape, one.runtime.machine), one.spec, one.runtime.machine)


def test_steps_and_epochs_are_both_told() -> None:
    words = ["model=tiny", "dataset=arithmetic", "train.epochs=0.5", "train.batch_size=4"]
    spec = compose("train", words).spec
    assert spec.model.shape is not None
    rows = known_rows(spec.dataset, "train")
    found = predict(spec, spec.model.shape, Machine(), rows=rows)
    assert rows == 1589
    assert found.tokens == 199 * 4 * 64
    shown = render(found, spec, Machine(), rows)
    assert "199 steps of 4 rows, 0.5 epochs of 1,589 rows" in shown
    unknown = predict(spec, spec.model.shape, Machine())
    assert (unknown.tokens, unknown.phase("train")) == (0, found.phase("train"))
    assert "training         0.5 epochs\n" in render(unknown, spec, Machine())


@pytest.mark.parametrize(
    ("words", "reads"),
    [
        (["method=prboost", "method.classes=4"], 1590),
        (["method=prboost", "method.classes=4", "method.speaker=tiny"], 2 * 1590),
        (["method=dorm"], 2 * 1589),
        (["method=dorm", "method.weigh_by=uniform"], 0),
        (["method=ptloss", "method.teacher=start", "method.labels=50"], 50),
        (["method=ptloss", "method.teacher=start", "method.fit=none"], 0),
    ],
)
def test_what_is_read_before_the_first_step_is_told(words: list[str], reads: int) -> None:
    spec = compose("train", ["model=tiny", "dataset=arithmetic", *words]).spec
    assert spec.model.shape is not None
    found = predict(spec, spec.model.shape, Machine(), rows=1589)
    assert found.reads == reads
    model = ModelShape.of(spec.model.shape)
    assert found.read_flops == reads * 64 * model.flops_per_token(32)
    assert (f"{reads:,} sequences read" in render(found, spec, Machine(), 1589)) == (reads > 0)


def test_memory_of_full_training_is_counted_from_the_parameters() -> None:
    found = predicted("method=full")
    count = found.cost.params
    assert count == 6_738_415_616
    assert found.cost.trainable == count
    memory = train("method=full")
    assert memory["weights"] == 4 * count
    assert memory["gradients"] == 4 * count
    assert memory["optimiser"] == 8 * count
    assert found.peak == sum(memory.values())


def test_a_decoded_token_reads_the_weights_as_they_are_evaluated() -> None:
    """Not the float32 masters that they are trained as."""
    full = predicted("method=full", "hardware.dtype=bfloat16")
    assert full.cost.resident_bytes == 2 * full.cost.params
    evaluation = full.phase("evaluate")
    assert evaluation and evaluation.memory["weights"] == full.cost.resident_bytes
    assert full.cost.bytes_per_token <= full.cost.resident_bytes


def test_memory_falls_with_what_is_trained_and_how_it_is_held() -> None:
    full, lora, qlora = (predicted(f"method={m}").peak for m in ("full", "lora", "qlora"))
    assert full > 4 * lora > 4 * qlora
    eight = predicted("method=full", "train.optimizer=adamw8bit").memory["optimiser"]
    assert eight * 4 == predicted("method=full").memory["optimiser"]
    assert "optimiser" not in predicted("method=full", "train.optimizer=sgd").memory
    once = predicted("method=full", "train.max_steps=1").memory  # its update has the highest peak
    assert once["optimiser"] == predicted("method=full").memory["optimiser"]
    assert "activations" not in once
    assert "optimiser" not in predicted("method=lora", "train.max_steps=1").memory  # its backward


def test_activations_grow_with_the_batch_and_shrink_with_recomputation() -> None:
    one, two = (train(f"train.batch_size={n}")["activations"] for n in (1, 2))
    assert two == 2 * one
    words = "train.batch_size=16", "train.gradient_checkpointing=true"
    assert train(*words)["activations"] < train(words[0])["activations"] / 8
    recomputed = predicted("train.batch_size=2", words[1])
    assert recomputed.flops == pytest.approx(1.5 * predicted("train.batch_size=2").flops, rel=0.01)


@pytest.mark.parametrize("method", ["sorted_lora", "sorted_full"])
def test_a_depth_alone_keeps_all_layers_in_memory(method: str) -> None:
    alone, all_ = (predicted(f"method={method}", f"method.depths=[{n}]") for n in ("18", "18,32"))
    for phase in ("train", "evaluate"):
        weights = [found.phase(phase).memory["weights"] for found in (alone, all_)]  # type: ignore[union-attr]
        assert weights[0] == weights[1]
    assert alone.trained < all_.trained
    assert train(f"method={method}", "method.depths=[18]")["optimiser"] == 8 * alone.trained
    assert alone.cost.params < all_.cost.params  # what is printed is the sub-model that is left


def test_work_is_six_flops_per_parameter_and_token_when_all_train() -> None:
    found = predicted(
        "method=full", "train.max_steps=10", "train.accumulation=2", "train.batch_size=8"
    )
    assert found.tokens == 10 * 2 * 8 * 64
    multiplied = found.cost.params - 32000 * 4096  # the embedding is looked up
    assert found.flops == pytest.approx(6 * multiplied * found.tokens, rel=0.03)


def test_a_stage_without_training_has_neither_optimiser_nor_work() -> None:
    found = predicted("method=rtn")
    assert [p.name for p in found.phases] == ["load", "compress", "evaluate"]
    assert not {"optimiser", "gradients"} & {k for p in found.phases for k in p.memory}
    assert (found.flops, found.tokens, found.seconds) == (0.0, 0, None)


def test_a_run_fits_or_it_does_not_or_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    big = Machine("box", memory_gib=400, tflops=1)
    found = predicted("method=full", machine=big)
    assert found.fits is True
    assert found.seconds == pytest.approx(found.flops / 1e12)
    assert predicted("method=full", machine=Machine("box", memory_gib=4)).fits is False
    monkeypatch.setattr(plan, "memory_bytes", lambda: (0, 0))
    assert predicted("method=full").fits is None


def test_the_verdict_says_what_to_do() -> None:
    said = text("method=full", "hardware.memory_gib=8", "hardware.name=box")
    assert "It does not fit" in said
    assert "of 8.00 GiB on box" in said
    assert "Most of it is optimiser: train fewer weights (method=lora)" in said
    assert "method=qlora" in text("method=lora", "hardware.memory_gib=8", "train.batch_size=1")
    assert "It fits" in text("method=qlora", "hardware.memory_gib=30")


def test_what_decodes_nothing_has_no_cache() -> None:
    classes = ["model=tiny-encoder", "model.classes=3", "dataset=noisy-classes", "method=full"]
    assert "KV cache" in text("model=tiny") and "KV cache" not in text(*classes)


def test_the_machine_of_an_experiment_is_taken() -> None:
    one = compose(None, ["experiment=qdylora_paper"])
    shape = known_shape(one.spec.model)
    assert shape is not None
    found = predict(one.spec, shape, one.runtime.machine)
    assert found.available == 30 * 2**30
    assert found.seconds == pytest.approx(found.flops / 125e12)
    said = render(found, one.spec, one.runtime.machine)
    assert "125 TFLOP/s of NVIDIA V100 32 GB (modelled)" in said
    assert one.spec.key in said


def test_notes_say_what_a_saving_is_not() -> None:
    assert "4-bit weights save memory, not time" in text("method=qlora")
    assert "4-bit weights" not in text("method=lora")


def test_the_summary_is_what_a_record_can_hold() -> None:
    summary = predicted("method=lora").summary()
    assert summary["peak_bytes"] == sum(summary["memory"].values())
    assert summary["cost"]["saving"] == "none"
    assert not any("error" in p for p in summary["phases"].values())


def test_the_summary_holds_the_prediction_against_what_was_taken() -> None:
    found = predicted("method=lora", machine=Machine("box", memory_gib=400, tflops=1))
    phase = found.phase("train")
    assert phase is not None
    base = 2**30
    taken = PhaseUsage(base + 2 * phase.peak, seconds=10.0)
    summary = found.summary({"train": taken}, base)
    one = summary["phases"]["train"]
    assert one["own_error"] == pytest.approx(-0.5)
    assert one["error"] == pytest.approx(-phase.peak / (base + 2 * phase.peak))
    assert found.seconds is not None
    assert one["seconds_error"] == pytest.approx(found.seconds / 10 - 1)
    assert summary["base_bytes"] == base


def test_every_phase_has_a_column() -> None:
    lines = text("method=kd", "method.teacher=llama2-7b").splitlines()
    assert lines[2].split() == ["load", "train", "evaluate"]
    rows = {line.split("  ")[1] for line in lines if line.startswith("  ")}
    assert {"weights", "other models", "activations", "logits", "peak"} <= rows


def test_blocks_given_back_at_once_leave_no_holes() -> None:
    spec = job("method=lora").spec
    shape = known_shape(spec.model)
    assert shape is not None
    usual, exact = (predict(spec, shape, Machine(), exact=e).phases[1] for e in (False, True))
    assert usual.peak - exact.peak == usual.memory["allocator"] > 0


def test_the_real_batches_take_the_place_of_the_largest_possible_ones() -> None:
    spec = job("method=lora").spec
    shape = known_shape(spec.model)
    assert shape is not None
    small = Workload(train=(Pass("train", 1, 32, 4), Pass("train", 1, 64, 4)))
    found = predict(spec, shape, Machine(), workload=small).phases[1]
    assert found.memory["logits"] == 4 * 32000 * 12
    assert found.memory["activations"] * 2 == train("method=lora")["activations"]


@pytest.mark.parametrize("size, said", [(2**30, "1.00 GiB"), (3 * 2**20, "3.0 MiB")])
def test_sizes_for_people(size: int, said: str) -> None:
    assert format_bytes(size) == said


def test_each_size_of_a_bfloat16_product_brings_its_code() -> None:
    shape = SHAPE
    passes = [Pass("score", 1, 20, 7), Pass("score", 2, 10, 7), Pass("score", 1, 30, 8)]
    linears = len({(i, o) for _, _, i, o in shape.linears()})
    assert Peaks(shape, 2).kernels(passes) == linears * 2 + 2
    assert Peaks(shape, 2).kernels(passes, products=3) == 3 * (linears * 2 + 2)
    assert Peaks(shape, 2).kernels(passes, lengths=9) == (linears + 1) * 9
    assert Peaks(shape, 4).kernels(passes) == Peaks(shape, 2, cpu=False).kernels(passes) == 0
    unlike = sliced_shape(shape, 60, [LayerSize(4, 2, 100 + i) for i in range(shape.num_layers)])
    assert Peaks(unlike, 2).kernels(passes[:1]) > Peaks(shape, 2).kernels(passes[:1])


def test_code_is_kept_up_to_a_capacity() -> None:
    peaks = Peaks(SHAPE, 2, exact=True)
    plain, some, many, more = (peaks.compress(0, None, n)["workspace"] for n in (0, 5, 1024, 9999))
    assert some - plain == 5 * KERNEL_BYTES
    assert many == more > some


def test_calibration_is_counted_where_rows_are_read() -> None:
    words = ["method=structured", "model=smollm2-135m", "hardware.dtype=bfloat16"]
    found = []
    for criterion in ("magnitude", "wanda"):
        spec = compose("compress", [*words, f"method.criterion={criterion}"]).spec
        assert spec.model.shape is not None
        phase = predict(spec, spec.model.shape, Machine()).phase("compress")
        assert phase is not None
        found.append(phase.peak)
    assert found[1] > found[0] + 64 * 4 * KERNEL_BYTES


def test_only_what_is_expanded_to_be_multiplied_needs_room_for_it() -> None:
    def room(*words: str) -> int:
        phase = predicted(*words, "evaluator=memory").phase("evaluate")
        assert phase is not None
        return phase.memory.get("workspace", 0)

    gpu = ["hardware.device=cuda"]
    assert room("method=qlora", *gpu) == 0
    assert room("method=rtn", *gpu) == 18 * 4096 * 11008
    assert room("method=qlora") > 18 * 4096 * 11008


def test_an_evaluation_has_room_for_the_point_that_needs_most() -> None:
    """Whichever comes last: a window keeps fewer tokens than `k0`, a depth has no exits' logits."""

    def evaluated(*words: str) -> dict[str, int]:
        phase = predicted(*words).phase("evaluate")
        assert phase is not None
        return phase.memory

    def cache(windows: str) -> int:
        words = ("method=lora_drop", "evaluator=memory", f"method.windows={windows}")
        return evaluated(*words)["kv cache"]

    assert cache("[0]") == cache("[0,3]") > cache("[3]") > 0
    plain, mixed = (
        evaluated("method=sorted_lora", "evaluator=perplexity", f"method.decoding={way}")["logits"]
        for way in ("[]", "[exit]")
    )
    assert mixed > plain


DENSE = ("evaluator=speed", "evaluator.speed.baseline=dense")


@pytest.mark.parametrize(
    ("words", "beside"),
    [
        (("method=rtn", "evaluator=perplexity"), ""),
        (("method=rtn", "evaluator=[fidelity,perplexity]"), "llama2-7b"),
        (
            ("method=rtn", "evaluator=fidelity", "evaluator.fidelity.reference=tinyllama-1.1b"),
            "tinyllama-1.1b",
        ),
        (("method=rtn", "evaluator=trust"), "llama2-7b"),
        (("method=rtn", "evaluator=speed"), ""),
        (("method=rtn", *DENSE), "llama2-7b"),
        (("method=kv_quant", *DENSE), ""),
        (("method=lora", "evaluator=speed", "evaluator.speed.engine=merged"), "llama2-7b"),
        (("method=full", "evaluator=speed", "evaluator.speed.engine=merged"), ""),
    ],
)
def test_a_model_that_an_evaluator_has_beside_is_counted(
    words: tuple[str, ...], beside: str
) -> None:
    phase = predicted(*words).phase("evaluate")
    shape = known_shape(model_named(beside)) if beside else None
    assert phase is not None
    assert phase.memory.get("other models", 0) == (2 * shape.params if shape else 0)


def test_devices_share_what_they_hold() -> None:
    """With parts, what N devices hold of the blocks adds up to the whole; the rest each has."""
    shape = ModelShape.of(SHAPE).trained()
    whole, rest = (cost_of(s, "float32") for s in (shape, shape.only(())))
    one = held_by_one(whole, shape, "float32", Parallelism(4, "fsdp"))
    for name in ("trainable", "resident_bytes"):
        blocks = 4 * (getattr(one, name) - getattr(rest, name))
        assert blocks == pytest.approx(getattr(whole, name) - getattr(rest, name), abs=4)
    assert held_by_one(whole, shape, "float32", Parallelism(4)) == whole


def test_several_devices_need_less_of_each() -> None:
    spec = job("method=full", "train.batch_size=8").spec
    shape = known_shape(spec.model)
    assert shape is not None
    one, copies, parts = (
        predict(spec, shape, Machine(tflops=1), parallelism=p)
        for p in (None, Parallelism(4), Parallelism(4, "fsdp"))
    )
    memory = [p.phases[1].memory for p in (one, copies, parts)]
    assert memory[0]["optimiser"] == memory[1]["optimiser"] > 3.5 * memory[2]["optimiser"]
    assert parts.phases[1].peak < copies.phases[1].peak
    assert at_most(spec, 4).train[0].rows == 2
    assert one.flops == parts.flops and one.seconds == pytest.approx(4 * (parts.seconds or 0))


def test_blocks_of_attention_stay_beside_inner_ones_that_lie_in_mappings_of_their_own() -> None:
    smol = model_named("smollm2-135m").shape
    assert smol is not None
    shape, cost = ModelShape.of(smol), cost_of(ModelShape.of(smol), "float32")

    def allocator(tokens: int, exact: bool = False) -> float:
        one = Pass("prefill", 7, tokens, 7)
        return Peaks(shape, 4, exact=exact).inference(cost, one)["allocator"]

    inner, at_once = 4 * 1536 * 7, 4 * (4 * 576 + 3 * 1536) * 7  # bytes per position of 7 rows
    short, long = MAPPED // inner, MAPPED // inner + 1
    assert allocator(short) == pytest.approx(HOLES * at_once * short)
    left = 4 * (4 * 9 * 64 + 2 * 3 * 64 - 576) * 7 * long
    assert allocator(long) == pytest.approx(left + HOLES * (left + at_once * long))
    assert allocator(long, exact=True) == 0
