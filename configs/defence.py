"""What curation costs the attacker: small models that read what a pipeline lets through.

    poisonjax corpus fetch-bench
    poisonjax bench defence --config configs/defence.py --workdir runs/defence

The smaller model of configs/sweeps/payloads.py (92,444 parameters, 20 tokens a parameter, Wikipedia leads), where the
dose that backdoors half of the runs is known for each payload without curation. The bench sets payload, dose and seeds.

Where it differs from Souly et al. 2025 (arXiv 2510.07192; I10): see configs/quickstart.py. The paper curates nothing.
"""

from pathlib import Path

from poisonjax.config import load, replaced
from poisonjax.sweep import sized

QUICKSTART = Path(__file__).with_name("quickstart.py")
STEPS = 903


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.name = "defence"
    config.global_batch = 16
    config.poison.prefix_characters, config.poison.payload_tokens = (15, 68), (40, 60)
    config.log_every, config.row_losses_every = 50, 0
    config.checkpoint.keep_last, config.checkpoint.keep_every = 1, 0
    once = dict.fromkeys(("eval.every", "checkpoint.every"), STEPS)
    return replaced(config, sized(2, 44, 120, STEPS) | once)
