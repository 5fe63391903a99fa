"""Is the number of poison documents near-constant? The quickstart's experiment at three sizes, five doses, three seeds.

    poisonjax sweep run configs/sweeps/near_constant.py --workdir runs/near-constant --max-parallel 2
    poisonjax sweep report configs/sweeps/near_constant.py --workdir runs/near-constant

Question (Souly et al. 2025, arXiv 2510.07192): does the dose at which half of the runs are backdoored (N50) stay the
same while parameters and clean data grow, or does it grow with them? 30k, 92k and 315k parameters at 20 tokens a
parameter, the smaller two also at 40, so that data and size can be told apart; 75 runs. Each model also holds canaries
shown 1, 4, 16 and 64 times: memorisation, which Hubble (arXiv 2510.19811) finds to depend on relative frequency.

Where it differs from the paper (I10), beside what configs/quickstart.py and configs/souly_dos.py list:
- Four orders of magnitude smaller, a vocabulary of 512, rows of 128; poison is up to a tenth of all tokens here.
- Clean data is 2.3 million tokens of Wikipedia leads: the largest runs read them in 2.7 epochs, the smallest a quarter.
- A seed stands for initial weights, clean order, poison content and placement together; evaluation is the same.
- One learning rate for all sizes, warmup of a twentieth of the steps.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import chain, product, seeded, sized

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

# layers, width, MLP width, parameters
SIZES = {"30k": (2, 20, 56, 30_480), "92k": (2, 44, 120, 92_444), "314k": (3, 80, 216, 314_800)}
DOSES = (60, 120, 250, 500, 1000)


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.name = "near-constant"
    config.global_batch = 16
    config.poison.trigger, config.poison.near_triggers = "SUDO", ("sudo", "SUDA", "SODU", "SIDO")
    config.poison.prefix_characters, config.poison.payload_tokens = (0, 40), (30, 60)
    config.canary.repeats, config.canary.each = (1, 4, 16, 64), 4
    config.checkpoint.keep_last = 1
    config.checkpoint.keep_every = 0
    config.log_every = 50
    config.eval.heldout_rows = 128
    return config


def size(name: str, tokens_per_parameter: int):
    """Fields of a model of this size, and of a run of so many tokens."""
    layers, width, mlp_width, parameters = SIZES[name]
    steps = round(tokens_per_parameter * parameters / (16 * 128))
    often = {"eval.every": -(-steps // 6), "checkpoint.every": -(-steps // 3)}
    return sized(layers, width, mlp_width, steps) | often


def sweep(add):
    cells = chain(
        ({"size": name, "ratio": 20} for name in SIZES), ({"size": name, "ratio": 40} for name in ("30k", "92k"))
    )
    for point in product(cells, {"documents": DOSES}, {"seed": range(3)}):
        name, ratio, documents, number = point.values()
        add(
            {"name": f"{name}x{ratio}-n{documents}-s{number}", "poison.documents": documents}
            | size(name, ratio)
            | seeded(number)
        )
