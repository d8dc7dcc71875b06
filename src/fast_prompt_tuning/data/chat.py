"""Conversations, as the model's own chat template writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError

from ..errors import ConfigError, DataError, shown


def turns(messages: Any, tokenizer: Any) -> dict[str, str]:
    """What a task's templates see of a conversation: all before the user's last turn, that turn, and what follows it.

    Earlier turns are context, a system message among them. The assistant's last turn is what is to be learned.

    Args:
        messages: turns, each with `role` and `content`; the last is the user's, or the assistant's answer to it.
        tokenizer: of the model, with a chat template.

    Returns:
        `before`, `user`, `after`: together the input, up to where the answer begins; `assistant`: the answer, if any.

    Raises:
        DataError: no such conversation, or one that the chat template refuses.
        ConfigError: the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            "the model's tokenizer has no chat template, which conversations need; choose an instruct model, or write "
            "templates (data.input_template, data.target_template)"
        )
    context = [_turn(each, i) for i, each in enumerate(messages)] if isinstance(messages, list) else []
    if not context:
        raise DataError(f"a conversation is a list of turns with role and content, not {shown(messages)}")
    answer = context.pop()["content"] if context[-1]["role"] == "assistant" else None
    if not context or context[-1]["role"] != "user":
        raise DataError("a conversation ends with a turn of the user, or with the assistant's answer to one")

    def written(user: str) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                [*context[:-1], {**context[-1], "content": user}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise DataError(f"the model's chat template refuses the conversation: {error}") from None
        return text

    # Written again with a mark on both sides of the turn: where the marks land is where it stands.
    user = context[-1]["content"]
    whole = written(user)
    mark = next((c for c in map(chr, range(0xE000, 0xF900)) if c not in whole), " ")
    tried = (written(f"{mark}{kept}{mark}").split(mark) for kept in (user, user.strip()))  # many templates strip it
    found = (parts for parts in tried if len(parts) == 3 and "".join(parts) == whole)
    before, said, after = next(found, ("", whole, ""))
    if (start := tokenizer.bos_token) and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]:
        before = before.removeprefix(start)  # the tokenizer adds it
    return {"before": before, "user": said, "after": after, **({} if answer is None else {"assistant": answer})}


def _turn(value: Any, number: int) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in ("role", "content")):
        raise DataError(f"turn {number} of the conversation is {shown(value)}; it needs role and content, both texts")
    return {"role": value["role"], "content": value["content"]}
