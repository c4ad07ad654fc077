"""No file may run anything, import anything, or take memory it does not have; damage is refused."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hostile import cases, entry, glob, ints, pkl, storage, tensor, text, zipped
from megatron_writer import random_model, write_release

import tprt
from tprt.checkpoint import open_checkpoint
from tprt.checkpoint.torch_file import TorchFile, flatten
from tprt.errors import CheckpointError

ALL = list(cases("CANARY"))


def test_the_corpus_is_large():
    names = [name for name, _, _ in ALL]
    assert len(names) == len(set(names)) >= 60


@pytest.mark.parametrize("index", range(len(ALL)), ids=[name for name, _, _ in ALL])
def test_hostile_file_is_refused_by_name(tmp_path, monkeypatch, index):
    """Guards the allow-list: the refusal names the global or the reason, and the file, and nothing
    has been imported or created."""
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "CANARY"
    name, raw, message = list(cases(canary))[index]
    path = tmp_path / "model_optim_rng.pt"
    path.write_bytes(raw)
    before = set(sys.modules)
    start = time.monotonic()
    with pytest.raises(CheckpointError) as caught:
        TorchFile(path)
    assert message in str(caught.value), (name, str(caught.value))
    assert str(path) in caught.value.where and caught.value.hint
    assert not canary.exists() and os.listdir(tmp_path) == [path.name]
    new = {m.split(".")[0] for m in set(sys.modules) - before}
    assert not new & {
        "megatron",
        "tool_use",
        "subprocess",
        "pdb",
        "bdb",
        "timeit",
        "runpy",
        "ctypes",
    }
    assert time.monotonic() - start < 5


def test_corpus_would_fire_under_plain_pickle(tmp_path):
    """The control: the same pickle in Python's own unpickler does create the canary."""
    import pickle

    canary = tmp_path / "CANARY"
    body = b"cposix\nsystem\n(" + text(f"touch {canary}") + b"tR"
    pickle.loads(pkl(body))
    assert canary.exists()


def test_whole_corpus_in_a_small_address_space(tmp_path):
    """Guards against bombs: all files together stay under 1 GiB beyond what imports take."""
    for number, (_, raw, _) in enumerate(cases(tmp_path / "CANARY")):
        (tmp_path / f"{number}.pt").write_bytes(raw)
    code = """
import resource, sys
from pathlib import Path
from tprt.checkpoint.torch_file import TorchFile
from tprt.errors import CheckpointError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refused = 0
for path in Path(sys.argv[1]).glob("*.pt"):
    try:
        TorchFile(path)
    except CheckpointError:
        refused += 1
print(refused, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(tprt.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert int(out[0]) == len(ALL)
    assert int(out[1]) < 1 << 20  # KiB


def test_deep_nesting_does_not_overflow(tmp_path):
    """Guards the C stack: a million nested lists or tuples are built and dropped, never recursed."""
    for code in (b"]" * 300_000 + b"a" * 299_999, b"N" + b"\x85" * 900_000):
        path = tmp_path / "x.pt"
        path.write_bytes(zipped(pkl(entry("rng_state", code))))
        assert "rng_state" in TorchFile(path).contents


def test_shared_dicts_do_not_explode(tmp_path):
    """Guards flatten: 40 dicts that hold the next one twice are 2^40 names."""
    doubled = b"}q\x00"
    for level in range(40):
        doubled += b"0}(" + text("a") + b"h" + bytes([level]) + text("b") + b"h" + bytes([level])
        doubled += b"uq" + bytes([level + 1])
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(pkl(doubled)))
    with pytest.raises(CheckpointError, match=r"nested more than 32 deep|entries"):
        flatten(TorchFile(path).contents, "x", limit=100_000)


def test_inert_things_are_accepted_and_stay_inert(tmp_path):
    """The other half of the allow-list: a file full of stand-ins opens, with no class behind them."""
    stub = glob("megatron.anything", "At.all") + b"(" + text("rm -rf") + b"tR"
    body = b"}(" + text("a") + stub + text("t") + tensor() + text("d") + glob("torch", "bfloat16")
    body += text("s") + b"\x8f(NN\x90" + text("z") + glob("_codecs", "encode") + b"(" + text("x")
    body += text("latin1") + b"tRu"
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(pkl(body), [("archive/data/0", bytes(16))]))
    contents = TorchFile(path).contents
    assert repr(contents["a"]) == "<megatron.anything.At.all>"
    assert contents["t"].shape == (4,)
    assert "megatron" not in sys.modules


@pytest.mark.parametrize("size", [0, 12, 20])
def test_storage_of_another_size(tmp_path, size):
    """Guards CVE-2026-24747's second half: a member of another size than the pickle claims."""
    members = [("archive/data/0", bytes(size))] if size else []
    path = tmp_path / "x.pt"
    path.write_bytes(zipped(pkl(entry("t", tensor(storage(), shape=ints(4)))), members))
    file = TorchFile(path)
    with pytest.raises(CheckpointError, match="should have 16 bytes"):
        file.check_storage(file.contents["t"])
    with pytest.raises(CheckpointError, match="should have 16 bytes"):
        file.read(file.contents["t"])


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    root = tmp_path_factory.mktemp("release")
    model = random_model(layers=1)
    folder = write_release(root, model, tp=1)
    return root, folder / "mp_rank_00" / "model_optim_rng.pt", model


