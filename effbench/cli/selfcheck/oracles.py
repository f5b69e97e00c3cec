"""Metrics of models whose answers are known beforehand, made of the tiny random model.

A method that changes nothing forgets nothing and agrees with its base in everything. A session is
as fast as itself, and the parts of a time take the energy of the whole. A model that always says
the same has a known accuracy, and a known distance to the model that gives every token the same
probability; that one has the vocabulary as its perplexity.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from effbench.api import registry
from effbench.api.method_types import Context
from effbench.api.plugins import make_method
from effbench.api.points import UNNAMED
from effbench.api.shape import ModelShape
from effbench.api.spec import DatasetSpec, Plugin
from effbench.api.weights import find, is_packed
from effbench.cli.selfcheck.base import Check
from effbench.config.compose import compose
from effbench.config.composed import settings_of
from effbench.data.dataset import Data
from effbench.evaluators.base import Result
from effbench.evaluators.choices import Choices
from effbench.evaluators.fidelity import Fidelity
from effbench.evaluators.generation import Generation
from effbench.evaluators.perplexity import Perplexity
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.methods.none import Unchanged
from effbench.models import load as models
from effbench.nn.decode.session import greedy
from effbench.nn.quant.linears import pack_linears
from effbench.resources.energy import Meter
from effbench.resources.timing import interleaved

CPU = torch.device("cpu")
STRENGTH = 8.0
"""What the random matrices are multiplied by, so that the model's answers differ."""
TIMING_SLACK = 0.02
"""How far from a 95 % interval the ratio 1 may lie: such intervals miss it, but not by much."""
PERFECT = ("agreement", "probability_loyalty", "label_loyalty", "answer_loyalty")
"""What is 1 for a model beside itself; all else under `fidelity` is 0."""
OPTIONS = ("yyy", "nnn", "ooo", "ppp")
"""Answers of the made-up questions; the first is always the right one."""


def run(short: bool) -> Iterator[Check]:
    """Yield every oracle; the short form takes two methods that change nothing, not all."""
    spec = compose("eval", ["model=tiny", "dataset=arithmetic", "+dataset.limit.test=24"]).spec
    for name in ("none", "lora") if short else identities():
        yield from identity(name, spec.dataset)
    yield speed(40 if short else 200)
    yield energy(0.1 if short else 0.5)
    yield bits(spec.dataset)
    with tempfile.TemporaryDirectory() as folder:
        made_up = write_questions(spec.dataset, Path(folder) / "questions.jsonl")
        yield from forced(made_up)
        yield from uniform(made_up)
        yield distance(made_up)


# -- a method that changes nothing -------------------------------------------------------------


def identities() -> list[str]:
    """Return the methods that have a setting at which they change nothing."""
    return [
        n for n in registry.names("methods") if registry.find("methods", n).identity is not None
    ]


def identity(name: str, dataset: DatasetSpec) -> Iterator[Check]:
    """Yield how far a method, put in but not trained, is from its base."""
    subject, base = untrained(name, dataset)
    apart = 0.0
    for evaluator in (Perplexity(), Choices()):
        before = evaluator.run(base)
        for point in subject.method.points():
            with subject.method.at(subject.model, point):
                apart = max(apart, difference(before, evaluator.run(subject)))
    # The head on some positions or on all of them is one product or another: rounding of float32.
    yield Check(f"forgetting of {name}", apart, 0, 1e-4, "", "outcome by outcome, not trained")
    for metric in Fidelity().run(subject).metrics:
        exact = float(metric.name in PERFECT)
        yield Check(f"{metric.name} of {name}", metric.value, exact, exact, metric.unit)


def untrained(name: str, dataset: DatasetSpec) -> tuple[Subject, Subject]:
    """Return the tiny model with a method put in but not trained, and without it."""
    cls = registry.find("methods", name)
    settings = {**settings_of(cls), **cls.needs, **cls.identity}
    method: Method = make_method(Plugin(name, settings))

    def base() -> torch.nn.Module:
        model = tiny_model()
        if is_packed(method.weights):
            pack_linears(model, find(method.weights)(), torch.float32)
        return model

    ctx = Context(
        seed=0,
        device=CPU,
        dtype=torch.float32,
        generator=torch.Generator().manual_seed(0),
        load_model=lambda other: tiny_model(),
    )
    model = method.prepare(base(), ctx).requires_grad_(False).eval()
    plain = subject_of(base(), dataset)
    return replace(plain, model=model, method=method, load_base=base), plain


def difference(one: Result, two: Result) -> float:
    """Return the largest difference between the outcomes of any item."""
    pairs = zip(one.outcomes, two.outcomes, strict=True)
    return max(abs(a - b) for o, p in pairs for a, b in zip(o.values, p.values, strict=True))


def speed(repeats: int) -> Check:
    """Return how far 1 lies from the interval of a session's speed against itself."""
    model, prompt = tiny_model(), torch.arange(4, 36)[None]

    def decode() -> None:
        greedy(Unchanged().session(model), prompt, 6)

    found = interleaved(decode, decode, repeats, drop=3).speedup
    outside = max(found.low - 1, 1 - found.high, 0.0)
    detail = f"ratio {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"
    return Check(
        "speed of a session to itself, outside its interval", outside, 0, TIMING_SLACK, "", detail
    )


