"""Sub-models that are some of a model's layers, under the same final norm and head.

A sub-model of depth n is W_out norm(h), with h the output of the last of its n layers. Inside
`nn.llama.stack.at_layers` a model is that sub-model: layers, caches and counts are those of the n
layers alone. `exit_states` gives the outputs h_n of several depths in one pass over the deepest.

Sources: Valipour et al., SortedNet, arXiv 2309.00255; Kavehzadeh et al., Sorted LLaMA, arXiv
2309.08968, whose exits share one norm and one head.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from effbench.nn.depth.exit_heads import own_head
from effbench.nn.llama.head import IGNORED
from effbench.nn.llama.stack import at_layers, decoder_layers


def keep_layers(model: torch.nn.Module, kept: Sequence[int]) -> None:
    """Take all other layers out of `model` for good, and number those that stay anew.

    Args:
        model: A Llama-style causal language model.
        kept: Indices of layers, ascending.
    """
    root: Any = model
    decoder, config = root.model, root.config
    decoder.layers = torch.nn.ModuleList(decoder.layers[i] for i in kept)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    for place, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = place


def exit_states(
    model: torch.nn.Module,
    depths: Iterable[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> dict[int, torch.Tensor]:
    """Return h_n [B, T, d], not normed, for each of `depths`; deeper layers do not run.

    Args:
        model: A Llama-style causal language model.
        depths: Numbers of layers n, from 1.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T].
    """
    wanted = sorted(set(depths))
    found: dict[int, torch.Tensor] = {}
    layers = decoder_layers(model)
    hooks = []
    for n in wanted:

        def keep(_: Any, __: Any, output: torch.Tensor, n: int = n) -> None:
            found[n] = output

        hooks.append(layers[n - 1].register_forward_hook(keep))
    root: Any = model
    try:
        with at_layers(model, range(wanted[-1])):
            root.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def states_apart(
    model: torch.nn.Module,
    subs: Mapping[int, Sequence[int]],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the depth of each sub-model and what the head reads of it, [B, T, d], not normed.

    They run one after the other, for they share no exit.

    Args:
        model: A Llama-style causal language model.
        subs: The layers of each sub-model, by depth.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T].
    """
    for n, kept in subs.items():
        with at_layers(model, kept):
            yield n, exit_states(model, (n,), input_ids, attention_mask)[n]


def freeze_all_but(model: torch.nn.Module, kept: Collection[int]) -> None:
    """Freeze the layers of a model that are not among those of some indices."""
    for index, layer in enumerate(decoder_layers(model)):
        if index not in kept:
            layer.requires_grad_(False)


def readout(model: torch.nn.Module, hidden: torch.Tensor, depth: int) -> torch.Tensor:
    """Return the logits [..., V] of the exit at `depth` from its hidden states [..., d].

    They are those of the model's norm and head, unless the exit has its own.
    """
    norm, head = norm_and_head(model, depth)
    logits: torch.Tensor = head(norm(hidden))
    return logits


def norm_and_head(model: torch.nn.Module, depth: int) -> tuple[Any, Any]:
    """Return the modules that give the logits of the exit at `depth`, one after the other."""
    own, root = own_head(model, depth), cast(Any, model)
    return (root.model.norm, root.lm_head) if own is None else (own.norm, own.head)


def exit_nll(
    model: torch.nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor,
    depth: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of an exit in nats, a scalar.

    Its logits are computed again in the backward pass, so that those of several exits are never in
    memory at once.

    Args:
        model: A Llama-style causal language model.
        hidden: h_n [B, T, d].
        labels: [B, T], not shifted; -100 where a token does not count.
        depth: n.
        weights: Of each token that counts, [N]; None is 1.
    """
    targets = labels[:, 1:]
    counted = targets != IGNORED
    wanted = targets[counted]

    def head(chosen: torch.Tensor) -> torch.Tensor:
        logits = readout(model, chosen, depth).float()
        if weights is None:
            return F.cross_entropy(logits, wanted, reduction="sum")
        return (weights * F.cross_entropy(logits, wanted, reduction="none")).sum()

    total: torch.Tensor = checkpoint(head, hidden[:, :-1][counted], use_reentrant=False)
    return total


def summed_nll(
    model: torch.nn.Module,
    states: Iterable[tuple[int, torch.Tensor]],
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the sum of `exit_nll` over several exits, a scalar.

    Args:
        model: A Llama-style causal language model.
        states: The depth of each exit and h_n [B, T, d] there.
        labels: [B, T], not shifted; -100 where a token does not count.
        weights: Of each token that counts, [N]; None is 1.
    """
    total = torch.zeros((), device=labels.device)
    for n, hidden in states:
        total = total + exit_nll(model, hidden, labels, n, weights)
    return total


def summed_nll_of(
    model: torch.nn.Module,
    subs: Mapping[int, Sequence[int]],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    labels: torch.Tensor,
    weights: torch.Tensor | None = None,
    *,
    nested: bool,
) -> torch.Tensor:
    """Return the summed negative log-likelihood of all sub-models in nats, a scalar.

    Args:
        model: A Llama-style causal language model.
        subs: The layers of each sub-model, by depth.
        input_ids: [B, T], padded on the right.
        attention_mask: [B, T].
        labels: [B, T], not shifted; -100 where a token does not count.
        weights: Of each token that counts, [N]; None is 1.
        nested: Whether they have the first layers each, and one pass gives the states of all.
    """
    inputs = input_ids, attention_mask
    states = (
        exit_states(model, subs, *inputs).items() if nested else states_apart(model, subs, *inputs)
    )
    return summed_nll(model, states, labels, weights)


def train_norm(model: torch.nn.Module) -> None:
    """Make the final norm a trained parameter, held in float32 whatever the model's dtype.

    A learning step is smaller than a short dtype can tell from 1.
    """
    root: Any = model
    norm = root.model.norm.float().requires_grad_(True)
    # A float32 weight gives a float32 output, which the head does not take.
    norm.register_forward_hook(lambda _, inputs, output: output.to(inputs[0].dtype))


@contextmanager
def scaled_updates(factors: Iterable[tuple[torch.nn.Parameter, float]]) -> Iterator[None]:
    """Multiply what happens to each parameter inside the context by its factor.

    Around a step of an optimiser whose update is proportional to the learning rate, it multiplies
    the learning rate of that parameter.
    """
    before = [(p, p.detach().clone(), factor) for p, factor in factors if factor != 1]
    yield
    with torch.no_grad():
        for parameter, old, factor in before:
            parameter.copy_(old + factor * (parameter - old))
