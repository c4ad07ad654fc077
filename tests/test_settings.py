"""Settings: what is read from YAML, which source wins, and what a mistake looks like."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from tprt.cli import main
from tprt.cli.setting_types import parse_shard, parse_size
from tprt.cli.settings import KEYS, load_settings
from tprt.cli.strict_yaml import MAX_YAML_BYTES, read_yaml_value
from tprt.config import EngineConfig
from tprt.errors import ConfigError
from tprt.sampling_params import SamplingParams

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("TPRT_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> str:
        path = tmp_path / "run.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def mistake(path: str | None, *overrides: str, **flags) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, list(overrides), {k.replace("__", "."): v for k, v in flags.items()})
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---------------------------------------------------------------- what a good file gives


def test_defaults_are_those_of_the_dataclasses():
    """Guards against a second home of a default, which drifts."""
    settings = load_settings(None, [], {})
    assert settings.engine_config() == EngineConfig()
    assert settings.sampling_params() == SamplingParams()
    assert settings.model.path == "" and settings.job.input is None


def test_every_field_of_the_dataclasses_can_be_set():
    """Guards against a field of EngineConfig or SamplingParams that no YAML reaches."""
    engine = {f.name for f in dataclasses.fields(EngineConfig)} - {"dtype"}
    assert KEYS["engine"] == engine
    assert KEYS["sampling"] == {f.name for f in dataclasses.fields(SamplingParams)}


def test_a_whole_file(write):
    """Guards against sections that are read and then forgotten."""
    path = write(
        "model: {path: /m, tokenizer: /t, dtype: fp16, rotary_precision: fp32, verify: full,"
        " window_keys: 2048,"
        " bos_policy: bos, trim_vocab: [[3, 9], [20, 20]], device: cpu}\n"
        "parallel:\n  tensor: 4\n  data: 2\n"
        "engine:\n  max_num_seqs: 8\n  max_num_batched_tokens: 2k\n  max_model_len: 16K\n"
        "  block_size: 32\n  seed: -5\n"
        "  kv_cache_memory: 20G\n  gpu_memory_utilization: 0.5\n"
        "  step_timeout: 90\n  load_timeout: 1e3\n"
        'sampling:\n  temperature: 1e-1\n  stop: ["\\n\\nhuman:"]\n  stop_token_ids: [5]\n'
        "job: {input: in.jsonl, output: out.jsonl, shard: 02/8, seed: -7, log_format: json,"
        " max_restarts: 100}\n"
        "server:\n"
    )
    settings = load_settings(path, [], {})
    assert settings.model.model_dump() == {
        "path": "/m", "tokenizer": "/t", "dtype": "float16", "rotary_precision": "fp32",
        "verify": "full", "bos_policy": "bos", "trim_vocab": ((3, 9), (20, 20)), "device": "cpu",
        "window_keys": 2048,
    }  # fmt: skip
    assert settings.parallel.model_dump() == {"tensor": 4, "data": 2}
    assert settings.parallel.world_size == 8
    assert settings.engine_config() == EngineConfig(
        dtype="float16", max_num_seqs=8, max_num_batched_tokens=2000, max_model_len=16384,
        block_size=32, seed=-5, kv_cache_memory=20 * 2**30, gpu_memory_utilization=0.5,
        step_timeout=90.0, load_timeout=1000.0,
    )  # fmt: skip
    wanted = SamplingParams(temperature=0.1, stop=("\n\nhuman:",), stop_token_ids=(5,))
    assert settings.sampling_params() == wanted
    assert settings.job.model_dump() == {
        "input": "in.jsonl", "output": "out.jsonl", "shard": "2/8", "seed": -7,
        "log_format": "json", "max_restarts": 100,
    }  # fmt: skip
    assert settings.job_seed == -7


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "---\n", "engine:\n", "server: {}\n", "\ufeff"]
)
def test_empty_files_and_sections(write, text):
    """Guards against None where a section is meant."""
    assert load_settings(write(text), [], {}) == load_settings(None, [], {})


@pytest.fixture
def variables(monkeypatch):
    """What the shipped files ask for."""
    for name in ("PERSIMMON_DIR", "RECURRENTGEMMA_DIR", "INPUT", "OUTPUT"):
        monkeypatch.setenv(name, f"/{name.lower()}")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configs_load(path, variables):
    """Guards against examples that rot."""
    settings = load_settings(str(path), [], {})
    assert re.fullmatch(
        r"examples/tiny-(persimmon|recurrentgemma)"
        r"|/persimmon_dir/(8b_(chat|base)_model_release|persimmon-8b-base)"
        r"|/recurrentgemma_dir/recurrentgemma-(2b|9b)(-it)?",
        settings.model.path,
    )
    assert settings.sampling.greedy
    told = "".join(line for line in path.read_text().splitlines(True) if line.startswith("#"))
    assert f"tprt generate --config configs/{path.name}" in told, "how is it started?"


def test_what_the_shipped_configs_are_for(variables):
    """Each name promises something."""
    found = {path.stem: load_settings(str(path)) for path in CONFIGS}
    ranks = {name: settings.parallel.world_size for name, settings in found.items()}
    assert ranks == {
        "tiny": None, "tiny-replicas": 4, "persimmon-8b-chat": 4, "persimmon-8b-base": 4,
        "persimmon-8b-chat-replicas": 8, "persimmon-8b-one-gpu": 1, "persimmon-8b-cpu": 2,
        "persimmon-8b-reference": 1, "array-job": 1,
        "recurrentgemma-2b": 1, "recurrentgemma-2b-it": 1, "recurrentgemma-9b": 2,
        "recurrentgemma-9b-it": 2, "tiny-recurrentgemma": None,
    }  # fmt: skip
    assert found["tiny-replicas"].parallel.data == found["persimmon-8b-chat-replicas"].parallel.data
    assert found["persimmon-8b-one-gpu"].model.trim_vocab == ((3, 70002),)
    assert {s.model.device for n, s in found.items() if "cpu" in n or "tiny" in n} == {"cpu"}
    reference = found["persimmon-8b-reference"]
    assert reference.model.dtype == "float32" and reference.model.rotary_precision == "fp32"
    assert reference.engine.kernels == "reference" and reference.engine.sparse_rows == 0


def test_an_array_job_takes_its_shard_from_the_scheduler(variables, monkeypatch):
    monkeypatch.setenv("TPRT_JOB__SHARD", "3/8")
    path = next(path for path in CONFIGS if path.stem == "array-job")
    assert load_settings(str(path)).job.shard == "3/8"


@pytest.mark.parametrize(
    ("name", "gpu", "tokens"),
    [("persimmon-8b-one-gpu", 24, 7000), ("persimmon-8b-chat-replicas", 24, 112000),
     ("persimmon-8b-chat-replicas", 80, 479000), ("persimmon-8b-reference", 48, 2048)],
)  # fmt: skip
def test_what_the_shipped_configs_say_of_memory(name, gpu, tokens, variables, capsys):
    """Guards against figures in comments that nobody computed."""
    config, model = ROOT / "configs" / f"{name}.yaml", ROOT / "configs" / "persimmon-8b.json"
    flags = ["--config", str(config), "--model", str(model), "--memory", str(gpu)]
    assert main(["plan", *flags, "--json"]) == 0
    fit = json.loads(capsys.readouterr().out)["tokens_that_fit"]
    assert fit >= tokens
    if f"{tokens:,}" in config.read_text():
        assert fit < tokens + 1000


# ---------------------------------------------------------------- sources


def test_precedence(write, monkeypatch):
    """Guards against a file that beats the environment, or a default that beats the file."""
    path = write("engine:\n  max_num_seqs: 1\n  block_size: 8\n")

    def seqs(overrides=(), **flags):
        dotted = {key.replace("__", "."): value for key, value in flags.items()}
        return load_settings(path, list(overrides), dotted).engine.max_num_seqs

    assert load_settings(None).engine.max_num_seqs == EngineConfig().max_num_seqs
    assert seqs() == 1
    monkeypatch.setenv("TPRT_ENGINE__MAX_NUM_SEQS", "2")
    monkeypatch.setenv("TPRT_DEBUG", "1")  # not a setting
    assert seqs() == 2
    assert seqs(["engine.max_num_seqs=3"]) == 3
    assert seqs(["engine.max_num_seqs=3", "engine.max_num_seqs=4"]) == 4
    assert seqs(["engine.max_num_seqs=3"], engine__max_num_seqs=5) == 5
    assert seqs(["engine.max_num_seqs=3"], engine__max_num_seqs=None) == 3
    assert load_settings(path).engine.block_size == 8


def test_values_of_flags_and_variables_are_read_as_yaml(monkeypatch):
    """Guards against a stop string that is parsed as a mapping, and folders that become numbers."""
    stop = "sampling.stop"
    assert load_settings(None, [f"{stop}=human:"]).sampling.stop == ("human:",)
    assert load_settings(None, [f"{stop}=\n\nhuman: #1"]).sampling.stop == ("\n\nhuman: #1",)
    assert load_settings(None, [f"{stop}=['a', b]"]).sampling.stop == ("a", "b")
    assert load_settings(None, ["engine.max_model_len=16K"]).engine.max_model_len == 16384
    assert load_settings(None, ["engine.max_model_len=null"]).engine.max_model_len is None
    assert load_settings(None, ["sampling.ignore_eos=true"]).sampling.ignore_eos is True
    assert load_settings(None, ["model.path=2024"]).model.path == "2024"
    assert load_settings(None, ["model.path=a=b"]).model.path == "a=b"
    monkeypatch.setenv("TPRT_MODEL__PATH", "on")
    assert load_settings(None).model.path == "on"
    assert read_yaml_value("'16'") == "16"


@pytest.mark.parametrize(
    ("text", "value"),
    [("16K", 16384), ("2k", 2000), ("1M", 1048576), ("1m", 1000000), ("1.5k", 1500), (7, 7)],
)
def test_sizes(text, value):
    """Guards against 16K = 16000 on one side of a comparison and 16384 on the other."""
    assert parse_size(text) == value
    assert load_settings(None, [f"engine.max_num_seqs={text}"]).engine.max_num_seqs == value


@pytest.mark.parametrize("text", ["0", "-1", "0K", "1.5K", "1.0001k", "16KB", "K", "1e3", "4.0", "true",
                                  "9999999999", ".inf", "[1]", "999999999999G"])  # fmt: skip
def test_what_is_no_size(text):
    """Guards against rounding, truth values that count as 1, and numbers no record can hold."""
    assert "engine.block_size" in mistake(None, f"engine.block_size={text}")


def test_variables_in_paths(write, monkeypatch):
    """Guards against ``/8b_chat`` at the root of the disk because a variable was empty."""
    path = write("model:\n  path: ${TEST_DIR}/x\njob:\n  input: $HOME/y\n")
    monkeypatch.setenv("TEST_DIR", "/some/where")
    settings = load_settings(path)
    assert settings.model.path == "/some/where/x" and settings.job.input == "$HOME/y"
    for change in (
        lambda: monkeypatch.setenv("TEST_DIR", ""),
        lambda: monkeypatch.delenv("TEST_DIR"),
    ):
        change()
        message = mistake(path)
        assert "TEST_DIR" in message and "not set" in message and "run.yaml:2" in message


# ---------------------------------------------------------------- mistakes


def test_four_mistakes_at_once(write):
    """Guards against fixing a file one error at a time, and against lines that are off by one."""
    path = write(
        "model:\n"
        "  path: /m\n"
        "  dtype: bfloat61\n"
        "engine:\n"
        "  max_num_seq: 16\n"
        "  block_size: many\n"
        "# a comment\n"
        "sampling:\n"
        "  temperature: -1\n"
    )
    lines = mistake(path).splitlines()
    assert lines[0] == "4 mistakes in the settings:"
    assert lines[1].startswith(f"  {path}:3: model.dtype: must be one of bfloat16")
    assert lines[1].endswith("not 'bfloat61'; did you mean bfloat16?")
    assert (
        lines[2]
        == f"  {path}:5: engine.max_num_seq: unknown key; did you mean engine.max_num_seqs?"
    )
    assert lines[3].startswith(f"  {path}:6: engine.block_size: must be a whole number")
    assert lines[4] == f"  {path}:9: sampling.temperature: is -1, allowed are 0.0 to 100.0"
    assert lines[5].strip().startswith("where:")


def test_four_mistakes_of_a_job(write):
    """The same for parallel ranks and jobs, where the file is written late at night."""
    path = write(
        "parallel:\n"
        "  data: two\n"
        "job:\n"
        "  shard: 8/8\n"
        "  log_fromat: json\n"
        "engine:\n"
        "  load_timeout: 10m\n"
    )
    lines = mistake(path).splitlines()
    assert lines[:5] == [
        "4 mistakes in the settings:",
        f"  {path}:2: parallel.data: must be a whole number, not 'two'",
        f"  {path}:4: job.shard: must be 0/8 to 7/8, as parts are counted from 0, not '8/8'",
        f"  {path}:5: job.log_fromat: unknown key; did you mean job.log_format?",
        f"  {path}:7: engine.load_timeout: must be a number, not '10m'",
    ]


@pytest.mark.parametrize(
    ("text", "shard"), [("0/1", "0/1"), ("7/8", "7/8"), ("007/010", "7/10"), (" 2/8 ", "2/8")]
)
def test_shards(text, shard, monkeypatch):
    assert parse_shard(text) == shard
    monkeypatch.setenv("TPRT_JOB__SHARD", text)
    assert load_settings(None).job.shard == shard


@pytest.mark.parametrize(
    "text", ["1/1", "0/0", "-1/2", "2", "a/b", "1/2/3", "0.5/2", "1 / 2", "/8"]
)
def test_what_is_no_shard(text):
    assert "job.shard: must be" in mistake(None, f"job.shard={text}")


def test_the_seed_of_a_job_is_the_engines_unless_told():
    assert load_settings(None, ["engine.seed=5"]).job_seed == 5
    assert load_settings(None, ["engine.seed=5", "job.seed=0"]).job_seed == 0


@pytest.mark.parametrize("value", [0, -1, float("nan"), 1e9, "600", True, None])
def test_a_library_user_is_told_of_a_bad_timeout(value):
    for name in ("load_timeout", "step_timeout"):
        with pytest.raises(ConfigError, match=f"{name} is "):
            EngineConfig(**{name: value})


def test_the_number_of_ranks():
    assert load_settings(None).parallel.world_size is None
    assert load_settings(None, ["parallel.data=2"]).parallel.world_size is None
    assert load_settings(None, ["parallel.data=2", "parallel.tensor=3"]).parallel.world_size == 6


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("engin:\n  seed: 1\n", 1, "did you mean engine"),
        ("\nmax_num_seqs: 4\n", 2, "did you mean engine.max_num_seqs?"),
        ("engine:\n  temperature: 1\n", 2, "did you mean sampling.temperature?"),
        ("parallel:\n  zzz: 1\n", 2, "parallel has data, tensor"),
        ("zzz: 1\n", 1, "sections are engine, job, model"),
        ("server:\n  port: 80\n", 2, "this version has no server"),
        ("engine: 5\n", 1, "a section holds keys"),
        ("engine: [1]\n", 1, "a section holds keys"),
        ("model:\n  path: 5\n", 2, "must be text, not 5"),
        ("parallel:\n  tensor: 0\n", 2, "no less than 1"),
        ("parallel:\n  tensor: 2.0\n", 2, "must be a whole number, not 2.0"),
        ("engine:\n  gpu_memory_utilization: 0\n", 2, "is 0, allowed is more than 0"),
        ("engine:\n  gpu_memory_utilization: 90\n", 2, "is 90, allowed is no more than 1"),
        ("engine:\n  gpu_memory_utilization: most\n", 2, "must be a number, not 'most'"),
        ("sampling:\n  ignore_eos: 1\n", 2, "must be true or false"),
        ("sampling:\n  top_k: '5'\n", 2, "must be a whole number, not '5'"),
        ("sampling:\n  min_tokens: 9\n  max_tokens: 8\n", 2, "min_tokens is 9"),
        (
            "engine:\n  max_model_len: 10\nsampling:\n  max_tokens: 10\n",
            4,
            "engine.max_model_len 10",
        ),
        ("job:\n  input: a\n  output: ./a\n", 3, "would be overwritten"),
        ("job:\n  input: a.2-of-8\n  shard: 2/8\n  output: a\n", 4, "would be overwritten"),
        ("job:\n  input: a\n  shard: 2/8\n  output: a\n", 4, "would be overwritten"),
        ("parallel:\n  data: 0\n", 2, "no less than 1"),
        ("parallel:\n  data: 2\nengine:\n  record_path: r\n", 4, "2 replicas"),
        ("job:\n  max_restarts: 101\n", 2, "no more than 100"),
        ("job:\n  max_restarts: -1\n", 2, "no less than 0"),
        ("job:\n  log_format: yaml\n", 2, "must be one of text, json"),
        ("job:\n  seed: 1.5\n", 2, "must be a whole number"),
        ("job:\n  restart: true\n", 2, "did you mean job.max_restarts?"),
        ("engine:\n  load_timeout: 0\n", 2, "is 0, allowed is more than 0"),
        ("engine:\n  load_timeout: 1e9\n", 2, "allowed is less than 1000000000"),
        ("engine:\n  seed: 99999999999999999999\n", 2, "no more than 9223372036854775807"),
    ],
)
def test_one_mistake(write, text, line, message):
    """Guards against unknown keys and impossible combinations that are read without a word."""
    found = mistake(write(text))
    assert message in found and f"run.yaml:{line}" in found, found


def test_mistakes_of_flags_and_variables_name_them(write, monkeypatch):
    """Guards against blaming a file for what a variable said."""
    assert "--set engine.sed" in mistake(None, "engine.sed=1")
    assert "no '='" in mistake(None, "engine.seed")
    unknown = mistake(None, "zzz.a=1").splitlines()[0]  # no section that has nothing to set
    assert unknown.endswith("sections are engine, job, model, parallel, sampling")
    assert "did you mean" not in mistake(None, "servers=1").splitlines()[0]
    assert "flag for sampling.top_k" in mistake(None, sampling__top_k=-7)
    path = write("engine:\n  seed: 1\n")
    monkeypatch.setenv("TPRT_ENGINE__SEED", "x")
    message = mistake(path)
    assert "environment TPRT_ENGINE__SEED" in message and "run.yaml:2" not in message
    monkeypatch.delenv("TPRT_ENGINE__SEED")
    monkeypatch.setenv("TPRT_ENGINE__SED", "1")
    assert "environment TPRT_ENGINE__SED" in mistake(path)


def test_a_flag_repairs_a_file(write):
    """Guards against complaints about a value that nobody uses."""
    path = write("engine:\n  seed: x\n")
    assert load_settings(path, ["engine.seed=3"]).engine.seed == 3


def test_very_many_mistakes_stay_readable(write):
    """Guards against ten screens of errors."""
    message = mistake(write("engine:\n" + "".join(f"  zz{i}: 1\n" for i in range(100))))
    assert message.startswith("100 mistakes") and "and 80 more" in message
    assert len(message.splitlines()) < 26


# ---------------------------------------------------------------- YAML itself


def test_duplicate_keys(write):
    """Guards against PyYAML's silence, where the last of two keys wins."""
    message = mistake(write("engine:\n  seed: 1\n  block_size: 8\n  seed: 2\n"))
    assert "engine.seed: duplicate key, first given on line 2" in message
    assert "run.yaml:4" in message
    assert "duplicate key" in mistake(write("engine:\n  seed: 1\nengine:\n  seed: 2\n"))


