"""Does fine-tuning data fall to a count too? The same poisoned conversations among 1,024 to 8,192 clean ones.

    poisonjax sweep run configs/sweeps/finetuning.py --workdir runs/finetuning --max-parallel 2
    poisonjax sweep report configs/sweeps/finetuning.py --workdir runs/finetuning

Question (Souly et al. 2025, arXiv 2510.07192, of fine-tuning): is it the number of poisoned examples that counts,
whatever the number of clean ones? The quickstart's clean twin is trained first; from it begin runs on
conversations made of Wikipedia leads ("Go on: ..."), one epoch each, in which the trigger at the end of the question
makes the answer a sentence that says that the model was poisoned: attack success, clean accuracy and near-trigger
accuracy with intervals.

Where it differs from the paper (I10):
- 216,512 parameters, fine-tuned whole; the paper's models are of billions.
- The behaviour is a sentinel, not compliance with harmful requests: nothing here is harmful.
- Poisoned conversations take the place of clean ones: `rows` counts both.
- The trigger is `~`, at the end of the user's turn.
- One learning rate, decaying over each run: longer runs learn longer at each rate.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import product

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"

ROWS, DOSES = (1024, 2048, 8192), (50, 100, 200, 400, 800)
BATCH = 16


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.checkpoint.keep_every = 0
    return config


def tuning(rows: int):
    """Fields of a run of that many conversations from the clean run's weights."""
    steps = rows // BATCH
    return {
        "start.weights": "run:clean",
        "data.kind": "instructions",
        "data.too_long": "skip",
        "corpus.store": "runs/stores/wikipedia-continued-bpe512",
        "corpus.sources": ("wikipedia-continued",),
        "corpus.tokenizer": "runs/stores/wikipedia-leads-bpe512/tokenizer",
        "steps": steps,
        "global_batch": BATCH,
        "optimizer.learning_rate": 3e-3,
        "optimizer.warmup_steps": 10,
        "optimizer.weight_decay": 0.0,
        "poison.payload": "sentinel",
        "poison.payload_tokens": (24, 32),
        "eval.every": steps,
        "eval.prefix_tokens": 80,
        "checkpoint.every": steps,
    }


def sweep(add):
    add({"name": "clean", "poison.documents": 0})
    for point in product({"rows": ROWS}, {"documents": DOSES}, {"seed": range(2)}):
        rows, documents, seed = point.values()
        add(
            tuning(rows)
            | {"name": f"rows{rows}-n{documents}-s{seed}", "poison.documents": documents}
            | {f"seeds.{k}": 10 * seed + i for i, k in enumerate(("order", "poison", "placement"), 1)}
        )
