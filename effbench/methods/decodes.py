"""How a method decodes, and what it says of given text, at each of its operating points."""

from __future__ import annotations

from dataclasses import dataclass

from effbench.api.batch import Batch
from effbench.api.points import UNNAMED, Point
from effbench.api.session import Session
from effbench.nn.decode.decoder import Decoder, Engine, Logits, forward_logits
from effbench.nn.losses import token
from effbench.util.lazy import torch


@dataclass(frozen=True)
class Forward:
    """What a model says of given text at one operating point."""

    own: Logits | None = None
    """Teacher-forced logits of the method's own; None for those of the model's forward pass."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether what requests share can be computed once, and the head where it is needed."""
        return self.own is None

    def logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return teacher-forced logits, [B, T, V]."""
        return forward_logits(model, batch) if self.own is None else self.own(model, batch)

    def token_nll(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        """Return each predicted token's negative log-likelihood, [B, T - 1], in nats.

        Float32, zero where the label is -100.
        """
        if self.own is None:
            return token.answer_nll(model, batch.input_ids, batch.attention_mask, batch.labels)
        return token.token_nll(self.own(model, batch), batch.labels)


class Decodes:
    """What a method says of decoding; on its own, that every point decodes as the model does.

    A method overrides `decoder`, and the rest follows. Whoever calls the rest is inside the
    context `at` of the same point.
    """

    def decoder(self, point: Point) -> Decoder:
        """Return how a point decodes. Default: all blocks for each token, one after the other."""
        return Decoder()

    def forward(self, point: Point = UNNAMED) -> Forward:
        """Return what a point says of given text: the logits that decoding gives."""
        return Forward(self.decoder(point).logits)

    def engines(self, point: Point = UNNAMED) -> frozenset[str]:
        """Return what can decode a point: `auto`, `static`, `eager` and `generate` of `speed`."""
        return self.decoder(point).engines

    def session(
        self, model: torch.nn.Module, point: Point = UNNAMED, engine: Engine = "auto"
    ) -> Session:
        """Return a fresh decoding session; it keeps all its state to itself.

        Raises:
            ValueError: When the engine does not apply.
        """
        return self.decoder(point).session(model, engine)

    def logits(self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED) -> torch.Tensor:
        """Return teacher-forced logits at a point, [B, T, V]."""
        return self.forward(point).logits(model, batch)

    def token_nll(
        self, model: torch.nn.Module, batch: Batch, point: Point = UNNAMED
    ) -> torch.Tensor:
        """Return each predicted token's negative log-likelihood at a point, [B, T - 1], in nats."""
        return self.forward(point).token_nll(model, batch)
