"""``tprt config show``: settings that can be fed back, where each comes from, and their digest."""

import argparse
import json
import os
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tprt.cli import config
from tprt.cli.settings import KEYS, load_settings, resolve_settings
from tprt.errors import ConfigError

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("TPRT_"):
            monkeypatch.delenv(name)
    for name in ("PERSIMMON_DIR", "RECURRENTGEMMA_DIR", "INPUT", "OUTPUT"):  # of the shipped files
        monkeypatch.setenv(name, f"/{name.lower()}")


@pytest.fixture
def show(capsys):
    def show(*argv: str) -> str:
        parser = argparse.ArgumentParser()
        config.add_parser(parser.add_subparsers())
        assert config.run(parser.parse_args(["config", "show", *argv])) == 0
        captured = capsys.readouterr()
        assert not captured.err
        return captured.out

    return show


def digest(text: str) -> str:
    """The last word of the last line."""
    return text.splitlines()[-1].split()[-1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_what_is_shown_can_be_fed_back(path, show, tmp_path):
    text = show("--config", str(path))
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_settings(str(again)) == load_settings(str(path))
    assert show("--config", str(again)) == text
    assert yaml.safe_load(text), "other programs read it as well"


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
AWKWARD = st.sampled_from(["1e5", "on", "no", "null", "~", "010", "0x1", "- a", "a: b", "#", "'", '"',
                           "\\n", "\n", " x ", "\u2028", "\x85", "\ufeff", "\x7f", "😀", "*a", "!b",
                           "2024-01-01", "1:30", ".inf", "=", "<<", "{", "[", "%", "@"])  # fmt: skip


@given(st.lists(AWKWARD | TEXTS, min_size=1, max_size=4))
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_survives(tmp_path, texts):
    """Guards against text that comes back as a number, as nothing or as another text."""
    resolved = resolve_settings(None, [], {"sampling.stop": texts, "model.path": "/a"})
    text = config.as_yaml(resolved)
    assert text.isascii()
    path = tmp_path / "again.yaml"
    path.write_text(text)
    assert load_settings(str(path)) == resolved.settings
    assert len(config.as_table(resolved).splitlines()) == 1 + sum(map(len, KEYS.values()))


def test_every_setting_has_a_line(show):
    lines = show("--resolved").splitlines()
    shown = [line.split()[0] for line in lines[:-1]]
    assert sorted(shown) == sorted(f"{s}.{k}" for s, keys in KEYS.items() for k in keys)
    assert lines[-1].startswith("digest ") and len(digest(lines[-1])) == 12
    assert all(line.endswith("  default") for line in lines[:-1])


def test_sources(show, tmp_path, monkeypatch):
    """Each from another place, and the place that wins where there are several."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "# a comment\nengine:\n  seed: 1\n  block_size: 8\n  max_num_seqs: 2\n  max_model_len: 1K\n"
    )
    monkeypatch.setenv("TPRT_ENGINE__BLOCK_SIZE", "32")
    monkeypatch.setenv("TPRT_ENGINE__MAX_NUM_SEQS", "3")
    monkeypatch.setenv("TPRT_ENGINE__SEED", "4")
    argv = ("--set", "engine.max_num_seqs=5", "--set", "engine.seed=6", "--seed", "7")
    lines = show("--resolved", "--config", str(path), *argv).splitlines()
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in lines[:-1]}
    assert rows["engine.max_model_len"] == ["1024", f"{path}:6"]
    assert rows["engine.block_size"] == ["32", "environment TPRT_ENGINE__BLOCK_SIZE"]
    assert rows["engine.max_num_seqs"] == ["5", "--set"]
    assert rows["engine.seed"] == ["7", "flag"]
    assert rows["engine.look_ahead"] == ["1", "default"]
    sources = json.loads(show("--resolved", "--json", "--config", str(path), *argv))["sources"]
    assert sources == {key: row[1] for key, row in rows.items()}


def test_json(show):
    told = json.loads(show("--json", "--temperature", "0.5"))
    assert told["settings"]["sampling"]["temperature"] == 0.5
    assert set(told) == {"settings", "digest"}
    assert told["digest"] == digest(show("--temperature", "0.5"))


def test_flags_are_those_of_generate(show):
    argv = ("--model", "/m", "--nproc", "4", "--set", "parallel.data=2", "--shard", "1/2")
    told = json.loads(show("--json", *argv))["settings"]
    assert told["model"]["path"] == "/m" and told["job"]["shard"] == "1/2"
    assert told["parallel"] == {"tensor": 2, "data": 2}, "--nproc counts all ranks"


def test_the_digest_is_of_values_and_not_of_sources(show, tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(
        "sampling:\n  temperature: 0\nengine:\n  max_model_len: 16K\njob:\n  shard: 02/8\n"
    )
    by_file = digest(show("--config", str(path)))
    sets = ("sampling.temperature=0.0", "engine.max_model_len=16384", "job.shard=2/8")
    argv = [word for text in sets for word in ("--set", text)]
    assert digest(show(*argv)) == by_file == digest(show("--resolved", *argv))
    monkeypatch.setenv("TPRT_ENGINE__MAX_MODEL_LEN", "16384")
    monkeypatch.setenv("TPRT_JOB__SHARD", "2/8")
    assert digest(show("--temperature", "0")) == by_file
    monkeypatch.undo()
    defaults = digest(show())
    assert defaults != by_file
    assert digest(show("--set", "engine.seed=0")) == defaults, "a default that somebody wrote down"


@pytest.mark.parametrize(
    "change",
    ["engine.seed=1", "sampling.stop=x", "model.path=p", "parallel.data=2", "job.seed=0",
     "sampling.ignore_eos=true", "engine.sparse_rows=0", "sampling.temperature=0.99999999"],
)  # fmt: skip
def test_another_value_gives_another_digest(change):
    assert load_settings(None, [change]).digest() != load_settings(None).digest()


def test_the_output_is_the_same_to_the_byte_everywhere(tmp_path):
    """Not of the terminal, the locale, the time or the hash seed."""
    code = (
        "import argparse; from tprt.cli import config; p = argparse.ArgumentParser()\n"
        "config.add_parser(p.add_subparsers())\n"
        "import sys; assert 'torch' not in sys.modules\n"
        "a = ['config', 'show', '--resolved', '--config', 'configs/tiny.yaml', '--set',"
        " 'sampling.stop=[\\u00e9, \"\\n\"]']\n"
        "config.run(p.parse_args(a))"
    )
    outputs = []
    for extra in (
        {"PYTHONHASHSEED": "1", "COLUMNS": "40", "LC_ALL": "C", "PYTHONUTF8": "0"},
        {"PYTHONHASHSEED": "2", "COLUMNS": "200", "LC_ALL": "C.UTF-8", "FORCE_COLOR": "1"},
    ):
        env = os.environ | {"PYTHONPATH": str(ROOT)} | extra
        command = [sys.executable, "-c", code]
        outputs.append(subprocess.run(command, env=env, cwd=ROOT, check=True, stdout=-1).stdout)
    assert outputs[0] == outputs[1] and outputs[0].isascii()


def test_mistakes_are_told_as_by_every_command(show):
    with pytest.raises(ConfigError, match=r"did you mean engine\.seed"):
        show("--set", "engine.sed=1")
    with pytest.raises(ConfigError, match="nproc"):
        show("--nproc", "3", "--set", "parallel.data=2")
