"""The house: imports go down its floors only, and no room looks into the one that is called its equal."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "poisonjax"
# From the top floor down. Rooms of one floor don't import each other but where `BESIDE` says so.
FLOORS = (
    ("commands",),
    ("bench",),
    ("attest", "report"),
    ("serve",),
    ("guard",),
    ("trace",),
    ("plan", "sweep", "audit"),
    ("training",),
    ("scan",),
    ("analysis",),
    ("evaluation",),
    ("weights",),
    ("run",),
    ("data",),
    ("config",),
    ("poison",),
    ("corpus",),
    ("model",),
    ("engines", "sinks"),
    ("processes", "startup", "files", "streams", "visible"),
)
BESIDE = ()
DOOR = "__init__"  # what programs and notebooks import from outside


def floor(room: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if room in rooms)


def room_of(path: Path) -> str:
    inside = path.relative_to(PACKAGE).parts
    return inside[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms of this package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if name.startswith("poisonjax.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path):
    room = room_of(path)
    if room in (DOOR, "__main__"):
        return
    for other in imports(path) - {room}:
        assert (room, other) in BESIDE or floor(other) > floor(room), f"{room} imports {other}, which isn't below it"


def test_no_command_imports_another():
    commands = {path.stem for path in (PACKAGE / "commands").glob("*.py")}
    shared = {"exit_codes", "reported", "__init__"}
    for name in commands - {"main"}:
        tree = ast.parse((PACKAGE / "commands" / f"{name}.py").read_text())
        modules = [f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names]
        others = {m.split(".")[2] for m in modules if m.startswith("poisonjax.commands.")}
        assert others <= shared, f"{name} imports {others - shared}"


def test_nothing_starts_jax_before_its_settings_stand():
    """`startup.start_jax` comes too late for a JAX that is imported: on CPU half of its devices, and of its speed."""
    before = "poisonjax.commands.main, poisonjax.training.process, poisonjax.training.stop, poisonjax.sweep.launch"
    code = f"import sys, {before}, poisonjax.run.folder, poisonjax.run.heartbeat; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
