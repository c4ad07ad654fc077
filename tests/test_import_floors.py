"""The house has floors: a module imports only from floors below it, or inside its own package."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "tprt"
FLOORS = {
    0: {"config", "sampling_params", "batch", "errors", "faults", "host_limits", "log", "sizes"},
    1: {"distributed", "kernels", "tokenizer"},
    2: {"cache", "checkpoint"},
    3: {"layers"},
    4: {"models"},
    5: {"engine"},
    6: {"llm"},
    7: {"job", "server", "evaluation", "bench", "cli"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# What a floor must not know beyond what its height already forbids (the house's table).
FORBIDDEN = {("layers", "checkpoint"), ("models", "kernels"), ("engine", "checkpoint")}
DOORS = {"__init__", "__main__"}  # the package's own entrances see every floor


def imported_modules(path: Path) -> set[str]:
    """Every module a file imports, at any depth of nesting, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(dotted: str) -> str | None:
    parts = dotted.split(".")
    return parts[1] if parts[0] == "tprt" and len(parts) > 1 and parts[1] in FLOOR_OF else None


def climbs(path: Path) -> list[str]:
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here in DOORS:
        return []
    wrong = []
    for module in imported_modules(path):
        there = room_of(module)
        if there is None or there == here:
            continue
        cli_to_face = here == "cli" and FLOOR_OF[there] == 7
        down = FLOOR_OF[there] < FLOOR_OF[here]
        # Ground-floor values may use each other; no other room looks into its neighbour.
        ground = FLOOR_OF[here] == FLOOR_OF[there] == 0
        if not (down or ground or cli_to_face) or (here, there) in FORBIDDEN:
            wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    return wrong


def test_every_file_stands_on_a_floor():
    for path in PACKAGE.rglob("*.py"):
        first = path.relative_to(PACKAGE).with_suffix("").parts[0]
        assert first in FLOOR_OF or first in DOORS, f"{path} has no floor"


def test_no_import_climbs():
    wrong = [line for path in sorted(PACKAGE.rglob("*.py")) for line in climbs(path)]
    assert not wrong, "\n".join(wrong)


def test_the_checker_sees_a_climb(tmp_path, monkeypatch):
    """Guards against a checker that passes everything, lazy imports included."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    (tmp_path / "layers").mkdir()
    bad = tmp_path / "layers" / "bad.py"
    bad.write_text("def f():\n    from tprt.engine.sampler import Sampler\n    return Sampler\n")
    assert climbs(bad) == ["layers/bad.py imports tprt.engine.sampler.Sampler"]


def test_nothing_from_the_engine_up_names_a_model():
    """A second architecture is a file under models, a config, and nothing else."""
    names = re.compile(r"persimmon|gemma|adept|griffin", re.IGNORECASE)
    for room in ("engine", "llm", "job", "cli"):
        for path in (PACKAGE / room).rglob("*.py"):
            found = names.search(path.read_text("utf-8"))
            assert found is None, f"{path.relative_to(PACKAGE)} names {found[0]}"


def test_library_does_not_import_pydantic():
    """pydantic belongs to the edge: importing the library face must not pull it in."""
    code = "import sys, tprt.llm; assert 'pydantic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_and_import_are_light():
    """``tprt --help`` and ``import tprt`` import no torch; time is not asserted on shared machines."""
    for argument in ("['--help']", "['generate', '--help']"):
        code = (
            "import sys, contextlib, io\n"
            "from tprt.cli import main\n"
            "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
            f"    main({argument})\n"
            "assert 'torch' not in sys.modules, 'torch was imported'\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
    began = time.perf_counter()
    light = "import tprt, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", light], check=True)
    print(f"import tprt: {time.perf_counter() - began:.2f} s")
