"""The chat format of Persimmon: messages in, one prompt text out.

This file knows no tokenizer and no ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tprt.errors import ConfigError


def render_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """``human: {text}\\n\\nadept:``, the format Persimmon's chat model was tuned on.

    Texts are stripped and there is no blank at the end: the model writes it. The format has no
    escapes, so ``\\n\\nadept:`` inside a message reads like a turn of its own.

    Args:
        messages: ``{"role": "user" | "human" | "assistant" | "adept", "content": str}`` in turns,
            from a user's to a user's.

    Raises:
        ConfigError: no messages, another role, content that is no text, or turns out of order.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(
            f"messages must be a list with one message at least, not {messages!r:.80}"
        )
    names = {"user": "human", "human": "human", "assistant": "adept", "adept": "adept"}
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"message {number} of {len(messages)}"
        if not isinstance(message, Mapping):
            raise ConfigError(f"a message must be an object, not {message!r:.80}", where=where)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in names:
            raise ConfigError(
                f"role is {role!r:.80}; Persimmon was tuned on user and assistant turns only",
                where=where,
                hint="put instructions into the first user message"
                if role in ("system", "developer")
                else "user or assistant",
            )
        wanted = "human" if number % 2 else "adept"
        if names[role] != wanted:
            raise ConfigError(
                f"role is {role!r} where a turn of {'user' if number % 2 else 'assistant'} is due",
                where=where,
                hint="turns alternate and begin and end with user",
            )
        if not isinstance(content, str):
            raise ConfigError(f"content must be text, not {content!r:.80}", where=where)
        turns.append(f"{wanted}: {content.strip()}")
    if len(messages) % 2 == 0:
        raise ConfigError(
            "the last message is the assistant's; there is nothing to answer",
            where=f"message {len(messages)} of {len(messages)}",
            hint="turns alternate and begin and end with user",
        )
    return "\n\n".join([*turns, "adept:"])
