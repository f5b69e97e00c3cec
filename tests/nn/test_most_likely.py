"""The likeliest token by the kernel: that of torch, whatever the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import generator

from effbench.nn.decode import native
from effbench.nn.decode.native import most_likely

SIZES = (1, 63, 64, 65, 1023, 1024, 1025, 2049)
"""Around the numbers that are compared abreast, and those of a block."""


def logits_of(size: int) -> dict[str, torch.Tensor]:
    """Rows [4, V] by what is special about them."""
    drawn = torch.randn(4, size, generator=generator(size))
    places = torch.tensor([0, size // 2, size - 1, size // 3])[:, None]
    nan = drawn.scatter(1, places, torch.nan)
    found = {
        "drawn": drawn,
        "ties": drawn.round(),
        "the largest anywhere": drawn.scatter(1, places, 100.0),
        "one number": drawn.scatter(1, places, torch.nan),
        "several of none": nan.scatter(1, places.flip(0), torch.nan),
        "none after infinity": drawn.scatter(1, places[:1].expand(4, 1), torch.inf).scatter(
            1, places, torch.nan
        ),
        "no number": torch.full_like(drawn, torch.nan),
        "zeros of both signs": torch.zeros_like(drawn).scatter(1, places, -0.0),
    }
    for value in (torch.inf, -torch.inf, torch.finfo(torch.bfloat16).min):
        found[f"all {value}"] = torch.full_like(drawn, value)
        found[f"some {value}"] = drawn.scatter(1, places, value)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_takes_the_token_that_torch_takes(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.kernels() is None:
        pytest.skip(native.why_not())
    given = [(f"{n} of {size}", t.to(dtype)) for size in SIZES for n, t in logits_of(size).items()]
    wide = torch.randn(2, 3, 2049, generator=generator()).to(dtype)
    given += [("[2, 3, V]", wide), ("[V]", wide[1, 2]), ("[0, V]", wide[0, :0])]
    expected = [logits.argmax(-1) for _, logits in given]
    monkeypatch.setattr(torch.Tensor, "argmax", lambda *_: pytest.fail("torch was asked"))
    for (name, logits), token in zip(given, expected, strict=True):
        found = most_likely(logits)
        assert found.dtype == torch.long and found.shape == token.shape
        assert found.equal(token), (name, found, token)


def test_what_the_kernel_does_not_read_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    native.kernels()
    asked: list[torch.Tensor] = []
    argmax = torch.Tensor.argmax

    def watched(self: torch.Tensor, *given: Any) -> torch.Tensor:
        asked.append(self)
        return argmax(self, *given)

    monkeypatch.setattr(torch.Tensor, "argmax", watched)
    logits = torch.randn(2, 3, 130, generator=generator())
    odd = (logits[..., ::2], logits.transpose(0, 2), logits[:, 1:2].expand(2, 3, 130)[:, :, 7:])
    for given in (*odd, logits.half(), logits.double()):
        asked.clear()
        assert most_likely(given).equal(argmax(given, -1)) and asked == [given]
    monkeypatch.setattr(native, "_latest", [])
    asked.clear()
    assert most_likely(logits).equal(argmax(logits, -1))
    assert len(asked) == 1, "kernels that nobody has loaded are not loaded for it"
