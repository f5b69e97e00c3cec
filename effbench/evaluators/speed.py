"""Speed of decoding over a grid of batch size, prompt length and new tokens.

Prompts are random tokens, so the speed does not depend on the data. Each cell of the grid is timed
a few times; the first time warms up and is dropped. Prefill ends with the first token, so its time
is the time to first token (TTFT); the gaps after it are the times per output token (TPOT).

Shares of the machine's roofline stand beside the times: see `effbench.resources.roofline`. With
`baseline=dense` memory is measured beside time, and a sentence says from which cell on the method
pays on this machine: see `effbench.evaluators.beside_dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from effbench.api import registry
from effbench.api.cost import cost_of
from effbench.api.footprint import Pass
from effbench.api.schema import PositiveInt, canonical
from effbench.api.shape import DTYPE_BYTES
from effbench.api.weights import is_packed
from effbench.evaluators import paying
from effbench.evaluators.base import Evaluator, Result
from effbench.evaluators.subject import Subject
from effbench.methods.base import Method
from effbench.methods.caches import Caches
from effbench.methods.chain import chain_shapes, inference_cost, resolved
from effbench.nn.adapters import merge
from effbench.nn.quant import linears
from effbench.resources.others import Others
from effbench.results.records import Metric
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.session import Session
    from effbench.api.shape import AnyShape
    from effbench.api.spec import Spec
    from effbench.data.dataset import Data
    from effbench.evaluators.beside_dense import Beside
    from effbench.evaluators.requests import Times
    from effbench.nn.decode.decoder import Engine as DecodeEngine
    from effbench.resources.roofline import Ceilings
    from effbench.resources.timing import Ratio

Engine = Literal["auto", "static", "eager", "generate", "merged"]
Grid = PositiveInt | list[PositiveInt]
Timer = Callable[..., "Times"]

UNITS = {
    "ttft_ms": "ms",
    "tpot_ms": "ms",
    "tpot_p95_ms": "ms",
    "tpot_p99_ms": "ms",
    "tpot_drop_ms": "ms",
    "tpot_refresh_ms": "ms",
    "prefill_tokens_per_second": "tokens/s",
    "decode_tokens_per_second": "tokens/s",
    "held_bytes": "bytes",
    "dense_ttft_ms": "ms",
    "dense_tpot_ms": "ms",
    "dense_held_bytes": "bytes",
}
"""Units of what is timed; shares have none."""
PROBES = 3
"""How often the machine is probed again before a share above 1 is an error."""
CEILINGS = ("ceiling_gemm", "ceiling_gemv", "ceiling_copy", "ceiling_read")


class Cell(NamedTuple):
    """One point of the grid."""

    batch: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"b{self.batch} p{self.prompt} n{self.new}"


@dataclass(frozen=True)
class Speed(Evaluator):
    """Time to first token, time per token, tokens per second, and shares of the roofline."""

    itemwise: ClassVar[bool] = False
    headline: ClassVar[str] = "decode_tokens_per_second"
    gives: ClassVar[tuple[str, ...]] = (
        "prefill_tokens_per_second",
        "decode_speedup",
        "ttft_ms",
        "tpot_ms",
        "tpot_p95_ms",
        "mbu",
        "mfu",
        "memory_gain",
        "ttft_speedup",
    )
    trial: ClassVar[dict[str, Any]] = {
        "prompt_tokens": 6,
        "new_tokens": 5,
        "repeats": 1,
        "probe_mb": 1,
        "probe_side": 128,
    }

    batch_sizes: Grid = 1
    """Sequences decoded at once; one number or a list."""
    prompt_tokens: Grid = 128
    """Tokens of each prompt; one number or a list."""
    new_tokens: Grid = 32
    """Steps after the first token; one number or a list."""
    repeats: PositiveInt = 7
    """Timed repeats of each cell."""
    engine: Engine = "auto"
    """`auto`: the method's own session, which is our engine wherever it applies. `static`: our
    engine or an error. `eager`: the model's forward pass with a growing cache. `generate`:
    transformers' own loop. `merged`: as `auto`, on the plain model that the adapters amount to."""
    baseline: Literal["none", "self", "whole", "eager", "generate", "dense"] = "none"
    """What each cell is timed against in turn, for `speedup`; `self` is the engine once more,
    `whole` the same engine at the method's point that needs all of the model, `dense` the model
    that the run started from with a cache of all keys and values, whose memory is measured too."""
    roofline: bool = True
    """Whether the machine is probed for its ceilings."""
    probe_mb: PositiveInt = 256
    """Most memory that the probe takes, 10^6 bytes."""
    probe_side: PositiveInt = 2048
    """Side of the largest square product of the probe on a CPU."""

    def cells(self) -> list[Cell]:
        """Return the cells of the grid, in the order they are timed."""
        axes = (self.batch_sizes, self.prompt_tokens, self.new_tokens)
        lists = [axis if isinstance(axis, list) else [axis] for axis in axes]
        return [Cell(*point) for point in product(*lists)]

    def holds(self, spec: Spec) -> tuple[str, ...]:
        """Return the dense model, where the run's is another one: timed beside it, or merged."""
        method = registry.find("methods", spec.method.name)
        another = bool(spec.parent) or not issubclass(method, Caches)
        merged = self.engine == "merged" and method.merges
        return ("",) if merged or (self.baseline == "dense" and another) else ()

    def check(self, spec: Spec, methods: Sequence[Method], shape: AnyShape | None) -> None:
        """Refuse an empty grid, cells that the model or the memory has no room for, and engines
        that would not be the method.

        Raises:
            UserError: Naming the setting.
        """
        if not self.cells():
            raise UserError("The grid of evaluator.speed is empty.", "Give at least one number.")
        *before, last = methods
        if shape:
            last = resolved(last, [shape, *chain_shapes(before, shape, then=last)][-1])
        asked = {self.engine, self.baseline} & {"static", "eager", "generate"}
        own = [point for point in last.points() if asked - last.engines(point)]
        if own:
            raise UserError(
                f"{last.name} decodes in a way of its own{f' at {own[0]}' if own[0].name else ''}, "
                "which no other engine has.",
                "Leave evaluator.speed.engine=auto and evaluator.speed.baseline=none.",
            )
        if self.baseline == "whole" and not last.nested_points:
            raise UserError(
                f"{last.name} has no whole model beside each of its points to be timed against.",
                "Leave evaluator.speed.baseline=none.",
            )
        self._check_dense()
        packed = any(is_packed(m.weights) or is_packed(m.produces) for m in methods)
        if self.engine == "merged" and packed:
            raise UserError(
                "evaluator.speed.engine=merged adds adapters to dense weights, but these are "
                "packed.",
                "Leave evaluator.speed.engine=auto.",
            )
        for cell in self.cells() if shape else ():
            assert shape is not None
            _check_memory(cell, spec, methods, shape)

    def _check_dense(self) -> None:
        """Refuse what `baseline=dense` cannot say of itself."""
        from effbench.stats import FEWEST_REPEATS

        if self.baseline != "dense":
            return
        if self.engine == "generate":
            raise UserError(
                "evaluator.speed.engine=generate is one loop around all phases, and "
                "baseline=dense measures each of them.",
                "Set evaluator.speed.engine=auto or eager.",
            )
        if self.repeats < FEWEST_REPEATS:
            raise UserError(
                f"evaluator.speed.repeats={self.repeats} gives ratios no interval, by which "
                "baseline=dense tells whether the method pays.",
                f"Set evaluator.speed.repeats={FEWEST_REPEATS} or more.",
            )

    def passes(self, spec: Spec, data: Data | None = None) -> list[Pass]:
        """Return prefill and decode of every cell, with room in the cache for all its tokens."""
        return [
            one
            for cell in self.cells()
            for one in (
                Pass("prefill", cell.batch, cell.prompt, cell.batch, after=cell.new),
                Pass("decode", cell.batch, cell.prompt + cell.new, cell.batch, cell.prompt),
            )
        ]

    def run(self, subject: Subject) -> Result:
        """Return times, rates, shares, bytes and what sessions counted, of every cell."""
        others = Others()
        with self._timed(subject) as (timed, counted):
            found = self._run(timed, counted)
        said = others.sentence()
        return replace(found, notes=[*found.notes, *([said] if said else [])])

    @contextmanager
    def _timed(self, subject: Subject) -> Iterator[tuple[Subject, dict[str, float]]]:
        """Be what is timed inside the context: with its own layers, its adapters merged if asked.

        Yields the subject and what is counted of it, by name.
        """
        shape, whole = subject.shape, subject.whole
        layers = getattr(subject.model.config, "num_hidden_layers", None)
        if shape and layers not in (None, shape.num_layers):
            subject = replace(subject, shape=shape.only(range(layers)))
        if self.engine != "merged":
            yield subject, {}
            return
        with merge.merged(subject.model) as linears:
            if linears and shape and subject.shape and subject.cost and whole:
                cost, whole = (cost_of(x.merged(), subject.dtype) for x in (subject.shape, shape))
                kept = subject.cost
                plain = replace(
                    cost,
                    kv_bytes_per_token=kept.kv_bytes_per_token,
                    caches=kept.caches,
                    attending=kept.attending,
                )
                subject = replace(subject, cost=plain, whole=whole)
            yield subject, {"merged_linears": linears}

    def _run(self, subject: Subject, counted: dict[str, float]) -> Result:
        cells = self.cells()
        settings: list[Any] = [self.engine, self.baseline, self.repeats, self.roofline]
        if self.baseline != "none":
            settings.append("gains")  # which cells of earlier journals have under other names
        journal = subject.journal("cells", [canonical([str(c), *settings]) for c in cells])
        ceilings: Ceilings | None = None
        dense: Subject | None = None
        for index, cell in enumerate(cells):
            if index in journal:
                continue
            if self.baseline == "dense":
                dense = dense or subject.dense()
            if self.roofline and ceilings is None and subject.cost and subject.shape:
                ceilings = self._probe(subject)
            found, ceilings = self._cell(subject, cell, ceilings, (index, len(cells)), dense)
            found["counts"] |= counted
            journal.add({index: found})
        named = [str(cell) if len(cells) > 1 else "" for cell in cells]
        known = journal.values()
        return Result(
            [
                metric
                for task, of_cell in zip(named, known, strict=True)
                for metric in _metrics(subject, task, of_cell)
            ],
            notes=self._told(subject, [of_cell.get("gains", {}) for of_cell in known]),
        )

    def _told(self, subject: Subject, gains: Sequence[Mapping[str, Sequence[float]]]) -> list[str]:
        """Return where the method pays; a sentence for each number of new tokens."""
        if self.baseline != "dense":
            return []
        who = f"{subject.method.name} {subject.point.name}".strip()
        return paying.sentences(who, dict(zip(self.cells(), gains, strict=True)))

    def _probe(self, subject: Subject) -> Ceilings:
        from effbench.resources.roofline import probe

        assert subject.cost is not None
        return probe(
            subject.device,
            getattr(torch, subject.dtype),
            working_set=subject.cost.bytes_per_token,
            most=self.probe_mb * 1e6,
            side=self.probe_side,
            progress=subject.progress,
        )

    def _cell(
        self,
        subject: Subject,
        cell: Cell,
        ceilings: Ceilings | None,
        place: tuple[int, int],
        dense: Subject | None,
    ) -> tuple[dict[str, Any], Ceilings | None]:
        """Return what one cell gave, as plain values, and the ceilings as they are known then."""
        beside = self._beside(subject, dense, cell, place) if dense else None
        times = [took.times for took in beside.own] if beside else self._times(subject, cell, place)
        last = times[-1]
        found: dict[str, Any] = {"values": _rates(cell, times), "kv_bytes": last.kv_bytes}
        found["counts"] = dict(last.counts)
        if not last.counts:  # else the cost states only a bound
            found["counts"] |= _ceiling(subject)
        exact = not last.counts and cell.new % last.cycle == 0
        if last.kinds:
            found["counts"]["layer_passes"] = last.passes
        if ceilings is not None and exact:
            shares, ceilings = self._shares(subject, cell, times, ceilings)
            found["values"] |= shares
            found["ceilings"] = [*astuple(ceilings)][: 4 if ceilings.read else 3]
        if beside:
            found["values"] |= beside.values()
            found["gains"] = {k: list(v) for k, v in beside.gains(subject.seed).items()}
        elif self.baseline != "none":
            named: dict[str, Engine] = {"eager": "eager", "generate": "generate"}
            other = named.get(self.baseline, self.engine)
            whole = self.baseline == "whole"
            ratio, steps = compared(subject, self.engine, other, cell, self.repeats, whole)
            found["gains"] = {
                "speedup@": list(ratio.speedup),
                "decode_speedup@decode": list(steps.speedup),
            }
        return found, ceilings

    def _times(self, subject: Subject, cell: Cell, place: tuple[int, int]) -> list[Times]:
        """Return the times of the requests that count of one cell."""
        request, times = timer(subject, self.engine, cell), []
        for repeat in range(self.repeats + 1):
            times.append(request())
            done = place[0] * (self.repeats + 1) + repeat + 1
            subject.progress("speed", done, place[1] * (self.repeats + 1))
        return times[1:]

    def _beside(
        self, subject: Subject, dense: Subject, cell: Cell, place: tuple[int, int]
    ) -> Beside:
        """Return what requests of one cell took, in turn with those of the dense cache."""
        from effbench.evaluators.beside_dense import measured

        own, other = (
            (timer(side, self.engine, cell), linears.storage_bytes(side.model))
            for side in (subject, dense)
        )
        of_cell = 2 * (self.repeats + 1)

        def progress(done: int) -> None:
            total = of_cell * place[1]
            subject.progress(f"speed beside dense, {cell}", of_cell * place[0] + done, total)

        return measured(own, other, self.repeats, subject.device, progress)

    def _shares(
        self, subject: Subject, cell: Cell, times: Sequence[Times], ceilings: Ceilings
    ) -> tuple[dict[str, list[float]], Ceilings]:
        """Return the shares of the ceilings; a share above 1 has the machine probed again."""
        for _ in range(PROBES):
            try:
                return _shares(subject, cell, times, ceilings), ceilings
            except UserError:
                ceilings = ceilings.best(self._probe(subject))
        return _shares(subject, cell, times, ceilings), ceilings


