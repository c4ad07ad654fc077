"""Batch lines: every kind of bad line is one error record, and the others are untouched."""

import errno
import hashlib
import io
import json
import os
import stat
from pathlib import Path

import pytest

from tprt.engine.outputs import CompletionOutput, RequestOutput
from tprt.errors import OutputError
from tprt.job.output_file import AtomicOutput, create_temporary
from tprt.job.records import parse_record, record_id, record_seed, result_line
from tprt.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=8)


def read(*lines: str | bytes | dict):
    raw = [
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    return [parse_record(r + b"\n", number, DEFAULTS, 1) for number, r in enumerate(raw, start=1)]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', "not UTF-8"),
        ("{", "not JSON"),
        ('{"prompt": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must hold a JSON object"),
        ({}, "exactly one of"),
        ({"prompt": "a", "messages": []}, "exactly one of"),
        ({"prompt": "a", "promt": "b"}, "unknown key 'promt'"),
        ({"id": 1.5, "prompt": "a"}, "id must be"),
        ({"id": True, "prompt": "a"}, "id must be"),
        ({"prompt": "a", "params": []}, "params must be an object"),
        ({"prompt": "a", "params": {"max_token": 4}}, "unknown sampling parameter"),
        ({"prompt": "a", "params": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"prompt": "a", "params": {"max_tokens": "5"}}, "max_tokens must be"),
        ({"prompt": "a", "params": {"temperature": -1}}, "temperature is -1"),
        ({"prompt": "a", "params": {"top_p": 0}}, "top_p is 0"),
        ({"prompt": "a", "params": {"temperature": 10**400}}, "temperature is 1000"),
        ({"prompt": "a", "params": {"seed": 2**70}}, "seed is"),
        ({"prompt": "a", "params": {"n": 10**9}}, "n is"),
        ({"prompt": "a", "params": {"stop": [""]}}, "stop must be"),
        ({"custom_id": "x", "url": "/v1/embeddings", "body": {}}, "url is"),
        ({"custom_id": "x", "method": "GET", "body": {}}, "method is"),
        ({"custom_id": "x", "body": 3}, "needs an object"),
        ({"custom_id": "x", "body": {"max_tokens": 3}}, "no 'prompt'"),
    ],
)
def test_bad_line_is_an_error_record(line, message):
    before, bad, after = read({"prompt": "one"}, line, {"prompt": "three"})
    assert message in bad.error and bad.line == 2 and bad.prompt is None
    assert before.error is None and after.error is None and after.id == "3"
    written = json.dumps(result_line(bad, None))
    assert message.split("'")[0] in written


def test_long_line_is_an_error_record(monkeypatch):
    monkeypatch.setattr("tprt.job.records.MAX_LINE_BYTES", 100)
    (record,) = read({"prompt": "a" * 200})
    assert "allowed are 100" in record.error


def test_params_override_defaults_and_seed_comes_from_the_id():
    plain, own = read(
        {"id": "p", "prompt": "a"}, {"id": "q", "prompt": "a", "params": {"seed": 5, "top_k": 2}}
    )
    assert plain.params.max_tokens == 8 and plain.params.seed == record_seed(1, "p")
    assert (own.params.seed, own.params.top_k, own.params.max_tokens) == (5, 2, 8)
    assert record_seed(1, "p") != record_seed(2, "p") != record_seed(2, "q")


def test_openai_lines_are_answered_in_their_own_form():
    chat = {
        "custom_id": "c1",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {
            "model": "m",
            "messages": [{"role": "user", "content": "hi"}],
            "max_completion_tokens": 3,
            "temperature": None,
            "frequency_penalty": 0,
            "logprobs": False,
        },
    }
    (record,) = read(chat)
    assert record.error is None and record.params.max_tokens == 3 and record.id == "c1"
    output = RequestOutput([1, 2], [CompletionOutput(0, " yes", [7, 8, 9], "stop")])
    line = result_line(record, output)
    assert line["custom_id"] == "c1" and line["response"]["status_code"] == 200
    body = line["response"]["body"]
    assert body["choices"][0]["message"] == {"role": "assistant", "content": " yes"}
    assert body["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}


def test_an_error_that_quotes_a_long_line_is_cut():
    (record,) = read({"prompt": "a", "x" * 10_000: 1})
    assert "unknown key" in record.error and len(record.error) < 2100


def test_the_id_alone_is_that_of_the_record():
    lines = [{"id": "a"}, {"custom_id": 5}, {"id": 1.5}, {"id": None}, {}, "[1]", "{", b"\xff"]
    for line in lines:
        (record,) = read(line)
        raw = (
            line if isinstance(line, bytes) else line if isinstance(line, str) else json.dumps(line)
        )
        found = record_id(raw if isinstance(raw, bytes) else raw.encode(), 1)
        assert found == record.id or (found is None and record.error)


def test_output_appears_whole_and_replaces_only_at_the_end(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")
    output = AtomicOutput(target)
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"], "written to only at the end"

    def lines():
        yield "a"
        assert target.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 2
        yield "é".encode()

    written = output.write(lines())
    output.discard()
    raw = target.read_bytes()
    assert raw == "a\né\n".encode()
    assert (written.size, written.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o444


def test_failing_lines_leave_the_old_output(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")

    def lines():
        yield "new"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        AtomicOutput(target).write(lines())
    assert target.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1


def test_unwritable_outputs(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    bad = ("missing/out", "", "pipe", "loop", "file/out", "a" * 300)
    for target in (*(tmp_path / name for name in bad), Path("/dev/null")):
        with pytest.raises(OutputError) as caught:
            AtomicOutput(target)
        assert caught.value.exit_code == 5
    full = tmp_path / "full"
    if os.path.exists("/dev/full"):
        monkeypatch.setattr(
            "tprt.job.output_file.create_temporary",
            lambda path: (os.open("/dev/full", os.O_WRONLY), full),
        )
        with pytest.raises(OutputError, match="No space left") as caught:
            AtomicOutput(tmp_path / "out").write(["x"])
        assert "make room" in caught.value.hint and str(tmp_path / "out") in caught.value.where
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop", "pipe"]


@pytest.mark.parametrize("call", ["fsync", "close"])
def test_an_output_that_fails_at_the_end_is_no_output(tmp_path, monkeypatch, call):
    """Network file systems speak of a full disk when a file is synced or closed."""
    target = tmp_path / "out"
    target.write_text("old\n")
    output = AtomicOutput(target)

    def fail(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:

        class FailsAtClose(io.FileIO):
            def close(self):
                if not self.closed:
                    super().close()
                    fail()

        monkeypatch.setattr(
            "tprt.job.output_file.open", lambda fd, mode, **_: FailsAtClose(fd, "wb"), raising=False
        )
    with pytest.raises(OutputError, match="quota"):
        output.write(["x"])
    assert target.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    left, others = (
        ".out.0a1b2c3d.tmp",
        [".out.x.0a1b2c3d.tmp", ".out.journal.0a1b2c3d.tmp", ".out.tmp"],
    )
    for name in (left, *others):
        (tmp_path / name).write_text("")
    handle, held = create_temporary(tmp_path / "out")
    AtomicOutput(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, held.name])
    os.close(handle)
    AtomicOutput(tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(others)


def test_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    AtomicOutput(link).write(["new"])
    assert link.is_symlink() and target.read_text() == "new\n"
