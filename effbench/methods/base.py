"""What a method is: a frozen dataclass of hyper-parameters with a few hooks.

A method knows no stage, no store and no command line. It overrides only the hooks it changes; the
defaults below are plain fine-tuning of every weight. Mutable state never lives on the method: it
lives in the model's modules or in the `Context`, which the training loop saves and restores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from effbench.api.batch import Batch
from effbench.api.cost import Cost, dense_cost
from effbench.api.examples import Example
from effbench.api.footprint import Training, trained_layers
from effbench.api.method_types import Context, Paper, Weights
from effbench.api.shape import DTYPE_BYTES, Shape
from effbench.methods.decodes import Decodes
from effbench.util.errors import UserError
from effbench.util.lazy import torch

if TYPE_CHECKING:
    from effbench.api.spec import DatasetSpec


@dataclass(frozen=True)
class Part:
    """A part of a compression. What is computed for it is kept, so that nothing is computed twice.

    All that takes time belongs into `make`, a pass over calibration rows too (a part for each).
    """

    name: str
    make: Callable[[], dict[str, torch.Tensor]]
    """Computes the part's tensors and changes nothing."""
    put: Callable[[Mapping[str, torch.Tensor]], None]
    """Puts the tensors in their place, whether computed just now or before an interruption."""


