"""Embeddings whose vectors lie in memory as packed codes, alone or as the head's own weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch

from effbench.nn.llama.surgery import replace_module
from effbench.nn.quant.linears import PackedLinear
from effbench.util.errors import UserError


class PackedEmbedding(torch.nn.Embedding):
    """Looks vectors up among the rows of a packed linear, and expands those alone.

    It has no parameter. Where the table is the output head's too (tied embeddings), the head has
    the codes and this only reads them, so that they are held once wherever the model is moved to.

    Args:
        rows: The packed table, [V, d]: a linear of V outputs.
        tied: Whether that is the model's head.
        dtype: Of what is looked up.
    """

    def __init__(self, rows: PackedLinear, tied: bool, dtype: torch.dtype) -> None:
        torch.nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = rows.out_features, rows.in_features
        self.padding_idx = self.max_norm = None
        self.dtype, self.tied = dtype, tied
        if tied:
            self._head = (rows,)  # in a tuple, so that it is no module of this one
        else:
            self.rows = rows

    @property
    def table(self) -> PackedLinear:
        """The linear that has the codes."""
        return self._head[0] if self.tied else self.rows

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """All vectors, [V, d] in `dtype`: made anew each time."""
        return self.table.dense_weight(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the vectors of token ids of any shape, [..., d] in `dtype`."""
        found = self.table.dense_rows(input.reshape(-1), self.dtype)
        return found.view(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Return the sizes, for printing."""
        kind = ", the head's" if self.tied else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{kind}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move, and follow a cast of the model."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


def embedding_dtype(model: Any) -> torch.dtype:
    """Return the dtype of a model's embeddings, which is that of its stream."""
    embedding = model.get_input_embeddings()
    dtype: torch.dtype = getattr(embedding, "dtype", None) or embedding.weight.dtype
    return dtype


def dense_tables(model: Any) -> tuple[str, torch.nn.Embedding, torch.nn.Linear]:
    """Return the name of a model's embedding, it and the head, both dense.

    Raises:
        UserError: When one of them is not, or does more than look up and multiply.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for part, kind in ((embedding, torch.nn.Embedding), (head, torch.nn.Linear)):
        if type(part) is not kind:
            raise UserError(
                f"The model has a {type(part).__name__} where a plain {kind.__name__} is needed.",
                "Start from a dense model whose embedding and head are torch's own.",
            )
    if head.bias is not None and is_tied(model):
        raise UserError(
            "The model's head adds a bias to products with its embedding.",
            "Start from a model whose tied head has none, or whose head is not tied.",
        )
    return _name(model, embedding), embedding, head


def is_tied(model: Any) -> bool:
    """Whether a model's head and its embedding are one table, dense or packed."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, PackedEmbedding):
        return embedding.tied and embedding.table is head
    return head is not None and head.weight is embedding.weight


def as_linear(embedding: torch.nn.Embedding) -> torch.nn.Linear:
    """Return a linear without bias that has the vectors as its rows, nothing copied."""
    sizes = embedding.embedding_dim, embedding.num_embeddings
    linear = torch.nn.Linear(*sizes, bias=False, device="meta")
    linear.weight = embedding.weight
    return linear


def some_rows(linear: torch.nn.Linear, begin: int, end: int) -> torch.nn.Linear:
    """Return a linear without bias of some rows of another, nothing copied."""
    weight = linear.weight.detach()[begin:end]
    piece = torch.nn.Linear(linear.in_features, len(weight), bias=False, device="meta")
    piece.weight = torch.nn.Parameter(weight, requires_grad=False)
    return piece


def put_head(model: Any, head: PackedLinear) -> None:
    """Put a packed head in its place, and before the blocks too where the embedding is tied."""
    name, embedding, old = dense_tables(model)
    tied = is_tied(model)
    replace_module(model, _name(model, old), head)
    if tied:
        replace_module(model, name, PackedEmbedding(head, True, embedding.weight.dtype))


def put_embedding(model: Any, rows: PackedLinear) -> None:
    """Put a packed table of its own in the embedding's place."""
    embedding = model.get_input_embeddings()
    new = PackedEmbedding(rows, False, embedding.weight.dtype)
    replace_module(model, _name(model, embedding), new)


def expand_embedding(model: Any) -> None:
    """Make a packed embedding a dense one, and the head with it where they are one table."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, PackedEmbedding):
        return
    tied, name, head_name = is_tied(model), _name(model, embedding), _name(model, head)
    weight = torch.nn.Parameter(embedding.weight, requires_grad=False)
    dense = torch.nn.Embedding.from_pretrained(weight)
    replace_module(model, name, dense.train(embedding.training))
    if tied:
        replace_module(model, head_name, as_linear(dense).train(head.training))


def _name(model: torch.nn.Module, part: torch.nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)
