"""Texts to tokens: where a prompt ends, and what is cut when it is too long."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effbench.api.examples import Tokens
from effbench.data.render import Conversation, Turn
from effbench.util.errors import UserError

WITHOUT_CHAT = (
    "Give one: dataset.template=zephyr or a FILE; or go without: dataset.chat=false, or chat=false "
    "of the evaluator."
)
WITHOUT_SYSTEM = (
    "Put it before what the user says first: dataset.system=user, or leave it out: "
    "dataset.system=none"
)
TEMPLATE_DATE = datetime(2024, 7, 26, 12)
"""The date that chat templates are told: that of Llama 3's own, where it cannot ask for one."""
TEMPLATE_CODES = [f"%{sign}{code}" for code in "dmyYIHMSjFTDR" for sign in ("-", "")]
TEMPLATE_WORDS = {"%a": "Fri", "%A": "Friday", "%b": "Jul", "%h": "Jul", "%B": "July", "%p": "PM"}
"""What the language of the machine would decide."""


class Encoder:
    """A tokenizer that never closes a text: what it would put at the end is left out."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.opening, self.closing = _added(tokenizer)

    def __call__(self, text: str, special: bool = True) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: Any.
            special: Whether what the tokenizer puts before a text goes before it.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        return ids[: len(ids) - self.closing] if special else ids

    @property
    def end(self) -> list[int]:
        """Tokens that the tokenizer puts at the end of every text."""
        ids: list[int] = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        return ids[len(ids) - self.closing :]

    def pair(self, prompt: str, answer: str, special: bool = True) -> tuple[list[int], list[int]]:
        """Return the tokens of a prompt and of an answer to it, neither of them empty.

        As lm-eval does it: both are tokenised together, and the prompt's own tokens are taken off
        the front. Before an answer without a prompt stands the token that a text begins with.

        Args:
            prompt: Without blanks at its end, see `moved`; may be empty.
            answer: With all that stands between it and the prompt.
            special: As in `__call__`.

        Raises:
            UserError: When the answer has no token.
        """
        context = self.context(prompt, special)
        rest = self(prompt + answer, special)[len(context) :] if prompt else []
        rest = rest or self(answer, special=False)
        if not rest:
            raise UserError(f"The answer {answer!r} has no token.", "Mend the row.")
        return context, rest

    def context(self, prompt: str, special: bool = True) -> list[int]:
        """Return the tokens of a prompt that an answer is to follow, at least one; see `pair`."""
        return self(prompt, special) or [prefix_token(self.tokenizer)]

    def left_of(self, answer: str, ids: list[int], room: int) -> int:
        """Return the UTF-8 bytes of an answer of which `room` tokens are left.

        A character that is cut through does not count.
        """
        if len(ids) <= room:
            return len(answer.encode())
        text = self.tokenizer.decode(ids[:room], skip_special_tokens=True)
        return len(text.rstrip("\ufffd").encode())


def moved(prompt: str, answer: str) -> tuple[str, str]:
    """Return both with the blanks at the end of the prompt before the answer; line ends stay.

    Most tokenizers make one token of a blank and the word after it.
    """
    bare = prompt.rstrip(" \t")
    return bare, prompt[len(bare) :] + answer


def _added(tokenizer: Any) -> tuple[int, int]:
    """Return how many tokens a tokenizer puts before and after every text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for before in range(len(full) - len(bare) + 1):
        if full[before : before + len(bare)] == bare:
            return before, len(full) - len(bare) - before
    return 0, 0


def fitted(
    prompt: list[int], answers: Sequence[list[int]], limit: int, kept: int = 0
) -> tuple[list[int], int]:
    """Return a prompt that leaves room for the longest of some answers, and what it lost.

    It loses its start, but for the `kept` tokens that every text begins with.

    Args:
        prompt: Tokens.
        answers: Tokens of each answer.
        limit: Most tokens of prompt and answer; one is left for what ends a text.
        kept: Tokens at its start that stay.
    """
    room = max(1, limit - max(map(len, answers)) - 1)
    if len(prompt) <= room:
        return prompt, 0
    kept = min(kept, room - 1)
    return prompt[:kept] + prompt[len(prompt) - (room - kept) :], len(prompt) - room


def joined(prompt: list[int], lost: int, answer: list[int], limit: int, size: int) -> Tokens:
    """Return prompt and answer as one sequence of at most `limit` tokens.

    Args:
        prompt: As `fitted` leaves it.
        lost: Tokens that it lost.
        answer: Tokens; it loses its end.
        limit: Most tokens.
        size: Bytes of the answer's text.
    """
    ids = [*prompt, *answer]
    return Tokens(ids[:limit], len(prompt), size, (lost, max(0, len(ids) - limit)))


def answered(
    encoder: Encoder, prompt: str, answer: str, limit: int, special: bool = True
) -> Tokens:
    """Return prompt and answer as one sequence; its bytes are those of the answer that is left.

    Args:
        encoder: Makes the tokens.
        prompt: As the user wrote it, or all of it in a chat template.
        answer: With all that stands between it and the prompt.
        limit: Most tokens, at least two.
        special: False for a prompt in a chat template.

    Raises:
        UserError: When the answer has no token.
    """
    if special:
        prompt, answer = moved(prompt, answer)
    context, rest = encoder.pair(prompt, answer, special)
    fitting, lost = fitted(context, [rest], limit, encoder.opening if special else 0)
    size = encoder.left_of(answer, rest, limit - len(fitting))
    return joined(fitting, lost, rest, limit, size)