@dataclass(frozen=True)
class Method(Decodes):
    """Base of all methods; on its own it is plain training of every weight."""

    name: ClassVar[str] = ""
    """The name of its file and its config; set by the registry."""
    paper: ClassVar[Paper | None] = None
    stage: ClassVar[Literal["train", "compress", "eval"]] = "train"
    """The stage that makes its artefact."""
    learning_rate: ClassVar[float] = 1e-4
    """What `train.learning_rate=null` means for this method."""
    version: ClassVar[int] = 1
    """Raised when the same settings would give another result; from then on in the key."""
    works_on: ClassVar[frozenset[str]] = frozenset({"dense"})
    """Kinds of linear layers it can start from: `dense`, `nf4`, `packed`, `adapted`."""
    leaves: ClassVar[str] = "dense"
    """The kind of linear layers that its artefact has."""
    identity: ClassVar[dict[str, Any] | None] = {}
    """Settings under which the method, put in but not trained, gives the base's own logits bit for
    bit; None where there are none. A contract test holds every method to it."""
    at_evaluation: ClassVar[frozenset[str]] = frozenset()
    """Settings on which nothing that is trained depends: `effbench eval from=RUN` can change them.
    """
    in_one_pass: ClassVar[bool] = False
    """Whether an evaluation may compute a batch at several points side by side, block by block.
    `at` must then take next to no time and change nothing but what the blocks compute."""
    nested_points: ClassVar[bool] = False
    """Whether `at` can be entered inside another one, the inner point being the one that holds."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Packages that its hooks import; imported before memory is first measured."""
    needs: ClassVar[dict[str, Any]] = {}
    """Settings without a usable default, as a trial run would have them."""

    @property
    def weights(self) -> Weights:
        """How the base is held: in the compute dtype, as float32 masters, or as NF4."""
        return "compute"

    def fitted(self, shape: Shape) -> Self:
        """Return the method with the defaults filled in that depend on the model's shape."""
        return self

    def check(self, shape: Shape) -> None:
        """Refuse what cannot work on a model of this shape.

        Raises:
            UserError: With the field to change. Called before any weight is loaded.
        """

    def check_after(self, earlier: Sequence[Method]) -> None:
        """Refuse to go on from an artefact that this method cannot start from.

        Args:
            earlier: The methods that made the artefact, first to last.

        Raises:
            UserError: Before any weight is loaded.
        """
        kind = earlier[-1].leaves if earlier else "dense"
        if kind not in self.works_on:
            raise UserError(
                f"{self.name} cannot go on from what {earlier[-1].name} left: "
                f"it needs {' or '.join(sorted(self.works_on))} linear layers, not {kind} ones.",
                "Run it first and the other one after it, or choose another method.",
            )

    def check_dataset(self, dataset: DatasetSpec) -> None:
        """Refuse a dataset that it cannot train on.

        Raises:
            UserError: Before any weight is loaded.
        """

    # -- structure -----------------------------------------------------------------------------

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Put the method's structure in and mark what trains. Default: everything trains."""
        model.requires_grad_(True)
        return model

    # -- training ------------------------------------------------------------------------------

    def dataset(
        self, examples: Sequence[Example], model: torch.nn.Module, ctx: Context
    ) -> list[Example]:
        """Return the examples to train on, in order: chosen, weighted, relabelled, with columns.

        A resumed run calls it again, with the untrained model.

        Args:
            examples: The training split.
            model: What training starts from, before anything is put into it.
            ctx: Of the run.
        """
        return list(examples)

    def unit(self, example: Example) -> Example:
        """Return a row with all sequences that one batch must hold, such as both of a pair.

        Rows of training and validation go through it. Default: the right answer alone.
        """
        return example

    def start(self, model: torch.nn.Module, window: Sequence[Batch], ctx: Context) -> None:
        """Run once before the first step: what has to look at data before anything trains.

        A resumed run does not call it again; what it leaves must be in `tensors` or `ctx.state`.

        Args:
            model: The prepared model.
            window: The micro-batches of the first step.
            ctx: Of the run.
        """

    def groups(self, model: torch.nn.Module) -> list[tuple[list[torch.nn.Parameter], float]]:
        """Return what trains, in groups, each with its share of the run's learning rate."""
        return [([p for p in model.parameters() if p.requires_grad], 1.0)]

    def on_step(self, model: torch.nn.Module, ctx: Context) -> None:
        """Run before each optimiser step: schedules and draws."""

    def on_gradients(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ctx: Context
    ) -> None:
        """Run in each optimiser step once all gradients are there, before they are clipped.

        Parameters may be replaced here, as long as the optimiser is told
        (`nn.adapters.growth.Swap`) and `rebuild` can do the same from `ctx.state`.
        """

    def rebuild(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return a prepared `model` with the structure that `ctx.state` tells of.

        Called when a run resumes, before the checkpoint's tensors are put in. A method whose
        structure changes while it trains needs it.
        """
        return model

    def settled(self, model: torch.nn.Module, ctx: Context) -> bool:
        """Whether the structure will change no more: early stopping counts from then on."""
        return True

    def facts(self, model: torch.nn.Module, ctx: Context) -> dict[str, float]:
        """Return what the event of each training step says besides loss and time."""
        return {}

    def finish(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the trained model as it is used from now on: the artefact, not yet saved."""
        return model

    def parts(self, model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        """Return kinds of predicted tokens with a loss of their own, [B, T - 1] bool each, by name.

        The first column is the second token. Tokens may be of no kind, and those without a label
        do not count.
        """
        return {}

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of one micro-batch, a scalar.

        The sum over its loss tokens divided by `batch.window_tokens`, so that the micro-batches of
        one window add up to the mean over all its tokens, each with the weight of its row.
        """
        nll = self.token_nll(model, batch)
        weights = batch.weights
        if weights is not None:
            nll = nll * weights[:, None]
        return nll.sum() / batch.window_tokens

    def validation(
        self, model: torch.nn.Module, batch: Batch, point: str = ""
    ) -> tuple[torch.Tensor, int]:
        """Return the losses of a validation batch, of any shape, and what their sum is over."""
        return self.token_nll(model, batch, point), batch.loss_tokens

    def scores(self, model: torch.nn.Module, batch: Batch, point: str = "") -> torch.Tensor:
        """Return what the model finds each sequence worth, [B]; higher is better.

        Default: the log-likelihood of its answer in nats, summed over tokens.
        """
        return -self.token_nll(model, batch, point).sum(1)

    def update(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        window: Sequence[Batch],
        ctx: Context,
    ) -> torch.Tensor:
        """Make one optimiser step over an accumulation window and return its loss, a scalar.

        Raises:
            UserError: When no parameter received a gradient in the whole window.
        """
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=ctx.device)
        for batch in window:
            with ctx.autocast():
                loss = self.loss(model, batch, ctx)
            if loss.requires_grad:
                ctx.backward(loss)
            total += loss.detach()
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        if all(p.grad is None for p in trained):
            raise UserError(
                "No parameter received a gradient in a whole accumulation window.",
                "Some layer computes without autograd, so nothing would be learnt; "
                "`effbench doctor` lists the known causes.",
            )
        self.on_gradients(model, optimizer, ctx)
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        ctx.clip(trained)
        optimizer.step()
        return total

    def release(self, model: torch.nn.Module) -> None:
        """Let go of what only training needed, before the model is evaluated."""

    # -- compression ---------------------------------------------------------------------------

    @property
    def calibrates(self) -> bool:
        """Whether compression runs the model on training rows."""
        return False

    def compress(
        self, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
    ) -> Iterator[Part]:
        """Yield the parts of the work, each from the model as the parts before have left it.

        Who iterates makes each part, or takes what an interrupted run kept of it, and puts it in
        place before asking for the next one. The model is compressed when the iterator is done.
        """
        raise NotImplementedError(f"{self.name} does not compress")

    # -- use -----------------------------------------------------------------------------------

    def points(self) -> tuple[str, ...]:
        """Return the names of the artefact's operating points; one unnamed point by default."""
        return ("",)

    def whole(self, shape: Shape) -> str:
        """Return the operating point with all that is in memory, listed or not.

        The others may need less; it is what they are compared with, and what a run after this one
        starts from. Default: the unnamed point, the model as it is left.

        Args:
            shape: The model's shape, as the method leaves it.
        """
        return ""

    def validated(self, shape: Shape) -> str:
        """Return the operating point at which training is validated, listed or not.

        It follows from what trains alone: which points are evaluated afterwards (`at_evaluation`)
        must not decide when training stops and which weights it keeps. Default: the unnamed point,
        the model as training has it.

        Args:
            shape: The shape of the model that it starts from.
        """
        return ""

    def at(self, model: torch.nn.Module, point: str) -> AbstractContextManager[Any]:
        """Return a context in which `model` works at `point`, and after which it is as before."""
        return nullcontext()

    # -- artefact ------------------------------------------------------------------------------

    def tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that make the artefact, by name. Default: all that trains."""
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        """Write the artefact into an existing, empty folder."""
        from safetensors.torch import save_file

        tensors = {n: t.contiguous().cpu() for n, t in self.tensors(model).items()}
        save_file(tensors, folder / "weights.safetensors")

    def load(self, model: torch.nn.Module, folder: Path, ctx: Context) -> torch.nn.Module:
        """Return the base `model` turned into the artefact of `folder`."""
        from effbench.nn.llama.weights import load_tensors

        model = self.prepare(model, ctx)
        load_tensors(self.tensors(model), folder / "weights.safetensors")
        return model

    def export(self, model: torch.nn.Module, point: str, folder: Path) -> None:
        """Write the artefact at one operating point in a form that other tools load."""
        raise UserError(
            f"{self.name} has no export to another tool's format.",
            "Its artefact can be used through `effbench eval from=RUN`.",
        )

    # -- accounting ----------------------------------------------------------------------------

    def left(self, shape: Shape, folder: Path | None = None) -> Shape:
        """Return the shape of what the method leaves of a model of `shape`.

        Args:
            shape: The shape of what it starts from.
            folder: Its artefact. Without one, or before there is one, the shape is the planned one,
                where only the artefact can tell.
        """
        return shape

    def training_cost(self, shape: Shape, dtype: str, base: Cost | None = None) -> Cost:
        """Return what a model of `shape` needs while it trains, at the most."""
        return self.cost(shape, dtype, self.whole(shape), base)

    def cost(self, shape: Shape, dtype: str, point: str = "", base: Cost | None = None) -> Cost:
        """Return what a model of `shape` under this method needs at `point`.

        Args:
            shape: The model's shape, as the method leaves it (`left`).
            dtype: Compute dtype, a key of `DTYPE_BYTES`.
            point: One of `points()`.
            base: Cost of what the method starts from; None for the unchanged model.
        """
        size = DTYPE_BYTES["float32" if self.weights == "float32" else dtype]
        cost = base or dense_cost(shape, size)
        kv_bytes = shape.kv_bytes_per_token(DTYPE_BYTES[dtype])
        return replace(cost, trainable=shape.params, kv_bytes_per_token=kv_bytes)

    def training(self, shape: Shape, dtype: str) -> Training:
        """Return what a training step keeps from its forward pass and its work, from shapes.

        A method whose structure changes while it trains counts its first step.

        Args:
            shape: The shape of the model that it starts from.
            dtype: Compute dtype, a key of `DTYPE_BYTES`.
        """
        return trained_layers(shape, DTYPE_BYTES[dtype], self.weights == "float32")

    def holds(self) -> tuple[str, ...]:
        """Return the config names of the other models that are in memory while it trains.

        An empty name is another copy of the model that it starts from.
        """
        return ()


def compress_whole(
    method: Method, model: torch.nn.Module, calibration: Sequence[Batch], ctx: Context
) -> None:
    """Compress a model in place from the first part to the last, and keep none of them."""
    for part in method.compress(model, calibration, ctx):
        part.put(part.make())
