"""The journal: what is kept, torn and damaged files, two openers, records that crash."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journals import assert_whole, contents, finish, opened, result, run

from tprt.errors import ConfigError, OutputError
from tprt.job.fingerprint import difference, make_fingerprint
from tprt.job.input_file import InputFacts, Shard
from tprt.job.journal import Journal, journal_path
from tprt.job.journal_index import LineSet
from tprt.sampling_params import SamplingParams


@pytest.fixture
def path(tmp_path) -> Path:
    return journal_path(tmp_path / "out")


# ---------------------------------------------------------------- what is kept


def test_a_job_in_two_runs(path):
    journal = opened(path)
    assert (journal.attempt, journal.num_done, journal.suspects, journal.quarantined) == (
        1,
        0,
        [],
        [],
    )
    journal.begin([7, 3])
    finish(journal, 7, 3, 10)
    journal.end("interrupted", "SIGTERM")
    journal.close()
    journal = opened(path)
    assert (journal.attempt, journal.num_done, journal.num_failed, journal.tokens) == (2, 3, 1, 20)
    assert journal.is_done(7) and not journal.is_done(8) and journal.suspects == []
    finish(journal, 1, 2)
    assert contents(journal) == {line: result(line) for line in (1, 2, 3, 7, 10)}
    journal.close(remove=True)
    assert list(path.parent.iterdir()) == []


def test_the_first_result_of_a_record_counts(path):
    journal = opened(path)
    journal.finish(4, "first", 1, False)
    journal.finish(4, "second", 10, True)
    assert (journal.num_done, journal.tokens, journal.num_failed) == (1, 1, 0)
    journal.close()
    with path.open("ab") as file:  # as an interrupt between writing and counting can leave it
        file.write(next(line for line in path.read_bytes().splitlines(True) if b"first" in line))
    journal = opened(path)
    assert (journal.num_done, journal.tokens) == (1, 1) and contents(journal) == {4: "first"}
    journal.close()


def test_results_longer_than_what_recovery_holds(path):
    texts = {
        line: f"{line}" * n for line, n in ((1, 2**20 - 30), (2, 2**20), (3, 5 * 2**20), (4, 1))
    }
    journal = opened(path)
    for line, text in texts.items():
        journal.finish(line, text, 0, False)
    journal.close()
    journal = opened(path)
    assert contents(journal) == texts
    both = zip(journal.results(), journal.results(), strict=True)
    assert all(one == other for one, other in both), "two readers do not move each other"
    journal.close()


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 9)), max_size=60, unique_by=lambda p: p[0]
    ),
    st.data(),
)
def test_a_line_set_orders_what_was_found(pairs, data):
    lines = LineSet()
    assert all(lines.add(line) for line, _ in pairs) and not any(
        lines.add(line) for line, _ in pairs
    )
    assert len(lines) == len(pairs) and all(line in lines for line, _ in pairs)
    assert not any(line in lines for line in set(range(320)) - {line for line, _ in pairs})
    again = [(line, 1000) for line in range(400)]  # of lines outside too
    assert list(lines.order([*pairs, *again])) == [value for _, value in sorted(pairs)]
    with pytest.raises(ValueError, match="missing"):
        lines.add(500)
        lines.order(pairs)


# ---------------------------------------------------------------- torn and damaged


def a_journal(path: Path) -> tuple[bytes, list[tuple[int, int]]]:
    """A journal's bytes, and (byte after it, line) of each finished record."""
    journal = opened(path)
    ends = []
    for line in (3, 1, 2, 5):
        journal.begin([line], alone=line == 2)
        finish(journal, line)
        journal.sync()
        ends.append((path.stat().st_size, line))
    journal.end("interrupted", "test")
    journal.close()
    return path.read_bytes(), ends