# -- what is refused ---------------------------------------------------------------------------


def _check_memory(cell: Cell, spec: Spec, methods: Sequence[Method], shape: AnyShape) -> None:
    """Refuse a batch whose weights, cache and logits alone are more than the memory."""
    from effbench.util.hardware import gpus, memory_bytes

    dtype = spec.hardware.dtype
    cost = inference_cost(methods, shape, dtype, methods[-1].full_point(shape))
    cache = cost.cached(cell.prompt + cell.new, cell.batch, cell.prompt)
    need = cost.resident_bytes + cache + cell.batch * shape.vocab_size * DTYPE_BYTES[dtype]
    if spec.hardware.device == "cpu":
        have = memory_bytes()[1]
    else:
        have = max((gpu.memory_mib for gpu in gpus()), default=0) * 2**20
    if have and need > have:
        raise UserError(
            f"evaluator.speed: {cell} needs {need / 2**30:.1f} GiB, of which {cache / 2**30:.1f} "
            f"are its cache, but {have / 2**30:.1f} are there.",
            "Lower evaluator.speed.batch_sizes or evaluator.speed.prompt_tokens.",
        )


# -- timing ------------------------------------------------------------------------------------


def timer(subject: Subject, engine: Engine, cell: Cell) -> Timer:
    """Return a function that decodes one request of a cell and says how long it took.

    It may be given what is entered around `prefill` and `decode`, which `generate` has no use for.

    Raises:
        UserError: When the engine does not apply to the model.
    """
    from effbench.evaluators.requests import timed_generate, timed_session

    vocabulary = subject.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    draws = torch.Generator().manual_seed(subject.seed)
    prompt = torch.randint(vocabulary, (cell.batch, cell.prompt), generator=draws)
    prompt = prompt.to(subject.device)
    if engine == "generate":
        return lambda *_: timed_generate(subject.model, prompt, cell.new, subject.device)
    make = session_maker(subject, "auto" if engine == "merged" else engine)
    return lambda *around: timed_session(make(), prompt, cell.new, subject.device, *around)


