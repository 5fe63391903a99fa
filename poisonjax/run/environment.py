"""What a run ran on."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path

from poisonjax.run.rows import Environment

PACKAGES = ("poisonjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorstore", "numpy")


def environment() -> Environment:
    """What environment.json holds."""
    import jax

    source = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": commit or None,
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
    }
