"""lm-eval's tasks through effbench, against lm-eval itself and on rows of our own."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from effbench.api.footprint import HEAD_ROWS
from effbench.api.points import UNNAMED
from effbench.api.spec import DatasetSpec
from effbench.config.compose import compose
from effbench.data import lm_eval_rows, lm_eval_tasks
from effbench.data.dataset import render
from effbench.data.overlap import Trained, kept
from effbench.evaluators.choices import Choices
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.models import load as models
from effbench.results.records import Record
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

PIQA = "evaluator.choices.tasks=[piqa]"


def rows_file(path: Path, count: int = 12, words: int = 4) -> Path:
    draw = random.Random(count + words)

    def text() -> str:
        return " ".join(draw.choice(["paint", "lake", "fork", "of", "glue"]) for _ in range(words))

    rows = [
        {"goal": text(), "sol1": text(), "sol2": text() + ".", "label": i % 2} for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def piqa(path: Path) -> list[str]:
    return ["evaluator=choices", PIQA, f"evaluator.choices.files.piqa.validation={path}"]


def of_task(record: Record, task: str) -> dict[str, Any]:
    return {m.name: m for m in record.metrics if m.task == task}


def test_the_head_reads_few_positions_at_once(bench: Bench) -> None:
    spec = bench.job("eval").spec
    [one] = Choices(tasks=["piqa"], batch_tokens=2048).passes(spec)
    assert (one.size, one.counted) == (2048, HEAD_ROWS)
    [one] = Choices(tasks=["piqa"], batch_tokens=100).passes(spec)
    assert (one.size, one.counted) == (100, 100)


# -- against lm-eval -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> tuple[Any, Any, Any]:
    """The default model in float32, its tokenizer and shape."""
    torch.set_num_threads(2)
    spec = compose("eval", []).spec.model
    loaded = models.load(spec, device="cpu", dtype=torch.float32)
    return loaded.model.eval().requires_grad_(False), loaded.tokenizer, loaded.shape


def holds(real: tuple[Any, Any, Any], name: str, shots: int | None, limit: int) -> None:
    """Compare every log-likelihood, every item and every metric with lm-eval's own."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model, tokenizer, shape = real
    settings = {"num_fewshot": shots, "limit": limit}
    cpu = torch.device("cpu")
    subject = Subject(model, Method(), UNNAMED, None, cpu, 0, 0, tokenizer=tokenizer, shape=shape)  # type: ignore[arg-type]
    found = Choices(tasks=[name], **settings).run(subject)
    loaded = {t.name: t for t in lm_eval_tasks.load_all(name, **settings)}
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=[t.task for t in loaded.values()],
        task_manager=lm_eval_tasks._manager(next(iter(loaded.values())).entry.folder),
        bootstrap_iters=0,
        **settings,
    )
    samples = [
        sample
        for task in loaded
        for sample in sorted(theirs["samples"][task], key=lambda s: s["doc_id"])
    ]
    expected = [response[0][0] for sample in samples for response in sample["resps"]]
    outcomes = {o.metric: o for o in found.outcomes if o.task == name}
    assert outcomes["loglikelihoods"].values == pytest.approx(expected, rel=2e-6, abs=1e-4)
    for metric in next(iter(loaded.values())).metrics:
        if metric != "perplexity":
            assert outcomes[metric].values == [sample[metric] for sample in samples]
    for task in loaded:
        for m in (m for m in found.metrics if m.task == task and m.obtained == "measured"):
            if m.name != "loglikelihood":
                reference = theirs["results"][task][f"{m.name},none"]
                assert m.value == pytest.approx(reference, rel=1e-5)


