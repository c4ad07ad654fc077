"""The chat formats: messages in, turns out, and the text of formats that are plain text.

This file knows no tokenizer and no ids.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tprt.errors import ConfigError


@dataclass(frozen=True)
class ChatFormat:
    """Args:
    name: of the model that was tuned on it.
    user, assistant: what it calls the two.
    stop: texts with which a model that goes on past its answer begins the user's next turn, where
        that is plain text.
    """

    name: str
    user: str
    assistant: str
    stop: tuple[str, ...] = ()

    def turns(self, messages: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
        """(who, text) of each message; texts are stripped.

        Args:
            messages: ``{"role": "user" | "assistant", "content": str}`` in turns, from a user's to a
                user's; roles may also have the format's own names.

        Raises:
            ConfigError: no messages, another role, content that is no text, or turns out of order.
        """
        if (
            isinstance(messages, str | Mapping)
            or not isinstance(messages, Sequence)
            or not messages
        ):
            raise ConfigError(
                f"messages must be a list with one message at least, not {messages!r:.80}"
            )
        names = {"user": self.user, "assistant": self.assistant}
        names |= {name: name for name in (self.user, self.assistant)}
        turns = []
        for number, message in enumerate(messages, start=1):
            where = f"message {number} of {len(messages)}"
            if not isinstance(message, Mapping):
                raise ConfigError(f"a message must be an object, not {message!r:.80}", where=where)
            role, content = message.get("role"), message.get("content")
            if not isinstance(role, str) or role not in names:
                raise ConfigError(
                    f"role is {role!r:.80}; {self.name} was tuned on user and assistant turns only",
                    where=where,
                    hint="put instructions into the first user message"
                    if role in ("system", "developer")
                    else "user or assistant",
                )
            wanted = self.user if number % 2 else self.assistant
            if names[role] != wanted:
                raise ConfigError(
                    f"role is {role!r} where a turn of {'user' if number % 2 else 'assistant'} is due",
                    where=where,
                    hint="turns alternate and begin and end with user",
                )
            if not isinstance(content, str):
                raise ConfigError(f"content must be text, not {content!r:.80}", where=where)
            turns.append((wanted, content.strip()))
        if len(messages) % 2 == 0:
            raise ConfigError(
                "the last message is the assistant's; there is nothing to answer",
                where=f"message {len(messages)} of {len(messages)}",
                hint="turns alternate and begin and end with user",
            )
        return turns


PERSIMMON = ChatFormat("Persimmon", "human", "adept", ("\n\nhuman:",))
GEMMA = ChatFormat("Gemma", "user", "model")


def render_chat(messages: Sequence[Mapping[str, Any]]) -> str:
    """``human: {text}\\n\\nadept:``, the format Persimmon's chat model was tuned on.

    There is no blank at the end: the model writes it. The format has no escapes, so ``\\n\\nadept:``
    inside a message reads like a turn of its own. Raises ConfigError like ``ChatFormat.turns``.
    """
    turns = [f"{who}: {text}" for who, text in PERSIMMON.turns(messages)]
    return "\n\n".join([*turns, f"{PERSIMMON.assistant}:"])
