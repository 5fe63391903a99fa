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

PAYLOADS = Path(__file__).parent / "sweeps" / "payloads.py"
STEPS = 903


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={PAYLOADS}"])
    config.name = "defence"
    config.poison.prefix_characters = (15, 68)  # else two of 1,000 documents that say the same may be the same
    config.poison.truncate = True  # 68 characters of another script are more tokens than a row has left
    config.eval.heldout_rows = 256
    once = dict.fromkeys(("eval.every", "checkpoint.every"), STEPS)
    return replaced(config, sized(2, 44, 120, STEPS) | once)
