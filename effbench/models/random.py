"""Models of a given shape with seeded random weights, and a tokenizer that needs no file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effbench.api.shape import AnyShape
from effbench.nn.model_kinds.base import ModelKind
from effbench.util.errors import UserError
from effbench.util.lazy import torch

INITIAL_STD = 0.02
"""Standard deviation of random weights."""
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
BYTE_VOCABULARY = len(SPECIAL_TOKENS) + 256


def random_model(shape: AnyShape, seed: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Return a Llama of `shape`, made on `device` in `dtype` without a second copy of anything.

    Each weight is drawn in float32 and then rounded, so that the same seed gives the same model in
    every dtype on one kind of device.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.initialization import no_init_weights

    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=shape.rms_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tied,
        pad_token_id=SPECIAL_TOKENS.index("<pad>"),
        bos_token_id=SPECIAL_TOKENS.index("<bos>"),
        eos_token_id=SPECIAL_TOKENS.index("<eos>"),
    )
    with torch.device(device), no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                drawn = torch.empty(parameter.shape, dtype=torch.float32, device=device)
                parameter.copy_(drawn.normal_(0.0, INITIAL_STD, generator=generator))
    return model.eval()


def random_of(values: Mapping[str, Any], kind: ModelKind, seed: int) -> Any:
    """Return a model of a config of transformers with random weights, float32 on the CPU.

    Args:
        values: As in `config.json`.
        kind: As which it is made.
        seed: Of its weights.
    """
    from effbench.models.survey import model_of

    with torch.random.fork_rng(devices=[]):  # what transformers draws is drawn anew
        model = model_of(values, kind.name, "cpu", torch.float32)
    draw(dict(model.named_parameters()), seed)
    return model


def draw(parameters: Mapping[str, torch.Tensor], seed: int) -> None:
    """Fill weights in place: matrices at random, norms with ones, biases with zeros.

    Args:
        parameters: By name; their order is that of the draws.
        seed: Of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                drawn = torch.empty(parameter.shape).normal_(0.0, INITIAL_STD, generator=generator)
                parameter.copy_(drawn)


def byte_tokenizer(shape: AnyShape) -> Any:
    """Return a tokenizer with one token per byte and four special ones.

    Raises:
        UserError: When the vocabulary of `shape` has no room for them.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if shape.vocab_size < BYTE_VOCABULARY:
        raise UserError(
            f"model.shape.vocab_size={shape.vocab_size} is too small for texts.",
            f"Random models use one token per byte: give at least {BYTE_VOCABULARY}.",
        )
    letters = (*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()))
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    pad, bos, eos, unk = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        model_max_length=shape.max_positions,
        clean_up_tokenization_spaces=False,
    )
