"""What an error of each weight costs: the diagonal of the empirical Fisher information.

    F = sum over sequences of (dL / dW)^2, element by element

with L the mean negative log-likelihood of a sequence's tokens after the first. Each sequence is a
pass of its own, without padding: a square of summed gradients would be something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from effbench.api.batch import Batch
from effbench.nn.quant.linears import dense_linears
from effbench.util.errors import UserError


def squared_gradients(model: torch.nn.Module, batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    """Return F of every decoder linear, [d_out, d_in] float32, by its name.

    A weight's gradient is squared and freed as soon as it is there.

    Args:
        model: A causal language model without dropout, its decoder linears dense.
        batches: What it reads; all tokens count but padding.

    Raises:
        UserError: When no sequence has two tokens, or a gradient is not finite.
    """
    weights = {name: model.get_parameter(f"{name}.weight") for name, _ in dense_linears(model)}
    sums = {name: torch.zeros_like(w, dtype=torch.float32) for name, w in weights.items()}
    read = 0
    with _squared_into(sums, weights), torch.enable_grad():
        for ids in _sequences(batches):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            F.cross_entropy(logits.float(), ids[1:]).backward()
            read += 1
    if not read:
        raise UserError(
            "There is no calibration row with two tokens to take gradients from.",
            "Raise dataset.limit.train, or choose another dataset.",
        )
    _require_finite(sums)
    return sums


def _sequences(batches: Sequence[Batch]) -> Iterator[torch.Tensor]:
    """Yield the tokens of each sequence, [T] without padding, where there is one to predict."""
    for batch in batches:
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            if mask.sum() > 1:
                yield ids[mask.bool()]


@contextmanager
def _squared_into(
    sums: Mapping[str, torch.Tensor], weights: Mapping[str, torch.nn.Parameter]
) -> Iterator[None]:
    """Add the square of every gradient of `weights` to `sums`, and keep no gradient."""
    trained = [weight.requires_grad for weight in weights.values()]
    hooks = []
    for name, weight in weights.items():

        def add(weight: torch.Tensor, total: torch.Tensor = sums[name]) -> None:
            assert weight.grad is not None
            total.add_(weight.grad.float().square())
            weight.grad = None

        hooks.append(weight.requires_grad_(True).register_post_accumulate_grad_hook(add))
    try:
        yield
    finally:
        for hook, weight, before in zip(hooks, weights.values(), trained, strict=True):
            hook.remove()
            weight.requires_grad_(before)


def _require_finite(sums: Mapping[str, torch.Tensor]) -> None:
    for name, total in sums.items():
        if not total.isfinite().all():
            raise UserError(
                f"Gradients of {name} are not finite.",
                "Compute in another dtype, or look for NaN in the model.",
            )
