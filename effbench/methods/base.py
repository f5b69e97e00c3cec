"""What every method is: a frozen dataclass of hyper-parameters with a few hooks.

A method knows no store and no command line. What it does to a model is a capability that it
inherits: `Trains` (`methods/trains.py`), `Compresses` (`methods/compresses.py`) or `Reads`
(`methods/reads.py`); here is what they share. It overrides only the hooks that it changes. Mutable
state never lives on the method: it lives in the model's modules, or in the `Evolution` of a
training, which the loop saves and restores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from effbench.api.batch import Batch
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.points import UNNAMED, Point
from effbench.api.shape import Anatomy, AnyShape, ModelShape, Phase
from effbench.api.spec import DatasetSpec, Stage
from effbench.api.weights import kinds
from effbench.methods.decodes import Decodes
from effbench.nn.adapters import peft_lora
from effbench.nn.decode.decoder import Decoder
from effbench.nn.llama import weights
from effbench.nn.pruning import plain
from effbench.util.errors import UserError
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Method(Decodes):
    """The core of all methods; on its own it changes nothing."""

    name: ClassVar[str] = ""
    """The name of its file and its config; set by the registry."""
    paper: ClassVar[Paper | None] = None
    stage: ClassVar[Stage] = "eval"
    """The stage that makes its artefact; it comes from the capability."""
    learning_rate: ClassVar[float] = 1e-4
    """What `train.learning_rate=null` means for this method."""
    version: ClassVar[int] = 1
    """Raised when the same settings would give another result; from then on in the key."""
    weighted_version: ClassVar[int] = 1
    """The same where that is so for rows with a `weight` alone; in no key of a run without them."""
    float16_version: ClassVar[int] = 1
    """The same where that is so for training in float16 alone."""
    accepts: ClassVar[frozenset[str]] = frozenset({"dense"})
    """Kinds of linear layers it can start from: `dense`, `adapted`, `packed`, one packed format."""
    produces: ClassVar[str] = "dense"
    """The kind of linear layers that its artefact has."""
    merges: ClassVar[bool] = False
    """Whether its adapters can be added to the weights, so that nothing else of it is left: what
    does not accept `adapted` linears starts from the dense sum."""
    identity: ClassVar[dict[str, Any] | None] = {}
    """Settings under which the method, put in but not trained, gives the base's own logits bit for
    bit; None where there are none. A contract test holds every method to it."""
    needs: ClassVar[dict[str, Any]] = {}
    """Settings without a usable default, as a trial run would have them."""
    anatomy: ClassVar[Anatomy] = "llama"
    """How the model's blocks have to be made: `other` needs nothing but linear layers with names
    and a forward pass, `plain` nothing that Llama itself lacks."""
    model_kinds: ClassVar[frozenset[str]] = frozenset({"causal"})
    """Kinds of models that it works on, files in `nn/model_kinds`: those of which it asks nothing
    but what they have alike."""
    eval_settings: ClassVar[frozenset[str]] = frozenset()
    """Settings on which nothing that is trained depends: `effbench eval from=RUN` can change them.
    """
    answers_with: ClassVar[str] = ""
    """What stands beside the language model's head and gives the answers, in words: the model has
    no plain form. Empty where there is no such thing."""
    in_one_pass: ClassVar[bool] = False
    """Whether an evaluation may compute a batch at several points side by side, block by block.
    `at` must then take next to no time and change nothing but what the blocks compute."""
    nested_points: ClassVar[bool] = False
    """Whether `at` can be entered inside another one, the inner point being the one that holds."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Packages that its hooks import; imported before memory is first measured."""

    @property
    def weights(self) -> Weights:
        """How the base is held: in the compute dtype, as float32 masters, or as NF4."""
        return "compute"

    def sealed(self) -> Self:
        """Return itself with a hash of the local files that it reads, so that they are in the key.

        Raises:
            UserError: When a file is missing.
        """
        return self

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method with the defaults filled in that depend on the model's shape.

        Args:
            shape: Of the model that it starts from.

        Raises:
            UserError: When it cannot work on such a model, with the field to change. Called before
                any weight is loaded.
        """
        return self

    def check_start(self, earlier: Sequence[Method]) -> None:
        """Refuse to go on from an artefact that this method cannot start from.

        Args:
            earlier: The methods that made the artefact, first to last.

        Raises:
            UserError: Before any weight is loaded.
        """
        kind = earlier[-1].leaves(self) if earlier else "dense"
        if not kinds(kind) & self.accepts:
            raise UserError(
                f"{self.name} cannot go on from what {earlier[-1].name} left: "
                f"it needs {' or '.join(sorted(self.accepts))} linear layers, not {kind} ones.",
                "Run it first and the other one after it, or choose another method.",
            )

    def leaves(self, then: Method) -> str:
        """Return the kind of linear layers that a method which follows finds."""
        return "dense" if self.merges_for(then) else self.produces

    def merges_for(self, then: Method) -> bool:
        """Whether its adapters are added to the weights before another method starts from it."""
        return self.merges and not kinds(self.produces) & then.accepts

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse a dataset that it cannot train on.

        Raises:
            UserError: Before any weight is loaded.
        """

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Put the method's structure in and mark what trains. Default: nothing does."""
        model.requires_grad_(False)
        return model

    def parts(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return kinds of predicted tokens with a loss of their own, [B, T - 1] bool each, by name.

        The first column is the second token. Tokens may be of no kind, and those without a label
        do not count.
        """
        return {}

    def scores(self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED) -> torch.Tensor:
        """Return what the model finds each sequence worth, [B]; higher is better.

        Default: the log-likelihood of its answer in nats, summed over tokens.
        """
        return -self.token_nll(model, batch, point).sum(1)

    # -- use -----------------------------------------------------------------------------------

    def points(self) -> tuple[Point, ...]:
        """Return the artefact's operating points, all different; one without a name by default."""
        return (UNNAMED,)

    def default_point(self) -> Point:
        """Return the point that stands for all where there is room for one: the last of them."""
        return self.points()[-1]

    def full_point(self, shape: AnyShape) -> Point:
        """Return the operating point with all that is in memory, listed or not.

        The others may need less; it is what they are compared with, and what a run after this one
        starts from. Default: the unnamed point, the model as it is left.

        Args:
            shape: The model's shape, as the method leaves it.
        """
        return UNNAMED

    def at(self, model: torch.nn.Module, point: Point) -> AbstractContextManager[Any]:
        """Return a context in which `model` works at `point`, and after which it is as before."""
        return nullcontext()

    # -- artefact ------------------------------------------------------------------------------

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that make the artefact, by name. Default: every weight."""
        return {n: p.detach() for n, p in model.named_parameters()}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the artefact into an existing, empty folder."""
        weights.save_tensors(self.artefact_tensors(model), folder / "weights.safetensors")

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` turned into the artefact of `folder`."""
        model = self.prepare(model, ctx)
        weights.load_tensors(self.artefact_tensors(model), folder / "weights.safetensors")
        return model

    def as_peft(self, model: torch.nn.Module, point: Point) -> peft_lora.PeftAdapter | None:
        """Return an operating point as an adapter that peft can hold; None where it is none."""
        return None

    def as_plain(
        self, model: torch.nn.Module, point: Point, dtype: torch.dtype | None = None
    ) -> plain.Plain:
        """Return an operating point as a model of transformers' own.

        Args:
            model: The artefact.
            point: One of its operating points.
            dtype: Of the weights; see `nn.pruning.plain.plain_model`.

        Raises:
            UserError: When transformers' class has no place for some part of it, or does not decode
                as the point does.
        """
        if self.answers_with:
            raise UserError(
                f"{self.name} answers with {self.answers_with}, which a causal model cannot hold.",
                "Its artefact can be used through `effbench eval from=RUN`.",
            )
        if self.decoder(point) != Decoder():
            where = f"{self.name} at {point.name}" if point.name else self.name
            raise UserError(
                f"{where} decodes in a way of its own, which no class of transformers has.",
                "Its artefact can be used through `effbench eval from=RUN` and "
                "`effbench generate`.",
            )
        with self.at(model, point):
            return plain.plain_model(model, dtype)

    def export(self, model: torch.nn.Module, point: Point, folder: Path) -> None:
        """Write an operating point in the form that suits it best: an adapter that peft loads, or
        a folder that transformers does.
        """
        adapter = self.as_peft(model, point)
        if adapter is not None:
            peft_lora.write_adapter(adapter, folder, peft_lora.base_of(model))
        else:
            plain.write(self.as_plain(model, point), folder)

    # -- accounting ----------------------------------------------------------------------------

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Return what the method makes of a model; what it costs is counted from that.

        Default: the model as it is.

        Args:
            base: What it starts from, frozen; its linears are packed already where `weights` is a
                packed format.
            point: One of `points()`, or `full_point`; it plays no part while it trains.
            phase: `train` is the model as it trains, at the most; where its structure changes,
                activations and FLOPs are those of the first step. `use` is what comes out of it.
            folder: Its artefact. Where only that can tell, and it is None or not there yet, the
                shape is the planned one.
        """
        return base

    def holds(self) -> tuple[str, ...]:
        """Return the config names of the other models that are in memory while it trains.

        An empty name is another copy of the model that it starts from.
        """
        return ()

    def others(self) -> tuple[str, ...]:
        """Return the config names of all other models that it loads: what they are is in the key.

        Default: those of `holds`.
        """
        return tuple(name for name in self.holds() if name)

    def check_others(self, shapes: Mapping[str, AnyShape]) -> None:
        """Refuse other models that it cannot use, as far as their shapes are known.

        Args:
            shapes: By their config names.

        Raises:
            UserError: Before any weight is loaded.
        """