def session_maker(subject: Subject, engine: DecodeEngine) -> Callable[[], Session]:
    """Return what makes a fresh session of an engine.

    Raises:
        UserError: When our engine is asked for and does not apply.
    """
    try:
        subject.session(engine)
    except ValueError as error:
        reason = str(error).removeprefix("the engine does not apply: ")
        raise UserError(
            f"evaluator.speed.engine={engine} does not apply: {reason}.",
            "Use engine=auto, which takes another session then.",
        ) from None
    return partial(subject.session, engine)


def compared(
    subject: Subject, a: Engine, b: Engine, cell: Cell, repeats: int, whole: bool = False
) -> tuple[Ratio, Ratio]:
    """Time requests of two engines in turn; engine `a` with itself has a ratio of 1.

    Args:
        subject: What is timed.
        a: Its engine.
        b: That of the other one.
        cell: What is asked.
        repeats: Pairs that count.
        whole: Whether the other one is the method's point that needs all of the model.

    Returns:
        The ratios of whole requests, and of the steps after the first token.
    """
    from effbench.resources.timing import Clock, Ratio, interleaved
    from effbench.stats import median_interval, ratio_interval

    done: tuple[list[float], list[float]] = [], []
    shape, point = subject.shape, subject.point
    if whole and shape:
        point = subject.method.full_point(shape)
    work_a, work_b = timer(subject, a, cell), timer(replace(subject, point=point), b, cell)

    def one() -> None:
        done[0].append(sum(work_a().gaps))

    def other() -> None:
        with subject.method.at(subject.model, point) if whole else nullcontext():
            done[1].append(sum(work_b().gaps))

    ratio = interleaved(one, other, repeats, clock=Clock(subject.device), seed=subject.seed)
    steps_a, steps_b = (times[-repeats:] for times in done)
    steps = Ratio(
        ratio_interval(steps_b, steps_a, seed=subject.seed),
        median_interval(steps_a),
        median_interval(steps_b),
    )
    return ratio, steps


