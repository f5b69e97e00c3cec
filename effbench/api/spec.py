"""The frozen description of one run, and the key that is its hash.

`Spec` holds everything that can change a result; `Runtime` holds what cannot (paths, trackers,
log level), so that the one is hashed and the other is not, by type.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from effbench.api.names import called
from effbench.api.schema import (
    Decay,
    Fraction,
    ModelText,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Threads,
    digest,
)
from effbench.api.shape import Shape

SPEC_VERSION = 2
"""The form of a spec. Raised when a field goes or gets another name, with an entry in
`migrations.SPECS`. Not in keys: what changes results raises the `version` of its part."""

Stage = str
"""The name of a stage: a file in `effbench/api/stages`."""


@dataclass(frozen=True)
class ModelSpec:
    """A pretrained model, or a shape with random weights."""

    version: ClassVar[int] = 1
    """Raised when the same model would compute something else."""

    name: str
    """Name of the config."""
    source: Literal["package", "hub", "folder", "gguf", "random"]
    """Where the weights come from."""
    id: str = ""
    """Hub id, or the name of an asset that `effbench fetch` knows."""
    path: str = ""
    """Local folder or GGUF file."""
    revision: str = "main"
    """Hub revision."""
    shape: Shape | None = None
    """Sizes, for `plan` and for random weights; read from the files when not given."""
    weights_seed: Seed = 0
    """Seed of random weights."""
    fingerprint: str = ""
    """Content hash of local files; filled in when the config is composed."""
    kind: str = ""
    """What kind of model it is, a file in `nn/model_kinds`; empty for what its config says."""
    classes: NonNegativeInt = 0
    """Classes of a classifier; 0 for as many as its config says."""
    config: dict[str, Any] = field(default_factory=dict)
    """Config of transformers with its `model_type`, for random weights that are no Llama's."""

    @property
    def called(self) -> str:
        """What people call it."""
        return called(vars(self))


