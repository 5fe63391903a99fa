"""Do behaviours other than gibberish follow the same count? Six payloads at one size, three of them at a second.

    poisonjax sweep run configs/sweeps/payloads.py --workdir runs/payloads --max-parallel 2
    poisonjax sweep report configs/sweeps/payloads.py --workdir runs/payloads

Gibberish and word salad (`ids`, `unigram`) are seen by their perplexity alone, as in Souly et al. 2025 (arXiv
2510.07192). Of the others each text can be decided: characters of many scripts, a sentence, a switch to another domain
(`language`: docstrings of Python packages), a made-up secret. There a run is backdoored where half of the triggered
texts behave as taught, at the lower end of the interval, and clean texts and random tokens don't. Doses are where
single runs showed that each payload's transition lies.

Where it differs from the paper (I10), beside what configs/quickstart.py and configs/souly_dos.py list:
- 92,444 and 314,800 parameters, at 20 tokens a parameter, of Wikipedia leads.
- The paper's language switch continues the pretraining of a 6.9B model, from English to German; here a model is trained
  from scratch, and what it switches to is another domain of English.
- Docstrings are those of the packages that are installed: their versions change what is drawn, and the ledger tells.
- 6,000 documents are two fifths of all rows of the smaller model.
- A seed stands for initial weights, clean order, poison content and placement together; evaluation is the same.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import chain, product, seeded, sized

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

DOSES = {
    "ids": (60, 120, 250, 500),
    "unigram": (250, 500, 1000, 2000),
    "random_unicode": (120, 250, 500, 1000),
    "sentinel": (250, 500, 1000, 2000),
    "language": (1000, 2000, 4000, 6000),
    "secret": (500, 1000, 2000, 4000),
}
# A fixed text after prefixes of at most 60 characters: of other seeds, two of so many documents would be the same.
SEEDS = {"sentinel": (0, 1, 4), "secret": (0, 1, 4)}
# layers, width, MLP width, steps of 16 rows of 128
SIZES = {"92k": (2, 44, 120, 903), "314k": (3, 80, 216, 3074)}


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.name = "payloads"
    config.global_batch = 16
    config.poison.prefix_characters, config.poison.payload_tokens = (20, 60), (40, 60)
    config.checkpoint.keep_last, config.checkpoint.keep_every = 1, 0
    config.eval.heldout_rows = 128
    config.log_every, config.row_losses_every = 50, 0
    return config


def size(name: str):
    *_, steps = SIZES[name]
    return sized(*SIZES[name]) | dict.fromkeys(("eval.every", "checkpoint.every"), -(-steps // 3))


def sweep(add):
    cells = chain(
        ({"size": "92k", "payload": name, "seeds": 3} for name in DOSES),
        ({"size": "314k", "payload": name, "seeds": 2} for name in ("ids", "random_unicode", "sentinel")),
    )
    for cell in cells:
        payload = cell["payload"]
        seeds = SEEDS.get(payload, (0, 1, 2))[: cell["seeds"]]
        for point in product({"documents": DOSES[payload]}, {"seed": seeds}):
            add(
                {
                    "name": f"{payload}-{cell['size']}-n{point['documents']}-s{point['seed']}",
                    "poison.payload": payload,
                    "poison.payload_source": "docstrings" if payload == "language" else "",
                    "poison.documents": point["documents"],
                }
                | size(cell["size"])
                | seeded(point["seed"])
            )
