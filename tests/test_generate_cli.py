"""``tprt generate`` from end to end: three launch forms, one result."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY

from tprt.cli import main

PROMPTS = ROOT / "examples" / "prompts.jsonl"


def command(out: Path, *extra: str, model: Path = TINY, prompts: Path = PROMPTS) -> list[str]:
    flags = ["--model", str(model), "--input", str(prompts), "--output", str(out)]
    return ["generate", *flags, "--dtype", "float32", "--max-tokens", "24", *extra]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def launch(*argv: str) -> subprocess.CompletedProcess:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
        cwd=ROOT,
        env=env,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_three_launch_forms_give_one_result(tmp_path):
    """Alone, --nproc 2 and torchrun with 4 ranks; sampled, so seeds and noise take part too."""
    sampled = ("--temperature", "0.8", "--top-p", "0.95", "--seed", "3")
    assert main(command(tmp_path / "alone", *sampled)) == 0
    launch("-m", "tprt", *command(tmp_path / "nproc", *sampled), "--nproc", "2", "--show")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")
    launch(*torchrun, "-m", "tprt", *command(tmp_path / "torchrun", *sampled))
    alone = (tmp_path / "alone").read_bytes()
    assert alone == (tmp_path / "nproc").read_bytes() == (tmp_path / "torchrun").read_bytes()
    ids = [json.loads(line)["id"] for line in PROMPTS.read_text().splitlines()]
    assert [line["id"] for line in lines(tmp_path / "alone")] == ids


def test_another_seed_gives_another_text(tmp_path):
    """Negative control of the test above: the seed matters."""
    hot = ("--temperature", "3.0", "--set", "sampling.ignore_eos=true")
    main(command(tmp_path / "a", *hot, "--seed", "1"))
    main(command(tmp_path / "b", *hot, "--seed", "2"))
    main(command(tmp_path / "c", *hot, "--seed", "1"))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_bad_records_get_errors_and_code_4(tmp_path, capsys):
    prompts = tmp_path / "in.jsonl"
    prompts.write_text(
        '{"id": "good", "prompt": "human: What is 1 + 1?\\n\\nadept:"}\n'
        "{not json\n"
        '{"id": "long", "prompt": "' + "lamp " * 3000 + '"}\n'
        '{"id": "empty", "prompt": ""}\n'
        '{"id": "ids", "prompt_token_ids": [5, 99999]}\n'
        '{"id": "roles", "messages": [{"role": "system", "content": "x"}]}\n'
        '{"id": "surrogate", "prompt": "\\ud800"}\n'
    )
    out = tmp_path / "out.jsonl"
    out.write_text("before\n")
    assert main(command(out, prompts=prompts)) == 4
    good, *bad = lines(out)
    assert good["error"] is None and good["outputs"][0]["finish_reason"] in ("stop", "length")
    assert good["prompt_tokens"] > 5 and good["outputs"][0]["tokens"] >= 1
    assert [b["id"] for b in bad] == ["2", "long", "empty", "ids", "roles", "surrogate"]
    assert all(b["error"]["message"] and b["outputs"] == [] for b in bad)
    assert "2048" in bad[1]["error"]["message"]
    said = capsys.readouterr()
    assert "6 failed" in said.out and "first of 6 failed records: 2: " in said.err
    left = ["in.jsonl", "out.jsonl", "out.jsonl.status.json"]
    assert sorted(p.name for p in tmp_path.iterdir()) == left


def test_empty_input_gets_a_warning(tmp_path, capsys):
    (tmp_path / "in").write_text("\n\n")
    assert main(command(tmp_path / "out", prompts=tmp_path / "in")) == 0
    assert (tmp_path / "out").read_text() == ""
    said = capsys.readouterr()
    assert f"{tmp_path / 'in'} holds no records" in said.err and "0 records" in said.out
    assert main(command(tmp_path / "out", "--restart")) == 0
    assert "holds no records" not in capsys.readouterr().err


def test_show_has_prompts_as_the_model_reads_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    turns = [
        {"role": "user", "content": "Repeat: key"},
        {"role": "assistant", "content": "door"},
        {"role": "user", "content": "Repeat: lamp"},
    ]
    records = [{"messages": turns}, {"messages": [{"role": "bard", "content": "x"}]}]
    (tmp_path / "in").write_text("\n".join(map(json.dumps, records)))
    assert main(command(tmp_path / "out", "--show", prompts=tmp_path / "in")) == 4
    shown = capsys.readouterr().out
    for line in ("human: Repeat: key", "adept: door", "human: Repeat: lamp", "adept:  "):
        assert line in shown
    assert "user:" not in shown and "assistant:" not in shown
    assert "'bard'" in shown, "what cannot be rendered is shown as it came"


@pytest.mark.parametrize("ranks, number, code", [(1, signal.SIGINT, 130), (2, signal.SIGTERM, 143)])
def test_an_interrupted_job_says_what_was_done(tmp_path, ranks, number, code):
    prompts, out = tmp_path / "in", tmp_path / "out"
    prompts.write_text('{"prompt": "human: Count"}\n' * 300)
    out.write_text("before\n")
    argv = command(out, "--set", "sampling.ignore_eos=true", prompts=prompts)
    argv[argv.index("24")] = "400"
    said = tmp_path / "err"
    with said.open("w") as err:
        process = subprocess.Popen(
            [sys.executable, "-m", "tprt", *argv, "--nproc", str(ranks)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stderr=err,
        )
        began = time.monotonic()
        while "ready in" not in said.read_text() and process.poll() is None:
            assert time.monotonic() - began < 60
            time.sleep(0.05)
        time.sleep(1)
        process.send_signal(number)
        assert process.wait(60) == code
    text = said.read_text()
    found = re.search(r"(\d+) of 300 records are done; (.*) is as it was", text)
    assert found and found[2] == str(out) and int(found[1]) < 300
    assert "The same command resumes" in text and text.count("records are done") == 1
    assert out.read_text() == "before\n"
    left = ["err", "in", "out", "out.journal", "out.status.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    status = json.loads((tmp_path / "out.status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", code)
    assert status["finished"] == int(found[1])


def test_an_error_is_no_interrupt(tmp_path, capsys):
    assert main(command(tmp_path / "out", "--set", "engine.kv_cache_memory=1")) == 8
    status = json.loads((tmp_path / "out.status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 8)
    assert "kv_cache_memory" in status["error"]["hint"]


def test_a_finished_job_is_not_computed_again(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(out)) == 0
    before, first = out.stat(), out.read_bytes()
    assert main(command(out)) == 0
    assert "finished already" in capsys.readouterr().err and out.stat() == before
    out.write_bytes(first[:-5])  # no longer what was written
    assert main(command(out)) == 0
    assert "finished already" not in capsys.readouterr().err and out.read_bytes() == first
    assert main(command(out, "--restart")) == 0
    assert out.read_bytes() == first and out.stat().st_mtime_ns > before.st_mtime_ns
    assert main(command(out, "--temperature", "0.5")) == 2
    said = capsys.readouterr().err
    assert "of another job: sampling.temperature" in said and "--restart" in said
    assert out.read_bytes() == first and "journal" not in str(list(tmp_path.iterdir()))
    assert main(command(out, "--temperature", "0.5", "--restart")) == 0


def test_a_changed_job_does_not_resume(tmp_path, capsys):
    """Stopped in the middle by a full disk, then asked for something else."""
    out = tmp_path / "out"
    argv = [sys.executable, "-m", "tprt", *command(out)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TPRT_FAULT": "journal.append:raise:hit=3"}
    stopped = subprocess.run(argv, check=False, capture_output=True, text=True, env=env, cwd=ROOT)
    assert stopped.returncode == 1 and "2 of 8 records are done" in stopped.stderr
    assert main(command(out, "--temperature", "0.5", "--seed", "3")) == 2
    said = capsys.readouterr().err
    assert "sampling.temperature" in said and "0.5" in said and "--restart" in said
    assert main(["job", "status", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "failed" in shown and "resumes" in shown
    assert main(command(out)) == 0
    said = capsys.readouterr()
    assert "attempt 2: 2 of 8 records are done already" in said.err
    assert main(command(tmp_path / "whole")) == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


SLOW_IMPORT = """
import time