def energy(seconds: float) -> Check:
    """Return the energy of windows that follow each other over that of one window around them.

    Args:
        seconds: Length of each window.
    """
    parts, matrix = [], torch.ones(64, 64)
    with Meter() as around:
        for _ in range(4):
            with Meter() as part:
                end = time.perf_counter() + seconds
                while time.perf_counter() < end:
                    matrix = (matrix @ matrix).clamp(max=1)
            parts.append(part.energy)
    share = sum(p.joules for p in parts) / around.energy.joules
    return Check("energy of windows to that of all", share, 0.95, 1.05, "", around.energy.obtained)


# -- definitions ---------------------------------------------------------------------------------


def bits(dataset: DatasetSpec) -> Check:
    """Return bits per byte over loss x tokens / ln 2 / bytes."""
    subject = subject_of(tiny_model(), dataset)
    found = values(Perplexity().run(subject))
    size = sum(len(t.answer.encode()) for t in subject.data.rows("test"))
    expected = found["loss"] * found["loss_tokens"] / math.log(2) / size
    return Check(
        "bits per byte, by definition", found["bits_per_byte"] / expected, 1 - 1e-9, 1 + 1e-9
    )


# -- models that always say the same -------------------------------------------------------------


def forced(dataset: DatasetSpec) -> Iterator[Check]:
    """Yield the accuracy of a model that can say the right answer only, and of one that cannot."""
    for letter, right in (("y", 1.0), ("n", 0.0)):
        subject = subject_of(tiny_model(), dataset)
        say(subject, letter, gap=20)
        found = values(Choices().run(subject))
        found |= values(Generation(tasks=(), max_new_tokens=3).run(subject))
        for name in ("accuracy", "accuracy_norm", "exact_match"):
            yield Check(f"{name} of a model that says {letter!r}", found[name], right, right)


def uniform(dataset: DatasetSpec) -> Iterator[Check]:
    """Yield perplexity and accuracy of a model that gives every token the same probability."""
    subject = subject_of(tiny_model(), dataset)
    say(subject, "y", gap=0)
    found = values(Perplexity().run(subject)) | values(Choices().run(subject))
    size = vocabulary(subject)
    yield Check(
        "perplexity of a uniform model", found["perplexity"], size * (1 - 1e-5), size * (1 + 1e-5)
    )
    chance = 1 / len(OPTIONS)  # the right answer stands equally often at each place
    yield Check("accuracy of a uniform model", found["accuracy"], chance, chance)


def distance(dataset: DatasetSpec) -> Check:
    """Return KL(uniform || q) over its closed form, q a model that prefers one token by a gap g.

    KL = ln(e^g + V - 1) - ln V - g / V for a vocabulary of V.
    """
    gap = 3.0
    uniform = subject_of(tiny_model(), dataset)
    say(uniform, "y", gap=0)
    subject = subject_of(tiny_model(), dataset)
    say(subject, "y", gap=gap)
    subject.load_base = lambda: uniform.model
    found = values(Fidelity().run(subject))["kl"]
    size = vocabulary(subject)
    exact = math.log(math.exp(gap) + size - 1) - math.log(size) - gap / size
    return Check("kl of a uniform model to a known one", found / exact, 1 - 1e-4, 1 + 1e-4)


@torch.no_grad()
def say(subject: Subject, letter: str, gap: float) -> None:
    """Make the model say one letter always: its logit is `gap`, wherever, and all others are equal.

    Every token has the same embedding, that of the letter twice as long; nothing is added to it on
    the way, and the last norm makes its length 1. Head and embedding are tied.
    """
    model = subject.model
    token = subject.data.tokenizer(letter)["input_ids"][0]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    length = 100.0  # the norm's epsilon is nothing beside it
    embedding[:, 0] = length
    embedding[token, 0] = 2 * length
    last: torch.Tensor = model.get_parameter("model.norm.weight")
    last.fill_(gap / length / math.sqrt(embedding.shape[1]))


def write_questions(like: DatasetSpec, path: Path) -> DatasetSpec:
    """Write questions whose right answer stands equally often at each place."""
    rows = []
    for number in range(6 * len(OPTIONS)):
        place = number % len(OPTIONS)
        options = [*OPTIONS[1 : place + 1], OPTIONS[0], *OPTIONS[place + 1 :]]
        rows.append({"prompt": f"Question {number}:", "options": options, "label": place})
    path.write_text("\n".join(map(json.dumps, rows)))
    return replace(
        like,
        name="made-up",
        source="file",
        files={"test": str(path)},
        cut={},
        limit={},
        choices=["{choice}"],
    )


# -- parts ---------------------------------------------------------------------------------------


@torch.no_grad()
def tiny_model() -> torch.nn.Module:
    """Return the tiny model in float32, its matrices made larger."""
    spec = compose("eval", ["model=tiny"]).spec.model
    model = models.load(spec, device="cpu", dtype=torch.float32, tokenizer=False).model
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.mul_(STRENGTH)
    return model.requires_grad_(False).eval()


def subject_of(model: torch.nn.Module, dataset: DatasetSpec) -> Subject:
    """Return the unchanged model as the subject of an evaluator."""
    spec = compose("eval", ["model=tiny"]).spec.model
    tokenizer = models.load_tokenizer(spec)
    data = Data(dataset, tokenizer)
    shape = ModelShape.of(models.shape_of(spec))
    return Subject(model, Unchanged(), UNNAMED, data, CPU, 0, 0, tokenizer=tokenizer, shape=shape)


def values(result: Result) -> dict[str, float]:
    """Return the value of each metric by name."""
    return {m.name: m.value for m in result.metrics}


def vocabulary(subject: Subject) -> int:
    """Return the number of tokens that the model tells apart."""
    return int(subject.model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