def ended(tokens: Tokens, limit: int, tokenizer: Any) -> Tokens:
    """Return a sequence with the token that ends a text, if there is room for it."""
    end = tokenizer.eos_token_id
    if end is None or len(tokens.ids) >= limit or tokens.cut[1]:
        return tokens
    return Tokens([*tokens.ids, end], tokens.prompt_length, tokens.answer_bytes, tokens.cut)


def chat_prompt(prompt: str | Sequence[Turn] | Conversation, tokenizer: Any) -> str:
    """Return a prompt in the model's chat template, ready for an answer.

    Args:
        prompt: What the user says, or a conversation.
        tokenizer: Of the model.

    Raises:
        UserError: When the model has no chat template, or one that fails.
    """
    if not isinstance(prompt, Conversation):
        turns = [("user", prompt)] if isinstance(prompt, str) else prompt
        prompt = Conversation(tuple({"role": who, "content": what} for who, what in turns))
    rendered: str = in_template(prompt, tokenizer, asks=True)
    return rendered


def in_template(
    conversation: Conversation, tokenizer: Any, asks: bool = False, masks: bool = False
) -> Any:
    """Return a conversation in the model's chat template.

    Args:
        conversation: Any.
        tokenizer: Of the model.
        asks: Whether it ends with what the assistant's answer begins with.
        masks: Whether to return `input_ids` and `assistant_masks`, by the template's own marks, and
            not the text.

    Raises:
        UserError: When the model has no chat template, or one that fails.
    """
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        raise UserError("The model has no chat template.", WITHOUT_CHAT)
    messages = list(conversation.messages)
    form: dict[str, Any] = {}
    if masks:
        form |= {"return_dict": True, "return_assistant_tokens_mask": True}
    if conversation.tools:
        form["tools"] = list(conversation.tools)
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=masks,
            add_generation_prompt=asks,
            **form,
            **_dated(tokenizer),
        )
    except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        system = any(message["role"] == "system" for message in messages)
        raise UserError(
            f"The model's chat template cannot be used: {reason}.",
            WITHOUT_SYSTEM if system and "system" in reason.lower() else WITHOUT_CHAT,
        ) from error


def template_of(tokenizer: Any, conversation: Conversation) -> str:
    """Return the chat template that a conversation is put into; empty where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    template: str = tokenizer.get_chat_template(tools=list(conversation.tools) or None)
    return template


def _dated(tokenizer: Any) -> dict[str, str]:
    """Return a chat template that asks for today's date with the answer to that.

    It would put another date into every prompt each day, in the language of the machine.
    """
    if "strftime_now" not in str(tokenizer.chat_template):
        return {}
    answers = (f"|replace({code!r}, {TEMPLATE_DATE.strftime(code)!r})" for code in TEMPLATE_CODES)
    words = (f"|replace({code!r}, {word!r})" for code, word in TEMPLATE_WORDS.items())
    filled = "form" + "".join((*words, *answers))
    macro = "{% macro strftime_now(form) %}{{ " + filled + " }}{% endmacro %}{{ '' }}"
    return {"chat_template": macro + tokenizer.get_chat_template()}


ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ message['content'] + eos_token }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
"""The chat template of Zephyr (Tunstall et al., 2023), which needs no token but the end of text."""
TEMPLATES = {"zephyr": ZEPHYR}


def template_text(template: str) -> str:
    """Return a chat template as it goes into a spec: a name, or the text of a file.

    Args:
        template: As `DatasetSpec.template`.

    Raises:
        UserError: When it is no name and no file, or holds no template.
    """
    if not template or template in TEMPLATES or "{{" in template:
        return template
    path = Path(template).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        raise UserError(
            f"dataset.template={template} is no file with a chat template, nor the name of one.",
            f"Known: {', '.join(TEMPLATES)}; or give a Jinja file.",
        ) from None
    if "{{" not in text:
        raise UserError(
            f"{path} holds no chat template: nothing in it stands for messages.",
            "A chat template is Jinja, such as {% for message in messages %}{{ ... }}{% endfor %}.",
        )
    return text


def with_template(tokenizer: Any, template: str) -> Any:
    """Return a tokenizer with another chat template, or itself where none is given."""
    if not template:
        return tokenizer
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


def prefix_token(tokenizer: Any) -> int:
    """Return the token that stands before a document: beginning of text, else end of text.

    Raises:
        UserError: When the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise UserError(
        "The model's tokenizer has neither a beginning-of-text nor an end-of-text token, so the "
        "first token of a document has nothing to be predicted from.",
        "Give its tokenizer_config.json a bos_token.",
    )


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of everything that can change the output of a tokenizer.

    That is its own state, its settings but for where it lies, and the libraries that run it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    body = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    settings = getattr(tokenizer, "init_kwargs", {}).items()
    parts = {
        "body": body,
        "class": type(tokenizer).__qualname__,
        "template": str(getattr(tokenizer, "chat_template", "")),
        "special": str(getattr(tokenizer, "special_tokens_map", "")),
        "settings": sorted(f"{k}={v!r}" for k, v in settings if not _is_place(k)),
        "libraries": {name: version(name) for name in ("tokenizers", "transformers")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _is_place(setting: str) -> bool:
    return setting == "name_or_path" or setting.endswith("_file")
