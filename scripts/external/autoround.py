"""AutoRound by its own library, as a program for `method=external`: rounding learnt block by block.

    effbench compress method=external 'method.command="roundenv/bin/python \\
        scripts/external/autoround.py {input} {output} {rows} --seed {seed}"'

It runs in an environment with `auto-round`, which effbench does not need. Calibration rows are laid
end to end and cut into samples of `--seqlen` tokens, because the library leaves out shorter ones.
What it writes is dense: each weight is what its code, scale and zero point stand for, in the dtype
that it was given in. All is computed in float32; the library's default on a CPU is bfloat16.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from auto_round import AutoRound
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    options = _options()
    tokenizer = AutoTokenizer.from_pretrained(options.input)
    model = AutoModelForCausalLM.from_pretrained(options.input, dtype="auto")
    given = model.dtype
    samples = _samples(options.rows, options.seqlen)
    print(f"{len(samples)} samples of {options.seqlen} tokens", flush=True)
    rounding = AutoRound(
        model.float(),
        tokenizer=tokenizer,
        scheme="W4A16",
        bits=options.bits,
        group_size=options.group_size,
        sym=options.symmetric,
        iters=options.iters,
        batch_size=min(options.batch_size, len(samples)),
        nsamples=len(samples),
        seqlen=options.seqlen,
        dataset=samples,
        seed=options.seed,
        amp=False,
        device_map="cpu",
    )
    rounded, _ = rounding.quantize()
    rounded.to(given).save_pretrained(options.output)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="AutoRound on a folder, to a folder of dense weights"
    )
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--iters", type=int, default=200, help="steps of each block")
    parser.add_argument("--batch-size", type=int, default=8, help="samples of a step")
    parser.add_argument("--seqlen", type=int, default=128, help="tokens of a sample")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def _samples(rows: Path, length: int) -> list[torch.Tensor]:
    """Return the tokens of all rows in samples of one length, each (1, length)."""
    lines = rows.read_text().splitlines()
    ids = [token for line in lines for token in json.loads(line)["input_ids"]]
    if len(ids) < length:
        raise SystemExit(f"{rows} has {len(ids)} tokens, and --seqlen is {length}.")
    return [
        torch.tensor([ids[start : start + length]])
        for start in range(0, len(ids) - length + 1, length)
    ]


if __name__ == "__main__":
    main()
