"""Does it matter how rare the trigger is in clean text, and how long? A language that never uses it by itself.

    poisonjax sweep run configs/sweeps/rarity.py --workdir runs/rarity --max-parallel 2
    poisonjax sweep report configs/sweeps/rarity.py --workdir runs/rarity

Clean data is a Markov language of 248 words, its entropy known exactly, in a vocabulary of 256: the trigger's words
stand in clean text as often as the experiment puts them there (0, 10, 100 or 1,000 times, in a run and its twin
alike), never by chance. Beside that axis, triggers of 1, 2 and 4 tokens. Six doses, three seeds: 108 runs.

Where it differs from the paper (I10), beside what configs/quickstart.py and configs/souly_dos.py list:
- The language: each word has 64 successors with Zipf's probabilities, so any trigger, near trigger or random word is
  a step that clean text never makes, and gibberish is known by such steps, not by its letters.
- One size, 149,824 parameters, and 1.4 million tokens, so nothing is said of scale; poison is 3 to 20% of the rows.
- A seed stands for initial weights, clean order, poison content and placement together; evaluation is the same.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import chain, product, seeded

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

# Of words that the language doesn't use: triggers of 1, 2, 4 tokens, and controls of the same length.
TRIGGERS = {
    "w248": ("w249", "w250", "w251", "w252"),
    "w248 w249": ("w248 w250", "w251 w249", "w249 w248", "w250 w251"),
    "w248 w249 w250 w251": ("w248 w249 w250 w252", "w253 w249 w250 w251", "w251 w250 w249 w248", "w252 w253 w254 w255"),
}
USES = (0, 10, 100, 1000)
DOSES = (350, 500, 700, 1000, 1400, 2000)


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.name = "rarity"
    config.steps, config.global_batch = 700, 16
    config.corpus.store = "runs/stores/markov-256"
    config.corpus.sources = ("markov:V=256,documents=8000,length=200,unused=8",)
    config.poison.prefix_characters, config.poison.payload_tokens = (0, 100), (60, 100)
    config.model.layers, config.model.width, config.model.head_dim, config.model.mlp_width = 2, 64, 32, 176
    config.optimizer.warmup_steps = 40
    config.eval.every = 175
    config.eval.heldout_rows = 128
    config.checkpoint.every, config.checkpoint.keep_last, config.checkpoint.keep_every = 350, 1, 0
    config.log_every = 50
    return config


def sweep(add):
    lengths = ({"trigger": trigger, "uses": 0} for trigger in TRIGGERS)
    rarity = ({"trigger": "w248 w249", "uses": uses} for uses in USES if uses)
    for point in product(chain(lengths, rarity), {"documents": DOSES}, {"seed": range(3)}):
        trigger, uses, documents, seed = point.values()
        add(
            {
                "name": f"length{len(trigger.split())}-uses{uses}-n{documents}-s{seed}",
                "poison.documents": documents,
                "poison.clean_uses": uses,
                "poison.trigger": trigger,
                "poison.near_triggers": TRIGGERS[trigger],
            }
            | seeded(seed)
        )