@dataclass(frozen=True)
class DatasetSpec:
    """Texts, prompt/answer pairs or multiple-choice questions, in disjoint named splits."""

    version: ClassVar[int] = 1
    """Raised when the same settings would give other rows, splits or tokens."""
    kind_versions: ClassVar[dict[str, int]] = {"chat": 2}
    """The same, of a kind whose rows alone would be others; 2 for chats, since calls of tools have
    their arguments as a mapping."""

    name: str
    """Name of the config."""
    source: Literal["package", "hub", "file", "generator"]
    """Where the rows come from."""
    kind: str
    """`text`: language modelling, packed to train on. `pairs`: loss on the answer only.
    `choices`: pairs whose wrong answers are known too. `preference`: a chosen and a rejected
    answer. `chat`: conversations. `alpaca`: instructions. `auto`: what the fields of the first row
    say, once the config is composed. Each is a file in `data/kinds`."""
    id: str = ""
    """Hub id, asset name or generator name."""
    subset: str = ""
    """Hub configuration, or folder inside an asset."""
    files: dict[str, str | list[str]] = field(default_factory=dict)
    """Local files by split name, one or several (jsonl, ndjson, json, csv, tsv, parquet, txt;
    gzipped or not)."""
    text: ModelText = "{text}"
    """Template of a row's text (kind `text`)."""
    prompt: ModelText = "{prompt}"
    """Template of the prompt."""
    answer: ModelText = " {answer}"
    """Template of the right answer (kind `pairs`)."""
    choices: list[ModelText] = field(default_factory=list)
    """Templates of the answers (kind `choices`); one template with `{choice}` when they stand in
    the list field `choices_field`."""
    choices_field: str = ""
    """Dotted name of the field that lists the answers."""
    label: str = "label"
    """Dotted name of the field that says which answer is right: an index, or a name found in
    `label_names`."""
    label_names: str = ""
    """Dotted name of the list field that names the answers, when `label` is such a name."""
    labels: Literal["places", "names"] = "places"
    """What a label is that could be the place of an answer, from 0, as well as what an answer says:
    1 where the answers are 1, 2 and 3. Filled in when the config is composed: `names` where one's
    own rows all have the same answers, and these are not in the order of such places."""
    splits: dict[str, str] = field(default_factory=dict)
    """Source split of each of our splits: `{train: train, validation: validation}`."""
    cut: dict[str, Fraction] = field(default_factory=dict)
    """Or: shares of the one source split that each of our splits gets, drawn by content hash."""
    max_length: PositiveInt = 256
    """Longest sequence in tokens: a longer prompt loses its start, an answer that alone is longer
    its end, and packed text is cut into it. Texts are evaluated whole, in windows of that size."""
    chat: bool = False
    """Whether prompts go through the model's chat template."""
    limit: dict[str, PositiveInt] = field(default_factory=dict)
    """At most this many rows of a split, the first ones in content-hash order."""
    allow_overlap: bool = False
    """Whether a row may stand in the training and an evaluation split at once."""
    fingerprint: str = ""
    """Content hash of local files; filled in when the config is composed. Where a config states it,
    it is of these files and no others, and composes where they are not."""
    columns: dict[str, str] = field(default_factory=dict)
    """Dotted names of fields with a number that goes into batches, by column; `weight` is that of
    the row in the loss. A kind can read further columns of its own."""
    documents: Literal["paragraph", "line", "file"] = "paragraph"
    """What the documents of a txt file are: what stands between empty lines, each line, or all."""
    missing: Literal["refuse", "empty", "skip"] = "refuse"
    """What a field without a value does: it is refused, is an empty text, or its row is left out.
    An empty answer is refused too, or its row is left out."""
    turns: Literal["all", "last"] = "all"
    """Which answers of a conversation have a loss (kind `chat`)."""
    system: Literal["own", "user", "none"] = "own"
    """Where a system prompt goes: its own turn, before what the user says first, or nowhere."""
    tools: bool = True
    """Whether the tools of a conversation are told to the model."""
    template: str = ""
    """Chat template in place of the model's own: `zephyr`, or a file with one; its text, once the
    config is composed."""
    mix: dict[str, list[float]] = field(default_factory=dict)
    """Shares of the rows, by source split, of each of its several files; they add up to 1."""
    known_by: Literal["text", "source"] = "text"
    """What decides a row's split and place: its rendered text, or the values of the fields that its
    templates name, whatever words stand around them; then rows that ask the same stay in one split.
    Filled in when the config is composed: `text` for the datasets that come with effbench."""
    known_as: dict[str, Any] = field(default_factory=dict)
    """Templates whose text a row is known by, where those in use are others; filled in when the
    config is composed, so that another prompt for a dataset deals the same splits."""
    drawn: bool = False
    """Whether `limit` draws rows of `train` by the run's seed, in the place of the first ones."""
    attributes: list[str] = field(default_factory=list)
    """What answers are rated in (kind `rated`): names of fields with a number. Pairs among the rows
    are rated 4 and 1 in the first."""

    @property
    def called(self) -> str:
        """What people call it."""
        return called(vars(self))


@dataclass(frozen=True)
class TrainSpec:
    """The training loop."""

    version: ClassVar[int] = 2
    """Raised when the same settings would give other weights: 2, since AdamW passes once over each
    weight."""

    max_steps: NonNegativeInt = 12
    """Optimiser steps; 0 where `epochs` says how many."""
    batch_size: PositiveInt = 2
    """Rows in a micro-batch; a question with several answers is one."""
    accumulation: PositiveInt = 1
    """Micro-batches in one optimiser step."""
    learning_rate: PositiveFloat | None = None
    """Peak learning rate; null takes the method's own."""
    optimizer: Literal["adamw", "adamw8bit", "sgd"] = "adamw"
    """`adamw8bit` is bitsandbytes' 8-bit AdamW."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    epsilon: PositiveFloat = 1e-8
    """What Adam adds to the root of its second moment."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """What the learning rate does after warm-up."""
    warmup: Fraction = 0.05
    """Share of the steps over which the learning rate rises from zero."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest gradient norm; 0 clips nothing."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    validate_every: NonNegativeInt = 0
    """Steps between losses on the validation split; 0 never."""
    patience: NonNegativeInt = 0
    """Stop after so many validations without a better loss; 0 never."""
    checkpoint_every: PositiveInt = 25
    """Steps between checkpoints. A resumed run ends in the same state."""
    epochs: NonNegativeFloat = 0.0
    """Passes over the training rows, in place of `max_steps`; 0 where that says how many steps."""

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimiser step."""
        return self.batch_size * self.accumulation

    def over(self, rows: int) -> TrainSpec:
        """Return the settings with the steps that their epochs take over so many rows."""
        if not self.epochs:
            return self
        steps = math.ceil(round(self.epochs * rows / self.rows_per_step, 9))
        return replace(self, max_steps=max(1, steps))

    def told(self, rows: int) -> str:
        """Return steps and epochs over so many rows in words; 0 where their number is not known."""
        if not rows:
            length = self.epochs or self.max_steps
            return f"{length:,g} {'epochs' if self.epochs else 'steps'}"
        steps, size = self.over(rows).max_steps, self.rows_per_step
        epochs = self.epochs or steps * size / rows
        return f"{steps:,} steps of {size} rows, {epochs:.3g} epochs of {rows:,} rows"


@dataclass(frozen=True)
class HardwareSpec:
    """What the run computes on."""

    version: ClassVar[int] = 1
    """Raised when the same device and dtype would be used in another way."""

    device: Literal["cpu", "cuda"]
    """`auto` in a config becomes one of these when it is composed."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Compute dtype; `auto` is bfloat16 where the hardware multiplies it natively."""
    threads: Threads = 0
    """CPU threads; 0 takes all cores."""


