"""The stages of the GPU check: every command can be parsed, a stage that fails is told and survived."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tprt.bench import gpu_check
from tprt.bench.__main__ import make_parser
from tprt.bench.command import check_flags
from tprt.bench.stage_runner import Stage, Step, figures, read_junit, run_stage, summary

ROOT = Path(__file__).resolve().parent.parent
FACTS = {"device": "none", "device_count": 0}
REPORT = {
    "bench": "x", "model": "m", "dtype": "bfloat16", "tp": 1, "tokens_per_s": 5.0,
    "ratio": {"transformers": 2.0}, "share_of_bandwidth": 0.5, "details": {},
}  # fmt: skip


def prints(report=None, code=0) -> tuple[str, ...]:
    return (
        "-c",
        f"print('hello'); print({json.dumps(report or REPORT)!r}); raise SystemExit({code})",
    )


@pytest.mark.parametrize("cpu", [False, True])
@pytest.mark.parametrize("ranks", [1, 4])
def test_every_command_can_be_parsed(cpu, ranks, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    parser, seen = make_parser(), set()
    for stage in gpu_check.stages(cpu, ranks, Path("out")):
        assert 0 < stage.limit < 9 * 60 and stage.steps
        assert len({step.name for step in stage.steps}) == len(stage.steps)
        assert bool(stage.not_run) == (cpu or ranks == 1)
        for step in stage.steps:
            if step.kind == "tests":
                files = [part for part in step.command if part.endswith(".py")]
                assert files and all((ROOT / file).is_file() for file in files)
                continue
            assert ("torch.distributed.run" in step.command) == (ranks > 1)
            args = parser.parse_args(step.command[step.command.index("tprt.bench") + 1 :])
            check_flags(args, ranks)
            assert args.toy == cpu and (args.device == "cpu") == cpu
            seen.add(args.bench)
    wanted = {"decode", "prefill", "throughput"}
    assert seen == wanted | ({"kernels", "startup", "bytes"} if ranks == 1 else {"allreduce"})


def test_stages_are_those_of_the_scripts():
    for script, ranks in (("gpu_check.sh", 1), ("multi_gpu_check.sh", 2)):
        path = ROOT / "launch" / script
        assert os.access(path, os.X_OK)
        subprocess.run(["bash", "-n", str(path)], check=True)
        (usage,) = (line for line in path.read_text().splitlines() if "|" in line)
        told = usage.partition("tests|")[2].partition(" ...")[0]
        names = [stage.name for stage in gpu_check.stages(False, ranks, Path("out"))]
        assert ["tests", *told.split("|")] == [*names, "all"]


def test_gpu_tests_are_found_by_their_marks():
    (tests,) = (s for s in gpu_check.stages(False, 1, Path("out")) if s.name == "tests")
    command = tests.steps[0].command
    assert "tests/test_gpu.py" in command and "tests/test_symmetric_memory.py" in command
    assert "tests/test_scheduler.py" not in command
    compiled = tests.steps[1].command
    assert "tests/test_triton_attention.py" in compiled and "tests/test_triton_head.py" in compiled


def test_a_failed_step_is_told_and_the_next_one_runs(tmp_path, capsys):
    broken = {**REPORT, "details": {"failed": [{"group": "g", "body": "b", "error": "e"}]}}
    steps = [
        Step("fails", ("-c", "import sys; print('oops', file=sys.stderr); sys.exit(3)")),
        Step("stuck", ("-c", "import time; time.sleep(60)")),
        Step("late", prints()),
    ]
    log = io.StringIO()
    told = run_stage(Stage("bad", 2, steps, ["a GPU"]), tmp_path, FACTS, log)
    assert not told["ok"] and [r["exit_code"] for r in told["results"]] == [3, 124]
    assert told["not_run"] == [
        "a GPU", "fails: failed with exit code 3", "stuck: cut off after 2 s",
        "late: no time was left of 2 s",
    ]  # fmt: skip
    assert "oops" in log.getvalue() and "oops" in capsys.readouterr().out
    parts = [Step("good", prints()), Step("parts", prints(broken)), Step("mute", ("-c", "pass"))]
    told = run_stage(Stage("mixed", 30, parts), tmp_path, FACTS, log)
    assert [result["ok"] for result in told["results"]] == [True, False, False]
    assert told["results"][0]["report"] == REPORT
    written = json.loads((tmp_path / "mixed.json").read_text())
    assert next(iter(written)) == "not_run" and written == told
    table = summary([told])
    assert "FAILED g of b: e" in table and "2.0 times transformers" in table
    part = Step("part", prints({**REPORT, "details": {"skipped": "bytes: ncu is not there"}}))
    told = run_stage(Stage("less", 30, [part]), tmp_path, FACTS, log)
    assert told["ok"] and told["not_run"] == ["part: bytes: ncu is not there"]


def test_tests_are_counted(tmp_path):
    case = tmp_path / "test_it.py"
    case.write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 0\n"
        "@pytest.mark.skip(reason='no such GPU')\ndef test_c(): pass\n"
    )
    step = Step("t", ("-m", "pytest", "-q", "-c", os.devnull, str(case)), "tests")
    told = run_stage(Stage("tests", 60, [step], ["x"]), tmp_path, FACTS, io.StringIO())
    (result,) = told["results"]
    assert result["tests"]["passed"] == 1 and len(result["tests"]["failed"]) == 1
    assert result["tests"]["skipped"] == {"no such GPU": 1}
    assert told["not_run"][1:] == ["t: failed with exit code 1", "t: 1 tests skipped: no such GPU"]
    assert not list(tmp_path.glob(".*.xml"))
    assert "test_b" in summary([told])


def test_tests_that_cannot_be_collected_have_failed(tmp_path):
    path = tmp_path / "junit.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="" name="tests.x"><error message="no module"/>'
        "</testcase></testsuite></testsuites>"
    )
    assert read_junit(path)["failed"] == ["::tests.x"]


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_exit_code_says_whether_all_passed(good, code, tmp_path, monkeypatch, capsys):
    made = [
        Stage("first", 20, [Step("a", prints(code=0 if good else 1))]),
        Stage("second", 20, [Step("b", prints())]),
        Stage("tune", 20, [Step("c", prints())]),
    ]
    monkeypatch.setattr(gpu_check, "stages", lambda *_: made)
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("TPRT_COMMIT", "abc123")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert gpu_check.main([], lambda: {"device": "some GPU", "device_count": 1}) == code
    assert {p.name for p in tmp_path.iterdir()} == {"first.json", "second.json", "gpu_check.log"}
    written = json.loads((tmp_path / "second.json").read_text())
    assert written["ok"] and written["commit"] == "abc123" and written["command"] == "gpu_check"
    assert "abc123" in capsys.readouterr().out
    assert gpu_check.main(["tune"], lambda: {"device": "some GPU", "device_count": 1}) == 0
    assert (tmp_path / "tune.json").exists()


def test_without_a_gpu_nothing_is_claimed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.main(["decode"], lambda: dict(FACTS)) == 2
    assert gpu_check.main(["--ranks", "4"], lambda: {"device": "a", "device_count": 2}) == 2
    assert "--cpu is a dry run" in capsys.readouterr().err and not list(tmp_path.iterdir())
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["decoding"], lambda: dict(FACTS))
    assert "no stage decoding" in capsys.readouterr().err


def test_machine_is_asked_in_a_process_of_its_own():
    found = gpu_check.machine()
    assert found["device"] and {"torch", "triton", "python"} <= found["versions"].keys()


def test_figures_of_every_measurement_have_a_line():
    details = {
        "cells": [{"batch": 1, "context": 2, "ms_per_step": 1.0, "tokens_per_s": 5.0,
                   "share_of_bandwidth": 0.5}, {"batch": 9, "context": 9, "skipped": "no room"}],
        "trace": {"waits_per_step": {}, "kernels_per_step": 9, "idle_share": 0.1},
        "alone": [{"tokens": 7, "ttft_ms": 1.0}],
        "mixed": [{"rows": 1, "step_tokens": 9, "mixed_ms": 1.0, "chunk_ms": 2.0, "decode_ms": 3.0}],
        "projection": {"lines": [{"batch": 1, "context": 2, "nccl": {"tokens_per_s": 4.0}}]},
        "lines": [
            {"operation": "o", "shape": "1", "body": "b", "us": 1.0, "share": 0.5},
            {"operation": "o", "shape": "2", "body": "b", "us": 2.0, "share": 0.5},
            {"bytes": 128, "us": {"all-reduce": 1.0}},
        ],
        "starts": [{"kind": "warm", "seconds": 1.0, "phases": {"read": 0.5}}],
    }  # fmt: skip
    lines = figures({"details": details})
    assert len(lines) == 8 and sum("projection" in line for line in lines) == 1
    more = {"zeros": 0.9, "zeros_measured": 0.9, "ratio": {"dense": {"median": 1.3}},
            "above_dense_limit": True, "dense_limit_tokens_per_s": 4.0}  # fmt: skip
    (line,) = figures({"details": {"cells": [details["cells"][0] | more]}})
    assert "1.3 times dense" in line and "above the dense limit of 4.0" in line
    read = {"num_kernels": 7, "bytes": 9, "ratio": 1.125, "closed_form": {"bytes": 8}}
    assert figures({"details": read}) == [
        "7 kernels read 9 bytes, 1.125 times the closed form of 8"
    ]
    assert figures(None) == []


def test_a_stage_of_the_dry_run_through_the_script(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "launch" / "gpu_check.sh"), "--cpu", "throughput"]
    ended = subprocess.run(
        command, check=False, env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    written = json.loads((tmp_path / "throughput.json").read_text())
    assert "dry run" in written["not_run"][0]
    assert [result["ok"] for result in written["results"]] == [True] * 3


def test_an_interrupt_ends_the_step_and_keeps_what_is_done(tmp_path):
    """SIGTERM: no process is left behind, the stage's file says what was cut off, exit code 143."""
    command = [sys.executable, "-m", "tprt.bench.gpu_check", "--cpu", "decode"]
    environment = {**os.environ, "OUT": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("--- decode"):
                break
        time.sleep(1)  # the step itself begins after its heading
        process.terminate()
        rest = process.stdout.read()
    assert process.returncode == 143
    assert "decode      FAILED" in rest
    told = json.loads((tmp_path / "decode.json").read_text())
    assert not told["ok"] and "decode: interrupted" in told["not_run"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path / "file" / "x"))
    (tmp_path / "file").write_text("")
    assert (
        gpu_check.main(["--cpu", "decode"], ask=lambda: {"device": "none", "device_count": 0}) == 5
    )
    assert "name another folder in OUT" in capsys.readouterr().err


def test_a_dry_run_does_not_replace_what_a_gpu_gave(monkeypatch, tmp_path):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    folders = []

    def keep(stage, folder, *_):
        folders.append(folder)
        return {"stage": stage.name, "ok": True, "seconds": 0.0, "results": [], "not_run": []}

    monkeypatch.setattr(gpu_check, "run_stage", keep)
    for arguments in (["decode"], ["--cpu", "decode"]):
        assert gpu_check.main(arguments, ask=lambda: {"device": "fake", "device_count": 1}) == 0
    assert folders[0] != folders[1]
