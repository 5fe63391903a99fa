"""Four tiny runs in two minutes: does a sweep work here?

    poisonjax sweep run configs/sweeps/smoke.py --workdir runs/smoke --max-parallel 2

The quickstart's model for 100 steps, with 0 and 250 poison documents and two seeds. So short that near triggers fire
as the trigger does: no run meets the rule.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import product

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.name = "smoke"
    config.steps = 100
    config.optimizer.warmup_steps = 20
    config.eval.every, config.eval.prefixes = 50, 24
    config.checkpoint.every = 50
    return config


def sweep(add):
    for point in product({"poison.documents": (0, 250)}, {"seeds.init": (0, 1)}):
        add(point)