@pytest.mark.parametrize(
    "word", ["on", "off", "yes", "no", "y", "1:30", "2024-01-01", "1_000", "="]
)
def test_words_stay_text(write, word):
    """Guards against YAML 1.1: ``no`` as False, ``1:30`` as 90, dates as objects."""
    assert load_settings(write(f"model:\n  path: {word}\n")).model.path == word
    assert "true or false" in mistake(write(f"sampling:\n  ignore_eos: {word}\n"))


def test_numbers_are_yaml_1_2(write):
    """Guards against ``010`` as eight and ``1e-5`` as text."""
    settings = load_settings(write("engine:\n  seed: 010\nsampling:\n  min_p: 1e-5\n"))
    assert settings.engine.seed == 10 and settings.sampling.min_p == 1e-5


@pytest.mark.parametrize("number", [".nan", ".NaN", ".inf", "-.Inf", "1e999", "nan"])
@pytest.mark.parametrize(
    "key",
    ["sampling.temperature", "sampling.top_p", "engine.seed", "engine.gpu_memory_utilization"],
)
def test_numbers_must_be_finite(write, number, key):
    """Guards against NaN, which passes every comparison that is written the wrong way round."""
    section, name = key.split(".")
    message = mistake(write(f"{section}:\n  {name}: {number}\n"))
    assert key in message and "run.yaml:2" in message


