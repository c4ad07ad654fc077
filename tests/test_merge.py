"""Joining shards: in input order, byte for byte, and never from shards that do not belong together."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from tprt.errors import ConfigError, OutputError
from tprt.job.fingerprint import make_fingerprint
from tprt.job.input_file import InputFacts, Shard
from tprt.job.journal import journal_path
from tprt.job.merge import merge_shards
from tprt.job.output_file import AtomicOutput
from tprt.job.status_file import JobStatus, StatusFile, status_path
from tprt.sampling_params import SamplingParams


def line(number: int) -> bytes:
    return json.dumps({"id": str(number), "text": "é\u2028"}, ensure_ascii=False).encode() + b"\r"


def fingerprint(shard: Shard, records: int, **changes) -> dict:
    values = {
        "input": InputFacts("ab", 100, records, records),
        "model": "m",
        "tokenizer": "t",
        "sampling": SamplingParams(),
        "job_seed": 0,
        "version": "1",
        "settings": {"dtype": "float32"},
        "shard": shard,
    }
    return make_fingerprint(**(values | changes))


def make_shard(output: Path, shard: Shard, records: int, **changes) -> Path:
    """The files of a shard that is finished."""
    path = shard.path(output)
    written = AtomicOutput(path).write(line(n) for n in range(shard.index, records, shard.count))
    status = JobStatus.begin(
        state="finished",
        exit_code=4,
        total=shard.num_records(records),
        finished=shard.num_records(records),
        failed=shard.index,
        tokens=10,
        fingerprint=fingerprint(shard, records, **changes),
        output_sha256=written.sha256,
        output_size=written.size,
    )
    StatusFile(status_path(path)).write(status)
    return path


def make_shards(output: Path, count: int, records: int) -> list[Path]:
    return [make_shard(output, Shard(i, count), records) for i in range(count)]


def change_status(path: Path, **changes) -> None:
    status = JobStatus.from_json(json.loads(status_path(path).read_text()))
    StatusFile(status_path(path)).write(replace(status, **changes))


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("records", [0, 1, 7, 24])
def test_shards_become_the_output_in_input_order(tmp_path, count, records):
    output = tmp_path / "out.jsonl"
    output.write_text("old\n")
    make_shards(output, count, records)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()} | {"out.jsonl": b""}
    report = merge_shards(output)
    raw = output.read_bytes()
    assert raw == b"".join(line(n) + b"\n" for n in range(records))
    assert (report.shards, report.records, report.failed) == (count, records, sum(range(count)))
    assert (report.tokens, report.size) == (10 * count, len(raw))
    assert report.sha256 == hashlib.sha256(raw).hexdigest()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} | {"out.jsonl": b""} == before


def test_a_link_is_followed_to_its_shards(tmp_path):
    (tmp_path / "real").mkdir()
    make_shards(tmp_path / "real" / "out", 2, 3)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "out")
    assert merge_shards(link).records == 3 and link.is_symlink()


def refused(output: Path, match: str) -> ConfigError:
    output.write_text("old\n")
    names = sorted(p.name for p in output.parent.iterdir())
    with pytest.raises(ConfigError, match=match) as caught:
        merge_shards(output)
    assert output.read_text() == "old\n" and caught.value.hint
    assert sorted(p.name for p in output.parent.iterdir()) == names, "nothing is left behind"
    return caught.value


def test_no_shards_and_shards_of_two_jobs(tmp_path):
    output = tmp_path / "out"
    refused(output, "no shards to merge")
    make_shards(output, 2, 5)
    make_shard(output, Shard(3, 4), 5)
    refused(output, "shards of 2 and of 4")


def test_names_that_only_look_like_shards_are_left_alone(tmp_path):
    output = tmp_path / "out"
    make_shards(output, 2, 5)
    for name in (
        "out.x-of-3",
        "outx0-of-3",
        "my-out.0-of-3",
        "out.0-of-3.bak",
        ".out.0-of-3.aa.tmp",
    ):
        (tmp_path / name).write_text("")
    assert merge_shards(output).records == 5


def test_missing_shards_are_listed(tmp_path):
    output = tmp_path / "out"
    make_shard(output, Shard(1, 4), 9)
    error = refused(output, "3 of 4 shards are missing: 0, 2, 3")
    assert "--shard 0/4" in error.hint
    shard = make_shard(tmp_path / "many", Shard(999, 1000), 5)
    error = refused(tmp_path / "many", "999 of 1000 shards are missing: 0, 1, 2")
    assert "and 979 more" in error.what
    shard.unlink()


def test_unfinished_shards(tmp_path):
    output = tmp_path / "out"
    paths = make_shards(output, 3, 9)
    journal_path(paths[1]).write_text("")
    error = refused(output, "shard 1/3 is not finished: 3 of 3 records are done")
    assert error.where == str(journal_path(paths[1])) and "goes on" in error.hint
    journal_path(paths[1]).unlink()
    for state in ("loading", "running", "writing", "failed", "interrupted"):
        change_status(paths[2], state=state)
        refused(output, f"shard 2/3 is {state}")
    status_path(paths[2]).write_text("{")
    refused(output, "shard 2/3 has no status that can be read")
    status_path(paths[2]).unlink()
    refused(output, "shard 2/3 has no status that can be read")
    paths[2].unlink()
    refused(output, "1 of 3 shards are missing: 2")
    journal_path(paths[2]).write_text("")  # it was killed before it had an output
    refused(output, "shard 2/3 is not finished")


def test_an_output_that_is_gone(tmp_path):
    paths = make_shards(tmp_path / "out", 2, 4)
    paths[0].unlink()
    refused(tmp_path / "out", "the output of shard 0/2 is gone")


def test_a_job_without_shards_that_is_unfinished_here(tmp_path):
    make_shards(tmp_path / "out", 2, 4)
    journal_path(tmp_path / "out").write_text("")
    refused(tmp_path / "out", "a job without shards is unfinished here")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "other"}, 'model: "m" in shard 0/3, "other" in shard 1/3'),
        (
            {"sampling": SamplingParams(temperature=0.5)},
            "sampling.temperature: 1.0 in shard 0/3, 0.5 in shard 1/3",
        ),
        (
            {"input": InputFacts("cd", 100, 9, 9)},
            'input.sha256: "ab" in shard 0/3, "cd" in shard 1/3',
        ),
    ],
)
def test_shards_of_another_job(tmp_path, changes, said):
    output = tmp_path / "out"
    make_shards(output, 3, 9)
    status_path(make_shard(output, Shard(1, 3), 9)).unlink()
    path = make_shard(output, Shard(1, 3), 9, **changes)
    error = refused(output, "not of one job")
    assert said in error.what and error.where == str(path)


def test_shards_that_changed_their_names(tmp_path):
    output = tmp_path / "out"
    one, two = make_shards(output, 2, 4)
    for companion in (lambda path: path, status_path):
        spare = tmp_path / "spare"
        companion(one).rename(spare)
        companion(two).rename(companion(one))
        spare.rename(companion(two))
    refused(output, "the status of shard 0/2 is that of 1/2")


def cut(raw: bytes) -> bytes:
    return raw[:-5]


@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lambda raw: raw.replace(b"id", b"ID", 1),
        lambda raw: raw + line(99) + b"\n",
        lambda raw: raw[: raw.index(b"\n") + 1],
        lambda raw: b"",
    ],
)
@pytest.mark.parametrize("index", [0, 2])
def test_an_output_that_is_not_what_was_written(tmp_path, damage, index):
    output = tmp_path / "out"
    path = make_shards(output, 3, 9)[index]
    path.write_bytes(damage(path.read_bytes()))
    error = refused(output, f"the output of shard {index}/3 is not what was written")
    assert error.where == str(path)


def test_a_status_without_the_number_of_records(tmp_path):
    (path,) = make_shards(tmp_path / "out", 1, 4)
    change_status(path, fingerprint={"shard": "0/1"})
    refused(tmp_path / "out", "how many records")


def test_an_output_that_cannot_be_written(tmp_path):
    make_shards(tmp_path / "out", 2, 4)
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        merge_shards(tmp_path / "out")
    with pytest.raises(OutputError):
        merge_shards(tmp_path / "missing" / "out")


def test_more_shards_than_files_that_may_be_open(tmp_path, monkeypatch):
    make_shards(tmp_path / "out", 2, 4)
    real = Path.open

    def limited(self, *args, **options):
        if self.name == "out.1-of-2":
            raise OSError(24, "Too many open files", str(self))
        return real(self, *args, **options)

    monkeypatch.setattr(Path, "open", limited)
    error = refused(tmp_path / "out", "Too many open files")
    assert "ulimit -n" in error.hint and error.where.endswith("out.1-of-2")


def test_a_merge_leaves_the_temporary_file_of_another_one_alone(tmp_path):
    """Two merges at once: each writes a file of its own, and the last one wins."""
    make_shards(tmp_path / "out", 2, 4)
    first = AtomicOutput(tmp_path / "out")

    def lines():
        yield "first"
        merge_shards(tmp_path / "out")
        yield "second"

    first.write(lines())
    assert (tmp_path / "out").read_text() == "first\nsecond\n"
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
