"""Replicas of the model that share the records of one job."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, free_port
from torch.distributed import PrefixStore, TCPStore

from tprt.cli import main
from tprt.engine.outputs import CompletionOutput, RequestOutput, StreamEvent
from tprt.errors import ConfigError
from tprt.job.dispatcher import Dispatcher
from tprt.job.input_file import InputFile, scan_input
from tprt.job.journal import Journal
from tprt.job.records import Record
from tprt.job.replica import Replica, error_result
from tprt.job.work_queue import LocalQueue, StoreQueue
from tprt.sampling_params import SamplingParams


class EchoLLM:
    """Answers each request after ``steps`` steps with its prompt, or fails for the prompt ``bad``."""

    def __init__(self, max_num_seqs=8, steps=3, seconds=0.0):
        self.engine_config = SimpleNamespace(max_num_seqs=max_num_seqs, dtype="float32")
        self.steps, self.seconds, self.most = steps, seconds, 0
        self._left, self._prompts, self._next = {}, {}, 0

    def add_request(self, prompt, params):
        if prompt["prompt"] == "bad":
            raise ConfigError("the prompt is bad")
        self._next += 1
        self._left[self._next], self._prompts[self._next] = self.steps, prompt["prompt"]
        return self._next

    def step(self):
        time.sleep(self.seconds)
        self.most = max(self.most, len(self._left))
        for request in list(self._left):
            self._left[request] -= 1
            output = None
            if not self._left[request]:
                del self._left[request]
                done = CompletionOutput(0, self._prompts.pop(request), [1] * self.steps, "stop")
                output = RequestOutput([1, 2], [done])
            yield StreamEvent(request, 0, "", [1], None, output)


def job(tmp_path, queue, window, count=40, **params):
    source = tmp_path / "in.jsonl"
    lines = [{"id": f"r{i}", "prompt": f"p{i}", "params": params} for i in range(count)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = scan_input(source)
    journal = Journal.open(tmp_path / "out.journal", {"job": 1})
    records = InputFile(source, facts)
    return Dispatcher(records, SamplingParams(), 0, None, journal, queue, window)


def texts(journal):
    return [json.loads(text)["outputs"][0]["text"] for _, text in journal.results()]


def test_one_replica_keeps_its_engine_full_and_every_record_gets_its_answer(tmp_path):
    queue = LocalQueue()
    work, llm = job(tmp_path, queue, window=10), EchoLLM()
    replica = Replica(llm, queue)
    most_out = 0
    while not work.over:
        work.pump()
        most_out = max(most_out, work.running)
        replica.turn()
    assert texts(work.journal) == [f"p{i}" for i in range(40)]
    assert llm.most == most_out == 10 and replica.over and replica.live_tokens == 0


def test_a_request_of_many_completions_counts_as_many(tmp_path):
    queue = LocalQueue()
    work = job(tmp_path, queue, window=10, n=4)
    work.pump()
    assert work.running == 3, "the third goes over the window, no fourth is begun"


def test_bad_prompts_are_answered_without_the_engine(tmp_path):
    queue = LocalQueue()
    replica = Replica(EchoLLM(), queue)
    params = SamplingParams()
    queue.put(Record(7, "x", {"prompt": "bad"}, params))
    queue.put(Record(8, "y", None, params, error="no prompt"))
    assert not replica.turn()
    first, second = queue.collect(), queue.collect()
    assert first.line == 7 and first.error == "x: the prompt is bad"
    assert json.loads(second.text)["error"] == {"message": "no prompt", "line": 8}
    assert queue.collect() is None


@pytest.fixture
def stores():
    """Connections to one store, as ranks have them."""
    server = TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)
    made = [server]

    def connect():
        made.append(PrefixStore("job", server.clone()))
        return made[-1]

    return connect


def test_records_and_results_travel_through_the_store(stores):
    ours, theirs = StoreQueue(stores()), StoreQueue(stores())
    params = SamplingParams(logit_bias={5: 1.0}, stop=["\ud7ff", "x"], seed=2**62, temperature=0.5)
    record = Record(3, "id\n", {"messages": [{"role": "user", "content": "ü"}]}, params)
    assert theirs.take() is None and not theirs.ended
    ours.put(record)
    ours.end()
    assert not theirs.ended, "what was put before the end is still to be taken"
    assert soon(theirs.take) == record and theirs.take() is None and theirs.ended
    result = error_result(record.failed("\ud800 no"), replica=1)
    theirs.give(result)
    assert soon(ours.collect) == result and ours.collect() is None


def soon(take):
    """What comes: the store answers no sender, so a reader may be there first."""
    for _ in range(1000):
        if (found := take()) is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("nothing came")


def test_what_is_longer_than_the_store_takes_travels_in_pieces(stores):
    ours, theirs = StoreQueue(stores()), StoreQueue(stores())
    record = Record(1, "long", {"prompt": "ü" * 5_000_000}, SamplingParams())
    ours.put(record)
    assert soon(theirs.take) == record
    result = error_result(record.failed("x"))
    long = replace(result, text="y" * 9_000_000)
    theirs.give(long)
    theirs.give(result)
    assert soon(ours.collect) == long and soon(ours.collect) == result
    assert ours.store.num_keys() <= 2, "the pieces are gone"


def test_a_slow_replica_holds_nobody_up(tmp_path, stores):
    work = job(tmp_path, StoreQueue(stores()), window=2 * 10, count=200)
    replicas = [
        Replica(EchoLLM(seconds=seconds), StoreQueue(stores()), number, shared=True)
        for number, seconds in enumerate((0.002, 0.1))
    ]

    def lead(replica):
        while not replica.over:
            if not replica.turn():
                time.sleep(0.001)

    threads = [threading.Thread(target=lead, args=(replica,)) for replica in replicas]
    work.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert work.over and texts(work.journal) == [f"p{i}" for i in range(200)]
    assert work.records[0] + work.records[1] == 200
    assert work.records[0] > 4 * work.records[1] > 0


def test_what_the_dispatching_thread_meets_is_raised_where_the_job_runs(tmp_path, stores):
    work = job(tmp_path, StoreQueue(stores()), window=4)
    (tmp_path / "in.jsonl").write_text("another\n")
    work.start()
    with pytest.raises(ConfigError, match="changed"):
        for _ in range(1000):
            assert not work.over
            time.sleep(0.01)
    work.stop()


def command(out, *extra):
    prompts = ROOT / "examples" / "prompts.jsonl"
    return [
        *("generate", "--model", str(TINY), "--input", str(prompts), "--output", str(out)),
        *("--dtype", "float32", "--max-tokens", "12", "--temperature", "0.9", *extra),
    ]


@pytest.mark.parametrize("ranks, tensor", [(2, 1), (4, 2)])
def test_replicas_answer_as_one(tmp_path, ranks, tensor):
    assert main(command(tmp_path / "one")) == 0
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tprt", *command(tmp_path / "many", "--nproc", str(ranks))),
            *("--set", f"parallel.data={ranks // tensor}", "--log-format", "json"),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "many").read_bytes() == (tmp_path / "one").read_bytes()
    summary = json.loads(done.stdout)
    assert sum(share["records"] for share in summary["replicas"]) == summary["records"]
    assert {share["replica"] for share in summary["replicas"]} <= set(range(ranks // tensor))


def test_ranks_that_replicas_cannot_share(capsys, tmp_path, monkeypatch):
    assert main(command(tmp_path / "out", "--nproc", "3", "--set", "parallel.data=2")) == 2
    assert "--nproc is 3, for 2 replicas" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(command(tmp_path / "out", "--set", "parallel.data=2")) == 2
    assert "parallel.data is 2, but 3 ranks were started" in capsys.readouterr().err
    asked = ("--set", "parallel.data=2", "--set", "parallel.tensor=2")
    assert main(command(tmp_path / "out", *asked)) == 2
    said = capsys.readouterr().err
    assert (
        "parallel.tensor is 2, parallel.data is 2, but 3 ranks" in said and "start 4 ranks" in said
    )