def test_cut_at_any_byte_it_is_a_beginning_of_what_it_was(path, monkeypatch):
    """What was whole at the cut is there, nothing else is there in part, and nothing is there twice."""
    whole, ends = a_journal(path)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # durable or not is not the question here
    header = whole.index(b"\n") + 1
    for cut in range(header, len(whole) + 1):
        path.write_bytes(whole[:cut])
        journal = opened(path)
        there = [line for end, line in ends if end <= cut]
        assert sorted(contents(journal)) == sorted(there)
        finish(journal, 1, 2, 3, 5)
        assert contents(journal) == {line: result(line) for line in (1, 2, 3, 5)}
        journal.close()
        recovered = path.read_bytes()
        kept = recovered[: recovered.rindex(b"attempt ") - 9]
        assert whole.startswith(kept) and kept.endswith(b"\n")
        assert cut - len(kept) < len(whole[:cut].splitlines(True)[-1]) + 1, (
            "one line is lost at most"
        )


@given(tail=st.binary(min_size=1, max_size=60), cut=st.integers(0, 200), zeros=st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_tail_of_anything_is_dropped(tmp_path_factory, tail, cut, zeros):
    """Power failures leave pages of zeros or of other files behind the last durable byte."""
    path = tmp_path_factory.mktemp("journal") / "out.journal"
    whole, ends = a_journal(path)
    cut = len(whole) - min(cut, len(whole) - whole.index(b"\n") - 1)
    path.write_bytes(whole[:cut] + (bytes(5000) if zeros else tail))
    journal = opened(path)
    assert sorted(contents(journal)) == sorted(line for end, line in ends if end <= cut)
    journal.close()
    assert_whole(path)
    shutil.rmtree(path.parent)


def test_damage_in_the_middle_is_an_error_that_says_where(path):
    whole, ends = a_journal(path)
    place = ends[1][0] + 30  # in a line behind two finished records
    start = whole.rindex(b"\n", 0, place) + 1
    path.write_bytes(whole[:place] + b"\x00" + whole[place + 1 :])
    with pytest.raises(OutputError, match=f"damaged at byte {start}") as caught:
        opened(path)
    assert caught.value.exit_code == 5 and caught.value.where == str(path)
    assert "--restart" in caught.value.hint and path.stat().st_size == len(whole), "left as it is"
    command = re.search(r"truncate -s \d+ \S+", caught.value.hint)[0]
    assert "keeps the 2 finished records" in caught.value.hint
    subprocess.run(command.split(), check=True)
    journal = opened(path)
    assert sorted(contents(journal)) == [1, 3]
    journal.close()


@pytest.mark.parametrize(
    "raw", [b"my notes\n", b"\x00" * 100, b"0" * 30, b"deadbeef fingerprint {}\n"]
)
def test_what_is_no_journal_is_left_alone(path, raw):
    path.write_bytes(raw)
    with pytest.raises(OutputError, match="damaged at byte 0"):
        opened(path)
    assert path.read_bytes() == raw
    opened(path, restart=True).close()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_empty_file_is_where_a_run_was_killed_before_its_first_line(path):
    path.touch()
    leftover = path.with_name(f".{path.name}.0a1b2c3d.tmp")
    leftover.write_text("")
    journal = opened(path)
    assert journal.attempt == 1 and not leftover.exists()
    journal.close()


def test_damage_found_when_the_output_is_written_is_an_error(path):
    journal = opened(path)
    finish(journal, 1, 2, 3)
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(whole.rindex(b'"3"'))
        file.write(b"x")
    with pytest.raises(OutputError, match="cannot be read any more"):
        list(journal.results())
    journal.close()


# ---------------------------------------------------------------- whose it is


def test_another_fingerprint_is_refused_with_the_difference(path):
    journal = opened(path)
    finish(journal, 1, 2)
    journal.close()
    before = path.read_bytes()
    other = {"input": {"sha256": "cd"}, "sampling": {"temperature": 0.7}, "version": "1", "new": 3}
    with pytest.raises(ConfigError, match="job that differs") as caught:
        Journal.open(path, other)
    lines = caught.value.what.split("\n")[1:]
    assert [line.strip() for line in lines] == [
        'input.sha256: "ab" then, "cd" now',
        "sampling.temperature: 0.0 then, 0.7 now",
        "new: nothing then, 3 now",
    ]
    assert "--restart begins again and drops 2 finished records" in caught.value.hint
    assert path.read_bytes() == before
    journal = Journal.open(path, other, restart=True)
    assert (journal.attempt, journal.num_done) == (1, 0)
    journal.close()
    opened_again = Journal.open(path, other)
    assert opened_again.attempt == 2
    opened_again.close()


def test_a_journal_of_another_format_is_refused(path, monkeypatch):
    monkeypatch.setattr("tprt.job.journal_recovery.FORMAT", 2)
    opened(path).close()
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="format: 2 then, 1 now"):
        opened(path)


