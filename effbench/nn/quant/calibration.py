"""What each linear reads on calibration rows, decoder block after decoder block.

    X_0 = what the first block is given,   X_{i+1} = block_i(X_i)

One set of X is held, [B, T, d] for each row, and every row is replaced as soon as it has gone
through a block: a walk holds those activations, and the statistics of one group of linears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from effbench.api.batch import Batch
from effbench.nn.llama.experts import layers_of, routing_only
from effbench.nn.llama.stack import decoder_layers
from effbench.nn.llama.surgery import replace_module
from effbench.nn.quant.linears import dense_linears
from effbench.util.errors import UserError

BLOCKS_APART = "Choose a model whose blocks run one after the other, or a method without data."


class Inputs(NamedTuple):
    """Sums over the calibration tokens x that some linears read alike."""

    gram: torch.Tensor
    """Σ x x^T, [d_in, d_in] float32."""
    magnitude: torch.Tensor
    """Mean of |x|, [d_in] float32."""


class Call(NamedTuple):
    """What a block is given beside the states: masks, positions, angles."""

    args: tuple[Any, ...]
    """Those after the states, which come first."""
    kwargs: dict[str, Any]

    def of(self, block: Callable[..., Any], states: torch.Tensor) -> torch.Tensor:
        """Return what the block makes of states, [B, T, d]."""
        out = block(states, *self.args, **self.kwargs)
        found: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return found


class Walk:
    """The blocks of a model in their order, and the calibration rows on their way through them.

    Args:
        model: A causal language model with dense linears, in eval mode.
        rows: What it reads; padding does not count.

    Raises:
        UserError: When there are no rows, or the blocks cannot run one after the other.
    """

    def __init__(self, model: Any, rows: Sequence[Batch]) -> None:
        if not rows:
            raise UserError(
                "There are no calibration rows.", "Choose a dataset with rows in its train split."
            )
        self.blocks, self.index = decoder_layers(model), 0
        self._names = _linears_by_block(model, self.blocks)
        self._real = [batch.attention_mask.bool().reshape(-1) for batch in rows]
        found = [_calls(model, self.blocks, batch) for batch in rows]
        self._states, self._calls = [states for states, _ in found], [calls for _, calls in found]

    @property
    def block(self) -> torch.nn.Module:
        """The block that the walk stands before."""
        return self.blocks[self.index]

    @torch.no_grad()
    def advance(self) -> None:
        """Send every row through the block as it is now, and go on to the next one, if any."""
        if self.index + 1 < len(self.blocks):
            for row, calls in enumerate(self._calls):
                self._states[row] = calls[self.index].of(self.block, self._states[row])
        self.index += 1

    @torch.no_grad()
    def groups(self) -> list[tuple[str, ...]]:
        """Return the names of the block's linears in the order they run, by the input they share.

        Raises:
            UserError: When one of them does not run, or more than once.
        """
        seen: list[tuple[str, torch.Tensor]] = []
        with _watched(self.block, self._names[self.index], lambda n, x: seen.append((n, x))):
            self._calls[0][self.index].of(self.block, self._states[0])
        ran, every = [name for name, _ in seen], self._names[self.index]
        unread = [name for name in every if name not in ran and name in self._of_experts]
        if sorted([*ran, *unread]) != sorted(every):
            raise UserError(
                f"Block {self.index} does not run each of its linears once.", BLOCKS_APART
            )
        groups: dict[int, list[str]] = {}
        for name, x in seen:
            groups.setdefault(id(x), []).append(name)
        return [*(tuple(names) for names in groups.values()), *((name,) for name in unread)]

    @property
    def _of_experts(self) -> tuple[str, ...]:
        """The linears of the block's experts, each of which reads some of the tokens, or none."""
        inside = tuple(f"{name}." for name, _ in layers_of(self.block))
        return tuple(n for n in self._names[self.index] if inside and n.startswith(inside))

    @torch.no_grad()
    def inputs(self, group: Sequence[str]) -> Inputs:
        """Return what the linears of a group read, the block being as it is now.

        Raises:
            UserError: When something of it is not a finite number.
        """
        d_in = int(self.block.get_submodule(group[0]).in_features)  # type: ignore[arg-type]
        device = self._states[0].device
        gram = torch.zeros(d_in, d_in, device=device)
        sums, tokens = torch.zeros(d_in, device=device), 0
        for row in range(len(self._states)):
            x = self._read(row, group[0], d_in)
            gram.addmm_(x.T, x)
            sums, tokens = sums + x.abs().sum(0), tokens + len(x)
        if not torch.isfinite(gram.sum()):
            raise UserError(
                f"{group[0]} of block {self.index} reads values that are not finite.",
                "Check the model's weights, or use hardware.dtype=float32.",
            )
        return Inputs(gram, sums / max(tokens, 1))

    def _read(self, row: int, name: str, d_in: int) -> torch.Tensor:
        """Return what a linear reads of a row, [tokens, d_in] float32; nothing after it runs."""
        real, x = self._real[row], self._states[row].new_zeros(0, d_in)
        with _watched(self.block, [name], _stop), routing_only(self.block, real):
            try:
                self._calls[row][self.index].of(self.block, self._states[row])
            except _Reached as reached:
                x = reached.x
        if name in self._of_experts:
            return x.float()
        return x.reshape(-1, d_in)[real].float()

    @contextmanager
    def tried(self) -> Iterator[torch.nn.Module]:
        """Give the block to be changed; its modules are put back at the end."""
        before = dict(self.block.named_modules())
        try:
            yield self.block
        finally:
            for name, module in before.items():
                if name and self.block.get_submodule(name) is not module:
                    replace_module(self.block, name, module)