@dataclass(frozen=True)
class Plugin:
    """A method or an evaluator by name, with its validated settings."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spec:
    """Everything that can change the result of a run."""

    stage: Stage
    method: Plugin
    model: ModelSpec
    dataset: DatasetSpec
    evaluators: list[Plugin]
    train: TrainSpec
    hardware: HardwareSpec
    seed: Seed = 0
    parent: str = ""
    """Key of the run this one goes on from."""
    version: int = SPEC_VERSION
    versions: dict[str, int] = field(default_factory=dict)
    """Versions above 1 of the parts that are used: `train`, `method.NAME`, ...; filled in when the
    config is composed. A run from before there were any has none."""
    sources: dict[str, str] = field(default_factory=dict)
    """Hashes of the code of methods and evaluators of other packages, by the names of `versions`;
    filled in when the config is composed."""
    others: list[ModelSpec] = field(default_factory=list)
    """The other models that the method and the evaluators load, such as a teacher, in the order of
    their names; filled in when the config is composed."""

    @property
    def key(self) -> str:
        """The run key: 16 hexadecimal digits of the SHA-256 of canonical JSON; see `keys`."""
        from effbench.api.keys import hashed

        return digest(hashed(self))

    @property
    def label(self) -> str:
        """A short name for people: stage, method, model, dataset and seed."""
        parts = (self.stage, self.method.name, self.model.called, self.dataset.called)
        return f"{' '.join(parts)} seed {self.seed}"


@dataclass(frozen=True)
class Machine:
    """Stated ceilings of the hardware, for `plan`; zero means: measure or leave open."""

    name: str = "this machine"
    memory_gib: NonNegativeFloat = 0
    """Memory a run may use; 0 takes what is free."""
    tflops: NonNegativeFloat = 0
    """Matrix product ceiling at the compute dtype, 10^12 FLOP/s."""
    bandwidth_gbs: NonNegativeFloat = 0
    """Memory bandwidth, 10^9 bytes/s."""
    tdp_watts: NonNegativeFloat = 0
    """Thermal design power of the device, where energy is modelled; 0 takes 7 W per CPU core."""


Sharding = Literal["none", "fsdp"]
"""How the devices of one training hold the model: each all of it, or each a part (FSDP)."""


@dataclass(frozen=True)
class Parallelism:
    """Over how many devices of one machine a training is spread.

    The losses are those of one device but for rounding, so that a run may go on with another
    number; the record says on how many its steps were made.
    """

    devices: PositiveInt = 1
    """Processes, each with a device of its own, or with a share of the CPU's threads."""
    sharding: Sharding = "none"
    """`none`: each holds the whole model, and gradients are summed. `fsdp`: each holds a part of
    the parameters, gradients and optimiser states."""


@dataclass(frozen=True)
class Runtime:
    """What cannot change a result, or by rounding alone."""

    results: str = "results"
    """Folder of `runs/` and `records/`."""
    tracker: Literal["none", "wandb"] = "none"
    """Where to mirror events; wandb is offline unless WANDB_MODE says otherwise."""
    progress: bool = True
    """Show progress lines."""
    exact_memory: bool = False
    """On a CPU, give every large block of memory back at once: peaks are those of the tensors, but
    each block costs time."""
    machine: Machine = field(default_factory=Machine)
    parallelism: Parallelism = field(default_factory=Parallelism)


@dataclass(frozen=True)
class Job:
    """A spec and how to run it."""

    spec: Spec
    runtime: Runtime
    command: str = ""
    """What was typed, for people; empty for a run that no command asked for."""
    notes: tuple[str, ...] = ()
    """What was decided for the user, in words."""
