"""Our decode engine beside llama.cpp on the same weights, on a CPU, batch 1, greedy.

Each system runs in a process of its own and answers in turn. llama.cpp reads a GGUF file that is
written here from the weights of our model; in 4 and 8 bits it has its own Q4_1 and Q8_0, and we
have `rtn` with groups of 32, or any precision's planes at one width (`any4`, `any3`), all with the
head in bfloat16. Threads stay on their cores. Times are the median over the rounds. The ceiling is
the best rate at which this machine reads memory, probed before and after in the process of ours.

It needs llama.cpp, which effbench itself does not: `pip install xllamacpp` into any folder, named
with `--site`, or into this environment.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

CONTEXTS = (16, 512, 1024, 4096)
PROMPTS = (16, 128, 512)
FORMATS = {
    "bfloat16": ("BF16", 1.1),
    "float32": ("F32", 1.1),
    "rtn8": ("Q8_0", 1.3),
    "rtn4": ("Q4_1", 1.8),
    "any4": ("Q4_1", 1.5),
    "any3": ("Q4_1", 1.5),
}
"""llama.cpp's name of each of our formats, and what we have to reach beside it."""
HEADS = {16: "BF16", 8: "Q8_0", 4: "Q4_1"}
"""llama.cpp's name of each width of the embedding and the head beside layers in few bits."""
NEW = 48
"""Tokens of one timed reply."""


# -- what runs in a process of its own ---------------------------------------------------------


def serve_theirs(gguf: str, threads: int, site: str) -> None:
    """Answer requests from llama.cpp."""
    sys.path[:0] = [site] if site else []
    import xllamacpp as xl

    p = xl.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup = gguf, max(CONTEXTS) + 4 * NEW, 1, True
    p.cpuparams.n_threads = p.cpuparams_batch.n_threads = threads
    p.n_gpu_layers, p.verbosity, p.cache_ram_mib = 0, -1, 0
    server = xl.Server(p)

    def answer(job: dict[str, Any]) -> dict[str, Any]:
        decoding = job["what"] == "decode"
        done: Any = server.handle_completions(
            {
                "prompt": job["ids"],
                "n_predict": NEW + 1 if decoding else 1,
                "ignore_eos": True,
                "temperature": 0.0,
                "top_k": 1,
                "samplers": ["top_k"],
                "cache_prompt": decoding,
            }
        )
        done = done if isinstance(done, dict) else json.loads(done)
        times = done["timings"]
        rate = times["predicted_per_second"] if decoding else times["prompt_per_second"]
        return {"rate": rate, "text": done["choices"][0]["text"]}

    _serve(answer)


def serve_ours(dtype: str, threads: int, head: int) -> None:
    """Answer requests from our engine."""
    import torch

    from effbench.nn.decode.native import most_likely
    from effbench.nn.decode.static import StaticSession
    from effbench.resources.roofline import probe

    torch.set_num_threads(threads)
    low = dtype[:3] in ("rtn", "any")
    compute = torch.bfloat16 if low else getattr(torch, dtype)
    model, tokenizer = _model(compute)
    if low:
        from effbench.nn.quant.embedding import put_head
        from effbench.nn.quant.formats.any_precision import AnyPrecisionCodes
        from effbench.nn.quant.formats.grouped import Grouped
        from effbench.nn.quant.linears import PackedLinear, pack_linears

        bits = int(dtype[3:])
        packed = Grouped(bits, 32) if dtype.startswith("rtn") else AnyPrecisionCodes(bits, bits)
        pack_linears(model, packed, compute)
        if head < 16:
            put_head(model, PackedLinear.quantise(model.lm_head, head, 32))
    sessions: dict[int, Any] = {}

    @torch.inference_mode()
    def answer(job: dict[str, Any]) -> dict[str, Any]:
        if job["what"] == "probe":
            found = probe("cpu", compute, repeats=3, side=256)
            return {"gemv": found.bandwidth, "gemm": found.gemm}
        ids = torch.tensor([job["ids"]])
        length = ids.shape[1]
        if job["what"] == "prefill":
            session = StaticSession(model)
            session.reserve(1, length + 1, length)
            start = time.perf_counter()
            session.prefill(ids).argmax(-1)
            return {"rate": length / (time.perf_counter() - start), "text": ""}
        if length not in sessions:
            session = StaticSession(model)
            session.reserve(1, length + NEW + 1, length)
            sessions[length] = session, session.prefill(ids).argmax(-1, keepdim=True)
        session, first = sessions[length]
        _rewind(session, length)
        tokens = [first]
        start = time.perf_counter()
        for _ in range(NEW):
            tokens.append(most_likely(session.step(tokens[-1]))[:, None])
        seconds = time.perf_counter() - start
        moved = _bytes(model) + sum(
            2 * layer.buffers[0][:, :, :1].nbytes * (length + NEW / 2) for layer in session.layers
        )
        return {
            "rate": NEW / seconds,
            "text": tokenizer.decode(torch.cat(tokens, 1)[0]),
            "bytes": NEW * moved / seconds,
            "engine": session.engine,
        }

    _serve(answer)


def _bytes(model: Any) -> int:
    """Bytes of weights that a step reads."""
    parts = (model.model.layers, model.lm_head)
    return sum(t.nbytes for part in parts for t in (*part.parameters(), *part.buffers()))


def _rewind(session: Any, length: int) -> None:
    """Forget all positions after the first `length` ones."""
    for layer in session.layers:
        layer.length = length
    session.positions += length - session.length
    session.length = length


def _serve(answer: Any) -> None:
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