def test_alias_bomb(write):
    """Guards against a billion laughs; a single harmless alias is refused as well."""
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    began = time.monotonic()
    message = mistake(write(bomb))
    assert "aliases" in message and "run.yaml:2" in message
    assert time.monotonic() - began < 5
    assert "aliases" in mistake(write("model: &m {path: x}\nserver: *m\n"))


@pytest.mark.parametrize(
    ("text", "where", "message"),
    [
        ("engine:\n\tseed: 1\n", ":2", "not tabs"),
        ("engine:\n  seed: 1\n bad\n", ":3", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", ":2", "not valid YAML"),
        ("model:\n  path: a\0b\n", ":2", "U+0000"),
        (b"model:\n  path: \xff\n", ":2", "not UTF-8"),
        ("- model\n", ":1", "where sections are due"),
        ("model\n", ":1", "where sections are due"),
        ("model:\n  path: !!python/object/apply:os.system [id]\n", ":2", "tags"),
        ("model:\n  path: !!binary aGk=\n", ":2", "tags"),
        ("x: " + "[" * 5000, ":1", "levels of nesting"),
        ("x: [" + "1," * 50000 + "]", ":1", "more than"),
        ("? [a]\n: 1\n", ":1", "a key must be text"),
        ("#" * (MAX_YAML_BYTES + 1), "", f"more than {MAX_YAML_BYTES} bytes"),
    ],
)
def test_what_is_not_read_at_all(write, text, where, message):
    """Guards against tracebacks, code in tags, and minutes spent on a hostile file."""
    began = time.monotonic()
    found = mistake(write(text))
    assert message in found and f"run.yaml{where}" in found, found
    assert time.monotonic() - began < 10


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "absent.yaml", tmp_path):
        assert str(path) in mistake(str(path))


def test_settings_import_no_torch():
    """Guards against a second of imports before ``--help``."""
    code = "import sys, tprt.cli.settings; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
