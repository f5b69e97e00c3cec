"""Methods of evaluation that change what a cache keeps, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from effbench.api.shape import Anatomy, AnyShape
from effbench.methods.base import Method
from effbench.methods.driven import Drives
from effbench.methods.reads import Reads
from effbench.nn.decode.decoder import Decoder
from effbench.util.errors import UserError


@dataclass(frozen=True)
class Caches(Drives, Reads):
    """A method of evaluation with a cache of its own; the model stays as it is."""

    anatomy: ClassVar[Anatomy] = "llama"

    def resolve(self, shape: AnyShape) -> Self:
        """Return the method.

        Raises:
            UserError: For a model whose layers share states, and as `Drives.resolve` does.
        """
        require_own_states(shape)
        return super().resolve(shape)

    def check_start(self, earlier: Sequence[Method]) -> None:
        """Refuse an artefact that decodes in a way of its own."""
        super().check_start(earlier)
        for point in earlier[-1].points() if earlier else ():
            if earlier[-1].decoder(point) != Decoder():
                where = f" at {point}" if point.name else ""
                raise UserError(
                    f"{earlier[-1].name} decodes in a way of its own{where}, "
                    f"which {self.name} would leave out.",
                    "Evaluate it without method=, through its own operating points.",
                )


def require_own_states(shape: AnyShape) -> None:
    """Refuse a model whose layers share states.

    Raises:
        UserError: When some layer's keys and values are another's.
    """
    if shape.shares:
        raise UserError(
            "Some layers of this model take states from others, whose cache is not theirs.",
            "Choose a model whose layers do not share.",
        )