@pytest.mark.real
@pytest.mark.parametrize("name", ["winogrande", "lambada_openai"])
def test_every_item_is_scored_as_lm_eval_scores_it(real: Any, name: str) -> None:
    holds(real, name, 0, 2)


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shots", "limit"),
    [
        ("hellaswag", 0, 24),
        ("piqa", 0, 24),
        ("copa", 0, 24),
        ("arc_challenge", 0, 24),
        ("boolq", 0, 12),
        ("winogrande", 0, 40),
        ("openbookqa", 0, 24),
        ("sciq", 0, 12),
        ("social_iqa", 0, 16),
        ("commonsense_qa", 0, 24),
        ("rte", 0, 16),
        ("lambada_openai", None, 24),
        ("mmlu_anatomy", 5, 8),
        ("mmlu_stem", 1, 1),
    ],
)
def test_many_items_are_scored_as_lm_eval_scores_them(
    real: Any, name: str, shots: int | None, limit: int
) -> None:
    holds(real, name, shots, limit)


class Words:
    """A tokenizer of single characters that puts a token in front, as some do."""

    bos_token_id, eos_token_id = 1, 2

    def decode(self, token: int) -> str:
        return "<s>" if token == 1 else "</s>"

    def __call__(self, text: Any, add_special_tokens: bool = True) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [self(t, add_special_tokens)["input_ids"] for t in text]}
        front = [1] if add_special_tokens else []
        while text.startswith("<s>"):
            front, text = [*front, 1], text[3:]
        return {"input_ids": [*front, *map(ord, text)]}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self(text, add_special_tokens)["input_ids"]


@pytest.mark.parametrize(
    "pair",
    [("a b", " c"), ("a b  ", "c"), ("", "c d"), ("<s>a", " b"), ("", "<s>c"), ("\n a\n", "b")],
)
def test_texts_are_cut_into_tokens_as_lm_eval_cuts_them(pair: tuple[str, str]) -> None:
    from types import SimpleNamespace

    from lm_eval.models.huggingface import HFLM

    lm = object.__new__(HFLM)
    lm.tokenizer, lm.add_bos_token, lm.backend = Words(), None, "causal"
    lm.custom_prefix_token_id, lm.enable_thinking = None, False
    seen: list[Any] = []
    lm._loglikelihood_tokens = lambda reqs, **_: seen.extend(reqs)  # type: ignore[method-assign]
    lm.loglikelihood([SimpleNamespace(args=pair)], disable_tqdm=True)
    task: Any = SimpleNamespace(name="own", instances=lambda: [[SimpleNamespace(args=pair)]])
    ((request,),) = lm_eval_tasks.requests(task, Words())
    assert (request.context, request.continuation) == (seen[0][1], seen[0][2])


# -- on rows of our own ----------------------------------------------------------------------------


def test_a_task_gives_lm_evals_metrics_and_every_item(bench: Bench, tmp_path: Path) -> None:
    words = [*piqa(rows_file(tmp_path / "own.jsonl")), "evaluator.choices.limit=9"]
    record = bench.run("eval", *words)
    found = of_task(record, "piqa")
    assert found["acc"].n == found["acc_norm"].n == 9
    assert found["acc"].split == "validation"
    assert found["acc"].low <= found["acc"].value <= found["acc"].high
    assert found["num_fewshot"].value == 0 and found["num_fewshot"].obtained == "counted"
    assert found["task_version"].value == 1
    outcomes = {o.metric: o for o in record.outcomes}
    scores = outcomes["loglikelihoods"]
    pairs = list(zip(scores.values[::2], scores.values[1::2], strict=True))
    assert scores.clusters == [i for i in range(9) for _ in range(2)]
    assert outcomes["acc"].values == [float((b > a) == i % 2) for i, (a, b) in enumerate(pairs)]
    assert not any(m.name == "accuracy" for m in record.metrics)
    kept = bench.folder(bench.job("eval", *words)).path / "evaluations" / "choices.piqa.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    own = [json.loads(line) for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    for row, given, (a, b) in zip(rows, own[:9], pairs, strict=True):
        assert given["goal"] in row["prompt"]
        assert row["text"].strip() == given["sol2" if b > a else "sol1"]


def test_a_dataset_without_choices_will_do_for_tasks(bench: Bench, tmp_path: Path) -> None:
    words = piqa(rows_file(tmp_path / "own.jsonl"))
    text = tmp_path / "text.txt"
    text.write_text("One paragraph.\n\nAnother one.\n")
    job = bench.job(
        "eval", *words, "dataset=file", f"dataset.files.all={text}", "dataset.kind=text"
    )
    assert job.spec.evaluators[0].settings["fingerprint"]


