"""``tprt chat``: the conversation without a terminal, the terminal without a model, then both."""

import contextlib
import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY
from rich.console import Console

from tprt.cli import build_parser, chat_terminal
from tprt.cli.chat import Chat, chat_params
from tprt.cli.chat_session import Session
from tprt.cli.chat_terminal import Figures, Interrupts, Reader, Screen, neutral
from tprt.cli.common import settings_from
from tprt.engine.outputs import StreamEvent
from tprt.errors import ConfigError, OutputError, PeerLost, TprtError
from tprt.job.records import parse_record
from tprt.sampling_params import MAX_SEED, SamplingParams

# ---------------------------------------------------------------- the conversation


def encode(messages: list[dict[str, str]]) -> list[int]:
    """One id per character and one per message, so that lengths are easy to say."""
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
    return [i for message in messages for i in [0, *map(ord, message["content"])]]


def session(limit: int = 1000, **params) -> Session:
    return Session(encode, limit, SamplingParams(**{"max_tokens": None} | params))


def ask(chat: Session, text: str, answer: str = "yes", stopped: bool = False):
    reply = chat.take(text)
    prepared = chat.prepare(reply.question, reply.again)
    chat.keep(prepared, answer, stopped)
    return prepared


def told(chat: Session, text: str) -> TprtError:
    with pytest.raises(TprtError) as caught:
        chat.take(text)
    return caught.value


def test_a_conversation_grows_and_shrinks():
    chat = session()
    assert ask(chat, "one", " first\n").token_ids == encode([{"role": "user", "content": "one"}])
    second = ask(chat, "two", "second")
    texts = [m["content"] for m in chat.messages]
    assert texts == ["one", "first", "two", "second"]
    assert second.token_ids == encode(chat.messages[:3])
    again = ask(chat, "/regen", "better")
    assert again.token_ids == second.token_ids, "the old answer must not be in the prompt"
    assert [m["content"] for m in chat.messages] == ["one", "first", "two", "better"]
    assert "two" in chat.take("/undo").say
    assert [m["content"] for m in chat.messages] == ["one", "first"]
    assert "1 turn" in chat.take("/clear").say and chat.messages == []
    for command in ("/regen", "/undo", "/save x"):
        assert "no question" in told(chat, command).what


def test_regen_draws_with_another_seed():
    drawn = session(seed=5)
    assert [ask(drawn, text).params.seed for text in ("a", "/regen", "/regen", "b", "/regen")] == [
        5, 6, 7, 5, 6,
    ]  # fmt: skip
    last = session(seed=MAX_SEED)
    assert [ask(last, text).params.seed for text in ("a", "/regen")] == [MAX_SEED, MAX_SEED - 1]
    unseeded = session()  # the engine seeds it from the arrival number
    assert [ask(unseeded, text).params.seed for text in ("a", "/regen")] == [None, None]


def test_regen_says_where_nothing_can_change():
    chat = session(temperature=0.0)
    ask(chat, "a")
    assert "the same" in chat.take("/regen").say
    chat.take("/set max_tokens 7")
    assert chat.take("/regen").say == "", "other parameters may give another answer"
    ask(chat, "b", stopped=True)
    assert chat.take("/regen").say == "", "a stopped answer goes on"


def test_the_oldest_turns_leave_the_prompt_not_the_conversation(tmp_path):
    chat = session(limit=96, max_tokens=20)
    for letter in "abcd":
        ask(chat, letter * 10, letter.upper() * 10)  # 22 ids a turn
    prepared = chat.prepare("e" * 10)
    assert prepared.left_out == 2, "2 turns, the question and the answer are 75 ids; 3 are 97"
    assert prepared.token_ids == encode([*chat.messages[4:], {"role": "user", "content": "e" * 10}])
    assert len(chat.messages) == 8
    chat.take(f"/save {tmp_path / 'all'}")
    assert "aaaaaaaaaa" in (tmp_path / "all").read_text()


