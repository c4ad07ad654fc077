"""``tprt chat``: a conversation in the terminal, alone, with ``--nproc N`` or under torchrun.

Rank 0 owns the terminal; the others follow its calls. Under ``--nproc`` Ctrl-C stops an answer,
under torchrun it ends all ranks, as torchrun does.
"""

import argparse
import os
import signal
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tprt.cli.chat_session import COMMANDS, Message, Prepared, Session, check_params
from tprt.cli.common import (
    LAUNCHER,
    add_model_flags,
    add_sampling_flags,
    add_settings_flags,
    is_given,
    make_llm,
    ranks_to_start,
    settings_from,
)
from tprt.cli.settings import Settings
from tprt.errors import EXIT_OK, EXIT_SIGINT, ConfigError, PeerLost, RankMismatch, TprtError
from tprt.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tprt.cli.chat_terminal import Interrupts, Reader, Screen
    from tprt.llm import LLM

CHECK_SECONDS = 1.0
NOTES = {"abort": ", stopped", "length": ", cut off by max_tokens"}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="A conversation in the terminal. /help there lists its commands. Questions may "
        "also come from a pipe, one per line; then stdout has the answers and nothing else.",
    )
    add_model_flags(parser)
    parser.add_argument("--nproc", type=int, metavar="N", help="start N ranks on this host")
    add_sampling_flags(parser, "most tokens per answer (what fits, at most 512)")
    add_settings_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    settings = settings_from(args)
    if not settings.model.path:
        raise ConfigError("--model missing", hint="give the flag, or model.path in --config")
    if settings.parallel.data > 1:
        raise ConfigError(
            f"parallel.data is {settings.parallel.data}, but a chat has one replica",
            hint="--set parallel.data=1",
        )
    params = chat_params(settings.sampling_params(), args)
    check_params(params)
    ranks = ranks_to_start(settings)
    if ranks > 1:
        from tprt.cli.chat_terminal import terminal_keeper
        from tprt.cli.launch import check_start, launch_local

        check_start(settings, ranks)
        restore = terminal_keeper()
        try:
            return launch_local(ranks, args.arguments, interactive=True)
        finally:
            restore()
    if int(os.environ.get("RANK", "0")) > 0:
        return _follow(settings)
    return _lead(settings, params, stop_given=is_given(args, "sampling.stop"))


def chat_params(params: SamplingParams, args: argparse.Namespace) -> SamplingParams:
    """The settings' parameters, with a chat's own defaults where the user said nothing."""
    if not is_given(args, "sampling.max_tokens"):
        params = replace(params, max_tokens=None)
    return params


def _has_launcher() -> bool:
    """Whether ``launch_local`` started this rank, which hands on Ctrl-C instead of ending."""
    return os.environ.get(LAUNCHER) == str(os.getppid())


def _follow(settings: Settings) -> int:
    if _has_launcher():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is rank 0's
    # Nothing here needs an orderly end, and Python's handlers wait for collectives to return.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with make_llm(settings) as llm:
        llm.follow()
    return EXIT_OK


def _lead(settings: Settings, params: SamplingParams, stop_given: bool) -> int:
    """Args: stop_given: else an answer ends where the model writes the user's next turn."""
    from tprt.cli.chat_terminal import Interrupts, Reader, Screen, forgive_encoding, terminal_keeper

    forgive_encoding()
    alone = "RANK" not in os.environ
    with Interrupts(alone or _has_launcher(), terminal_keeper()) as interrupts:
        with interrupts.raising():
            llm = make_llm(settings)
        if not stop_given:
            params = replace(params, stop=llm.tokenizer.chat_stop)
        with llm:
            if llm.tp.size > 1:
                llm.generate([])  # from here on all others follow, and will hear of an end

            def encode(messages: list[Message]) -> list[int]:
                return llm.tokenizer.encode_chat(messages)

            screen, session = Screen(), Session(encode, _limit(llm), params)
            reader = Reader(interrupts, [f"/{name}" for name in COMMANDS])
            return Chat(llm, session, reader, screen, interrupts).run()


def _limit(llm: "LLM") -> int:
    """Most tokens of prompt and answer that model and cache can hold."""
    request = llm.make_request({"prompt_token_ids": [0]}, SamplingParams(max_tokens=None))
    return 1 + request.max_tokens


class Chat:
    """The loop of rank 0: reads, answers, shows."""

    def __init__(
        self,
        llm: "LLM",
        session: Session,
        reader: "Reader",
        screen: "Screen",
        interrupts: "Interrupts",
    ) -> None:
        self._llm, self._session = llm, session
        self._reader, self._screen, self._interrupts = reader, screen, interrupts
        # Alone, a process may lose its parent without harm.
        self._parent = os.getppid() if llm.tp.size > 1 else None

    def run(self) -> int:
        """Until the user ends it; the exit code.

        Raises:
            PeerLost, RankMismatch: nothing more can be answered.
        """
        if self._reader.is_terminal:
            stops = "stops an answer" if self._interrupts.enabled else "ends the chat at once"
            self._screen.say(f"/help lists commands, Ctrl-C {stops}, Ctrl-D ends the chat")
        with self._interrupts.every(CHECK_SECONDS, self._check):
            while not self._interrupts.leave:
                try:
                    text, is_text = self._reader.message()
                except EOFError:
                    return EXIT_OK
                except KeyboardInterrupt:
                    if not self._interrupts.enabled:
                        break
                    if not self._interrupts.leave:
                        self._screen.say("Ctrl-C again ends the chat, as do /exit and Ctrl-D")
                    continue
                try:
                    if not self._take(text, is_text):
                        return EXIT_OK
                except (PeerLost, RankMismatch):
                    raise
                except TprtError as error:
                    self._screen.say(f"error: {error}", style="red")
        return EXIT_SIGINT

    def _take(self, text: str, is_text: bool) -> bool:
        """Carry out one input; False when it ends the chat."""
        reply = self._session.take(text, is_text)
        if reply.say:
            self._screen.say(reply.say)
        if reply.question is not None:
            self._answer(self._session.prepare(reply.question, reply.again))
        return not reply.leave

    def _answer(self, prepared: Prepared) -> None:
        from tprt.cli.chat_terminal import Figures

        if prepared.left_out:
            self._screen.say(
                f"left out of the prompt, which would not fit: {prepared.left_out} of "
                f"{len(self._session.turns)} earlier turns, the oldest"
            )
        request_id = self._llm.add_request(
            {"prompt_token_ids": prepared.token_ids}, prepared.params
        )
        figures = Figures(len(prepared.token_ids), self._session.limit)
        text, reason = "", None
        with self._screen.answer(figures) as shown:
            while reason is None:
                stop = self._interrupts.stop
                for event in self._llm.abort(request_id) if stop else self._llm.step():
                    text, reason = text + event.text, event.finish_reason
                    shown.add(event.text, len(event.token_ids))
        if reason == "error":
            raise ConfigError(
                f"the logits became NaN or infinite in {self._llm.engine_config.dtype}",
                hint="bfloat16 and float32 have more range than float16",
            )
        self._session.keep(prepared, text, stopped=reason == "abort")
        self._screen.say(f"{figures}{NOTES.get(reason, '')}")

    def _check(self) -> None:
        """While the user thinks: end when the launcher is gone."""
        if self._parent is not None and os.getppid() != self._parent:
            raise PeerLost("the launcher of this rank is gone", hint="start the chat again")
