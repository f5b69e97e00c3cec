"""Packed products at 7B sizes beside bfloat16 ones; a 7B shape in few bits, and in DFloat11."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from gpu_stage import Row, Stage

SECONDS = 150
SIZES = ((4096, 4096), (4096, 11008), (11008, 4096))
"""`(d_in, d_out)` of the linears of a 7B block."""
COPIES = 24
"""Matrices of one size that are gone through, so that none is in the cache when it is read."""
FORMS = ("codes 4 128", "codes 8 128", "trits 2 128", "signs 3 128", "nested 3", "nested 4")
"""As `bench_code_products` names them."""
FASTER, SHARE = 2.5, 0.6
"""What 3 bits are to reach: times as fast as bfloat16, and share of the bytes/s ceiling."""
BATCHES = (1, 16)
"""Sequences that are decoded at once in DFloat11; a prompt is read too."""


def run(stage: Stage) -> None:
    """Time the products, each matrix of a size in turn; then decode at every width, and exactly."""
    import torch

    from effbench.resources.roofline import probe

    device = "cpu" if stage.tiny else "cuda"
    dtype = torch.float32 if stage.tiny else torch.bfloat16
    most = stage.size(2**31, 2**20)
    ceilings = probe(device, dtype, working_set=most, most=most, side=stage.size(2048, 128))
    for sizes in ((128, 64),) if stage.tiny else SIZES:
        with stage.part("{} x {}".format(*sizes)), torch.inference_mode():
            _compare(stage, device, dtype, sizes, ceilings.bandwidth)
    with stage.part("decoding"), torch.inference_mode():
        _decode(stage, device, dtype, ceilings.bandwidth)
    with stage.part("DFloat11"), torch.inference_mode():
        _lossless(stage, device, ceilings.bandwidth)


def _compare(
    stage: Stage, device: str, dtype: Any, sizes: tuple[int, int], bandwidth: float
) -> None:
    """Note how products of one size compare with the dense ones, and with their bytes."""
    import torch
    from bench_code_products import layer

    from effbench.nn.quant import nf4
    from effbench.nn.quant.linears import storage_bytes

    d_in, d_out = sizes
    count, what = stage.size(COPIES, 2), f"{d_in} x {d_out}"
    dense = [torch.randn(d_out, d_in, device=device, dtype=dtype) for _ in range(count)]
    x = torch.randn(1, d_in, device=device, dtype=dtype)
    plain = _seconds(device, lambda: [torch.nn.functional.linear(x, w) for w in dense])
    read = sum(w.numel() * w.element_size() for w in dense)
    stage.note(Row(f"{what}: share of the bytes/s ceiling, dense", read / plain / bandwidth))
    packed = [nf4.quantise(w) for w in dense]
    fused = _seconds(device, lambda: [_product(x, p, (d_out, d_in)) for p in packed])
    read = count * nf4.nf4_bytes(d_in, d_out)
    stage.note(Row(f"{what}, nf4: times as fast as dense", plain / fused))
    stage.note(Row(f"{what}, nf4: share of the bytes/s ceiling", read / fused / bandwidth))
    for form in FORMS[-1:] if stage.tiny else FORMS:
        made = [layer(form, d_out, d_in).to(device) for _ in range(count)]
        taken = _seconds(device, lambda made=made: [m(x) for m in made])  # type: ignore[misc]
        asked = form == "nested 3" and not stage.tiny
        least = {"at_least": FASTER} if asked else {}
        stage.note(Row(f"{what}, {form}: times as fast as dense", plain / taken, **least))
        read = sum(_read(m) if form.startswith("nested") else storage_bytes(m) for m in made)
        least = {"at_least": SHARE} if asked else {}
        share = read / taken / bandwidth
        stage.note(Row(f"{what}, {form}: share of the bytes/s ceiling", share, **least))


def _decode(stage: Stage, device: str, dtype: Any, bandwidth: float) -> None:
    """Note what a 7B shape decodes in bfloat16, and in nested codes at each width."""
    from bench_code_products import layer

    from effbench.nn.llama.surgery import replace_module
    from effbench.nn.quant.linears import dense_linears
    from effbench.nn.quant.nested_linear import NestedLinear, read_at

    model = _model(stage, device, dtype)
    head = model.lm_head.weight
    head_bytes = head.numel() * head.element_size()
    dense = sum(w.numel() * w.element_size() for w in model.model.layers.parameters())
    plain = _step(stage, model, device)
    stage.note(Row("decoding, dense", 1 / plain, "tokens/s"))
    stage.note(Row("decoding, dense: MBU", (dense + head_bytes) / plain / bandwidth))
    for name, linear in dense_linears(model):
        made = layer("nested 8", linear.out_features, linear.in_features)
        replace_module(model, name, made.to(device))
    nested = [m for m in model.modules() if isinstance(m, NestedLinear)]
    for bits in (3,) if stage.tiny else range(3, 9):
        with read_at(model, bits):
            taken = _step(stage, model, device)
            read = sum(map(_read, nested)) + head_bytes
        asked = bits == 3 and not stage.tiny
        least = {"at_least": FASTER} if asked else {}
        stage.note(Row(f"decoding at {bits} bits: times as fast as dense", plain / taken, **least))
        least = {"at_least": SHARE} if asked else {}
        stage.note(Row(f"decoding at {bits} bits: MBU", read / taken / bandwidth, **least))


def _lossless(stage: Stage, device: str, bandwidth: float) -> None:
    """Note a 7B shape in DFloat11 beside itself in bfloat16: its rate, and whether bits differ.

    Blocks are decoded in line, and each while the one before computes. All have the weights of the
    first, which alone is encoded.
    """
    import torch

    from effbench.nn.llama.surgery import replace_module
    from effbench.nn.quant import dfloat11
    from effbench.nn.quant.dfloat11_ahead import decoded_ahead
    from effbench.resources.timing import Clock, steady

    model = _model(stage, device, torch.bfloat16)
    blocks, clock = list(model.model.layers), Clock(device)
    for block in blocks[1:]:
        block.load_state_dict(blocks[0].state_dict())
    ids = torch.randint(model.config.vocab_size, (1, stage.size(2048, 8)), device=device)

    def seconds(engine: str) -> dict[str, float]:
        taken = {f"batch {n}": _step(stage, model, device, n, engine) for n in BATCHES}
        prompts = [clock.seconds(lambda: model(ids, logits_to_keep=1)) for _ in range(5)]
        return taken | {f"{ids.shape[1]} tokens at once": steady(prompts, drop=2)[0]}

    plain, right = seconds("graph"), model(ids, logits_to_keep=1).logits
    linears = {n: m for n, m in blocks[0].named_modules() if isinstance(m, torch.nn.Linear)}
    encoded = dfloat11.encode({name: linear.weight for name, linear in linears.items()})
    out = torch.empty(len(encoded.rest), dtype=torch.bfloat16, device=device)
    alone = _seconds(device, lambda: dfloat11.decode(encoded, out, trusted=True))
    moved = encoded.nbytes + out.nbytes
    stage.note(Row("DFloat11: bfloat16 weights written", out.nbytes / alone, "B/s"))
    stage.note(Row("DFloat11: share of the bytes/s ceiling", moved / alone / bandwidth))
    scratch = dfloat11.Scratch()
    for block in blocks:
        own = {name: block.get_submodule(name) for name in linears}
        for name, packed in dfloat11.pack(own, encoded, scratch, "").items():
            replace_module(block, name, packed)
    found = {}
    for how, context in (("in line", nullcontext), ("ahead", decoded_ahead)):
        with context(model):
            found[how] = seconds("walk")
            same = float(model(ids, logits_to_keep=1).logits.equal(right))
        stage.note(Row(f"DFloat11 {how}: the bits of bfloat16", same, at_least=1))
        for what, taken in found[how].items():
            stage.note(Row(f"DFloat11 {how}, {what}: times as fast as dense", plain[what] / taken))
    for what, taken in found["ahead"].items():
        ratio = found["in line"][what] / taken
        stage.note(Row(f"DFloat11, {what}: ahead, times as fast as in line", ratio))


def _model(stage: Stage, device: str, dtype: Any) -> Any:
    """Return a model of 7B shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=stage.size(4096, 64),
        intermediate_size=stage.size(11008, 96),
        num_hidden_layers=stage.size(32, 2),
        num_attention_heads=stage.size(32, 2),
        vocab_size=stage.size(32000, 128),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def _step(stage: Stage, model: Any, device: str, batch: int = 1, engine: str = "graph") -> float:
    """Return the seconds of a step after prompts, the mean of some."""
    import torch

    from effbench.nn.decode.static import StaticSession

    prompt, new = stage.size(128, 8), stage.size(32, 4)
    session = StaticSession(model)
    session.reserve(batch, prompt + new + 4, prompt)
    if device == "cuda" and session.engine != engine:
        raise RuntimeError(f"steps are made by {session.engine!r}, not by {engine!r}")
    ids = torch.randint(model.config.vocab_size, (batch, prompt), device=device)
    token = session.prefill(ids).argmax(-1, keepdim=True)
    for _ in range(4):
        session.step(token)
    if device == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(new):
        session.step(token)
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) / new


def _read(layer: Any) -> int:
    """Return the bytes that a product of a nested linear reads at its width."""
    return int(layer.bits * layer.planes[0].numel() + layer.table.numel() * 2)


def _product(x: Any, packed: Any, shape: tuple[int, int]) -> Any:
    from effbench.nn.quant import nf4

    if x.is_cuda and nf4.bitsandbytes_available():
        return nf4.product_bitsandbytes(x, packed, shape)
    return x @ nf4.dequantise(packed, shape, x.dtype).T


def _seconds(device: str, work: Callable[[], object]) -> float:
    """Return the median seconds of a call, as a graph where there is a GPU."""
    import torch

    from effbench.resources.timing import Clock, steady

    clock, replayed = Clock(device), work
    if device == "cuda":
        aside = torch.cuda.Stream()
        with torch.cuda.stream(aside):
            work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replayed = graph.replay
    return steady([clock.seconds(replayed) for _ in range(12)], drop=2)[0]