@pytest.mark.parametrize(
    "limit, left_out", [(97, 0), (96, 1), (75, 1), (74, 2), (53, 2), (52, 3), (31, 3)]
)
def test_as_many_old_turns_as_fit_are_kept(limit, left_out):
    """Exactly: a token too few drops one turn more."""
    chat = session(max_tokens=20)
    for letter in "abc":
        ask(chat, letter * 10, letter * 10)
    chat.limit = limit
    assert chat.prepare("q" * 10).left_out == left_out


def test_a_question_that_never_fits_names_the_numbers():
    chat = session(limit=100, max_tokens=20)
    ask(chat, "a" * 10)
    with pytest.raises(ConfigError) as caught:
        chat.prepare("q" * 80)
    assert all(n in caught.value.what for n in ("81 tokens", "20 (max_tokens)", "100 fit"))
    assert "/set max_tokens" in caught.value.hint
    assert len(chat.turns) == 1
    with pytest.raises(ConfigError, match="100 tokens; 100 fit"):
        session(limit=100).prepare("q" * 99)


def test_max_tokens_left_open_takes_what_fits_up_to_512():
    assert session(limit=5000).prepare("q").params.max_tokens == 512
    assert session(limit=100).prepare("q" * 89).params.max_tokens == 10
    chat = session(limit=100)  # a quarter is kept free as long as old turns can go
    ask(chat, "a" * 30, "A" * 30)
    assert chat.prepare("q" * 12).left_out == 0 and chat.prepare("q" * 13).left_out == 1


def test_set():
    chat = session()
    assert chat.take("/set temperature 0.5").say == "temperature is 0.5"
    assert chat.take('/set stop ["\\n", "end"]').say == 'stop is ["\\n", "end"]'
    assert chat.take("/set ignore_eos true").say == "ignore_eos is true"
    assert chat.take("/set seed null").say == "seed is null"
    assert chat.take("/set logit_bias {5: 1.5}").say == 'logit_bias is {"5": 1.5}'
    assert chat.take("/set top_k").say == "top_k is 0"
    assert chat.params.stop == ("\n", "end") and chat.params.temperature == 0.5
    shown = dict(line.split(None, 1) for line in chat.take("/set").say.splitlines())
    assert shown["temperature"] == "0.5" and "at most 512" in shown["max_tokens"]
    assert "n" not in shown


@pytest.mark.parametrize(
    "command, parts",
    [
        ("/set temperature 400", ["temperature is 400", "0.0 to 100.0"]),
        ("/set temperature hot", ["temperature must be a number", "'hot'"]),
        ("/set temprature 1", ["'temprature'", "did you mean temperature?"]),
        ("/set n 3", ["n is 3", "no use"]),
        ("/set logprobs 2", ["logprobs is 2", "no use"]),
        ("/set max_tokens 1000", ["max_tokens is 1000", "1000 tokens that fit"]),
        ("/set logit_bias {a: b}", ["logit_bias"]),
        ("/set seed .inf", ["seed"]),
        ("/hlep", ["'/hlep'", "did you mean /help?", "//hlep"]),
        ("/", ["unknown command", "/help lists all"]),
        ("/undo 3", ["/undo takes nothing", "'3'"]),
        ("/save", ["name of a file"]),
    ],
)
def test_wrong_commands_say_what_is_wrong_and_change_nothing(command, parts):
    chat = session()
    ask(chat, "a")
    before = chat.params, list(chat.turns)
    error = str(told(chat, command))
    assert all(part in error for part in parts), error
    assert "try:" in error and (chat.params, chat.turns) == before


def test_texts_that_begin_with_a_slash():
    chat = session()
    assert chat.take("//help me").question == "/help me"
    assert chat.take("/help", is_text=True).question == "/help"
    assert chat.take("/usr/bin\nand more").question == "/usr/bin\nand more"
    assert chat.take("  \t") == chat.take("")
    assert chat.take("").question is None
    assert chat.take("/exit").leave and not chat.take("hello").leave
    assert "/regen" in chat.take("/help").say


