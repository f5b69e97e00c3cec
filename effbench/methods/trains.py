"""Methods that train: what they add to the core of a method."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

from effbench.api.batch import Batch
from effbench.api.evolution import Evolution
from effbench.api.examples import Example
from effbench.api.method_types import Context
from effbench.api.points import UNNAMED, Point
from effbench.api.shape import AnyShape, ModelShape, Phase
from effbench.api.spec import Stage
from effbench.api.weights import held
from effbench.methods.base import Method
from effbench.nn.llama import weights
from effbench.nn.model_kinds.base import kind_of
from effbench.util.errors import UserError
from effbench.util.lazy import torch

START = ""
"""Stands for a frozen copy of what the run starts from, where a model's config name may stand."""


@dataclass(frozen=True)
class Trains(Method):
    """A method whose artefact comes from training; on its own, plain training of every weight."""

    stage: ClassVar[Stage] = "train"
    data_parallel: ClassVar[frozenset[str]] = frozenset()
    """The ways (`hardware.sharding`) in which its training was shown to work on several devices: a
    step on parts of each micro-batch, its gradients summed, is the step on all of it. Each class
    says it for itself, because a subclass may add what does not work; see `data_parallel`."""
    read_tokens: ClassVar[int] = 0
    """Tokens of the largest batch that `dataset` reads; 0 where it reads row by row."""

    def prepare(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Put the method's structure in and mark what trains. Default: everything trains."""
        model.requires_grad_(True)
        return model

    def aux_models(self) -> dict[str, str]:
        """Return the other models that training needs beside its own, by the setting's name.

        A value is a model's config name, or `START`. They are in `ctx.aux` from before `prepare`
        until training ends, in the compute dtype, frozen.
        """
        return {}

    def splits(self) -> tuple[str, ...]:
        """Return the splits beside `train` that training learns from or decides by.

        Their rows are in `ctx.splits` from before `dataset` on. None of their prompts may stand in
        `train`, and no evaluator may read them. Default: none.
        """
        return ()

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

    def evolution(self, model: torch.nn.Module, ctx: Context) -> Evolution:
        """Return what changes the prepared model beside the optimiser. Default: nothing."""
        return Evolution()

    def param_groups(self, model: torch.nn.Module) -> list[tuple[list[torch.nn.Parameter], float]]:
        """Return what trains, in groups, each with its share of the run's learning rate.

        What trains and is in none of them, such as a classifier's head, is trained at share 1.
        """
        return [([p for p in model.parameters() if p.requires_grad], 1.0)]

    @property
    def loss_unit(self) -> str:
        """What `loss` is in, once summed over a window: `nats/token`, or over rows, or nothing.

        A token of a classifier is the class of its row.
        """
        return "nats/token"

    def loss(self, model: torch.nn.Module, batch: Batch, ctx: Context) -> torch.Tensor:
        """Return the loss of one micro-batch, a scalar.

        The sum over its loss tokens divided by `batch.window_tokens`, so that the micro-batches of
        one window add up to the mean over all its tokens, each with the weight of its row: what
        overrides it does the same (`Batch.weighed`).
        """
        return batch.weighed(self.token_nll(model, batch)).sum() / batch.window_tokens

    def validation(
        self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED
    ) -> tuple[torch.Tensor, int]:
        """Return the losses of a validation batch, of any shape, and what their sum is over."""
        return self.token_nll(model, batch, point), batch.loss_tokens

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
        ctx.reduce(_members(optimizer), total)
        if all(p.grad is None for p in _members(optimizer)):
            raise UserError(
                "No parameter received a gradient in a whole accumulation window.",
                "Some layer computes without autograd, so nothing would be learnt; "
                "`effbench doctor` lists the known causes.",
            )
        ctx.unscale()
        ctx.evolution.after_backward(optimizer)
        ctx.clip(_members(optimizer))
        optimizer.step()
        ctx.evolution.after_step(optimizer)
        return total

    def validation_point(self, shape: AnyShape) -> Point:
        """Return the operating point at which training is validated, listed or not.

        It follows from what trains alone: which points are evaluated afterwards (`eval_settings`)
        must not decide when training stops and which weights it keeps. Default: the unnamed point,
        the model as training has it.

        Args:
            shape: The shape of the model that it starts from.
        """
        return UNNAMED

    def trained_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that a checkpoint keeps, by name. Default: all that trains."""
        return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def artefact_tensors(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Return the tensors that make the artefact, by name. Default: all that trains."""
        return self.trained_tensors(model)

    def finalize(self, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
        """Return the trained model as it is used from now on: the artefact, not yet saved."""
        return model

    def shape(
        self, base: ModelShape, point: Point, phase: Phase, folder: Path | None
    ) -> ModelShape:
        """Return the model with every weight training, held as `weights` says."""
        return base.trained(held(self.weights))

    def reads_first(self, rows: int) -> int:
        """Return how many sequences are read before the first step, as for a search. Default: 0.

        Args:
            rows: Training rows; 0 where their number is not known.
        """
        return 0

    def holds(self) -> tuple[str, ...]:
        """Return the config names of the auxiliary models; `START` is a copy of the model."""
        return tuple(self.aux_models().values())

    def consults(self) -> tuple[str, ...]:
        """Return the config names of the other models in memory while `dataset` is at work.

        They are gone before the first step. Default: none.
        """
        return ()

    def others(self) -> tuple[str, ...]:
        """Return the auxiliary models, and those that are asked before training."""
        return (*super().others(), *self.consults())


def data_parallel(method: Method) -> frozenset[str]:
    """Return the ways in which a method may train on several devices, as its own class says."""
    ways: frozenset[str] = vars(type(method)).get("data_parallel", frozenset())
    return ways


def groups_of(
    method: Trains, model: torch.nn.Module
) -> list[tuple[list[torch.nn.Parameter], float]]:
    """Return the groups of a method, and one of what trains beside them, where there is any."""
    groups = method.param_groups(model)
    named = {id(p) for members, _ in groups for p in members}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in named]
    return [*groups, (others, 1.0)] if others else groups


def _members(optimizer: torch.optim.Optimizer) -> list[torch.nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def begin_training(method: Trains, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
    """Load the auxiliary models, put the method's structure in, and make its evolution.

    Args:
        method: What trains.
        model: What it starts from.
        ctx: Of the run; `aux` and `evolution` are set.

    Raises:
        UserError: When an auxiliary model has other tokens than `model`.
    """
    ctx.aux = {key: _auxiliary(key, name, model, ctx) for key, name in method.aux_models().items()}
    model = method.prepare(model, ctx)
    ctx.evolution = method.evolution(model, ctx)
    return model


def _auxiliary(key: str, name: str, model: torch.nn.Module, ctx: Context) -> torch.nn.Module:
    if name == START:
        copied = copy.deepcopy(model)
        weights.cast_parameters(copied, ctx.dtype)
        return copied.requires_grad_(False).eval()
    loaded = ctx.load_model(name).requires_grad_(False).eval()
    require_same_tokens(key, name, loaded, model)
    return loaded


def require_same_tokens(
    key: str, name: str, other: torch.nn.Module, model: torch.nn.Module
) -> None:
    """Refuse another model that reads other tokens than `model`, or has other answers.

    Raises:
        UserError: Naming `method.<key>`.
    """
    require_same(key, name, _read(other), _read(model))


class Read(NamedTuple):
    """What a model reads, and what it chooses from."""

    tokens: int
    kind: str
    answers: int

    @classmethod
    def by(cls, shape: AnyShape) -> Self:
        """Return that of a model of a shape."""
        return cls(shape.vocab_size, ModelShape.of(shape).kind, shape.outputs)


def require_same(key: str, name: str, theirs: Read, ours: Read) -> None:
    """Refuse what `require_same_tokens` refuses, where no model is loaded yet."""
    if theirs.tokens != ours.tokens:
        raise UserError(
            f"method.{key}={name} has {theirs.tokens} vocabulary entries, the trained model "
            f"{ours.tokens}.",
            "Choose a model with the same tokenizer.",
        )
    if theirs != ours:
        raise UserError(
            f"method.{key}={name} is a {theirs.kind} with {theirs.answers} answers, the trained "
            f"model a {ours.kind} with {ours.answers}.",
            "Choose a model that answers the same.",
        )


def _read(model: torch.nn.Module) -> Read:
    kind, config = kind_of(model), model.config
    tokens: int = config.vocab_size  # type: ignore[assignment, union-attr]
    return Read(tokens, kind.name, tokens if kind.speaks else config.num_labels)  # type: ignore