def test_the_content_of_files_is_in_the_key(bench: Bench, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "own.jsonl")
    first = bench.job("eval", *piqa(path)).spec.key
    assert bench.job("eval", *piqa(path)).spec.key == first
    rows_file(path, 13)
    assert bench.job("eval", *piqa(path)).spec.key != first


def test_a_group_is_the_mean_over_all_its_items(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lm_eval_rows.GROUPS, "mmlu", ("mmlu_anatomy", "mmlu_virology"))
    words = ["evaluator=choices", "evaluator.choices.tasks=[mmlu]"]
    for name, count in (("mmlu_anatomy", 3), ("mmlu_virology", 9)):
        path = tmp_path / f"{name}.jsonl"
        rows = [
            {"question": f"{name} {i}?", "choices": ["a", "b", "c", "d"], "answer": (i * i) % 4}
            for i in range(count)
        ]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        words.append(f"evaluator.choices.files.{name}.test={path}")
    record = bench.run("eval", *words)
    parts = [of_task(record, name)["acc"] for name in ("mmlu_anatomy", "mmlu_virology")]
    whole = of_task(record, "mmlu")["acc"]
    assert [p.n for p in parts] == [3, 9] and whole.n == 12
    assert whole.value == pytest.approx((3 * parts[0].value + 9 * parts[1].value) / 12)
    outcomes = next(o for o in record.outcomes if o.task == "mmlu" and o.metric == "acc")
    assert outcomes.clusters == [0] * 3 + [1] * 9