def test_what_is_saved_is_complete_and_tprt_generate_takes_it(tmp_path):
    chat, path = session(), tmp_path / "my talk.jsonl"
    ask(chat, 'first "q"\n\x1b', "first é")
    ask(chat, "second", "the end")
    assert "2 turns" in chat.take(f"/save {path}").say
    record = parse_record(path.read_bytes(), 1, SamplingParams(), 0)
    assert record.error is None and record.id == "my talk"
    assert record.prompt == {"messages": chat.messages[:3]}
    assert json.loads(path.read_text())["body"]["metadata"] == {"answer": "the end"}


def test_save_never_replaces_a_file_unasked(tmp_path):
    chat, path = session(), tmp_path / "f"
    path.write_text("mine")
    ask(chat, "a")
    error = told(chat, f"/save {path}")
    assert isinstance(error, OutputError) and f"/save! {path}" in error.hint
    assert path.read_text() == "mine"
    chat.take(f"/save! {path}")
    assert "mine" not in path.read_text() and list(tmp_path.iterdir()) == [path]
    assert "No such file" in told(chat, f"/save {tmp_path}/no/f").what


def parameters(*argv: str) -> SamplingParams:
    args = build_parser().parse_args(["chat", *argv])
    return chat_params(settings_from(args).sampling_params(), args)


def test_a_chats_own_defaults_give_way_to_what_the_user_says(tmp_path, monkeypatch):
    """16 is also the default of a batch job: saying it must count, saying nothing must not."""
    assert parameters().max_tokens is None and parameters().stop == ()
    assert parameters("--max-tokens", "16").max_tokens == 16
    assert parameters("--set", "sampling.max_tokens=16").max_tokens == 16
    file = tmp_path / "c.yaml"
    file.write_text("sampling:\n  max_tokens: 16\n  stop: []\n")
    given = parameters("--config", str(file))
    assert given.max_tokens == 16 and given.stop == ()
    file.write_text("sampling:\n  temperature: 0.0\n")
    assert parameters("--config", str(file)).max_tokens is None
    monkeypatch.setenv("TPRT_SAMPLING__MAX_TOKENS", "16")
    assert parameters().max_tokens == 16