def facts(**changes) -> dict:
    values = {
        "input": InputFacts("ab", 100, 12, 10, identity=(1, 2, 3)),
        "model": "m1",
        "tokenizer": "t1",
        "sampling": SamplingParams(stop=["x"], logit_bias={3: 1.0}),
        "job_seed": 0,
        "version": "0.1.0",
        "settings": {"dtype": "float32", "trim_vocab": [[3, 70002]], "max_model_len": 512},
    }
    return make_fingerprint(**(values | changes))


def test_fingerprints_are_plain_and_name_what_differs():
    one = facts()
    assert json.loads(json.dumps(one)) == one and difference(one, facts()) == []
    assert difference(one, facts(input=InputFacts("ab", 100, 12, 10))) == [], (
        "identity is no content"
    )
    changes = [
        ({"model": "m2"}, 'model: "m1" then, "m2" now'),
        ({"tokenizer": "t2"}, 'tokenizer: "t1" then, "t2" now'),
        ({"job_seed": 1}, "job_seed: 0 then, 1 now"),
        ({"version": "0.2.0"}, 'version: "0.1.0" then, "0.2.0" now'),
        ({"shard": Shard(2, 8)}, 'shard: null then, "2/8" now'),
        ({"input": InputFacts("cd", 100, 12, 10)}, 'input.sha256: "ab" then, "cd" now'),
        ({"sampling": SamplingParams(logit_bias={3: 1.0})}, 'sampling.stop: ["x"] then, [] now'),
    ]
    for change, line in changes:
        assert difference(one, facts(**change)) == [line]
    long = facts(sampling=SamplingParams(allowed_token_ids=list(range(9000))))
    longer = facts(sampling=SamplingParams(allowed_token_ids=list(range(9001))))
    assert len(json.dumps(long)) < 2000
    (line,) = difference(long, longer)
    assert line.startswith('sampling.allowed_token_ids: "sha256 ') and len(line) < 250
    assert difference({"a": {"b": 1}}, {"a": 2}, "here", "there") == [
        "a.b: 1 here, nothing there",
        "a: nothing here, 2 there",
    ]


def test_two_runs_do_not_share_a_journal(path):
    journal = opened(path)
    with pytest.raises(ConfigError, match=f"process {os.getpid()} on host ") as caught:
        opened(path)
    assert caught.value.exit_code == 2 and caught.value.where == str(path)
    with pytest.raises(ConfigError):
        opened(path, restart=True)
    finish(journal, 1)
    journal.close()
    journal = opened(path)
    assert journal.is_done(1)
    journal.close()


@pytest.mark.parametrize("remove", [False, True])
def test_a_run_waits_for_the_one_before(path, remove, caplog):
    """Also where that removes or replaces the file that the other has opened already."""
    first = opened(path)
    finish(first, 1)

    def leave():
        time.sleep(0.5)
        first.close(remove=remove)

    thread = threading.Thread(target=leave)
    thread.start()
    with caplog.at_level("INFO"):
        second = opened(path, wait_s=60.0)
    thread.join()
    assert second.attempt == (1 if remove else 2) and second.is_done(1) is not remove
    assert caplog.text.count("waiting up to 60 s") == 1
    with pytest.raises(ConfigError):
        opened(path)
    second.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_name_that_moves_on_before_the_lock_is_taken(path, monkeypatch, replaced):
    """The run before ends between our opening of its file and our lock on it."""
    opened(path).close()
    real = fcntl.flock

    def late(fd, operation):
        monkeypatch.undo()
        path.unlink()
        if replaced:
            opened(path).close()
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    journal = opened(path, wait_s=30.0)
    assert journal.attempt == 1 + replaced
    finish(journal, 1)
    journal.close()
    journal = opened(path)
    assert journal.is_done(1), "it went to the file that has the name"
    journal.close()