def test_perplexity_is_that_of_the_last_words(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"one two {w}"}) + "\n" for w in "abcdefgh"))
    files = f"evaluator.choices.files.lambada_openai.test={path}"
    words = ["evaluator=choices", "evaluator.choices.tasks=[lambada_openai]", files]
    record = bench.run("eval", *words)
    found = of_task(record, "lambada_openai")
    mean = found["loglikelihood"]
    assert found["perplexity"].value == pytest.approx(math.exp(-mean.value))
    assert found["perplexity"].low == pytest.approx(math.exp(-mean.high))
    assert found["perplexity"].high == pytest.approx(math.exp(-mean.low))
    assert {o.metric for o in record.outcomes} == {"acc", "loglikelihood", "loglikelihoods"}


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluator.choices.tasks=[helaswag]"], "no task 'helaswag'"),
        (["evaluator.choices.tasks=[piqa,piqa]"], "names 'piqa' twice"),
        (["evaluator.choices.tasks=[gsm8k_cot]"], "generated text"),
        (["evaluator.choices.tasks=[truthfulqa_mc1]"], "needs split 'validation'"),
        ([PIQA, "evaluator.choices.num_fewshot=3"], "needs split 'train'"),
        (
            ["evaluator.choices.tasks=[truthfulqa_mc2]", "evaluator.choices.num_fewshot=1"],
            "no exam",
        ),
        ([PIQA, "evaluator.choices.files.piqua.validation=x.jsonl"], "is not a file"),
        ([PIQA, f"evaluator.choices.files.piqua.validation={__file__}"], "no task 'piqua'"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_at_once(
    bench: Bench, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effbench.util.hf.hub_reachable", lambda: False)
    with pytest.raises(UserError, match=message):
        bench.job("eval", "evaluator=choices", *words)


def test_items_longer_than_the_model_are_refused(bench: Bench, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "own.jsonl", 3, words=4000)
    with pytest.raises(UserError, match="3 of 3 items of piqa are longer") as error:
        bench.run("eval", *piqa(path))
    assert "num_fewshot" in error.value.hint


def test_rows_that_were_trained_on_are_not_evaluated(bench: Bench, tmp_path: Path) -> None:
    path = rows_file(tmp_path / "own.jsonl", 40)
    data = [
        "dataset=file",
        f"dataset.files.all={path}",
        "dataset.prompt='{goal}'",
        "dataset.answer='{sol1}'",
    ]
    train = ["method=lora", "train.max_steps=1", "train.batch_size=1"]
    refusal = r"Task piqa .* evaluates the rows that dataset 'own\.jsonl'"
    with pytest.raises(UserError, match=refusal):
        bench.run("train", *data, *train, *piqa(path))
    bench.run("train", *data, *train, *piqa(path), "dataset.allow_overlap=true")
    parent = bench.run("train", *data, *train, "seed=1").key
    with pytest.raises(UserError, match="allow_overlap"):
        bench.run("eval", f"from={parent}", *piqa(path))
    other = rows_file(tmp_path / "other.jsonl", 7)
    bench.run("eval", f"from={parent}", *piqa(other))


@pytest.mark.parametrize(
    ("config", "name", "shared"),
    [
        ("piqa", "piqa", True),
        ("piqa", "hellaswag", False),
        ("gsm8k-test", "gsm8k", True),
        ("gsm8k", "gsm8k", False),  # trains on another split of the same set
        ("arc-easy", "arc_easy", False),  # validation rows; lm-eval evaluates the test rows
        ("arithmetic", "piqa", False),
    ],
)
def test_the_sets_of_our_datasets_are_known(config: str, name: str, shared: bool) -> None:
    dataset = compose("eval", [f"dataset={config}", "model=tiny"]).spec.dataset
    assert lm_eval_tasks.overlaps(name, dataset) == shared


@pytest.mark.real
def test_rows_of_tasks_are_found_by_what_they_hold() -> None:
    task = lm_eval_rows.rows_of(lm_eval_rows.find("piqa"), "validation", {})[:40]
    rows = [{k: row[k] for k in ("goal", "sol1", "sol2", "label")} for row in task]
    own = DatasetSpec(name="own", source="file", kind="pairs", prompt="{goal}", answer=" {sol1}")
    own = replace(own, known_by="source")

    def found(rows: list[dict[str, Any]], name: str = "piqa", limit: int | None = None) -> bool:
        trained = Trained()
        trained.add(kept(list(render(rows, own, "train"))))
        return lm_eval_tasks.overlaps(name, own, {}, trained, limit)

    assert found(rows), "the rows that the asset holds, in a file of one's own"
    assert not found(rows, "hellaswag")
    assert not found([row for row in rows if row["label"] == 1]), "a wrong answer to the question"
    last = max(n for n, row in enumerate(rows) if row["label"] == 0)
    assert found(rows[last : last + 1]) and not found(rows[last : last + 1], limit=last)
    extra = [{**row, "goal": f"{row['goal']} Say it."} for row in rows]
    assert not found(extra) and found([*extra, rows[last]])


@pytest.mark.real
@pytest.mark.parametrize(
    "name", [n for n, e in lm_eval_tasks.TASKS.items() if e.stored and "mmlu" not in n]
)
def test_every_task_says_what_its_rows_ask_and_answer(name: str) -> None:
    known = lm_eval_rows.evaluated(lm_eval_rows.find(name), {}, limit=3)
    constant = {"boolq", "rte", "sst2", "lambada_openai"}
    assert len(known) == 3 and all(row.asked for row in known)
    assert all(bool(row.right_source) == (name not in constant) for row in known)


def test_sets_of_the_hub_are_known() -> None:
    def trained(hub: str, split: str, subset: str = "") -> DatasetSpec:
        return DatasetSpec(
            name="own", source="hub", kind="pairs", id=hub, subset=subset, splits={"train": split}
        )

    assert lm_eval_tasks.overlaps("piqa", trained("ybisk/piqa", "validation[:90%]"))
    assert not lm_eval_tasks.overlaps("piqa", trained("ybisk/piqa", "train"))
    assert lm_eval_tasks.overlaps("arc_easy", trained("allenai/ai2_arc", "test", "ARC-Easy"))
    assert not lm_eval_tasks.overlaps(
        "arc_easy", trained("allenai/ai2_arc", "test", "ARC-Challenge")
    )
    assert lm_eval_tasks.overlaps("mmlu", trained("cais/mmlu", "test", "virology"))