def test_help_imports_no_torch():
    code = (
        "import sys, contextlib, io\n"
        "from tprt.cli import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['chat', '--help'])\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# ---------------------------------------------------------------- lines in


def reader(monkeypatch, text: str) -> Reader:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    return Reader(Interrupts())


@pytest.mark.parametrize(
    "typed, messages",
    [
        ("a\r\nb\n", [("a", False), ("b", False)]),
        ("a\\\nb\\\nc\nd", [("a\nb\nc", False), ("d", False)]),
        ('"""a\n/b\n"""\nc\n', [("a\n/b", True), ("c", False)]),
        ('"""a b"""\n', [("a b", True)]),
        ('"""\n\na\n\n"""  \n', [("a", True)]),
        ('say """ now\n', [('say """ now', False)]),
        ("a\\\n", [("a\n", False)]),
        ('"""a\nb', [("a\nb", True)]),
        ("", []),
    ],
)
def test_lines_become_messages(monkeypatch, typed, messages):
    found, lines = [], reader(monkeypatch, typed)
    with contextlib.suppress(EOFError):
        while True:
            found.append(lines.message())
    assert found == messages


# ---------------------------------------------------------------- text out


def test_nothing_a_terminal_acts_on_gets_through():
    evil = "a\x1b[2J\x9b1mb\x07\x00\r\x7f\x85\u202ec\td\n\ud800é漢😀"
    shown = neutral(evil)
    assert shown == "a\\x1b[2J\\x9b1mb\\x07\\x00\\r\\x7f\\x85\\u202ec\td\n\\ud800é漢😀"
    everything = "".join(map(chr, range(256)))
    acting = {c for c in neutral(everything) if not c.isprintable() and c not in "\n\t\xa0\xad"}
    assert not acting


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def lines(self, width: int) -> list[str]:
        """What stands on an endless screen after everything written."""
        rows, y, x = [""], 0, 0
        for token in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.|\n", self.getvalue(), re.DOTALL):
            if token == "\n":
                y += 1
                rows += [""] * (y + 1 - len(rows))
                x = 0
            elif token == "\r":
                x = 0
            elif token.startswith("\x1b["):
                if token[-1] == "A":
                    y -= int(token[2:-1] or 1)
                elif token[-1] == "K":
                    rows[y] = ""
                else:
                    assert token[-1] in "mhl", token
            else:
                rows[y] = rows[y].ljust(x)[:x] + token + rows[y][x + 1 :]
                x += 1
                assert x <= width, f"a row is wider than the terminal: {rows[y]!r}"
        return [row.rstrip() for row in rows]


def show(pieces: list[str], width: int = 30, terminal: bool = True):
    file = FakeTerminal() if terminal else io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    with Screen(console).answer(Figures(7, 100)) as answer:
        for piece in pieces:
            answer.add(piece, 1)
    return file


@pytest.mark.parametrize("frame", [-1.0, 60.0], ids=["every", "no"])
def test_a_long_answer_ends_up_on_the_screen_once_and_whole(monkeypatch, frame):
    """Rows scroll away while others grow; a row drawn twice or cut would show here."""
    monkeypatch.setattr(chat_terminal, "FRAME_SECONDS", frame)
    words = [f"word{i}" for i in range(60)]
    text = " ".join(words) + "\n\n[bold]no markup[/bold] :smile:\n\tx = [1]\n" + "y" * 70
    pieces = re.findall(r"(?s).{1,3}", " \n" + text)
    for width in (30, 31):
        file = show(pieces, width)
        assert "\x1b[1A\x1b[2K" * 2 not in file.getvalue(), (
            "more than a row and figures drawn again"
        )
        rows = file.lines(width)
        joined = " ".join(rows).split()
        assert joined[:60] == words
        assert joined[60:-3] == "[bold]no markup[/bold] :smile: x = [1]".split()
        assert "".join(joined[-3:]) == "y" * 70
        assert rows[rows.index(next(r for r in rows if "[bold]" in r)) - 1] == ""
        assert rows[-1] == "" and rows.count("") == 2
        assert not any("tokens" in row for row in rows), "the figures vanish with the answer"


def test_figures_are_shown_while_an_answer_grows(monkeypatch):
    monkeypatch.setattr(chat_terminal, "FRAME_SECONDS", -1.0)
    raw = show(["one"] * 5, width=60).getvalue()
    assert "0 tokens, context 7/100" in raw
    assert re.search(r"\n3 tokens, [\d.]+ tokens/s, context 10/100", raw)


def test_escapes_of_the_model_do_not_reach_a_terminal_or_a_pipe(capsys):
    evil = ["\x1b]0;ti", "tle\x07 \x1b[31mred", "\x1b", "[2J"]
    raw = show(evil, width=200).getvalue()
    assert "\\x1b]0;title\\x07 \\x1b[31mred\\x1b[2J" in raw
    assert not re.search(r"\x1b(?!\[(\?25[lh]|\d*A|2K))|\x07", raw), "only what rich itself writes"
    show(evil, terminal=False)
    assert capsys.readouterr().out == "\\x1b]0;title\\x07 \\x1b[31mred\\x1b[2J\n"


def test_a_pipe_gets_text_only(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take a pipe for a terminal
    show([" a", " b\n", "c"], terminal=False)
    show([], terminal=False)
    assert capsys.readouterr().out == "a b\nc\n\n"


def test_the_rate_is_that_of_tokens_after_the_first(monkeypatch):
    figures, clock = Figures(10, 100), iter([5.0, 6.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert str(figures) == "0 tokens, context 10/100"
    figures.add(1)
    assert str(figures) == "1 token, context 11/100"
    figures.add(0)
    figures.add(4)
    figures.add(2)
    assert str(figures) == "7 tokens, 3.0 tokens/s, context 17/100"


# ---------------------------------------------------------------- Ctrl-C


def press() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def soon_forgotten(monkeypatch) -> float:
    """After this many seconds a Ctrl-C is no second one."""
    monkeypatch.setattr(chat_terminal, "TWICE_SECONDS", 0.25)
    return 0.3


def test_ctrl_c_raises_only_where_a_line_is_read(soon_forgotten):
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        press()
        assert interrupts.stop and not interrupts.leave
        time.sleep(soon_forgotten)
        with interrupts.raising():
            pass
        assert not interrupts.stop, "a new question starts afresh"
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            press()
        assert not interrupts.leave, "one at a prompt ends nothing"
        press()
        assert interrupts.leave, "a second one at once ends the chat, wherever it is"
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("line_between", [False, True])
def test_two_at_the_prompt_end_the_chat_unless_a_line_came_between(soon_forgotten, line_between):
    with Interrupts() as interrupts:
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            press()
        time.sleep(soon_forgotten)
        if line_between:
            with interrupts.raising():
                pass
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            press()
        assert interrupts.leave is not line_between


def test_ticks_run_while_a_line_is_read_and_are_not_torn():
    """What a tick does may not be left half done."""
    done = []

    def tick() -> None:
        press()
        done.append("whole")

    with Interrupts() as interrupts, interrupts.every(0.01, tick):
        time.sleep(0.05)
        assert done == []
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            time.sleep(5)
        quiet = Interrupts.every(interrupts, 0.01, lambda: done.append("quiet"))
        with quiet, interrupts.raising():
            time.sleep(0.05)  # the Ctrl-C has been told once
    assert done[:2] == ["whole", "quiet"]

    def fail() -> None:
        raise PeerLost("gone")

    with Interrupts() as interrupts, interrupts.every(0.01, fail):
        with pytest.raises(PeerLost), interrupts.raising():
            time.sleep(5)


STUCK = """
import hashlib, sys
from tprt.cli import chat_terminal
chat_terminal.END_SECONDS = 0.2
with chat_terminal.Interrupts():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # minutes in C, deaf to signals
"""


@pytest.mark.parametrize(
    "signals, code", [([signal.SIGINT] * 2, 130), ([signal.SIGTERM], 143)], ids=["INT", "TERM"]
)
def test_a_process_stuck_in_a_call_ends_all_the_same(signals, code):
    """As in a collective whose peer was stopped: Python's own handlers never get to run there."""
    source = STUCK
    if code == 143:
        source = STUCK.replace("with chat", "import signal\nsignal.signal(15, print)\nwith chat")
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, cwd=ROOT)
    try:
        assert process.stdout.readline() == b"ready\n"
        for number in signals:
            time.sleep(0.1)
            process.send_signal(number)
        assert process.wait(timeout=10) == code
    finally:
        process.kill()


# ---------------------------------------------------------------- the loop, without a model


class FakeLLM:
    """Answers with the given events, one list a step; ``heard`` are the prompts."""

    tp, engine_config = SimpleNamespace(size=1), SimpleNamespace(dtype="float16")

    def __init__(self, *steps) -> None:
        self.steps, self.heard, self.aborted = list(steps), [], []

    def add_request(self, prompt, params) -> int:
        self.heard.append("".join(map(chr, prompt["prompt_token_ids"])).split("\0")[1:])
        return len(self.heard)

    def step(self) -> list[StreamEvent]:
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        return [StreamEvent(len(self.heard), 0, *event) for event in step]

    def abort(self, request_id: int) -> list[StreamEvent]:
        self.aborted.append(request_id)
        return [StreamEvent(request_id, 0, "!", [], "abort")]


def talk(monkeypatch, capsys, typed: str, *steps):
    llm, chat = FakeLLM(*steps), session()
    with Interrupts() as interrupts:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        loop = Chat(llm, chat, Reader(interrupts), Screen(), interrupts)
        code = loop.run()
    return code, llm, chat, capsys.readouterr()


def test_an_answer_is_heard_in_the_next_question(monkeypatch, capsys):
    steps = [[(" he", [1])], [("llo", [2, 3])], [("", [4], "stop")], [("bye", [5], "length")]]
    code, llm, _, said = talk(monkeypatch, capsys, "a\nb\n", *steps)
    assert code == 0 and said.out == "hello\nbye\n"
    assert llm.heard == [["a"], ["a", "hello", "b"]]
    assert "4 tokens" in said.err and "context 6/1000" in said.err
    assert "cut off by max_tokens" in said.err


def test_errors_of_a_turn_end_the_turn_only(monkeypatch, capsys):
    steps = [ConfigError("no room", hint="less"), [("nan", [1], "error")], [("fine", [1], "stop")]]
    code, _, chat, said = talk(monkeypatch, capsys, "a\nb\n/what\nc\n", *steps)
    assert code == 0 and [t.question for t in chat.turns] == ["c"]
    assert "no room" in said.err and "try:   less" in said.err
    assert "NaN or infinite in float16" in said.err and "'/what'" in said.err


def test_a_lost_peer_ends_the_chat(monkeypatch, capsys):
    with pytest.raises(PeerLost):
        talk(monkeypatch, capsys, "a\nb\n", PeerLost("gone"))


def test_ctrl_c_stops_an_answer_and_keeps_what_there_is(monkeypatch, capsys):
    class Pressing(list):
        def __iter__(self):
            press()
            return super().__iter__()

    steps = [[("par", [1])], Pressing([("tial", [2])]), [("on", [3], "stop")]]
    code, llm, chat, said = talk(monkeypatch, capsys, "a\nb\n", *steps)
    assert code == 0 and llm.aborted == [1]
    assert said.out.splitlines()[0] == "partial!" and "stopped" in said.err
    assert [(t.answer, t.stopped) for t in chat.turns] == [("partial!", True), ("on", False)]


def test_ctrl_c_twice_in_an_answer_ends_the_chat(monkeypatch, capsys):
    class Pressing(list):
        def __iter__(self):
            press()
            press()
            return super().__iter__()

    code, llm, _, _ = talk(monkeypatch, capsys, "a\nb\n", Pressing([("x", [1])]))
    assert code == 130 and llm.aborted == [1] and len(llm.heard) == 1


def test_turns_left_out_are_told(monkeypatch, capsys):
    steps = [[("A" * 300, [1], "stop")], [("B" * 300, [1], "stop")], [("C", [1], "stop")]]
    *_, said = talk(monkeypatch, capsys, f"{'a' * 90}\n{'b' * 90}\n{'c' * 90}\n", *steps)
    assert said.err.count("left out of the prompt") == 1
    assert "1 of 2 earlier turns" in said.err


# ---------------------------------------------------------------- the program

ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "TERM": "xterm"}
COMMAND = [
    sys.executable, "-m", "tprt", "chat", "--model", str(TINY), "--dtype", "float32",
    "--temperature", "0",
]  # fmt: skip


# Makes its stdin the terminal of its session, then becomes the program.
OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_a_pipe_in_and_out():
    typed = f"{'lamp ' * 3000}\nReverse: lamp canoe frog\n/exit\nnot read\n"
    done = subprocess.run(
        COMMAND,
        check=False,
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=ENV,
    )
    assert (done.returncode, done.stdout) == (0, "frog canoe lamp\n"), done.stderr
    assert "error: the question alone has" in done.stderr and "2048 fit together" in done.stderr
    assert re.search(r"4 tokens, [\d.]+ tokens/s, context 19/2048", done.stderr)


class Terminal:
    """The program in a terminal of its own. ``marked`` are the processes it has started."""

    def __init__(self, *argv: str, **env: str) -> None:
        self.mark, self.seen = uuid.uuid4().hex, ""
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN_TERMINAL, *COMMAND, *argv],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            cwd=ROOT,
            env=ENV | env | {"CHAT_TEST_MARK": self.mark},
        )
        os.close(slave)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.marked():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.master)

    def marked(self) -> list[int]:
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if (
                    folder.name.isdecimal()
                    and self.mark.encode() in (folder / "environ").read_bytes()
                ):
                    found.append(int(folder.name))
        return found

    def no_process_left(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while self.marked() and time.monotonic() < end:
            time.sleep(0.05)
        return not self.marked()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def until(self, text: str, seconds: float = 60.0) -> str:
        """Everything shown up to ``text``."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            left = max(0.0, end - time.monotonic())
            data = b""
            if select.select([self.master], [], [], left)[0]:
                with contextlib.suppress(OSError):  # closed by all processes
                    data = os.read(self.master, 65536)
            assert data, f"no {text!r} in {self.seen[-1000:]!r}"
            self.seen += data.decode("utf-8", "replace")
        head, _, self.seen = self.seen.partition(text)
        return head + text

    def tell(self, line: str, answer: str) -> str:
        self.type(line + "\n")
        shown = self.until(answer)
        self.until("> ")
        return shown


def test_ctrl_c_in_a_terminal_with_two_ranks():
    """The ranks have sessions of their own: what the terminal sends must be handed on to them."""
    with Terminal("--nproc", "2") as terminal:
        terminal.until("> ")
        assert len(terminal.marked()) == 3
        terminal.tell("Reverse: lamp canoe frog", "frog canoe lamp")
        terminal.tell("/set ignore_eos true", "is true")
        terminal.tell("/set max_tokens 1900", "is 1900")
        terminal.type("Repeat 3 times: donkey\n")
        # Text and figures come while the answer grows.
        terminal.until("donkey donkey donkey donkey")
        terminal.until("tokens/s, context")
        terminal.type("\x03")
        rest = terminal.until(", stopped")
        assert int(re.findall(r"(\d+) tokens", rest)[-1]) < 1900
        terminal.until("> ")
        terminal.tell("/set ignore_eos false", "is false")
        terminal.tell("Reverse: kite horn lily", "lily horn kite")
        time.sleep(2.1)  # since the first Ctrl-C
        terminal.type("\x03")
        terminal.until("Ctrl-C again ends")
        terminal.until("> ")
        assert terminal.process.poll() is None
        terminal.type("\x03")
        assert terminal.process.wait(timeout=20) == 130
        assert terminal.no_process_left(5)
        settings = termios.tcgetattr(terminal.master)
        assert settings[3] & termios.ECHO and settings[3] & termios.ICANON


def test_ranks_end_when_their_launcher_is_killed():
    """They would go on reading the terminal that the shell has taken back."""
    with Terminal("--nproc", "2") as terminal:
        terminal.until("> ")
        assert len(terminal.marked()) == 3
        terminal.process.kill()
        terminal.process.wait()
        assert terminal.no_process_left(15)


def test_a_pasted_text_is_one_question(tmp_path):
    """Some Python and readline versions switch it off."""
    (tmp_path / "inputrc").write_text("set enable-bracketed-paste off\n")
    with Terminal(INPUTRC=str(tmp_path / "inputrc")) as terminal:
        assert "\x1b[?2004h" in terminal.until("> "), "the terminal is asked to mark pastes"
        terminal.type("\x1b[200~- blue lake\n- yellow lamp\nWhat is lamp?\x1b[201~")
        terminal.until("What is lamp?")
        terminal.tell("", "lamp yellow")
        terminal.tell("/und\t", "dropped: - blue lake - yellow lamp What is lamp?")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=20) == 0