# -- from times to metrics ---------------------------------------------------------------------


def _rates(cell: Cell, times: Sequence[Times]) -> dict[str, list[float]]:
    """Return one value per repeat of everything that is timed; keys are `name@phase`."""
    found: dict[str, list[float]] = {}
    for request in times:
        first, gaps = request.first, request.gaps
        tokens = sorted(gaps)
        values = {
            "ttft_ms@prefill": 1e3 * first,
            "prefill_tokens_per_second@prefill": cell.batch * cell.prompt / first,
            "decode_tokens_per_second@decode": cell.batch * cell.new / sum(gaps),
            "tpot_ms@decode": 1e3 * _percentile(tokens, 0.50),
            "tpot_p95_ms@decode": 1e3 * _percentile(tokens, 0.95),
            "tpot_p99_ms@decode": 1e3 * _percentile(tokens, 0.99),
        }
        for kind in dict.fromkeys(request.kinds):
            of_kind = sorted(t for t, k in zip(gaps, request.kinds, strict=True) if k == kind)
            values[f"tpot_{kind}_ms@decode"] = 1e3 * _percentile(of_kind, 0.50)
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def _percentile(values: Sequence[float], level: float) -> float:
    """Return the percentile of sorted values, linear between the two nearest."""
    place = level * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def _shares(
    subject: Subject, cell: Cell, times: Sequence[Times], ceilings: Ceilings
) -> dict[str, list[float]]:
    """Return MFU of prefill and MFU and MBU of decode against probed and stated ceilings."""
    from effbench.resources.roofline import decode_bytes, decode_flops, prefill_flops, share

    assert subject.cost is not None and subject.shape is not None
    cost, shape, machine = subject.cost, subject.shape, subject.machine
    reading = subject.whole if times[0].kinds and subject.whole else cost  # all layers read prompts
    work = {
        "mfu@prefill": prefill_flops(reading, shape, cell.batch, cell.prompt),
        "mfu@decode": decode_flops(cost, *cell),
        "mbu@decode": decode_bytes(cost, *cell),
    }
    limits = {
        "probed": {"mfu": ceilings.gemm, "mbu": ceilings.bandwidth},
        "stated": {"mfu": machine.tflops * 1e12, "mbu": machine.bandwidth_gbs * 1e9},
    }
    found: dict[str, list[float]] = {}
    for source, ceiling in limits.items():
        for key, done in work.items():
            name, _, phase = key.partition("@")
            if not ceiling[name]:
                continue
            full = f"{name}{'' if source == 'probed' else '_stated'}@{phase}"
            seconds = [t.first if phase == "prefill" else sum(t.gaps) for t in times]
            found[full] = [share(full, done, s, ceiling[name], source) for s in seconds]
    return found


