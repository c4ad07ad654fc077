"""What the watch and the journal take from a job: their CPU time, counted on both ranks."""

import json
import os
import sys
import threading
import time
import timeit
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fault_results import keep_fact
from launched_jobs import ROOT, LaunchedJob, generate, write_prompts

RECORDS = 900
LEAST_SECONDS = 20.0
ALLOWED = 0.02
# Of them and of nothing else; the journal's, the watch's, and the one that hears signals.
THREADS = ("tprt-post", "tprt-watch", "tprt-journal-sync", "tprt-signals")


class Meter:
    """CPU seconds of this process by what they were spent on."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.threads: dict[str, int] = {}
        self._inside = False

    def count_calls(self, kind: type, *names: str) -> None:
        """Count the main thread's time in methods; one within another is counted once."""
        for name in names:
            setattr(kind, name, self._counted(getattr(kind, name), f"{kind.__name__}.{name}"))

    def _counted(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if self._inside or threading.current_thread() is not threading.main_thread():
                return call(*args, **options)
            self._inside, began = True, time.thread_time()
            try:
                return call(*args, **options)
            finally:
                self._inside = False
                self.spent[name] += time.thread_time() - began

        return counted

    def count_threads(self) -> None:
        run = threading.Thread.run

        def counted(thread: threading.Thread) -> None:
            if thread.name in THREADS:
                self.threads[thread.name] = threading.get_native_id()
            try:
                run(thread)
            finally:
                if self.threads.pop(thread.name, None) is not None:
                    self.spent[thread.name] += time.thread_time()

        threading.Thread.run = counted  # type: ignore[method-assign]

    def threads_that_live(self) -> None:
        for name, number in dict(self.threads).items():
            ran = Path(f"/proc/self/task/{number}/schedstat").read_text().split()[0]
            self.spent[name] += int(ran) / 1e9


def cost_of_a_move() -> float:
    """CPU seconds of telling one's progress."""
    from tprt.distributed.progress import Progress

    progress = Progress()

    def step() -> None:
        progress.enter("decode", 1, kind="x")
        for _ in range(8):
            progress.wait_for("all_reduce")
            progress.go_on()

    return timeit.timeit(step, number=2000, timer=time.thread_time) / 2000 / 17


def measured_rank(folder: Path, arguments: list[str]) -> int:
    """A rank of the job that writes down what it spent."""
    from tprt.cli import main
    from tprt.distributed.progress import Progress
    from tprt.distributed.watch import Watch
    from tprt.job.journal import Journal
    from tprt.job.status_file import StatusUpdater

    meter, made = Meter(), []
    init = Progress.__init__

    def noted(progress: Progress, *args: Any) -> None:
        init(progress, *args)
        made.append(progress)

    Progress.__init__ = noted  # type: ignore[method-assign]
    meter.count_threads()
    meter.count_calls(Journal, "begin", "finish", "sync", "end", "close")
    meter.count_calls(StatusUpdater, "update", "enter", "end")
    meter.count_calls(Watch, "start", "tell", "ask", "wait_for_others")
    began, clock = time.process_time(), time.monotonic()
    code = main(arguments)
    total, seconds = time.process_time() - began, time.monotonic() - clock
    meter.threads_that_live()
    moves = sum(progress.moves for progress in made)
    meter.spent["progress"] = moves * cost_of_a_move()
    report = {"total": total, "seconds": seconds, "spent": dict(meter.spent), "moves": moves}
    (folder / f"cpu.{os.environ['RANK']}").write_text(json.dumps(report))
    return code


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_watch_and_the_journal_take_less_than_a_fiftieth(tmp_path, capsys):
    out = tmp_path / "out"
    sizes = (
        "--max-tokens",
        "32",
        "--set",
        "sampling.ignore_eos=true",
        "--set",
        "engine.max_num_seqs=8",
    )
    job_arguments = generate(write_prompts(tmp_path / "in", RECORDS), out, *sizes)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with LaunchedJob([*start, str(Path(__file__)), str(tmp_path), *job_arguments]) as job:
        job.wait(600)
        assert job.code == 0, job.text
    reports = [json.loads((tmp_path / f"cpu.{rank}").read_text()) for rank in (0, 1)]
    spent = sum((Counter(report["spent"]) for report in reports), Counter())
    total = sum(report["total"] for report in reports)
    share = spent.total() / total
    said = f"watch and journal took {100 * share:.2f} % of {total:.1f} s CPU time"
    with capsys.disabled():
        print(
            f"\n{said}",
            *(f"  {name:24} {value:.3f} s" for name, value in spent.most_common()),
            sep="\n",
        )
    assert {"tprt-post", "tprt-watch", "tprt-journal-sync", "Journal.finish"} <= set(spent)
    assert reports[0]["seconds"] > LEAST_SECONDS, "too short to say anything"
    assert share < ALLOWED
    keep_fact("cost", f"In a job of {RECORDS} records on two ranks the {said} of both.")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(measured_rank(Path(sys.argv[1]), sys.argv[2:]))
