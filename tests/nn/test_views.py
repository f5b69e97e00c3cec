"""Caches that keep what they like: what queries see is the view's, whatever asks for tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from helpers import decoded
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, eager_attention_forward

from effbench.methods.cache.streaming import SinkWindow
from effbench.nn.decode import native
from effbench.nn.decode.decoder import Decoder, Drafts, Exits
from effbench.nn.decode.early_exit import confident
from effbench.nn.decode.policy import CachePolicy
from effbench.nn.decode.quantised_cache import QuantisedCache
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.sessions import session_for
from effbench.nn.decode.staged import WholeSession, whole_logits
from effbench.nn.decode.static import StaticSession
from effbench.nn.decode.view import LayerCache, View, as_mask
from effbench.nn.llama.parts import Attention, attention_of
from effbench.nn.llama.walk import why_not
from effbench.util.errors import UserError

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "initializer_range": 0.2,
}
KINDS = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


class AllLayer(LayerCache):
    """Keeps everything."""

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> View:
        if self.get_seq_length():
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return View(keys, values, self.empty)


@dataclass(frozen=True)
class AllTurned(CachePolicy):
    """Keeps everything, as the modules turned it."""

    more: int = 0

    def layer(self, undo: int) -> LayerCache:
        return AllLayer()


@dataclass(frozen=True)
class AllAtPlaces(AllTurned):
    """Keeps everything, and turns it at its place in the cache."""

    turns_at_places: ClassVar[bool] = True


POLICIES = [AllTurned(), AllAtPlaces()]


def model_of(kind: str = "llama", attention: str = "sdpa", **sizes: Any) -> Any:
    torch.manual_seed(0)
    config = KINDS[kind](**{**SIZES, **sizes}, attn_implementation=attention)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def some_ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(128, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_what_keeps_everything_changes_no_bit(
    policy: CachePolicy, kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFBENCH_NATIVE", "0")  # whose sums run in another order
    model, ids = model_of(kind, attention), some_ids(2, 24)
    ours, theirs = Decoder(cache=policy).session(model), CachedSession(model)
    assert decoded(ours, ids, 7).equal(decoded(theirs, ids, 7))
    assert ours.kv_bytes() == theirs.kv_bytes()
    assert whole_logits(model, policy, ids).equal(model(ids).logits)
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    expected = model(ids, attention_mask=mask).logits
    assert whole_logits(model, policy, ids, mask).equal(expected)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_kernel_makes_the_products_between_two_attentions(
    policy: CachePolicy, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = model_of(kind), some_ids(2, 24)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    session = Decoder(cache=policy).session(model)
    assert isinstance(session, WholeSession)
    if native.kernels() is None:
        pytest.skip(native.why_not())
    assert session.staged.between is not None
    calls: list[int] = []
    kernels = session.staged.between.kernel.kernels

    def counted(sizes: Any, step: Any, dtype: torch.dtype) -> None:
        calls.append(step.batch)
        type(kernels).decode(kernels, sizes, step, dtype)

    monkeypatch.setattr(kernels, "decode", counted)
    found = decoded(session, ids, 7, mask)
    monkeypatch.undo()
    # Prompts of 14 rows, then 17 steps of 2: calls around each attention, and for the head.
    layers = model.config.num_hidden_layers
    assert calls == [14] * (layers + 1) + [2] + [2] * (17 * (layers + 2))
    torch.testing.assert_close(
        found, decoded(CachedSession(model), ids, 7, mask), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("policy", "whole"),
    [(QuantisedCache(2, 4, 20), POLICIES[0]), (SinkWindow(4, 16), POLICIES[1])],
)
def test_while_all_tokens_fit_the_kernel_gives_the_bits_of_a_whole_cache(
    policy: CachePolicy, whole: CachePolicy
) -> None:
    model, ids = model_of(), some_ids(2, 24)
    ours, theirs = (Decoder(cache=each).session(model) for each in (policy, whole))
    assert decoded(ours, ids[:, :20], 9).equal(decoded(theirs, ids[:, :20], 9))
    for token in ids[:, 20:].split(1, 1):  # the fourth is the first after which a group is full
        last = ours.step(token), theirs.step(token)
    assert not last[0].equal(last[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_padding_is_not_seen_and_rows_are_reordered(policy: CachePolicy) -> None:
    model, ids = model_of(), some_ids(3, 20)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[2, :1] = 0
    session, rows = Decoder(cache=policy).session(model), torch.tensor([2, 0, 2])
    found = decoded(session, ids[:, :15], 9, mask)
    for row, start in enumerate((4, 0, 1)):
        alone = decoded(CachedSession(model), ids[row : row + 1, start:15], 9 - start)
        torch.testing.assert_close(found[row], alone[0], atol=2e-5, rtol=1e-4)
    session.reorder(rows)
    again = session.step(ids[rows, 15:16])
    expected = decoded(CachedSession(model), ids[2:, 1:16], 8)[0, -1]
    torch.testing.assert_close(
        again, torch.stack([expected, again[1], expected]), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("policy", POLICIES)
def test_it_goes_with_exits_and_with_drafts(policy: CachePolicy) -> None:
    model, ids = model_of(), some_ids(2, 8)
    expected = greedy(CachedSession(model), ids, 20)
    never = Exits((2,), lambda exits: confident([2.0] * (exits - 1)))
    for decoder in (Decoder(never, cache=policy), Decoder(driver=Drafts(2), cache=policy)):
        assert greedy(decoder.session(model), ids, 20).equal(expected)
    early = Exits((1, 3), lambda exits: confident([0.1, 0.15]))
    found, plain = (Decoder(early, cache=c).session(model) for c in (policy, CachePolicy()))
    assert greedy(found, ids, 20).equal(greedy(plain, ids, 20))
    assert 1 < found.counts()["exit_depth"] < 4  # type: ignore[attr-defined]


def test_a_model_that_turns_otherwise_is_refused() -> None:
    model = model_of()
    model.config.model_type = "phi3"
    with pytest.raises(UserError, match="turn queries and keys in another way"):
        Decoder(cache=AllAtPlaces()).session(model)
    assert Decoder(cache=AllTurned()).session(model)


# -- modules that nobody knows ---------------------------------------------------------------------


class OwnAttention(LlamaAttention):
    """An attention of a file of its own: Llama's, whose output is doubled."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