try:
    with open("importing", "w"):
        pass
    time.sleep(1.5)
    whole = True
except BaseException:  # as some libraries have it
    whole = False
"""


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_an_import_to_end(tmp_path, number, code):
    """Within one it would be swallowed, or leave half a module for others to fail on."""
    (tmp_path / "slow.py").write_text(SLOW_IMPORT)
    script = (
        "import sys, time, tprt.cli.generate, tprt.cli\n"
        "def run(args):\n    import slow; print(slow.whole, flush=True); time.sleep(60)\n"
        "tprt.cli.generate.run = run\n"
        "sys.exit(tprt.cli.main(['generate']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        until = time.monotonic() + 60
        while not (tmp_path / "importing").exists():
            assert time.monotonic() < until and process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (code, "True\n")
    assert said.startswith("tprt: ") and said.count("\n") == 1


@pytest.mark.parametrize("delay", [0.2, 0.5])
def test_ctrl_c_while_it_starts_is_one_line(tmp_path, delay):
    argv = [sys.executable, "-m", "tprt", *command(tmp_path / "out")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(argv, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    if process.returncode == -signal.SIGINT:  # before the program could say so
        assert said == ""
    else:
        assert (process.returncode, said) == (130, "tprt: interrupted\n")


def test_a_launch_from_a_program_leaves_it_as_it_was(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    assert "TPRT_LAUNCHER_PID" not in os.environ
    assert main([*command(tmp_path / "out"), "--nproc", "2"]) == 0
    assert not {"TPRT_LAUNCHER_PID", "GLOO_SOCKET_IFNAME"} & set(
        os.environ
    )  # conftest.py: nor others
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.parametrize("ranks", [1, 2])
def test_shards_answer_what_one_job_answers(tmp_path, capsys, ranks):
    out = tmp_path / "out"
    for shard in ("0/3", "2/3"):
        assert main(command(out, "--shard", shard)) == 0
    assert main(["generate", "--merge", "--output", str(out)]) == 2
    assert "--shard 1/3" in capsys.readouterr().err
    launch("-m", "tprt", *command(out, "--shard", "1/3", "--nproc", str(ranks)))
    assert main(["generate", "--merge", "--output", str(out)]) == 0
    assert main(command(tmp_path / "whole")) == 0
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


def test_openai_lines(tmp_path):
    body = {"messages": [{"role": "user", "content": "Repeat 2 times: lamp"}], "max_tokens": 8}
    line = {"custom_id": "z", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in").write_text(json.dumps(line) + "\n")
    assert main(command(tmp_path / "out", "--temperature", "0", prompts=tmp_path / "in")) == 0
    (answer,) = lines(tmp_path / "out")
    assert answer["custom_id"] == "z"
    assert answer["response"]["body"]["choices"][0]["message"]["role"] == "assistant"


@pytest.mark.parametrize("form", ["megatron", "hf", "presharded"])
def test_converted_checkpoints_answer_alike(tmp_path, form, capsys):
    """The rotary precision and the tokenizer travel with the file."""
    target = tmp_path / form
    tp = "1" if form == "hf" else "4"
    assert main(["convert", str(TINY), str(target), "--format", form, "--tp", tp]) == 0
    assert main(command(tmp_path / "a", "--temperature", "0")) == 0
    assert main(command(tmp_path / "b", "--temperature", "0", model=target)) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_vocabulary_that_needs_padding(tmp_path):
    """673 rows are no even cut over 4 ranks: equal parts in memory, padding that is never read."""
    from tprt.config import PersimmonConfig
    from tprt.engine.memory_plan import plan_ranks

    config = PersimmonConfig(
        vocab_size=673,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=16,
        max_position_embeddings=64,
    )
    import torch

    ranks = plan_ranks(config, 4, torch.float32)
    assert len({r.weights for r in ranks}) == 1
    assert sum(r.read for r in ranks) < sum(r.weights for r in ranks)


def test_inspect_and_plan_in_json(capsys):
    assert main(["inspect", str(TINY), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"], found["tp_on_disk"], found["config"]["rotary_precision"]) == (
        "megatron",
        2,
        "fp32",
    )
    assert found["tokenizer"]["unused_ids"] == 64 and found["warnings"] == []
    one, eight = found["bytes_per_rank"]["1"][0], max(found["bytes_per_rank"]["8"])
    assert one / 8 < eight < one / 7
    assert main(["plan", "--model", str(TINY), "--tp", "2", "--json", "--dtype", "fp32"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kv_bytes_per_token"] == 2 * 3 * 256 * 4
    assert plan["parameters"] == found["parameters"]


def test_plan_of_the_8b_model(capsys):
    """The sizes in the reference: 9,397,175,296 parameters, 576 KiB of KV per token."""
    argv = ["plan", "--model", str(ROOT / "configs" / "persimmon-8b.json"), "--tp", "4", "--json"]
    assert main(argv) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"] == 9_397_175_296
    assert plan["kv_bytes_per_token"] == 589_824
    assert plan["tp_sizes"] == [1, 2, 4, 8, 16, 32, 64]
    assert all(abs(rank["weights"] / 2**30 - 4.38) < 0.01 for rank in plan["per_rank"])
    assert main([*argv, "--memory", "4"]) == 8


def test_plan_speaks_of_sizes_in_units_that_fit(capsys):
    assert main(["plan", "--model", str(TINY), "--tp", "2", "--dtype", "fp32"]) == 0
    said = capsys.readouterr().out
    assert "4.44 MiB" in said and "3.00 KiB" in said and "0.00" not in said
    model = str(ROOT / "configs" / "persimmon-8b.json")
    settings = ["--set", "engine.kv_cache_memory=1G", "--set", "engine.block_size=7"]
    assert main(["plan", "--model", model, *settings]) == 0
    said = capsys.readouterr().out
    assert "17.50 GiB" in said and "576.00 KiB" in said
    # 260 blocks of 7 tokens fit into 1 GiB; one of them is for padding
    assert f"the KV cache takes {260 * 7 * 576 / 2**10:.2f} MiB per rank" in said


def test_settings_file_and_start_up_log(tmp_path):
    """A deployment as YAML; the log says what was read and which rotary precision is used."""
    done = launch(
        "-m", "tprt", "generate", "--config", "configs/tiny.yaml",
        "--output", str(tmp_path / "out"), "--rotary-precision", "bf16",
    )  # fmt: skip
    assert "rotary bf16" in done.stderr and "MB read by rank 0" in done.stderr
    assert "8 records, 0 failed" in done.stdout and "tokens/s" in done.stdout
    assert len(lines(tmp_path / "out")) == 8


def test_float16_that_overflows_is_an_error_record(tmp_path):
    """Rows of NaN must not be answered with id 0 as if nothing had happened."""
    import torch

    model = Path(shutil.copytree(TINY, tmp_path / "model"))
    for path in model.rglob("model_optim_rng.pt"):
        state = torch.load(path, weights_only=False)
        for name, tensor in state["model"]["language_model"]["encoder"].items():
            if name.endswith(("dense_4h_to_h.weight", "dense_h_to_4h.weight")):
                tensor *= 500
        torch.save(state, path)
    argv = command(tmp_path / "out", "--temperature", "0", model=model)
    argv[argv.index("float32")] = "float16"
    assert main(argv) == 4
    assert all("float16" in line["error"]["message"] for line in lines(tmp_path / "out"))
