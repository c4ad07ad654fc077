"""A conversation: its turns, its sampling parameters, what its commands do, what fits the model.

Knows no terminal and no model: ids come from an ``encode`` it is given, answers are brought to it.
"""

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from tprt.cli.strict_yaml import read_yaml_value
from tprt.errors import ConfigError, OutputError
from tprt.job.output_file import AtomicOutput
from tprt.sampling_params import MAX_SEED, SamplingParams

Message = dict[str, str]

DEFAULT_MAX_TOKENS = 512
COMMANDS = {
    "help": "this list",
    "regen": "answer the last question again; where tokens are drawn, with another seed",
    "undo": "drop the last question and its answer",
    "clear": "drop the whole conversation",
    "save": "write the conversation to a FILE; /save! replaces one that exists",
    "set": "change a sampling parameter: /set temperature 0.7; /set shows all",
    "exit": "end the chat, as Ctrl-D does",
}
HELP = (
    "\n".join(f"/{name:<6} {text}" for name, text in COMMANDS.items())
    + "\nA line that ends in a backslash goes on in the next one; "
    '""" begins a text of many lines and ends it.'
    "\n//text sends a text that begins with a slash. Ctrl-C stops an answer."
)
# Parameters whose results a conversation has no place for, at the value that leaves them off.
WITHOUT_USE: dict[str, Any] = {"n": 1, "logprobs": None, "prompt_logprobs": None}


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        stopped: the user stopped the answer.
        params: the session's parameters when it was answered.
        attempt: how often the question was answered before.
    """

    question: str
    answer: str
    stopped: bool
    params: SamplingParams
    attempt: int = 0


@dataclass(frozen=True)
class Reply:
    """What an input asks for.

    Args:
        say: text for the user.
        question: to be answered; ``again`` replaces the last turn.
    """

    say: str = ""
    question: str | None = None
    again: bool = False
    leave: bool = False


@dataclass(frozen=True)
class Prepared:
    """A question ready for the model; ``left_out`` of the oldest turns are not in the prompt."""

    question: str
    again: bool
    token_ids: list[int]
    params: SamplingParams
    left_out: int


class Session:
    """Args:
    encode: messages that end with the user's, as the ids of a prompt.
    limit: most tokens of prompt and answer.
    params: as the user set them; ``max_tokens`` None means what fits, at most 512.

    Raises:
        ConfigError: ``params`` asks for something a chat has no place for.
    """

    def __init__(
        self, encode: Callable[[list[Message]], list[int]], limit: int, params: SamplingParams
    ) -> None:
        self.encode, self.limit = encode, limit
        self.params = self._checked(params)
        self.turns: list[Turn] = []

    # ------------------------------------------------------------ questions and answers

    @property
    def messages(self) -> list[Message]:
        return _messages(self.turns)

    def prepare(self, question: str, again: bool = False) -> Prepared:
        """The prompt for a question, without the oldest turns where they do not fit.

        Args:
            again: the question is the last turn's.

        Raises:
            ConfigError: not even the question alone fits.
        """
        earlier, asked = self.turns[:-1] if again else self.turns, self.params.max_tokens
        wanted = min(DEFAULT_MAX_TOKENS, max(1, self.limit // 4)) if asked is None else asked

        def ids(left_out: int) -> list[int]:
            return self.encode([*_messages(earlier[left_out:]), _user(question)])

        def fits(left_out: int) -> bool:
            return len(ids(left_out)) + wanted <= self.limit

        left_out = bisect_left(range(len(earlier)), True, key=fits)
        token_ids = ids(left_out)
        room = self.limit - len(token_ids)
        if room < (asked or 1):
            answer = "" if asked is None else f" and its answer up to {asked} (max_tokens)"
            raise ConfigError(
                f"the question alone has {len(token_ids)} tokens{answer}; {self.limit} fit together",
                hint="a shorter question, /set max_tokens with less, or a larger "
                "engine.max_model_len or kv_cache_memory where the model allows it",
            )
        most = min(room, DEFAULT_MAX_TOKENS) if asked is None else asked
        params = replace(self.params, max_tokens=most)
        if again and params.seed is not None:
            attempt = self.turns[-1].attempt + 1
            step = attempt if params.seed + attempt <= MAX_SEED else -attempt
            params = replace(params, seed=params.seed + step)
        return Prepared(question, again, token_ids, params, left_out)

    def keep(self, prepared: Prepared, answer: str, stopped: bool) -> None:
        """Take an answer into the conversation."""
        attempt = 0
        if prepared.again:
            attempt = self.turns.pop().attempt + 1
        # The chat format strips every text, so what is left out here never reaches the model.
        turn = Turn(prepared.question, answer.strip(), stopped, self.params, attempt)
        self.turns.append(turn)

    # ------------------------------------------------------------ inputs

    def take(self, text: str, is_text: bool = False) -> Reply:
        """What an input means.

        Args:
            is_text: never a command, whatever it begins with.

        Raises:
            ConfigError, OutputError: the command is unknown, or cannot be carried out; nothing changed.
        """
        if is_text or "\n" in text.strip() or not text.startswith("/"):
            return Reply(question=text) if text.strip() else Reply()
        if text.startswith("//"):
            return Reply(question=text[1:])
        name, _, rest = text[1:].strip().partition(" ")
        rest = rest.strip()
        if name in ("save", "save!"):
            return self._save(rest, replaces=name == "save!")
        if name not in COMMANDS:
            near = get_close_matches(name, COMMANDS, 1, cutoff=0.5)
            meant = f"did you mean /{near[0]}? " if near else ""
            raise ConfigError(
                f"unknown command {'/' + name!r:.60}",
                hint=f"{meant}/help lists all; //{name[:20]} sends it as a text",
            )
        if rest and name != "set":
            raise ConfigError(f"/{name} takes nothing behind it, not {rest!r:.60}", hint=f"/{name}")
        command: Callable[..., Reply] = getattr(self, f"_{name}")
        return command(rest) if name == "set" else command()

    def _help(self) -> Reply:
        return Reply(HELP)

    def _exit(self) -> Reply:
        return Reply(leave=True)

    def _regen(self) -> Reply:
        last = self._last("answer again")
        same = self.params.greedy and self.params == last.params and not last.stopped
        say = "temperature 0 draws nothing: the answer will be the same" if same else ""
        return Reply(say, last.question, again=True)

    def _undo(self) -> Reply:
        question = self._last("undo").question
        del self.turns[-1]
        return Reply(f"dropped: {' '.join(question.split())[:60]}")

    def _clear(self) -> Reply:
        count = len(self.turns)
        self.turns.clear()
        return Reply(f"dropped {count} turn{'' if count == 1 else 's'}")

    def _last(self, what: str) -> Turn:
        if not self.turns:
            raise ConfigError(f"there is no question to {what}", hint="ask one first")
        return self.turns[-1]

    # ------------------------------------------------------------ parameters

    def _set(self, rest: str) -> Reply:
        name, _, text = rest.partition(" ")
        if not name:
            return Reply(self.describe())
        known = [field.name for field in fields(SamplingParams)]
        if name not in known:
            near = get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}?" if near else "/set shows all"
            raise ConfigError(f"unknown parameter {name!r:.60}", hint=meant)
        if not text.strip():
            return Reply(f"{name} is {_shown(getattr(self.params, name))}")
        try:
            values = vars(self.params) | {name: read_yaml_value(text.strip())}
            self.params = self._checked(SamplingParams.from_dict(values))
        except ConfigError as error:
            what = error.what.removeprefix("bad sampling parameters: ")
            stays = f"another value; {name} stays {_shown(getattr(self.params, name))}"
            raise ConfigError(what, hint=error.hint or stays) from None
        return Reply(f"{name} is {_shown(getattr(self.params, name))}")

    def describe(self) -> str:
        """Every parameter and its value, one per line, as ``/set`` takes them."""
        lines = []
        for name, value in vars(self.params).items():
            note = f"  (what fits, at most {DEFAULT_MAX_TOKENS})"
            note = note if name == "max_tokens" and value is None else ""
            if name not in WITHOUT_USE:
                lines.append(f"{name:<27}{_shown(value)}{note}")
        return "\n".join(lines)

    def _checked(self, params: SamplingParams) -> SamplingParams:
        check_params(params)
        if params.max_tokens is not None and params.max_tokens >= self.limit:
            raise ConfigError(
                f"max_tokens is {params.max_tokens}; with a question that is more than the "
                f"{self.limit} tokens that fit",
                hint="less, or null for what fits",
            )
        return params

    # ------------------------------------------------------------ files

    def _save(self, name: str, replaces: bool) -> Reply:
        last = self._last("save")
        if not name:
            raise ConfigError("/save needs the name of a file", hint="/save talk.jsonl")
        path = Path(name).expanduser()
        line = _batch_line(path.stem, self.messages[:-1], last.answer)
        if replaces:
            output = AtomicOutput(path)
            try:
                output.write([line])
            finally:
                output.discard()
        else:
            try:
                with path.open("x", encoding="utf-8") as file:
                    file.write(f"{line}\n")
            except FileExistsError:
                raise OutputError(
                    f"{str(path)!r} exists already", hint=f"/save! {name} replaces it"
                ) from None
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise OutputError(
                    f"cannot write {str(path)!r}: {reason}", hint="a folder you may write to"
                ) from None
        count = len(self.turns)
        return Reply(f"saved {count} turn{'' if count == 1 else 's'} to {path}")


def check_params(params: SamplingParams) -> None:
    """Raises ConfigError where ``params`` asks for something a chat has no place for."""
    for name, off in WITHOUT_USE.items():
        value = getattr(params, name)
        if value != off:
            raise ConfigError(
                f"{name} is {value}, which a chat has no use for",
                hint=f"leave it at {_shown(off)}; tprt generate has a use for it",
            )


def _user(question: str) -> Message:
    return {"role": "user", "content": question}


def _messages(turns: Sequence[Turn]) -> list[Message]:
    found = []
    for turn in turns:
        found += [_user(turn.question), {"role": "assistant", "content": turn.answer}]
    return found


def _batch_line(name: str, messages: list[Message], answer: str) -> str:
    """The conversation as an OpenAI batch line, which ``tprt generate`` answers.

    A prompt ends with a question, so the last answer stands in ``metadata``, which changes nothing.
    """
    line = {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, "metadata": {"answer": answer}},
    }
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, legal as a JSON escape but not as UTF-8
        return json.dumps(line)
    return text


def _shown(value: object) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        value = dict(value)  # logit_bias
    return json.dumps(value, ensure_ascii=False)
