"""Generated answers against transformers' and lm-eval's own, and how they are graded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from subjects import HARDWARE, by_name, subject_of, text_file

from effbench.api.schema import plain
from effbench.config.compose import compose
from effbench.evaluators.generation import Generation, end_tokens, flattened
from effbench.evaluators.questions import extracted
from effbench.evaluators.subject import Subject
from effbench.models import load as models
from effbench.nn.decode.generate import Generated, Prompt, Sampling, generate, left_padded, sample
from effbench.nn.decode.session import CachedSession
from effbench.results.journal import Journal
from effbench.testing.bench import Bench
from effbench.util.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def subject(bench: Bench) -> Subject:
    return subject_of(bench, "dataset=arithmetic", "+dataset.limit.test=6")


def prompts_of(lengths: Sequence[int], **settings: Any) -> list[Prompt]:
    draws = torch.Generator().manual_seed(4)
    settings = {"max_new_tokens": 8, **settings}
    ids = [torch.randint(4, 260, (n,), generator=draws).tolist() for n in lengths]
    return [Prompt(i, seed=n, **settings) for n, i in enumerate(ids)]


def decoded(subject: Subject, prompts: Sequence[Prompt], **settings: Any) -> list[Generated]:
    def text(ids: list[int]) -> str:
        return str(subject.data.tokenizer.decode(ids, skip_special_tokens=True))

    with torch.inference_mode():
        session = CachedSession(subject.model)
        return generate(session, prompts, text, device=CPU, **settings)


# -- the loop ----------------------------------------------------------------------------------


def test_greedy_is_the_argmax_of_full_passes(subject: Subject) -> None:
    prompts = prompts_of([9, 4, 13, 1])
    found = decoded(subject, prompts)
    for prompt, made in zip(prompts, found, strict=True):
        ids = list(prompt.ids)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(subject.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert made.ids == ids[len(prompt.ids) :]
        assert not made.ended


def test_the_batch_changes_nothing(subject: Subject) -> None:
    for sampling in (Sampling(), Sampling(0.8), Sampling(1.5, top_k=40, top_p=0.9)):
        prompts = prompts_of([9, 4, 13, 1, 7])
        together = decoded(subject, prompts, sampling=sampling)
        turned = decoded(subject, prompts[::-1], sampling=sampling)[::-1]
        alone = [decoded(subject, [p], sampling=sampling)[0] for p in prompts]
        assert together == turned == alone


def test_a_cache_is_made_at_its_full_size_at_once(subject: Subject) -> None:
    asked: list[tuple[int, ...]] = []

    class Ready(CachedSession):
        def reserve(self, *sizes: int) -> None:
            asked.append(sizes)

    prompts = [*prompts_of([9, 4]), *prompts_of([6], max_new_tokens=11)]
    generate(Ready(subject.model), prompts, str, device=CPU)
    assert asked == [(3, 9 + 11, 9)]


def test_any_padding_token_will_do(subject: Subject) -> None:
    prompts = prompts_of([9, 4, 1])
    results = [decoded(subject, prompts, pad_token_id=pad) for pad in (0, 2, 99)]
    assert results[0] == results[1] == results[2]


def test_prompts_are_padded_on_the_left() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]], 9, CPU)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask is not None and mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left_padded([[5], [6]], 9, CPU)[1] is None


class Scripted:
    """A session whose rows say what they are told, and that counts the rows of each step."""

    def __init__(self, says: Sequence[str], tokenizer: Any) -> None:
        self.says = [tokenizer(s)["input_ids"] for s in says]
        self.rows = list(range(len(says)))
        self.place = 0
        self.sizes: list[int] = []

    def _logits(self) -> torch.Tensor:
        logits = torch.zeros(len(self.rows), 512)
        for i, row in enumerate(self.rows):
            logits[i, self.says[row][self.place]] = 1
        self.place += 1
        self.sizes.append(len(self.rows))
        return logits

    def prefill(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        return self._logits()

    def step(self, input_ids: torch.Tensor) -> torch.Tensor:
        told = [self.says[row][self.place - 1] for row in self.rows]
        assert input_ids.tolist() == [[t] for t in told]
        return self._logits()

    def reorder(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[i] for i in rows.tolist()]

    def kv_bytes(self) -> int:
        return 0


def test_stops_end_a_row_and_finished_rows_leave_the_batch(subject: Subject) -> None:
    tokenizer = subject.data.tokenizer
    says = ["4.\n\nQ: and", "five<eos>xxx", "abcdefghij", "12Q:34\n\n.."]
    session = Scripted(says, tokenizer)
    prompts = [
        dataclasses.replace(p, stop=("Q:", "\n\n"), stop_ids=frozenset({tokenizer.eos_token_id}))
        for p in prompts_of([3, 3, 3, 3])
    ]
    text = tokenizer.decode
    found = generate(session, prompts, lambda i: text(i, skip_special_tokens=True), device=CPU)
    assert [g.text for g in found] == ["4.", "five", "abcdefgh", "12"]
    assert [g.ended for g in found] == [True, True, False, True]
    assert [len(g.ids) for g in found] == [4, 5, 8, 4]
    assert session.sizes == [4, 4, 4, 4, 2, 1, 1, 1]


# -- sampling ----------------------------------------------------------------------------------


def drawn(sampling: Sampling, n: int = 4000) -> torch.Tensor:
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]]).expand(n, -1)
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return torch.bincount(sample(logits, uniform, sampling), minlength=5)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(2.0, top_k=3),
        Sampling(1.0, top_p=0.7),
        Sampling(1.3, top_k=4, top_p=0.8),
    ],
)
def test_samples_follow_transformers_distribution(sampling: Sampling) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = TemperatureLogitsWarper(sampling.temperature)(
        torch.zeros(1, 1), torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]])
    )
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(torch.zeros(1, 1), logits)
    if sampling.top_p < 1:
        logits = TopPLogitsWarper(sampling.top_p)(torch.zeros(1, 1), logits)
    p = logits[0].double().softmax(-1).numpy()
    counts = drawn(sampling).numpy()
    assert (counts[p == 0] == 0).all()
    assert stats.chisquare(counts[p > 0], 4000 * p[p > 0]).pvalue > 0.001


@pytest.mark.parametrize(
    ("sampling", "last"),
    [(Sampling(1.0), 0), (Sampling(1.0, top_k=2), 2), (Sampling(1.0, top_p=0.5), 1)],
)
def test_the_ends_of_the_uniform_number(sampling: Sampling, last: int) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0]]).expand(2, -1)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample(logits, ends, sampling).tolist() == [1, last]


def test_another_seed_is_another_answer(subject: Subject) -> None:
    evaluator = Generation(tasks=(), max_new_tokens=6, temperature=1.0)
    kept: list[list[str]] = []
    for seed in (0, 0, 1):
        subject = dataclasses.replace(
            subject, seed=seed, keep=lambda name, rows: kept.append([r["text"] for r in rows])
        )
        evaluator.run(subject)
    assert kept[0] == kept[1] != kept[2]


# -- the run's own dataset ---------------------------------------------------------------------


def saying(subject: Subject, says: Sequence[str]) -> Subject:
    """Return the subject with a method whose sessions say these texts, in order of the rows."""
    texts = [t.prompt for t in subject.data.rows("test")]
    tokenizer = subject.data.tokenizer
    told = {tuple(tokenizer(t)["input_ids"]): s for t, s in zip(texts, says, strict=True)}

    class Session(Scripted):
        def __init__(self) -> None:
            pass

        def prefill(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
            rows = [tuple(i for i in row if i != 0) for row in input_ids.tolist()]
            super().__init__([told[r] + "<eos>" for r in rows], tokenizer)
            return super().prefill(input_ids)

    class Says(type(subject.method)):  # type: ignore[misc]
        def session(self, model: torch.nn.Module, *_: Any) -> Any:
            return Session()

    return dataclasses.replace(subject, method=Says())


def test_answers_of_the_dataset_are_matched(subject: Subject) -> None:
    right = [t.answer for t in subject.data.rows("test")]
    said = [right[0], right[1] + " ", right[2] + "0", "no", right[4], ""]
    found = Generation(tasks=()).run(saying(subject, said))
    [outcome] = [o for o in found.outcomes if o.metric == "exact_match"]
    assert outcome.values == [1, 1, 0, 0, 1, 0]
    metrics = by_name(found)
    assert metrics["exact_match"].value == 0.5 and metrics["exact_match"].n == 6
    assert metrics["output_tokens"].value == sum(len(s) + 1 for s in said) / 6
    assert metrics["truncated"].value == 0
    assert outcome.task == "" and outcome.split == "test"


def test_what_counts_in_an_answer() -> None:
    assert extracted("so 3 + 4 = 7\n#### 7", r"#### (-?\d+)") == "7"
    assert extracted("first 5, then 12.", r"-?\d+") == "12"
    assert extracted("none", r"\d") is None
    assert extracted("  the whole \n", "") == "the whole"


def test_an_interrupted_evaluation_goes_on(subject: Subject, tmp_path: Path) -> None:
    evaluator = Generation(tasks=(), max_new_tokens=5, batch_tokens=90, temperature=0.9)
    kept: list[Any] = []
    subject = dataclasses.replace(subject, keep=lambda name, rows: kept.append([name, *rows]))
    expected, made = evaluator.run(subject), subject.method.session
    calls = [0]

    class Stops(type(subject.method)):  # type: ignore[misc]
        limit = 2

        def session(self, model: torch.nn.Module, *_: Any) -> Any:
            calls[0] += 1
            if calls[0] > self.limit:
                raise KeyboardInterrupt
            return made(model)

    stopped = dataclasses.replace(
        subject,
        method=Stops(),
        journal=lambda name, items: Journal(tmp_path / f"{name}.items", items),
    )
    with pytest.raises(KeyboardInterrupt):
        evaluator.run(stopped)
    Stops.limit, calls[0] = 10**6, 0
    assert evaluator.run(stopped) == expected
    assert kept[0] == kept[1]
    rest, calls[0] = calls[0], 0
    evaluator.run(dataclasses.replace(stopped, journal=subject.journal))
    assert rest + 2 == calls[0] >= 3


def test_its_passes_are_those_of_a_full_batch(bench: Bench) -> None:
    spec = bench.job("eval").spec
    prefill, decode = Generation(tasks=(), max_new_tokens=36, batch_tokens=1000).passes(spec)
    assert (prefill.kind, prefill.rows, prefill.tokens) == ("prefill", 10, 64)
    assert (decode.kind, decode.rows, decode.tokens) == ("decode", 10, 100)
    assert all(p.counted == 10 for p in (prefill, decode))


def test_its_passes_are_those_of_the_questions_where_there_is_data(subject: Subject) -> None:
    spec = compose("eval", []).spec
    evaluator = Generation(tasks=(), max_new_tokens=5, batch_tokens=80)
    passes = evaluator.passes(spec, subject.data)
    [asked] = evaluator._questions(subject.data)
    lengths = sorted((len(p.ids) for p in evaluator._prompts(subject, asked)), reverse=True)
    assert sum(p.rows for p in passes if p.kind == "decode") == len(lengths) == 6
    assert [p.tokens for p in passes][:2] == [lengths[0], lengths[0] + 5]
    assert all(p.rows * (p.tokens + 5) <= 80 for p in passes if p.kind == "prefill")


def test_texts_are_kept_in_the_run_folder(bench: Bench) -> None:
    words = ["evaluator=generation", "evaluator.generation.tasks=[]", *HARDWARE]
    words += ["evaluator.generation.limit=3", "evaluator.generation.max_new_tokens=4"]
    record = bench.run("eval", *words)
    path = bench.store.run(record.key).path / "evaluations" / "generation.test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3
    assert set(rows[0]) == {"id", "prompt", "text", "exact_match", "output_tokens", "truncated"}
    assert rows[0]["prompt"].startswith("Question: What is")
    assert "Question: What is" not in json.dumps([vars(o) for o in record.outcomes])


# -- lm-eval's tasks ---------------------------------------------------------------------------

GSM8K = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"},
    {"question": "What is 1,000 + 1?", "answer": "Add.\n#### 1,001"},
    {"question": "What is 9 - 4?", "answer": "Subtract.\n#### 5"},
]


def gsm8k(folder: Path) -> dict[str, dict[str, str]]:
    path = folder / "gsm8k.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in GSM8K))
    return {"gsm8k": {"test": str(path)}}


def test_tasks_are_graded_through_lm_evals_filters(bench: Bench, tmp_path: Path) -> None:
    subject = subject_of(bench, "dataset=arithmetic")
    evaluator = Generation(tasks=("gsm8k",), num_fewshot=0, files=gsm8k(tmp_path))
    [questions] = list(evaluator._questions(subject.data))
    assert questions.asked[0].prompt == "Question: What is 2 + 3?\nAnswer:"
    assert questions.asked[0].until[0] == "Question:" and questions.asked[0].temperature == 0
    assert questions.grade(0, " It is #### 5") == {
        "exact_match_strict_match": 1,
        "exact_match_flexible_extract": 1,
    }
    assert questions.grade(1, "so the sum is $1,001")["exact_match_flexible_extract"] == 1
    assert questions.grade(1, "so the sum is $1,001")["exact_match_strict_match"] == 0
    assert questions.grade(2, "6") == {
        "exact_match_strict_match": 0,
        "exact_match_flexible_extract": 0,
    }


def test_a_task_has_metrics_of_its_own(bench: Bench, tmp_path: Path) -> None:
    subject = subject_of(bench, "dataset=arithmetic")
    kept: list[str] = []
    subject = dataclasses.replace(subject, keep=lambda name, rows: kept.append(name))
    settings: dict[str, Any] = {"num_fewshot": 0, "files": gsm8k(tmp_path), "max_new_tokens": 5}
    result = Generation(tasks=("gsm8k",), limit=2, **settings).run(subject)
    assert {(m.name, m.task, m.n) for m in result.metrics} == {
        (name, "gsm8k", 2)
        for name in (
            "exact_match_strict_match",
            "exact_match_flexible_extract",
            "output_tokens",
            "truncated",
        )
    }
    assert kept == ["gsm8k"]


def test_instructions_are_judged_on_a_file_of_rows(bench: Bench, tmp_path: Path) -> None:
    rows = [
        {
            "key": 1,
            "prompt": "Say it without a comma.",
            "instruction_id_list": ["punctuation:no_comma", "change_case:english_capital"],
            "kwargs": [{}, {}],
        },
        {
            "key": 2,
            "prompt": "Answer in French.",
            "instruction_id_list": ["language:response_language"],
            "kwargs": [{"language": "fr"}],
        },
    ]
    path = tmp_path / "ifeval.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    files = {"ifeval": {"train": str(path)}}
    evaluator = Generation(tasks=("ifeval",), files=files, max_new_tokens=4)
    subject = subject_of(bench, "dataset=arithmetic")
    [questions] = list(evaluator._questions(subject.data))
    assert questions.asked[0].max_new_tokens == 1280
    assert questions.grade(0, "no comma")["inst_level_strict_acc"] == [1.0, 0.0]
    found = by_name(evaluator.run(subject))
    assert found["prompt_level_strict_acc"].n == 1 and found["inst_level_strict_acc"].n == 2
    assert found["left_out"].value == 1 and found["left_out"].obtained == "counted"


def test_the_rows_of_a_file_are_in_the_key(bench: Bench, tmp_path: Path) -> None:
    place = gsm8k(tmp_path)["gsm8k"]["test"]
    words = ["evaluator=generation", "evaluator.generation.tasks=[gsm8k]"]
    words += ["evaluator.generation.num_fewshot=0"]
    words += [f"evaluator.generation.files.gsm8k.test={place}"]
    before = bench.job("eval", *words).spec
    assert before.evaluators[0].settings["fingerprint"]
    Path(place).write_text(json.dumps(GSM8K[0]))
    assert bench.job("eval", *words).spec.key != before.key


def test_several_grades_of_one_answer_are_a_cluster() -> None:
    values, ids, clusters = flattened([[1.0, 0.0], [1.0]], ["a", "b"])
    assert (values, clusters) == ([1.0, 0.0, 1.0], [0, 0, 1])
    assert len(set(ids)) == 3
    assert flattened([1.0, 0.0], ["a", "b"]) == ([1.0, 0.0], ["a", "b"], [])


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=[hellaswag]"], "hellaswag is no generation task"),
        (["tasks=[gsm9k]"], "There is no task 'gsm9k'"),
        (["tasks=[]", "pattern='('"], "is no regular expression"),
        (["tasks=[]", "top_p=0"], "top_p=0 is not possible"),
        (["tasks=[]", "temperature=-1"], "temperature=-1 is not possible"),
    ],
)
def test_settings_that_cannot_be_are_refused(bench: Bench, words: list[str], message: str) -> None:
    settings = [f"evaluator.generation.{w}" for w in words]
    with pytest.raises(UserError, match=message):
        bench.job("eval", "evaluator=generation", *settings)


def test_what_is_asked_is_the_dataset_where_that_has_other_questions(bench: Bench) -> None:
    def tasks(*words: str) -> list[str]:
        [plugin] = bench.job("eval", "evaluator=generation", *words).spec.evaluators
        return list(plugin.settings["tasks"])

    assert tasks("dataset=arithmetic") == []
    for dataset in ("gsm8k-test", "prose", "noisy-pairs", "noisy-ratings"):
        assert tasks(f"dataset={dataset}") == ["gsm8k_cot"], dataset
    named = "evaluator.generation.tasks=[gsm8k_cot]"
    assert tasks("dataset=arithmetic", named) == ["gsm8k_cot"]
    other = "evaluator.generation.tasks=[gsm8k_cot_zeroshot]"
    assert tasks("dataset=arithmetic", other) == ["gsm8k_cot_zeroshot"]


def test_what_was_asked_stays_where_a_run_starts_from_its_spec(tmp_path: Path) -> None:
    words = ["model=tiny", "dataset=arithmetic", "evaluator=generation", *HARDWARE]
    job = compose("eval", [*words, "evaluator.generation.tasks=[gsm8k_cot]"])
    file = tmp_path / "my.yaml"
    file.write_text(json.dumps(plain(job.spec)))
    assert compose("eval", [str(file)]).spec.key == job.spec.key


def test_plain_text_has_no_prompts(bench: Bench, tmp_path: Path) -> None:
    words = ["evaluator=generation", "evaluator.generation.tasks=[]"]
    with pytest.raises(UserError, match="it is plain text"):
        bench.job("eval", *words, *text_file(tmp_path, ["a", "b"]))


def test_more_than_the_positions_names_the_task_and_a_remedy(
    bench: Bench, subject: Subject, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"arithmetic: a prompt of \d+ tokens .* 512 positions"):
        Generation(tasks=(), max_new_tokens=500).run(subject)
    long = Generation(tasks=("gsm8k",), num_fewshot=0, files=gsm8k(tmp_path), max_new_tokens=490)
    with pytest.raises(UserError, match="gsm8k: a prompt of") as error:
        long.run(subject)
    assert "num_fewshot" in error.value.hint and "max_new_tokens" in error.value.hint


@pytest.mark.parametrize("pattern", [r"#### (\d+)", "(.*)"])  # the second fits every answer's end
def test_a_pattern_that_fits_no_answer_is_refused(subject: Subject, pattern: str) -> None:
    with pytest.raises(UserError, match="matches nothing in the answer"):
        Generation(tasks=(), pattern=pattern).run(subject)


def test_chat_needs_a_template(bench: Bench, tmp_path: Path) -> None:
    evaluator = Generation(tasks=("gsm8k",), num_fewshot=0, files=gsm8k(tmp_path), chat=True)
    with pytest.raises(UserError, match="no chat template"):
        evaluator.run(subject_of(bench, "dataset=arithmetic"))
    with pytest.raises(UserError, match="no chat template"):
        Generation(tasks=()).run(subject_of(bench, "dataset=arithmetic", "dataset.chat=true"))


def test_logits_that_are_not_numbers_name_the_layer(subject: Subject) -> None:
    with torch.no_grad():
        subject.model.model.layers[2].mlp.up_proj.weight.fill_(float("nan"))  # type: ignore
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj"):
        Generation(tasks=(), max_new_tokens=3).run(subject)


def test_a_stop_that_is_a_token_of_its_own_ends_an_answer(subject: Subject) -> None:
    evaluator = Generation(tasks=(), until=("<unk>", "\n"))
    [questions] = list(evaluator._questions(subject.data))
    prompt = evaluator._prompts(subject, questions)[0]
    tokenizer = subject.data.tokenizer
    assert prompt.stop_ids == {tokenizer.eos_token_id, tokenizer.unk_token_id}
    assert prompt.stop == ("<unk>", "\n")


def test_all_end_tokens_count(subject: Subject) -> None:
    subject.model.generation_config.eos_token_id = [7, 9]  # type: ignore[union-attr]
    assert end_tokens(subject) == {subject.data.tokenizer.eos_token_id, 7, 9}


# -- the real model ----------------------------------------------------------------------------

ASKED = [
    "The capital of France is",
    "Question: What is 12 plus 30?\nAnswer:",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
]


@pytest.mark.real
def test_greedy_is_that_of_transformers() -> None:
    spec = compose("eval", ["model=smollm2-135m"]).spec.model
    loaded = models.load(spec, device="cpu", dtype=torch.float32)
    tokenizer, model = loaded.tokenizer, loaded.model
    prompts = [Prompt(tokenizer(t)["input_ids"], 16, frozenset({2})) for t in ASKED]
    with torch.inference_mode():
        found = generate(CachedSession(model), prompts, tokenizer.decode, device=CPU)
    ids, mask = left_padded([p.ids for p in prompts], tokenizer.pad_token_id, CPU)
    theirs = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, max_new_tokens=16, do_sample=False
    )[:, ids.shape[1] :]
    for ours, row in zip(found, theirs.tolist(), strict=True):
        assert ours.ids == row[: len(ours.ids)]
        assert len(ours.ids) == 16 or ours.ids[-1] == 2


@pytest.mark.real
@pytest.mark.slow
def test_answers_are_those_of_lm_eval(bench: Bench) -> None:
    from lm_eval.models.huggingface import HFLM

    from effbench.data import lm_eval_tasks

    words = ["model=smollm2-135m", "dataset=arithmetic"]
    subject = subject_of(bench, *words, strength=1)
    kept: dict[str, list[Any]] = {}
    subject = dataclasses.replace(subject, keep=lambda name, rows: kept.update({name: rows}))
    names = ("gsm8k_cot", "gsm8k_cot_zeroshot")
    Generation(tasks=names, limit=2, max_new_tokens=40).run(subject)
    theirs = HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=2)
    for name in names:
        asked = [i[0] for i in lm_eval_tasks.load(name, limit=2).instances()]
        for instance in asked:
            instance.args[1]["max_gen_toks"] = 40
        expected = theirs.generate_until(asked, disable_tqdm=True)
        assert [row["text"] for row in kept[name]] == expected
    assert any(row["output_tokens"] > 10 for row in kept["gsm8k_cot"])