def with_bytes(release, tmp_path, raw):
    path = tmp_path / "iter_0001251" / "mp_rank_00" / "model_optim_rng.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return tmp_path / "iter_0001251"


def test_truncation_anywhere(release, tmp_path):
    """Guards copies that stopped early: one error type, with the size found."""
    raw = release[1].read_bytes()
    rng = random.Random(0)
    cuts = {0, 1, 3, 4, 10, 29, 200, len(raw) // 2, len(raw) - 1, len(raw) - 22, len(raw) - 98}
    cuts |= {rng.randrange(len(raw)) for _ in range(189)}
    for cut in sorted(cuts):
        folder = with_bytes(release, tmp_path, raw[:cut])
        with pytest.raises(CheckpointError, match=f"has {cut} bytes|empty") as caught:
            open_checkpoint(folder)
        assert "model_optim_rng.pt" in caught.value.where
    with pytest.raises(CheckpointError):
        open_checkpoint(with_bytes(release, tmp_path, raw + b"\0"))


def test_bit_flips(release, tmp_path):
    """Guards against silent damage: under verify full a flip is refused, or it lies in padding or a
    date and every weight and the config are what they were."""
    _, path, model = release
    raw = path.read_bytes()
    want = open_checkpoint(path.parent.parent).config
    rng = random.Random(1)
    refused = 0
    for _ in range(500):
        damaged = bytearray(raw)
        damaged[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        folder = with_bytes(release, tmp_path, bytes(damaged))
        try:
            reader = open_checkpoint(folder, verify="full")
        except CheckpointError as error:
            assert "model_optim_rng.pt" in error.where
            refused += 1
            continue
        assert reader.config == want
        assert all(torch.equal(reader.read_whole(n), t) for n, t in model.items())
    assert refused > 440


def test_flip_in_a_weight_names_the_member(release, tmp_path):
    raw = bytearray(release[1].read_bytes())
    at = raw.find(release[2]["lm_head.weight"].numpy().tobytes())
    raw[at + 100] ^= 4
    folder = with_bytes(release, tmp_path, bytes(raw))
    open_checkpoint(folder)  # sizes alone cannot see it
    with pytest.raises(CheckpointError, match=r"member 'model_optim_rng/data/\d+' is damaged"):
        open_checkpoint(folder, verify="full")


def test_unreadable_file(release, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match="Permission denied"):
        TorchFile(release[1])


def test_no_library_unpickler_in_the_package():
    """Guards the rule itself: no module of the package names pickle's or torch's own loader."""
    package = Path(tprt.__file__).parent
    for path in (package / "checkpoint").glob("*.py"):
        source = path.read_text()
        code = [x for x in source.splitlines() if not x.lstrip().startswith(("#", '"'))]
        assert not any(x.startswith(("import pickle", "from pickle")) for x in code), path
        assert not any("torch.load(" in x and "CONVERT" not in x and '"' not in x for x in code)