class Worker:
    """A system in a process of its own."""

    def __init__(self, *words: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, *map(str, words)],
            env={**os.environ, "OMP_PROC_BIND": "true"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._read()

    def ask(self, what: str, ids: list[int] | None = None) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"what": what, "ids": ids}) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = self._read()
        return found

    def _read(self) -> Any:
        assert self.process.stdout
        for line in self.process.stdout:
            try:
                return json.loads(line)
            except ValueError:  # something that a library said
                continue
        raise RuntimeError(f"a process ended: {self.process.args!r}")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


# -- the file that llama.cpp reads -------------------------------------------------------------


def _model(dtype: Any) -> Any:
    from effbench.config.compose import compose
    from effbench.models import load as models

    spec = compose("eval", ["model=smollm2-135m"]).spec.model
    loaded = models.load(spec, device="cpu", dtype=dtype)
    return loaded.model.requires_grad_(False), loaded.tokenizer


def write_gguf(path: Path, kind: str, like: Path, head: str) -> None:
    """Write the default model for llama.cpp: header and tokenizer of `like`, our weights."""
    import gguf
    import torch

    reader = gguf.GGUFReader(like)
    writer = gguf.GGUFWriter(path, "llama")
    skipped = ("GGUF.", "general.architecture", "general.file_type")
    for name, field in reader.fields.items():
        if not name.startswith(skipped):
            sub = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    model, _ = _model(torch.float32)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, len(model.model.layers))
    config, quant = model.config, gguf.GGMLQuantizationType[kind]
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        for part, heads in (
            ("q_proj", config.num_attention_heads),
            ("k_proj", config.num_key_value_heads),
        ):
            if part in name:  # pairs that turn into each other lie side by side there
                halves = array.reshape(heads, 2, -1, array.shape[1])
                array = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)
        own = names.get_name(name, (".weight",))
        assert own is not None
        if array.ndim == 1:
            writer.add_tensor(own, array)
        else:
            low = kind.startswith("Q") and "embed" in name
            chosen = gguf.GGMLQuantizationType[head] if low else quant
            writer.add_tensor(own, gguf.quantize(array, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# -- the table ---------------------------------------------------------------------------------


def bench(form: str, threads: int, gguf: Path, given: argparse.Namespace, ids: list[int]) -> bool:
    """Print one format's rows; return whether the goal is reached in all of them."""
    ours = Worker("--serve", "ours", "--format", form, "--threads", threads, "--head", given.head)
    theirs = Worker("--serve", gguf, "--threads", threads, "--site", given.site)
    kind, goal = FORMATS[form]
    before = ours.ask("probe")
    rows = [("decode", n) for n in given.contexts]
    rows += [("prefill", n) for n in given.prompts] if threads == max(given.threads) else []
    reached, lines = True, []
    for what, n in rows:
        prompt = ids[:n]
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "theirs": []}
        for turn in range(given.rounds + 1):
            order = [("ours", ours), ("theirs", theirs)]
            for name, worker in order[:: -1 if turn % 2 else 1]:
                found[name].append(worker.ask(what, prompt))
        rate = {k: median(a["rate"] for a in v[1:]) for k, v in found.items()}
        pairs = [
            a["rate"] / b["rate"]
            for a, b in zip(found["ours"][1:], found["theirs"][1:], strict=True)
        ]
        same = _same(found["ours"][-1]["text"], found["theirs"][-1]["text"])
        moved = median(a.get("bytes", 0) for a in found["ours"][1:])
        lines.append((what, n, rate, pairs, same, moved, found["ours"][-1].get("engine", "")))
        if what == "decode":
            reached &= median(pairs) >= goal
    after = ours.ask("probe")
    ceiling = max(before["gemv"], after["gemv"])
    print(f"\n{form} beside {kind}, {threads} threads; memory {ceiling / 1e9:.1f} GB/s")
    for what, n, rate, pairs, same, moved, engine in lines:
        share = (
            f"{moved / ceiling:5.0%} of memory, {same} characters alike ({engine})" if moved else ""
        )
        print(
            f"  {what:<8}{n:>6}: theirs {rate['theirs']:7.1f}, ours {rate['ours']:7.1f} tokens/s; "
            f"{median(pairs):.2f} [{min(pairs):.2f}, {max(pairs):.2f}]  {share}",
            flush=True,
        )
    ours.close()
    theirs.close()
    return reached


def _same(a: str, b: str) -> int:
    """Characters until the first one that differs."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--site", default="", help="folder with xllamacpp")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--prompts", nargs="*", type=int, default=list(PROMPTS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", default="", help="folder for the GGUF files, kept")
    parser.add_argument(
        "--head",
        type=int,
        default=8,
        choices=list(HEADS),
        help="bits of embedding and head beside layers in few bits",
    )
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--format", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        if given.serve == "ours":
            serve_ours(given.format, given.threads[0], given.head)
        else:
            serve_theirs(given.serve, given.threads[0], given.site)
        return 0
    from effbench.data.assets import fetch

    if not given.site and not find_spec("xllamacpp"):
        print("llama.cpp is not here: pip install xllamacpp --target DIR, then --site DIR.")
        return 1
    like = next(fetch("smollm2-135m").rglob("*.gguf"))
    rng = np.random.default_rng(0)
    ids = rng.integers(1000, 40000, max(CONTEXTS)).tolist()
    reached = True
    with tempfile.TemporaryDirectory() as own:
        folder = Path(given.keep or own)
        for form in given.formats:
            kind, head = FORMATS[form][0], HEADS[given.head]
            gguf = folder / f"{kind}-{head}.gguf"
            if not gguf.exists():
                write_gguf(gguf, kind, like, head)
            for threads in given.threads:
                reached &= bench(form, threads, gguf, given, ids)
    print("\nall goals reached" if reached else "\nsome goals MISSED")
    return int(not reached)


if __name__ == "__main__":
    sys.exit(main())
