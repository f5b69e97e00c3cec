"""LoRA-Drop: the parallel pass, the decoding session and what they cost."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import decoded
from transformers import LlamaConfig, LlamaForCausalLM

from effbench.api import registry
from effbench.api.batch import Batch
from effbench.api.examples import Example, Tokens
from effbench.api.method_types import Context
from effbench.api.schema import build
from effbench.api.shape import ModelShape, Shape
from effbench.api.skipping import speed_ceiling
from effbench.config.composed import settings_of
from effbench.methods.base import Method
from effbench.methods.chain import chain_cost
from effbench.methods.depth.lora_drop import LoRADrop
from effbench.methods.depth.points import Window
from effbench.methods.trains import begin_training
from effbench.nn.decode.native_step import NativeStep
from effbench.nn.decode.session import CachedSession, greedy
from effbench.nn.decode.temporal import TemporalSession
from effbench.nn.decode.temporal_static import StaticTemporalSession
from effbench.nn.depth.droppable import draw_starts, prompt_lengths, schedule
from effbench.util.errors import UserError

SHAPE = Shape(
    hidden_size=32,
    intermediate_size=48,
    num_layers=8,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    vocab_size=61,
)
SETS = [((1, 2, 5), 1), ((2, 3, 4, 6), 2), ((3, 7), 5), ((1, 2, 3, 4, 5, 6, 7), 3)]


class Rotary64(torch.nn.Module):
    """The angles in float64 throughout; transformers computes them in float32."""

    def __init__(self, head_dim: int, theta: float) -> None:
        super().__init__()
        self.rates = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(
        self, hidden: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = position_ids[..., None].double() * self.rates
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def tiny(attention: str = "sdpa") -> LlamaForCausalLM:
    torch.manual_seed(3)
    settings: dict[str, Any] = {
        "hidden_size": SHAPE.hidden_size,
        "intermediate_size": SHAPE.intermediate_size,
        "num_hidden_layers": SHAPE.num_layers,
        "num_attention_heads": SHAPE.num_heads,
        "num_key_value_heads": SHAPE.num_kv_heads,
        "head_dim": SHAPE.head_dim,
        "vocab_size": SHAPE.vocab_size,
        "initializer_range": 0.2,
        "attn_implementation": attention,
    }
    # Frozen, because torch multiplies by a weight that requires gradients in another order.
    return LlamaForCausalLM(LlamaConfig(**settings)).eval().requires_grad_(False)


def in_float64(model: Any) -> Any:
    """Return the model with float64 norms and angles too."""
    model = model.double()
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(SHAPE.hidden_size, eps=module.variance_epsilon)
            norm.weight = module.weight
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, norm)
    model.model.rotary_emb = Rotary64(SHAPE.head_dim, SHAPE.rope_theta)
    return model


def context(seed: int = 0) -> Context:
    def load_model(name: str) -> torch.nn.Module:
        raise AssertionError(name)

    generator = torch.Generator().manual_seed(seed)
    return Context(seed, torch.device("cpu"), torch.float32, generator, load_model)


def prepared(method: LoRADrop, model: Any = None, strength: float = 0.1) -> Any:
    """Return a model with random, not zero, stand-ins."""
    model = method.prepare(model or tiny(), context())
    generator = torch.Generator().manual_seed(9)
    for name, parameter in model.lora_drop.named_parameters():
        if name.endswith("B"):
            parameter.data.normal_(0, strength, generator=generator)
    return model


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SHAPE.vocab_size, (rows, length), generator=generator)


def batch_of(ids: torch.Tensor, prompt: int = 1) -> Batch:
    labels = ids.clone()
    labels[:, :prompt] = -100
    batch = Batch(ids, torch.ones_like(ids), labels, list(range(len(ids))))
    return dataclasses.replace(batch, window_tokens=batch.loss_tokens)


def digest(model: Any) -> str:
    state = {n: p for n, p in model.named_parameters() if not n.startswith("lora_drop")}
    hashed = hashlib.sha256()
    for name in sorted(state):
        hashed.update(name.encode() + state[name].detach().numpy().tobytes())
    return hashed.hexdigest()


# -- the parallel pass against stepwise decoding and against the algorithm's text ----------------


@pytest.mark.parametrize("prompt", [1, 5])
@pytest.mark.parametrize(("layers", "window"), SETS)
@pytest.mark.parametrize("anchor", ["refresh", "previous", "input", "residual"])
@pytest.mark.parametrize("kv", ["skip", "fill"])
@torch.no_grad()
def test_masked_pass_is_stepwise_decoding(
    layers: tuple[int, ...], window: int, prompt: int, anchor: Any, kv: Any
) -> None:
    method = LoRADrop(rank=4, layers=layers, window=window, anchor=anchor, kv=kv)
    model = in_float64(prepared(method))
    ids = tokens(2, 17)
    whole = method.logits(model, batch_of(ids, prompt))[:, prompt - 1 :]
    steps = decoded(method.session(model), ids, prompt)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-12)
    full = model(ids).logits[:, prompt - 1 :]
    assert (whole - full).abs().max() > 1e-2  # the schedule does something


@pytest.mark.parametrize(
    ("anchor", "kv"), [("refresh", "skip"), ("previous", "fill"), ("residual", "skip")]
)
@pytest.mark.parametrize(("layers", "window"), SETS[:3])
@torch.no_grad()
def test_against_a_token_loop_in_float64(
    layers: tuple[int, ...], window: int, anchor: Any, kv: Any
) -> None:
    method = LoRADrop(rank=4, alpha=6.0, layers=layers, window=window, anchor=anchor, kv=kv)
    model = in_float64(prepared(method))
    ids = tokens(1, 14)
    expected = token_loop(model, ids[0].tolist(), 4, method)
    whole = method.logits(model, batch_of(ids, 4))[0]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-11)
    assert abs(float(expected.abs().max())) > 0.1


def token_loop(model: Any, ids: list[int], prompt: int, method: LoRADrop) -> torch.Tensor:
    """One token at a time, one layer at a time, one head at a time: the algorithm as written."""
    weight = {n: p.double() for n, p in model.named_parameters()}
    dropped = set(method.layers or ())
    keys: dict[int, list[torch.Tensor]] = {i: [] for i in range(SHAPE.num_layers)}
    values: dict[int, list[torch.Tensor]] = {i: [] for i in range(SHAPE.num_layers)}
    anchors: dict[int, torch.Tensor] = {}
    out = []
    for t, token in enumerate(ids):
        phase = (t - prompt) % (method.window + 1)
        dropping = t >= prompt and phase < method.window
        h = weight["model.embed_tokens.weight"][token]
        for i in range(SHAPE.num_layers):
            read, residual = h, method.anchor == "residual"
            block = {k.split(".", 3)[3]: w for k, w in weight.items() if f"model.layers.{i}." in k}
            if i in dropped and dropping:
                if method.kv == "fill":
                    attend(block, norm(h, block["input_layernorm.weight"]), t, keys[i], values[i])
                A, B = weight[f"lora_drop.layers.{i}.A"], weight[f"lora_drop.layers.{i}.B"]
                h = anchors[i] + method.alpha / method.rank * (B @ (A @ h)) + residual * read
            else:
                h = h + attend(
                    block, norm(h, block["input_layernorm.weight"]), t, keys[i], values[i]
                )
                x = norm(h, block["post_attention_layernorm.weight"])
                gate = block["mlp.gate_proj.weight"] @ x
                inner = gate / (1 + torch.exp(-gate)) * (block["mlp.up_proj.weight"] @ x)
                h = h + block["mlp.down_proj.weight"] @ inner
            if i in dropped and (not dropping or method.anchor == "previous"):
                anchors[i] = h - residual * read
        out.append(weight["lm_head.weight"] @ norm(h, weight["model.norm.weight"]))
    return torch.stack(out)


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / torch.sqrt((x * x).mean() + 1e-6)


def attend(
    block: dict[str, torch.Tensor],
    x: torch.Tensor,
    position: int,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
) -> torch.Tensor:
    def heads(name: str) -> torch.Tensor:
        return (block[f"self_attn.{name}.weight"] @ x).view(-1, SHAPE.head_dim)

    def turned(v: torch.Tensor) -> torch.Tensor:
        half = SHAPE.head_dim // 2
        out = v.clone()
        for j in range(half):
            angle = position * SHAPE.rope_theta ** (-2 * j / SHAPE.head_dim)
            a, b = v[:, j], v[:, j + half]
            out[:, j] = a * math.cos(angle) - b * math.sin(angle)
            out[:, j + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    keys.append(turned(heads("k_proj")))
    values.append(heads("v_proj"))
    mixed = []
    for n, query in enumerate(turned(heads("q_proj"))):
        group = n * SHAPE.num_kv_heads // SHAPE.num_heads
        scores = torch.stack([k[group] @ query for k in keys]) / math.sqrt(SHAPE.head_dim)
        shares = torch.exp(scores - scores.max())
        shares = shares / shares.sum()
        mixed.append(sum(s * v[group] for s, v in zip(shares, values, strict=True)))
    return block["self_attn.o_proj.weight"] @ torch.cat(mixed)


def test_schedule() -> None:
    refreshed = schedule(torch.tensor([3, 1]), torch.tensor([0, 2]), 9, 3)
    rows = ["".join(".x"[int(r)] for r in row) for row in refreshed]
    assert rows == ["xxx...x..", "x.x...x.."]
    assert schedule(torch.tensor([1]), torch.tensor([0]), 5, 0).all()


def test_prompt_is_the_unlabelled_start() -> None:
    labels = torch.tensor([[-100, -100, 5, -100], [1, 2, 3, 4], [-100] * 4])
    assert prompt_lengths(labels).tolist() == [2, 1, 4]


@torch.no_grad()
def test_ragged_right_padded_batch_is_its_rows() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=2)
    model = in_float64(prepared(method))
    ids = tokens(2, 12)
    batch = batch_of(ids)
    batch.labels[0, :4] = -100
    batch.labels[1, 7:] = -100
    batch.attention_mask[1, 7:] = 0
    both = method.logits(model, batch)
    first = method.logits(model, batch_of(ids[:1], 4))[0]
    second = method.logits(model, batch_of(ids[1:, :7]))[0]
    torch.testing.assert_close(both[0], first, rtol=0, atol=1e-12)
    torch.testing.assert_close(both[1, :7], second, rtol=0, atol=1e-12)


# -- zero strength --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [LoRADrop(layers=()), LoRADrop(fraction=0.0), LoRADrop(window=0)]
)
@torch.no_grad()
def test_zero_strength_is_the_base_bit_for_bit(method: LoRADrop) -> None:
    base, model = tiny(), prepared(method)
    ids = tokens(2, 9)
    assert torch.equal(method.logits(model, batch_of(ids)), base(ids).logits)
    ours: Any = method.session(model)
    theirs: Any = Method().session(base)
    assert torch.equal(decoded(ours, ids, 4), decoded(theirs, ids, 4))
    assert ours.kv_bytes() == theirs.kv_bytes()
    cached: Any = zip(ours.layers, theirs.layers, strict=True)
    assert all(torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in cached)
    expected = greedy(Method().session(base), ids, 6)
    assert torch.equal(greedy(method.session(model), ids, 6), expected)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_prompt_and_refreshes_run_as_in_the_base(padded: bool) -> None:
    method = LoRADrop(layers=(2, 3), window=2)
    ids = tokens(2, 9)
    mask = torch.ones_like(ids[:, :6])
    mask[1, :2] = 0
    session: Any = method.session(prepared(method), engine="eager")
    session.cycle.window = 0  # refresh at every step
    ours = decoded(session, ids, 6, mask if padded else None)
    theirs = decoded(CachedSession(tiny()), ids, 6, mask if padded else None)
    assert torch.equal(ours, theirs)


@torch.no_grad()
def test_all_refreshed_is_the_base() -> None:
    method = LoRADrop(layers=(2, 3), window=2)
    model, ids = prepared(method), tokens(2, 9)
    batch = batch_of(ids, prompt=9)
    assert torch.equal(method.logits(model, batch), tiny()(ids).logits)


@torch.no_grad()
def test_leaving_a_point_restores_the_base() -> None:
    method = LoRADrop(layers=(2, 3, 6), window=3)
    model, ids = prepared(method), tokens(2, 9)
    untouched = model(ids).logits
    before = method.logits(model, batch_of(ids))
    assert method.points() == (Window(0), Window(1), Window(2), Window(3))
    seen = []
    with method.at(model, Window(1)):
        for point in method.points():
            with method.at(model, point):
                seen.append(method.logits(model, batch_of(ids)))
                decoded(method.session(model), ids, 3)
        assert model.lora_drop.window == 1
    with pytest.raises(KeyError), method.at(model, Window(2)):
        raise KeyError
    assert torch.equal(seen[0], untouched)
    assert torch.equal(seen[3], before)
    assert not torch.equal(seen[1], seen[2])
    assert torch.equal(method.logits(model, batch_of(ids)), before)
    assert torch.equal(model(ids).logits, untouched)
    assert torch.equal(tiny()(ids).logits, untouched)


@pytest.mark.parametrize("window", [1, 3])
@torch.no_grad()
def test_baselines_are_points_without_maps(window: int) -> None:
    """B = 0 with the anchor, and layers left out, each against a method that is just that."""
    settings: dict[str, Any] = {"rank": 4, "layers": (2, 3, 5), "window": window}
    method = LoRADrop(**settings, windows=(0, window), baselines=("reuse", "identity"))
    k, reuse, identity = (Window(window, b) for b in (None, "reuse", "identity"))
    assert method.points() == (reuse, identity, Window(0), k)
    model, ids = in_float64(prepared(method)), tokens(2, 12)
    seen = {}
    for point in method.points():
        with method.at(model, point):
            seen[point] = method.logits(model, batch_of(ids, 4))
            steps = decoded(method.session(model), ids, 4)
        torch.testing.assert_close(steps, seen[point][:, 3:], rtol=0, atol=1e-12)
    for anchor, baseline in (("refresh", reuse), ("input", identity)):
        plain = LoRADrop(**settings, anchor=anchor)  # type: ignore[arg-type]
        other = in_float64(prepared(plain, strength=0.0))
        torch.testing.assert_close(
            plain.logits(other, batch_of(ids, 4)), seen[baseline], rtol=0, atol=1e-12
        )
    assert len({float(x.sum()) for x in seen.values()}) == 4
    stand_in = 2 * 4 * SHAPE.hidden_size * 3 * window / (window + 1)
    costs = {p: chain_cost([method], SHAPE, "float32", p) for p in (k, reuse)}
    read = costs[k].bytes_per_token - costs[reuse].bytes_per_token
    assert read == pytest.approx(4 * stand_in)
    assert method.full_point(SHAPE) == Window(0) and "generate" in method.engines(Window(0))
    assert "generate" not in method.engines(reuse)


@torch.no_grad()
def test_a_window_longer_than_the_text_never_refreshes() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=10**6, windows=(0, 10**6))
    model, ids = in_float64(prepared(method)), tokens(1, 14)
    whole = method.logits(model, batch_of(ids, 4))[:, 3:]
    session: Any = method.session(model)
    torch.testing.assert_close(decoded(session, ids, 4), whole, rtol=0, atol=1e-12)
    assert session.kv_lengths() == [4 if i in (2, 3, 5) else 14 for i in range(8)]


@torch.no_grad()
def test_tokens_by_their_place_in_the_cycle() -> None:
    method = LoRADrop(layers=(2,), window=2)
    model = prepared(method)
    batch = batch_of(tokens(1, 9), prompt=3)
    parts = {n: "".join(".x"[int(i)] for i in m[0]) for n, m in method.parts(model, batch).items()}
    # The columns are tokens 1 to 8; 1 and 2 are prompt. Token 3 is predicted by the prompt's end,
    # tokens 4 and 5 by dropped ones, token 6 by a refresh.
    assert parts == {"j0": "xxx..x..", "j1": "...x..x.", "j2": "....x..x"}
    assert sum(m.long() for m in method.parts(model, batch).values()).eq(1).all()
    refreshed = schedule(torch.tensor([3]), torch.tensor([0]), 8, 2)[0]
    assert method.parts(model, batch)["j0"][0].equal(refreshed)
    with method.at(model, Window(0)):
        assert not method.parts(model, batch)
    longest = LoRADrop(layers=(2,), window=100, windows=(100,))
    assert list(longest.parts(prepared(longest), batch)) == [f"j{j}" for j in range(9)]


# -- the session ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "window"), SETS)
@pytest.mark.parametrize("generated", [1, 6, 11])
@torch.no_grad()
def test_cache_lengths_and_bytes(layers: tuple[int, ...], window: int, generated: int) -> None:
    method = LoRADrop(layers=layers, window=window)
    model, prompt, rows = prepared(method), 5, 3
    refreshes = generated // (window + 1)
    lengths = [prompt + (refreshes if i in layers else generated) for i in range(SHAPE.num_layers)]
    for kind in (TemporalSession, StaticTemporalSession):
        session = kind(model, model.lora_drop)
        decoded(session, tokens(rows, prompt + generated), prompt)
        assert session.kv_lengths() == lengths
        position = 2 * SHAPE.num_kv_heads * SHAPE.head_dim * 4 * rows
        assert session.kv_bytes() == position * sum(lengths)
        dropped = (generated - refreshes) * len(layers)
        assert session.cycle.passes == generated * SHAPE.num_layers - dropped


@pytest.mark.parametrize(("layers", "window"), SETS)
@torch.no_grad()
def test_attention_calls_per_cycle(layers: tuple[int, ...], window: int) -> None:
    method = LoRADrop(layers=layers, window=window)
    model = prepared(method)
    session, calls, ids = method.session(model, engine="eager"), [], tokens(1, 5)
    session.prefill(ids)
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(window + 1):
        session.step(ids[:, :1])
    kept = SHAPE.num_layers - len(layers)
    assert len(calls) == (window + 1) * kept + len(layers)


WALK = partial(StaticTemporalSession, use_native=False)


@pytest.mark.parametrize("kind", [TemporalSession, StaticTemporalSession, WALK])
@torch.no_grad()
def test_untrained_drop_step_ignores_its_token(kind: Any) -> None:
    method = LoRADrop(layers=(2, 4), window=2)
    model, ids = method.prepare(tiny(), context()), tokens(1, 6)
    logits = []
    for token in (7, 40):
        session = kind(model, model.lora_drop)
        session.prefill(ids)
        steps = [session.step(torch.tensor([[token]])) for _ in range(3)]
        logits.append(steps)
    assert (logits[0][0] - logits[1][0]).abs().max() == 0  # the first drop step: same anchors
    assert (logits[0][2] - logits[1][2]).abs().max() > 1e-3  # the refresh sees its token


@torch.no_grad()
def test_consecutive_sessions_share_nothing() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=3)
    model, ids = prepared(method), tokens(2, 6)
    first = greedy(method.session(model), ids, 6)  # stops within a cycle
    half_done = method.session(model)
    decoded(half_done, ids, 4)
    second = greedy(method.session(model), ids, 6)
    assert torch.equal(first, second)
    assert torch.equal(second, greedy(method.session(prepared(method)), ids, 6))
    with pytest.raises(RuntimeError):
        half_done.prefill(ids)


@torch.no_grad()
def test_batch_is_its_rows() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=2)
    model, ids = in_float64(prepared(method)), tokens(2, 14)
    both = decoded(method.session(model), ids, 4)
    for row in range(2):
        alone = decoded(method.session(model), ids[row : row + 1], 4)
        torch.testing.assert_close(both[row : row + 1], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("attention", "atol"), [("sdpa", 1e-12), ("eager", 1e-4)])
@pytest.mark.parametrize(("anchor", "kv"), [("refresh", "skip"), ("previous", "fill")])
@torch.no_grad()
def test_left_padded_batch_is_its_rows(attention: str, atol: float, anchor: Any, kv: Any) -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=2, anchor=anchor, kv=kv)
    model, ids = prepared(method, tiny(attention)), tokens(3, 15)
    if attention == "sdpa":  # eager attention is float32 inside, and overflows in a float64 model
        model = in_float64(model)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, :2], mask[2, :4] = 0, 0
    together = decoded(method.session(model), ids, 5, mask)
    for row, padding in enumerate((2, 0, 4)):
        alone = decoded(method.session(model), ids[row : row + 1, padding:], 5 - padding)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=atol)


@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_reorder_moves_anchors_with_the_cache(padded: bool) -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=2)
    model, ids = in_float64(prepared(method)), tokens(3, 12)
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[0, :3] = 0
    rows = torch.tensor([2, 0, 0, 1])
    straight = method.session(model)
    decoded(straight, ids[rows], 5, mask[rows] if padded else None)
    moved = method.session(model)
    decoded(moved, ids[:, :9], 5, mask if padded else None)
    moved.reorder(rows)
    for t in range(9, 12):
        moved.step(ids[rows][:, t : t + 1])
    token = tokens(4, 1, seed=5)
    torch.testing.assert_close(moved.step(token), straight.step(token), rtol=0, atol=1e-12)


@torch.no_grad()
def test_half_precision_base() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=2)
    model, ids = prepared(method, tiny().bfloat16()), tokens(1, 9)
    assert {p.dtype for p in model.lora_drop.parameters()} == {torch.float32}
    whole = method.logits(model, batch_of(ids, 3))[:, 2:]
    steps = decoded(method.session(model), ids, 3)
    assert whole.dtype == steps.dtype == torch.bfloat16
    assert (whole - steps).abs().max() < 0.1 * whole.abs().max()


# -- training -------------------------------------------------------------------------------------


def test_only_the_stand_ins_train_and_start_by_seed_and_layer() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5))
    model: Any = method.prepare(tiny(), context())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"lora_drop.layers.{i}.{m}" for i in (2, 3, 5) for m in "AB"}
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (
        count == 2 * 4 * SHAPE.hidden_size * 3 == chain_cost([method], SHAPE, "float32").trainable
    )
    torch.rand(7)
    other: Any = LoRADrop(rank=4, layers=(3,)).prepare(tiny(), context())
    start = model.lora_drop.layers["3"]
    assert torch.equal(start.A, other.lora_drop.layers["3"].A)
    assert not torch.equal(start.A, model.lora_drop.layers["2"].A)
    assert start.A.abs().max() <= SHAPE.hidden_size**-0.5 and not start.B.any()
    reseeded: Any = method.prepare(tiny(), context(seed=1))
    assert not torch.equal(start.A, reseeded.lora_drop.layers["3"].A)


def train(method: LoRADrop, model: Any, ctx: Context, steps: int) -> list[float]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    batch = batch_of(tokens(4, 24))
    return [float(method.update(model, optimizer, [batch], ctx)) for _ in range(steps)]


def test_training_lowers_the_loss_and_leaves_the_base() -> None:
    method = LoRADrop(rank=8, layers=(2, 3, 5, 6), prefix=0.0, random_phase=False)
    ctx = context()
    model = begin_training(method, tiny(), ctx)
    before, (first, *_, last) = digest(model), train(method, model, ctx, 25)
    assert last < 0.7 * first
    assert digest(model) == before == digest(tiny())


def test_gradient_checkpointing_changes_nothing() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=2)
    gradients = []
    for checkpointing in (False, True):
        model: Any = prepared(method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        method.loss(model, batch_of(tokens(2, 12)), context()).backward()
        gradients.append([p.grad for p in model.lora_drop.parameters()])
    assert all(g is not None and g.any() for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_resumed_training_draws_the_same() -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5))
    ctx = context()
    model = begin_training(method, tiny(), ctx)
    train(method, model, ctx, 2)
    weights = {n: t.clone() for n, t in method.trained_tensors(model).items()}
    state = ctx.generator.get_state()
    straight = train(method, model, ctx, 3)

    resumed = context()
    resumed.generator.set_state(state)
    again = begin_training(method, tiny(), resumed)
    with torch.no_grad():
        for name, tensor in method.trained_tensors(again).items():
            tensor.copy_(weights[name])
    torch.rand(11)
    assert train(method, again, resumed, 3) == straight
    assert len(set(straight)) == 3


def test_draws() -> None:
    batch = batch_of(tokens(64, 21), prompt=5)
    prompts, phases = draw_starts(
        batch, 3, torch.Generator().manual_seed(0), prefix=0.5, random_phase=True
    )
    assert set(prompts.tolist()) == set(range(5, 14))
    assert set(phases.tolist()) == {0, 1, 2, 3}
    generator = torch.Generator().manual_seed(0)
    halves = [batch_of(batch.input_ids[i : i + 32], prompt=5) for i in (0, 32)]
    parts = [draw_starts(half, 3, generator, 0.5, True)[0] for half in halves]
    assert torch.equal(torch.cat(parts), prompts)
    prompts, phases = draw_starts(batch, 3, generator, prefix=0.0, random_phase=False)
    assert set(prompts.tolist()) == {5} and set(phases.tolist()) == {0}


@torch.no_grad()
def test_accurate_training_sees_what_decoding_sees() -> None:
    settings: dict[str, Any] = {"layers": (2, 3, 5), "prefix": 0.0, "random_phase": False}
    ids = tokens(2, 15)
    losses = {}
    for accurate in (True, False):
        method = LoRADrop(**settings, kv_accurate=accurate)
        model = prepared(method)
        losses[accurate] = float(method.loss(model, batch_of(ids), context()))
        logits = decoded(method.session(model), ids, 1)[:, :-1]
        stepwise = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert losses[True] == pytest.approx(float(stepwise), abs=1e-5)
    assert abs(losses[False] - losses[True]) > 1e-4


def test_layers_of_least_influence_are_dropped_and_kept_with_the_stand_ins(
    tmp_path: Path,
) -> None:
    method = LoRADrop(rank=4, fraction=0.4, window=2, choice="influence")
    model: Any = tiny()
    quiet = (3, 6)  # of the candidates 2 to 6; evenly spaced ones are 3 and 5
    assert LoRADrop(fraction=0.4).droppable(8) == (3, 5)
    for index in (1, *quiet):
        model.model.layers[index].self_attn.o_proj.weight.data.mul_(0.01)
        model.model.layers[index].mlp.down_proj.weight.data.mul_(0.01)
    rows = [Example(str(n), (Tokens(ids, 0, 9),)) for n, ids in enumerate(tokens(3, 9).tolist())]
    ctx = context()
    assert method.dataset(rows, model, ctx) == rows
    trained = method.prepare(model, ctx)
    assert trained.lora_drop.indices == list(quiet), "layer 1 is no candidate"
    method.save(trained, tmp_path)
    again = method.load(tiny(), tmp_path, context(seed=8))
    assert again.lora_drop.indices == list(quiet)
    base, last = ModelShape.of(SHAPE), Window(2)
    planned = [method.shape(base, last, "use", folder) for folder in (None, tmp_path)]
    runs = [[i for i, layer in enumerate(shape.layers) if layer.bypass] for shape in planned]
    assert runs == [[3, 5], list(quiet)]
    (tmp_path / "droppable.json").unlink()
    with pytest.raises(FileNotFoundError):  # no others are taken for them
        method.load(tiny(), tmp_path, context())


@torch.no_grad()
def test_save_and_load(tmp_path: Path) -> None:
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=2)
    model, batch = prepared(method), batch_of(tokens(2, 9))
    method.save(model, tmp_path)
    again = method.load(tiny(), tmp_path, context(seed=8))
    assert torch.equal(method.logits(again, batch), method.logits(model, batch))
    with pytest.raises(UserError, match="does not fit"):
        LoRADrop(rank=4, layers=(2, 3)).load(tiny(), tmp_path, context())


# -- choosing layers, refusing, counting ----------------------------------------------------------


def test_droppable_layers() -> None:
    assert LoRADrop().droppable(30) == tuple(range(4, 29, 2))
    assert LoRADrop(fraction=1.0).droppable(12) == tuple(range(3, 11))
    assert LoRADrop(fraction=0.25).droppable(12) == (5, 9)
    assert LoRADrop(fraction=0.0).droppable(12) == ()
    assert LoRADrop(layers=(6, 2)).droppable(8) == (2, 6)
    for layers in range(3, 40):
        for fraction in (0.25, 0.5, 0.75, 1.0):
            chosen = LoRADrop(fraction=fraction).droppable(layers)
            assert len(set(chosen)) == len(chosen)
            assert all(0 < i < layers - 1 for i in chosen)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (LoRADrop(layers=(0, 2)), "layer 0"),
        (LoRADrop(layers=(2, 8)), "lists layer 8"),
        (LoRADrop(layers=(-1,)), "lists layer -1"),
        (LoRADrop(layers=(2, 2)), "twice"),
        (LoRADrop(fraction=0.01), "no layer at all"),
        (LoRADrop(window=1000), "1001 operating points"),
        (LoRADrop(windows=(3, 1)), "rising"),
        (LoRADrop(windows=()), "empty"),
    ],
)
def test_impossible_settings_are_refused(method: LoRADrop, message: str) -> None:
    with pytest.raises(UserError, match=message):
        method.resolve(SHAPE)


def test_possible_settings_pass() -> None:
    methods = [LoRADrop(), LoRADrop(layers=()), LoRADrop(fraction=0.0), LoRADrop(window=0)]
    for method in (*methods, LoRADrop(window=10**6, windows=(0, 10**6))):
        method.resolve(SHAPE)


def test_unfit_models_are_refused() -> None:
    with pytest.raises(UserError, match="laid out"):
        other: Any = torch.nn.Linear(2, 2)
        other.config = LlamaConfig()
        LoRADrop().prepare(other, context())
    sliding = tiny()
    sliding.config.layer_types = ["sliding_attention"] * SHAPE.num_layers
    with pytest.raises(UserError, match="sliding"):
        LoRADrop().prepare(sliding, context())


def test_config_is_the_dataclass() -> None:
    path = Path(__file__).parents[2] / "conf" / "method" / "lora_drop.yaml"
    values = yaml.safe_load(path.read_text())
    assert values.pop("name") == "lora_drop"
    assert values == settings_of(registry.find("methods", "lora_drop"))
    assert build(LoRADrop, {"layers": [2, 3]}, "method").layers == (2, 3)


@pytest.mark.parametrize("kv", ["skip", "fill"])
@torch.no_grad()
def test_cost_is_what_is_counted(kv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeStep, "of", lambda session: None)  # torch cannot look into it
    method = LoRADrop(rank=4, layers=(2, 3, 5), window=3, kv=kv)
    model = prepared(method)
    for point in method.points():
        window = method.window_at(point).window
        cost = chain_cost([method], SHAPE, "float32", point)
        parameters = list(model.parameters())
        assert cost.params == sum(p.numel() for p in parameters)
        assert cost.trainable == sum(p.numel() for p in parameters if p.requires_grad)
        assert cost.resident_bytes == sum(p.numel() * 4 for p in parameters)
        assert cost.saving == ("physical" if window else "none")
        cycle = window + 1
        with method.at(model, point):
            session = method.session(model, engine="eager")  # modules, which tell that they ran
        session.prefill(tokens(1, 4))
        at_start = session.kv_bytes()
        weights, flops = touched(model, session, cycle)
        assert cost.bytes_per_token == pytest.approx(weights / cycle)
        assert cost.flops_per_token == pytest.approx(flops / cycle)
        assert cost.kv_bytes_per_token == pytest.approx((session.kv_bytes() - at_start) / cycle)


def touched(model: Any, session: Any, steps: int) -> tuple[int, int]:
    """Return the weight bytes and product FLOPs of the modules that ran, embedding left out."""
    ran: list[torch.nn.Module] = []
    handles = [
        m.register_forward_hook(lambda module, *_: ran.append(module))
        for m in model.modules()
        if not list(m.children()) and not isinstance(m, torch.nn.Embedding)
    ]
    for _ in range(steps):
        session.step(tokens(1, 1))
    for handle in handles:
        handle.remove()
    sizes = [p for m in ran for p in m.parameters()]
    flops = sum(2 * p.numel() for p in sizes if p.dim() == 2)
    return sum(p.numel() * 4 for p in sizes), flops


def test_speed_ceiling() -> None:
    assert speed_ceiling(0.0, 3) == speed_ceiling(0.5, 0) == 1.0
    assert speed_ceiling(1.0, 3) == 4.0
    smol = Shape(576, 1536, 30, 9, 3, 64, 49152, tied=True)
    one = 576 * (2 * 576 + 2 * 192 + 3 * 1536) + 2 * 576
    share = one / (chain_cost([LoRADrop(window=0)], smol, "float32").bytes_per_token / 4)
    assert speed_ceiling(15 * share, 3) == pytest.approx(1.42, abs=0.01)
    assert speed_ceiling(22 * share, 3) == pytest.approx(1.77, abs=0.01)
    llama = Shape(4096, 11008, 32, 32, 32, 128, 32000)
    one = 4096 * (4 * 4096 + 3 * 11008) + 2 * 4096
    share = one / (chain_cost([LoRADrop(window=0)], llama, "float32").bytes_per_token / 4)
    found = [speed_ceiling(n * share, k) for n, k in ((16, 3), (24, 3), (24, 5))]
    assert [round(x, 2) for x in found] == [1.58, 2.23, 2.58]
    assert round(speed_ceiling(0.75, 3), 2) == 2.29
    method = LoRADrop(window=3)
    count = len(method.droppable(30))
    full, dropped = (
        chain_cost([method], smol, "bfloat16", p).bytes_per_token for p in (Window(0), Window(3))
    )
    assert 1 < full / dropped < speed_ceiling(count * share, 3)
    assert chain_cost([LoRADrop(layers=(9,))], smol, "float32").trainable == 18_432