def test_the_lock_of_a_killed_process_is_gone(path):
    code = """
        import os, signal, sys
        from pathlib import Path
        from tprt.job.journal import Journal
        journal = Journal.open(Path(sys.argv[1]), {})
        journal.finish(1, "x", 0, False)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run(code, path).returncode == -9
    journal = Journal.open(path, {}, wait_s=0.0)
    assert journal.num_done == 1, "what reached the kernel survives the process"
    journal.close()


def test_a_journal_removed_by_hand_is_not_mistaken_for_another(path):
    first = opened(path)
    path.unlink()
    second = opened(path)
    first.close(remove=True)
    assert path.exists(), "it is the other run's"
    second.close()


# ---------------------------------------------------------------- crash rules


def attempt(
    path: Path, *begun: list[int], end: str | None, done=(), alone: bool = False
) -> Journal:
    """One attempt that begins ``begun`` and ends so; None leaves no word. The journal after it."""
    journal = opened(path)
    for lines in begun:
        journal.begin(lines, alone=alone)
    finish(journal, *done)
    if end is not None:
        journal.end(end, f"{end} of attempt {journal.attempt}")
    journal.close()
    after = opened(path)
    after.end("interrupted", "a look")
    after.close()
    return after


def test_an_attempt_that_ended_well_makes_no_suspects(path):
    for end in ("interrupted", "finished"):
        assert attempt(path, [4, 2], [9], end=end, done=[2]).suspects == []


@pytest.mark.parametrize("end", ["crash", "killed", None])
def test_what_was_in_flight_at_a_crash_is_retried_alone(path, end):
    after = attempt(path, [9, 2], [4], end=end, done=[2])
    assert (after.suspects, after.quarantined) == ([4, 9], [])
    assert ("without a word" if end is None else f"{end} of attempt 1") in after.crash_cause(4)
    after = attempt(path, end="interrupted")
    assert after.suspects == [4, 9], "a stop that was asked for forgets nobody"
    after = attempt(path, [4], end="interrupted", done=[4])
    assert after.suspects == [9]
    after = attempt(path, [9], end="finished", done=[9])
    assert after.suspects == []


@pytest.mark.parametrize(("end", "needed"), [("crash", 2), ("killed", 4), (None, 4)])
def test_a_record_that_crashes_alone_is_quarantined(path, end, needed):
    """Two crashes suffice; kills come from outside more often, so it takes four."""
    assert attempt(path, [6, 7], end="crash").suspects == [6, 7]
    for count in range(1, needed + 1):
        after = attempt(path, [6], end=end, alone=True)
        gone = count == needed
        assert (after.suspects, after.quarantined) == (([7], [6]) if gone else ([6, 7], []))
    after = attempt(path, end="interrupted", done=[6])
    assert (after.suspects, after.quarantined) == ([7], []), "its error record is there"


def test_kills_and_crashes_add_up(path):
    for end, quarantined in (("killed", []), ("crash", []), (None, [6])):
        assert attempt(path, [6], end=end, alone=True).quarantined == quarantined


def test_a_crash_in_company_counts_nothing(path):
    for _ in range(5):
        assert attempt(path, [6], [7], end="crash").quarantined == []
    for _ in range(5):
        assert attempt(path, [6], [7], end="crash", alone=True).quarantined == []
    for _ in range(5):
        assert attempt(path, [6], end="interrupted", alone=True).quarantined == []
    for _ in range(5):
        assert attempt(path, end="crash").quarantined == [], "while nothing was in flight"


def test_only_the_first_end_counts(path):
    journal = opened(path)
    journal.begin([3])
    journal.end("crash", "rank 1 raised")
    journal.end("interrupted", "the main thread noticed later")
    journal.close()
    journal = opened(path)
    assert journal.suspects == [3] and journal.crash_cause(3) == "rank 1 raised"
    journal.end("interrupted", "SIGTERM")
    journal.begin([4])  # by a main thread that has not heard of it, and is killed then
    journal.close()
    journal = opened(path)
    assert journal.suspects == [3]
    journal.close()


def test_many_lines_begin_at_once(path):
    journal = opened(path)
    journal.begin(range(1, 250_001))
    journal.close()
    journal = opened(path)
    assert journal.suspects == list(range(1, 250_001))
    journal.close()