@pytest.mark.parametrize("policy", [CachePolicy(), *POLICIES])
def test_a_new_attention_decodes_and_takes_any_cache(policy: CachePolicy) -> None:
    model, ids = model_of(), some_ids(2, 20)
    expected = decoded(session_for(model), ids, 7)
    for layer in model.model.layers[1:]:
        old = layer.self_attn
        layer.self_attn = OwnAttention(model.config, old.layer_idx).eval()
        layer.self_attn.load_state_dict(old.state_dict())
    found = decoded(Decoder(cache=policy).session(model), ids, 7)
    torch.testing.assert_close(found, model(ids).logits[:, 6:], atol=2e-5, rtol=1e-4)
    assert (found - expected).abs().max() > 0.1


class Cooled(LlamaAttention):
    """Llama's attention at another temperature, which says how a step goes through it."""

    def __init__(self, old: LlamaAttention) -> None:
        super().__init__(old.config, old.layer_idx)
        self.load_state_dict(old.state_dict())
        self.scaling = old.scaling / 2
        self.eval()

    def decode_part(self, norm: Any) -> Attention:
        return attention_of(self, norm)

    def why_not_stepped(self) -> str:
        return ""


class Doubled(Cooled):
    """Overrides what the part was offered for."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


@pytest.mark.parametrize("native", ["0", "1"])
@pytest.mark.parametrize("kind", [Cooled, Doubled])
def test_a_new_attention_that_offers_its_part_goes_in_our_engine(
    kind: type[Cooled], native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EFFBENCH_NATIVE", native)
    model, ids = model_of(), some_ids(2, 20)
    for layer in model.model.layers:
        layer.self_attn = kind(layer.self_attn)
    session = session_for(model)
    assert isinstance(session, StaticSession) == (kind is Cooled)
    assert why_not(model) == (
        "" if kind is Cooled else "a Doubled stands where a LlamaAttention should"
    )
    found = decoded(session, ids, 7)
    torch.testing.assert_close(found, model(ids).logits[:, 6:], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_a_query_that_sees_nothing_is_given_a_number(kind: str, dtype: torch.dtype) -> None:
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(kind, eager_attention_forward)
    q, k, v = torch.randn(3, 1, 2, 3, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    seen = torch.tensor([[0, 0, 0], [1, 0, 0], [1, 1, 0]]).bool()[None, None]
    module = model_of().model.layers[0].self_attn
    module.num_key_value_groups = 1
    found = attend(module, q, k, v, as_mask(seen, kind, dtype), scaling=8**-0.5)[0]
    assert found.isfinite().all()
    torch.testing.assert_close(found[0, 1], v[0, :, 0], atol=1e-2, rtol=1e-2)


def test_positions_whose_angles_change_are_not_turned_at_places() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = model_of(rope_parameters=dynamic)
    with pytest.raises(UserError, match="are dynamic"):
        Decoder(cache=AllAtPlaces()).session(model)
    Decoder(cache=AllTurned()).session(model)
