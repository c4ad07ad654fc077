"""Reading inputs: bounded memory, bad lines, duplicate ids, shards, and files that change."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.errors import ConfigError
from tprt.job import input_file
from tprt.job.input_file import InputFile, Shard, scan_input
from tprt.sampling_params import SamplingParams
from tprt.tokenizer import Tokenizer

DEFAULTS = SamplingParams(temperature=0.0, max_tokens=8)


def write(path: Path, *lines: bytes | str | dict, end: bytes = b"\n") -> Path:
    raw = [
        line
        if isinstance(line, bytes)
        else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    path.write_bytes(b"".join(r + end for r in raw))
    return path


def records(path: Path, shard: Shard | None = None, job_seed: int = 1):
    return list(InputFile(path, scan_input(path)).records(DEFAULTS, job_seed, shard))


def test_facts_of_a_file_and_of_an_empty_one(tmp_path):
    path = write(tmp_path / "in", {"prompt": "a"}, "", {"prompt": "b"}, "  ", "{")
    facts, raw = scan_input(path), path.read_bytes()
    assert facts.sha256 == hashlib.sha256(raw).hexdigest() and facts.size == len(raw)
    assert (facts.lines, facts.records) == (5, 3)
    empty = scan_input(write(tmp_path / "empty"))
    assert (empty.size, empty.lines, empty.records) == (0, 0, 0)
    assert records(tmp_path / "empty") == []


def test_lines_of_every_kind(tmp_path):
    """BOM, CRLF, blank lines, a last line without an end, all kinds of bad lines."""
    lines = [
        b'\xef\xbb\xbf{"prompt": "a"}\r', b"", b"\r", b'{"id": "x", "prompt": "b"}', b"{", b"[1]",
        b'{"prompt": "\xff"}', b'{"prompt": "\x00"}', b'{"prompt": "\\u0000"}', b'{"id": 1.5}',
        b'{"custom_id": "c", "url": [], "body": {}}', b"\x00", b"[" * 5000, b'{"id": "\\ud800"}',
        b'{"prompt": "last"}',
    ]  # fmt: skip
    path = tmp_path / "in"
    path.write_bytes(b"\n".join(lines))
    found = records(path)
    assert [r.line for r in found] == [1, *range(4, 16)]
    assert [r.line for r in found if r.error is None] == [1, 4, 9, 15]


def test_nul_in_a_line_is_an_error_and_nul_in_a_prompt_is_text(tmp_path):
    raw, escaped = records(
        write(tmp_path / "in", b'{"prompt": "a\x00b"}', b'{"prompt": "a\\u0000b"}')
    )
    assert "not JSON" in raw.error and escaped.error is None
    assert escaped.prompt == {"prompt": "a\0b"}
    tokenizer = Tokenizer(next(TINY.rglob("*.model")))
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"


def test_values_too_deep_to_be_quoted_stop_nothing(tmp_path):
    """A nesting that the parser just takes and that ``repr`` may not."""
    lines = []
    for depth in (50, 400, 900, 980, 990, 2000):
        nest = "[" * depth + "]" * depth
        lines += [
            f'{{"id": {nest}}}',
            f'{{"prompt": {nest}}}',
            f'{{"prompt": "a", "params": {nest}}}',
        ]
        lines += [f'{{"prompt": "a", "params": {{"stop": {nest}}}}}', f'{{"messages": {nest}}}']
        lines += [f'{{"custom_id": "{depth}", "body": {{"prompt": "a", "logit_bias": {nest}}}}}']
    found = records(write(tmp_path / "in", *lines))
    assert len(found) == len(lines)
    assert all(len(r.error or "") < 3000 for r in found)


def test_a_long_line_is_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(input_file, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr("tprt.job.records.MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(input_file, "PIECE_BYTES", 64)
    longest = []
    real = input_file._lines

    def measured(file, digest):
        class Watched:
            def readline(self, size=-1):
                piece = file.readline(size)
                longest.append(len(piece))
                return piece

        return real(Watched(), digest)

    monkeypatch.setattr(input_file, "_lines", measured)
    fits = {"prompt": "x" * (999 - len('{"prompt": ""}'))}
    path = write(
        tmp_path / "in", fits, {"prompt": "y" * 986}, b"z" * 50_000, {"prompt": "b"}, b" " * 2000
    )
    good, over, long, after, blank = records(path)
    assert good.error is None and after.error is None and after.id == "4"
    assert over.error == "the line has 1001 bytes, allowed are 1000"
    assert (long.line, long.id) == (3, "3") and "has 50001 bytes, allowed are 1000" in long.error
    assert blank.error and max(longest) <= 1001
    assert scan_input(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_line_that_cannot_be_read_has_no_id_to_be_taken(tmp_path):
    """Records numbered from 0, one of them damaged: it gets its error and stops nothing."""
    path = write(tmp_path / "in", {"id": 0, "prompt": "a"}, "{", {"id": 2, "prompt": "b"}, "[")
    assert scan_input(path).records == 4
    assert [(r.line, r.id, r.error is None) for r in records(path)] == [
        (1, "0", True), (2, "2", False), (3, "2", True), (4, "4", False),
    ]  # fmt: skip


def test_duplicate_ids_are_refused_with_both_lines(tmp_path):
    for lines, where in (
        (({"id": "a"}, {"id": "b"}, "", {"id": "a"}), "lines 1 and 4"),
        (({"id": "2"}, {"prompt": "x"}), "lines 1 and 2"),  # an id that a line number gives
        (({"id": "\ud800"}, {"custom_id": "\ud800"}), "lines 1 and 2"),
    ):
        path = write(tmp_path / "in", *lines)
        with pytest.raises(ConfigError, match="stands twice") as caught:
            scan_input(path)
        assert caught.value.where == f"{path}, {where}"


@given(st.lists(st.sampled_from(["a", "b", "3", "4", None]), max_size=6))
@settings(deadline=None, max_examples=60)
def test_duplicates_are_found_exactly(ids):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"tprt-test-ids-{os.getpid()}"
    try:
        write(path, *({} if i is None else {"id": i} for i in ids))
        whole = [str(n) if i is None else i for n, i in enumerate(ids, 1)]
        if len(set(whole)) == len(whole):
            assert scan_input(path).records == len(ids)
        else:
            with pytest.raises(ConfigError, match="stands twice"):
                scan_input(path)
    finally:
        path.unlink(missing_ok=True)


def test_equal_hashes_of_different_ids_are_no_duplicates(tmp_path, monkeypatch):
    monkeypatch.setattr(input_file, "_id_hash", len)
    monkeypatch.setattr(input_file, "COMPARED_IDS", 1)
    path = write(tmp_path / "in", *({"id": i} for i in ("a", "b", "cc", "dd", "e")))
    assert scan_input(path).records == 5
    write(path, *({"id": i} for i in ("a", "b", "cc", "dd", "cc")))
    with pytest.raises(ConfigError, match="'cc' stands twice") as caught:
        scan_input(path)
    assert "lines 3 and 5" in caught.value.where


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shards_share_the_records_in_turn(tmp_path, count):
    rng = random.Random(count)
    lines = [rng.choice(["", {"prompt": str(i)}, "{", b"  "]) for i in range(40)]
    path = write(tmp_path / "in", *lines)
    whole = records(path)
    parts = [records(path, Shard(i, count)) for i in range(count)]
    assert [parts[n % count][n // count] for n in range(len(whole))] == whole
    assert [len(p) for p in parts] == [
        Shard(i, count).num_records(len(whole)) for i in range(count)
    ]


def test_shards_count_from_0():
    assert Shard.parse(" 2/8") == Shard(2, 8) and str(Shard(2, 8)) == "2/8"
    assert Shard(2, 8).path(Path("a/out.jsonl")) == Path("a/out.jsonl.2-of-8")
    for text in ("8/8", "9/8", "0/0", "1", "1/2/3", "-1/2", "a/b", "", "1/x", "0x1/2", "٣/٤"):
        with pytest.raises(ConfigError, match="shards count from 0"):
            Shard.parse(text)


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(ConfigError, match="folder, device or pipe") as caught:
            scan_input(path)
        assert "a job reads its input more than once" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        scan_input(tmp_path / "missing")


@pytest.mark.parametrize(
    ("pack", "name"),
    [(gzip.compress, "gzip"), (bz2.compress, "bzip2"), (lzma.compress, "xz")],
)
def test_a_compressed_input_is_refused_whole(tmp_path, pack, name):
    """Not as one bad record per line that its bytes happen to make."""
    (tmp_path / "in.jsonl").write_bytes(pack(b'{"prompt": "x"}\n' * 50))
    with pytest.raises(ConfigError, match=f"compressed \\({name}\\)"):
        scan_input(tmp_path / "in.jsonl")


@pytest.mark.parametrize("change", ["append", "in_place", "replace", "same_time", "gone"])
def test_an_input_that_changes_is_refused(tmp_path, change):
    path = write(tmp_path / "in", *({"prompt": f"{i:04d}"} for i in range(2000)))
    source = InputFile(path, scan_input(path))
    found = source.records(DEFAULTS, 1)
    next(found)
    before = path.stat()
    if change == "append":
        with path.open("a") as file:
            file.write("{}\n")
    elif change in ("in_place", "same_time"):
        with path.open("r+b") as file:
            file.seek(before.st_size - 9)
            file.write(b"x")
        if change == "same_time":  # what size, inode and time do not show, the digest does
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
            found = source.records(DEFAULTS, 1)
    elif change == "replace":
        path.rename(tmp_path / "old")
        path.write_bytes((tmp_path / "old").read_bytes())
        assert len(list(found)) == 1999, "what is open is still what was scanned"
        with pytest.raises(ConfigError, match="changed"):
            next(source.records(DEFAULTS, 1))  # at once, not when all is read
        found = source.records(DEFAULTS, 1)
    else:
        path.unlink()
        assert len(list(found)) == 1999
        found = source.records(DEFAULTS, 1)
    with pytest.raises(
        ConfigError, match="cannot be read" if change == "gone" else "changed"
    ) as caught:
        list(found)
    assert str(path) in caught.value.where


def test_an_input_that_grows_while_it_is_scanned_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "in", {"prompt": "a"})
    real = input_file._id_hash

    def grow(record_id):
        with path.open("a") as file:
            file.write("\n")
        return real(record_id)

    monkeypatch.setattr(input_file, "_id_hash", grow)
    with pytest.raises(ConfigError, match="changed"):
        scan_input(path)


def test_the_reading_of_inputs_needs_no_torch():
    code = (
        "import sys, tprt.job.input_file, tprt.job.journal, tprt.job.merge; "
        "assert 'torch' not in sys.modules"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
