"""What is loaded as a causal model must not see the tokens that come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from effbench.models.survey import require_causal
from effbench.util.errors import UserError


class Summing(torch.nn.Module):
    """Logits of each place from the sum of what is embedded up to it, or from it on."""

    def __init__(self, leaks: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=32)
        self.embedding, self.leaks = torch.nn.Embedding(32, 32), leaks

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        x = self.embedding(input_ids)
        return SimpleNamespace(logits=x.flip(1).cumsum(1).flip(1) if self.leaks else x.cumsum(1))


def test_a_model_that_sees_the_tokens_to_come_is_refused() -> None:
    require_causal(Summing(leaks=False))
    with pytest.raises(UserError, match="see those after them"):
        require_causal(Summing(leaks=True))
