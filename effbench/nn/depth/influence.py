"""How much each layer changes what it reads: the block influence of ShortGPT.

    influence_l = 1 - E[cos(x_l, x_{l+1})]     x_l: what layer l reads, [d], over all tokens

Men et al., ShortGPT: Layers in Large Language Models are More Redundant Than You Expect, 2024,
arXiv 2403.03853.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch


def influence(sums: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the block influence of every layer, [L] float64.

    Args:
        sums: Cosines of what each layer reads and leaves, [L], added up over tokens; see `passed`.
        tokens: How many.
    """
    return 1 - sums / max(1, tokens)


def of_texts(model: Any, texts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the block influence of every layer on some texts, [L] float64.

    Args:
        model: A Llama-style causal language model.
        texts: Token ids, [T] each.
    """
    layers = model.model.layers
    sums = torch.zeros(len(layers), dtype=torch.float64)
    for text in texts:
        real = torch.ones(1, len(text), dtype=torch.bool, device=text.device)
        read = passed(layers, real, partial(model.model, text[None], use_cache=False))
        sums += read["cosines"]
    return influence(sums, sum(map(len, texts)))


def passed(
    layers: torch.nn.ModuleList, real: torch.Tensor, run: Callable[[], object]
) -> dict[str, torch.Tensor]:
    """Return the cosine of what each layer reads and leaves, [L] float64, summed over tokens.

    Args:
        layers: Decoder blocks of a model that is laid out as Llama is.
        real: Tokens that count, [B, T] bool. Their number is returned too, as `tokens`.
        run: Lets the model read the tokens.
    """
    sums = torch.zeros(len(layers), dtype=torch.float64)

    def add(index: int, before: torch.Tensor, after: torch.Tensor) -> None:
        pair = before[real].double(), after[real].double()
        sums[index] += torch.nn.functional.cosine_similarity(*pair, dim=-1).sum().cpu()

    hooks = [
        layer.register_forward_hook(lambda _, inputs, out, i=i: add(i, inputs[0], out))
        for i, layer in enumerate(layers)
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return {"cosines": sums, "tokens": real.sum()}