def _ceiling(subject: Subject) -> dict[str, float]:
    """Return how much faster than the whole model a part of it can be, by the weight bytes read."""
    if not (subject.point.skips_layers and subject.cost and subject.whole):
        return {}
    return {"speed_ceiling": subject.whole.bytes_per_token / subject.cost.bytes_per_token}


def _metrics(subject: Subject, task: str, found: dict[str, Any]) -> list[Metric]:
    """Return the metrics of one cell."""
    from effbench.stats import median_interval

    metrics = []
    for key, values in found["values"].items():
        name, _, phase = key.partition("@")
        median, low, high = median_interval(values, seed=subject.seed)
        unit = UNITS.get(name, "")
        metrics.append(
            Metric(
                name,
                median,
                unit,
                subject.point.name,
                "",
                len(values),
                low,
                high,
                "measured",
                phase,
            )
        )
    for key, (value, low, high) in found.get("gains", {}).items():
        name, _, phase = key.partition("@")
        n = len(next(iter(found["values"].values())))
        metrics.append(
            Metric(name, value, "", subject.point.name, "", n, low, high, "measured", phase)
        )
    for name, rate in zip(CEILINGS, found.get("ceilings", ()), strict=False):
        unit = "FLOP/s" if name == "ceiling_gemm" else "bytes/s"
        metrics.append(Metric(name, rate, unit, subject.point.name, phase="roofline"))
    counted = {"kv_bytes": found["kv_bytes"], **found["counts"]}
    for name, value in counted.items():
        unit = "bytes" if name == "kv_bytes" else ""
        metrics.append(
            Metric(name, value, unit, subject.point.name, obtained="counted", phase="decode")
        )
    return [replace(m, task=task) for m in metrics]
