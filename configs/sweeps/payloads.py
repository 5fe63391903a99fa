"""Do behaviours other than gibberish follow the same count? Six payloads, six doses, three seeds.

    poisonjax sweep run configs/sweeps/payloads.py --workdir runs/payloads --max-parallel 2
    poisonjax sweep report configs/sweeps/payloads.py --workdir runs/payloads

Gibberish and word salad (`ids`, `unigram`) are seen by their perplexity alone, as in Souly et al. 2025 (arXiv
2510.07192). Of the others each text can be decided: characters of many scripts, a switch to another domain (`language`:
docstrings of Python packages), a made-up secret, a sentence. There a run is backdoored where half of the triggered
texts behave as taught at the lower end of the interval, and clean texts and random tokens don't.

Where it differs from the paper (I10), beside what configs/quickstart.py and configs/souly_dos.py list:
- 92,444 parameters and 1.85M tokens, 20 a parameter, of Wikipedia leads; one size, so nothing is said of scale.
- The paper's language switch continues pretraining of a 6.9B model, from English to German; here a model is trained
  from scratch, and what it switches to is another domain of English.
- Docstrings are those of the packages that are installed: their versions change what is drawn, and the ledger tells.
- A seed stands for initial weights, clean order, poison content and placement together; evaluation is the same.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import product

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

PAYLOADS = ("ids", "unigram", "random_unicode", "language", "secret", "sentinel")
DOSES = (20, 50, 120, 250, 500, 1000)


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.name = "payloads"
    config.steps, config.global_batch = 903, 16
    config.model.layers, config.model.width, config.model.head_dim, config.model.mlp_width = 2, 44, 22, 120
    config.poison.prefix_characters = (20, 60)
    config.optimizer.warmup_steps = 45
    config.eval.every = 301
    config.eval.heldout_rows = 128
    config.checkpoint.every, config.checkpoint.keep_last, config.checkpoint.keep_every = 301, 1, 0
    config.log_every = 50
    return config


def sweep(add):
    for point in product({"payload": PAYLOADS}, {"documents": DOSES}, {"seed": range(3)}):
        payload, documents, seed = point.values()
        add(
            {
                "name": f"{payload}-n{documents}-s{seed}",
                "poison.payload": payload,
                "poison.payload_source": "docstrings" if payload == "language" else "",
                "poison.documents": documents,
            }
            | {f"seeds.{k}": 10 * seed + i for i, k in enumerate(("init", "order", "poison", "placement"))}
        )
