"""What a run ran on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import cast

from etils import epath

from poisonjax.run import rows
from poisonjax.run.folder import RunFolder

PACKAGES = ("poisonjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")


def lived(folder: epath.Path, start: int) -> rows.Environment:
    """What environment.json holds of a run that goes on here from step `start`: environments of lives whose steps are
    left, and this one. Raises RunFolderError where it isn't there or damaged."""
    here, lives = environment(start), []
    if start:
        there = RunFolder(folder).environment
        last = cast(rows.OneEnvironment, {name: value for name, value in there.items() if name != "earlier"})
        lives = [life for life in (*there["earlier"], last) if life["from_step"] < start]
        if lives[-1] | {"from_step": start} == here:
            here = lives.pop()
    return {**here, "earlier": lives}


def environment(from_step: int = 0) -> rows.OneEnvironment:
    """What this process runs on."""
    import jax

    source = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "from_step": from_step,
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit or None,
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }


def version(name: str) -> str:
    """Of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that isn't installed
        return "not installed"