class _Reached(Exception):  # noqa: N818  (what it carries is a find, not an error)
    """Ends a pass at the linear that was asked for."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def _stop(name: str, x: torch.Tensor) -> None:
    raise _Reached(x)


@contextmanager
def _watched(
    block: torch.nn.Module, names: Sequence[str], look: Callable[[str, torch.Tensor], None]
) -> Iterator[None]:
    """Call `look` with the name and the input of each of some linears before it runs."""
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, n=name: look(n, args[0])
        )
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _linears_by_block(model: torch.nn.Module, blocks: torch.nn.ModuleList) -> list[tuple[str, ...]]:
    """Return the names of the dense linears of each block, as the block calls them."""
    dense = {linear for _, linear in dense_linears(model)}
    return [tuple(n for n, m in block.named_modules() if m in dense) for block in blocks]


@torch.no_grad()
def _calls(
    model: Any, blocks: torch.nn.ModuleList, batch: Batch
) -> tuple[torch.Tensor, list[Call]]:
    """Return the states that the first block is given, and what each is given beside them.

    Raises:
        UserError: When something happens to the states between blocks.
    """
    states: list[torch.Tensor] = []
    calls: list[Call] = []
    with _handing_on(blocks, states, calls):
        model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        )
    if len(calls) != len(blocks) or any(one is not states[0] for one in states):
        raise UserError(
            f"The blocks of {type(model).__name__} cannot be calibrated one after the other: "
            "what one returns is not what the next one reads.",
            BLOCKS_APART,
        )
    return states[0], calls


@contextmanager
def _handing_on(
    blocks: torch.nn.ModuleList, states: list[torch.Tensor], calls: list[Call]
) -> Iterator[None]:
    """Let blocks return what they are given, and note it.

    The first one runs, for only that tells whether blocks return a tuple.
    """
    in_tuples: list[bool] = []

    def of(forward: Callable[..., Any]) -> Callable[..., Any]:
        def hand_on(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not in_tuples:
                in_tuples.append(isinstance(forward(hidden_states, *args, **kwargs), tuple))
            states.append(hidden_states)
            calls.append(Call(args, kwargs))
            return (hidden_states,) if in_tuples[0] else hidden_states

        return hand_on

    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            vars(block)["forward"] = of(block.forward)
        yield
    finally:
        for block, own in zip(blocks, before, strict=True):
            vars(block).pop("forward")
            if own is not None:
                vars(block)["forward"] = own
