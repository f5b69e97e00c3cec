"""What a kind of model is, and how it is found: by its file here.

Everything above speaks of rows as prompts with answers, and of logits [B, T, V] whose position t is
for what stands at t + 1. A kind makes that true of its models, whatever they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, ClassVar

from effbench.api.examples import Example, Tokens
from effbench.util.errors import UserError
from effbench.util.lazy import torch
from effbench.util.rooms import Room

CAUSAL = "causal"
"""The kind of a model that nothing else is said of."""


class ModelKind:
    """Base of all kinds, and what causal language models are."""

    name: ClassVar[str] = ""
    """The name of its file; set when it is found."""
    noun: ClassVar[str] = "causal language model"
    instead: ClassVar[str] = ""
    """What to do about a model that is none."""
    auto: ClassVar[str] = "AutoModelForCausalLM"
    """The class of transformers that loads its models."""
    endings: ClassVar[tuple[str, ...]] = ()
    """How transformers ends the names of their classes."""
    caches: ClassVar[bool] = True
    """Whether a pass leaves keys and values, from which decoding goes on."""

    windows: ClassVar[bool] = True
    """Whether a row that is longer than a window may be read window by window."""
    speaks: ClassVar[bool] = True
    """Whether what it answers is text."""
    writes: ClassVar[bool] = True
    """Whether it writes text, token by token."""
    fills: ClassVar[bool] = True
    """Whether it says what word belongs to a place of a text: its end, or a mask token's."""
    forms: ClassVar[tuple[str, ...]] = ("transformers", "peft", "gguf")
    """In what its models leave; without GGUF among them `--to auto` writes the first."""
    task: ClassVar[str] = "CAUSAL_LM"
    """What peft calls the work of its models."""
    evaluator: ClassVar[str] = ""
    """What asks its models where no evaluator is chosen; empty for what the stage has."""
    rows: ClassVar[str] = ""
    """What a kind of dataset has to say of its rows (`data.kinds.base.Kind`) for it to learn from
    them; empty where any will do."""
    other_rows: ClassVar[tuple[str, str]] = ("", "")
    """What is wrong with other rows, and what to do about it."""

    @property
    def one(self) -> str:
        """One of its models, as a sentence has it: `an encoder with a classification head`."""
        return f"{'an' if self.noun[0] in 'aeiou' else 'a'} {self.noun}"

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether a config of transformers is of such a model, where nobody says so."""
        return False

    def why_not(self, config: Mapping[str, Any]) -> str:
        """Return what keeps a config from being that of such a model; empty when nothing does."""
        return ""

    def made(self, model: Any) -> bool:
        """Whether a loaded model is one."""
        return bool(self.endings) and type(model).__name__.endswith(self.endings)

    # -- rows ----------------------------------------------------------------------------------

    def example(self, example: Example, closing: list[int], outputs: int) -> Example:
        """Return a row as its models read it.

        Args:
            example: Prompt and answers as one text.
            closing: Tokens that its tokenizer ends every text with.
            outputs: Logits of the model.

        Raises:
            UserError: For a row that they cannot answer.
        """
        return example

    def prompt(self, ids: list[int], closing: list[int]) -> list[int]:
        """Return a prompt as its models read it when they are to write an answer.

        Args:
            ids: Tokens of the prompt.
            closing: Tokens that its tokenizer ends every text with.
        """
        return ids

    def positions(self, config: Any) -> int:
        """Return the longest text that a config of transformers has positions for, in tokens."""
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        found = (getattr(config, name, None) for name in names)
        return next((x for x in found if isinstance(x, int)), 0) or 2048

    # -- passes --------------------------------------------------------------------------------

    def logits(
        self, model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the logits of rows, [B, T, V].

        Args:
            model: One of them.
            ids: [B, T], padded on the right.
            mask: [B, T], 1 for real tokens.
            labels: [B, T], not shifted; -100 where a token does not count.
        """
        found: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return found

    def states(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the last hidden states of texts, [B, T, d]."""
        inner = getattr(model, str(model.base_model_prefix))
        found: torch.Tensor = inner(
            input_ids=ids, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return found

    # -- parts ---------------------------------------------------------------------------------

    def blocks(self, model: Any) -> torch.nn.ModuleList:
        """Return the blocks, in the order they run.

        They are the list of modules with the most parameters, whatever it is called and wherever it
        is.

        Raises:
            UserError: When it has no list of blocks.
        """
        inner = getattr(model, getattr(model, "base_model_prefix", ""), None)
        named = getattr(inner, "layers", None)
        if isinstance(named, torch.nn.ModuleList):
            return named
        lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
        if not lists:
            raise UserError(
                f"{type(model).__name__} has no list of blocks.", "Choose a decoder-only model."
            )
        return max(lists, key=lambda found: sum(p.numel() for p in found.parameters()))

    def encoding(self, model: Any) -> int:
        """Return how many of its first blocks read prompts alone, and no answer."""
        return 0

    def heads(self, model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
        """Yield what reads the last states and learns with every method, in the order it runs."""
        yield from ()

    def adjust(self, model: Any, config: Mapping[str, Any]) -> None:
        """Make a model without its weights what a config says, where transformers does not."""

    def ready(self, model: Any) -> None:
        """Make a model that was just loaded usable."""

    def stated(self, model: Any) -> dict[str, Any]:
        """Return entries of `config.json` that transformers would write otherwise."""
        return {}


ROOM = Room("nn.model_kinds", ModelKind, "model.kind={} is not a kind of model.")
names = ROOM.names


@cache
def find(name: str) -> ModelKind:
    """Return the kind called `name`.

    Raises:
        UserError: When there is none.
    """
    return ROOM.find(name)()


def kind_in(config: Mapping[str, Any], stated: str = "") -> ModelKind:
    """Return the kind of model that a config of transformers is of.

    Args:
        config: As in `config.json`.
        stated: Name of the kind that somebody says it is; empty for what the config says.

    Raises:
        UserError: When there is no such kind.
    """
    if stated:
        return find(stated)
    return next((k for k in map(find, names()) if k.claims(config)), find(CAUSAL))


def kind_of(model: Any) -> ModelKind:
    """Return the kind of a loaded model."""
    return next((k for k in map(find, names()) if k.made(model)), find(CAUSAL))


def freeze(model: torch.nn.Module) -> None:
    """Let nothing of a model train but its heads, which are float32 from now on."""
    model.requires_grad_(False)
    for _, head in kind_of(model).heads(model):
        head.float().requires_grad_(True)


def closed(tokens: Tokens, closing: list[int]) -> Tokens:
    """Return a sequence whose prompt ends as a text of its own does."""
    at = tokens.prompt_length
    ids = [*tokens.ids[:at], *closing, *tokens.ids[at:]]
    return replace(tokens, ids=ids, prompt_length=at + len(closing))
