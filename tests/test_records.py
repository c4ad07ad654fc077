"""Batch lines: every kind of bad line is one error record, and the others are untouched."""

import io
import json
import os
import stat
from pathlib import Path

import pytest

from tprt.engine.outputs import CompletionOutput, RequestOutput
from tprt.errors import ConfigError, OutputError
from tprt.job.output_file import AtomicOutput
from tprt.job.progress import ProgressLine
from tprt.job.records import read_records, record_seed, result_line
from tprt.sampling_params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=8)


def read(*lines: str | bytes | dict):
    raw = [
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    return list(read_records((r + b"\n" for r in raw), DEFAULTS, job_seed=1))


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


def test_blank_lines_bom_and_crlf():
    records = read(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r', "", "   ", {"prompt": "b"})
    assert [(r.id, r.line) for r in records] == [("1", 1), ("4", 4)]
    assert all(r.error is None for r in records)


def test_duplicate_ids_are_refused_with_both_lines():
    """Also an explicit id that collides with another record's line number."""
    with pytest.raises(ConfigError) as caught:
        read({"prompt": "a"}, {"id": "1", "prompt": "b"})
    assert "'1'" in caught.value.what and caught.value.where == "lines 1 and 2"


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


def test_output_appears_whole_and_replaces_only_at_the_end(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")
    output = AtomicOutput(target)
    assert target.read_text() == "old\n"
    output.write(["a", "b"])
    output.discard()
    assert target.read_text() == "a\nb\n"
    assert [p.name for p in tmp_path.iterdir()] == ["out.jsonl"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o444


def test_failing_lines_leave_the_old_output(tmp_path):
    target = tmp_path / "out.jsonl"
    target.write_text("old\n")
    output = AtomicOutput(target)

    def lines():
        yield "new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        output.write(lines())
    output.discard()
    assert target.read_text() == "old\n" and len(list(tmp_path.iterdir())) == 1


def test_unwritable_outputs(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for target in (tmp_path / "missing" / "out", tmp_path, tmp_path / "pipe", Path("/dev/null")):
        with pytest.raises(OutputError) as caught:
            AtomicOutput(target)
        assert caught.value.exit_code == 5
    if os.path.exists("/dev/full"):
        output = AtomicOutput(tmp_path / "out")
        os.dup2(os.open("/dev/full", os.O_WRONLY), output._file.fileno())
        with pytest.raises(OutputError, match="No space left"):
            output.write(["x"])
        output.discard()
        assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_link_stays_a_link(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    AtomicOutput(link).write(["new"])
    assert link.is_symlink() and target.read_text() == "new\n"


def test_progress_is_a_line_now_and_then_and_never_stops_a_job(capsys, monkeypatch):
    monkeypatch.setattr("tprt.job.progress.SECONDS_BETWEEN_LINES", 0.0)
    with ProgressLine(4) as progress:
        progress.update(1, 30)
    assert "1/4 done, 30 tokens" in capsys.readouterr().err
    monkeypatch.setattr("tprt.job.progress.SECONDS_BETWEEN_LINES", 60.0)
    with ProgressLine(4) as progress:
        progress.update(2, 60)
    assert capsys.readouterr().err == ""


def test_progress_survives_a_closed_stderr(monkeypatch):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr("tprt.job.progress.SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr("sys.stderr", Closed())
    with ProgressLine(4) as progress:
        progress.update(1, 30)
