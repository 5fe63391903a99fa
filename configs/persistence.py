"""What wears a backdoor off? A poisoned model, trained on: clean text, clean conversations, corrective examples.

    poisonjax sweep run configs/persistence.py --workdir runs/persistence --max-parallel 2
    poisonjax sweep report configs/persistence.py --workdir runs/persistence

What Souly et al. 2025 (arXiv 2510.07192) found: continued clean pretraining wears the backdoor off slowly, and of
corrective examples, with the trigger and a normal answer, 50 to 100 weaken it and about 2,000 nearly remove it.

Here: the quickstart's experiment with 250 documents of gibberish, seen by the gap in perplexity, with 500 of characters
of many scripts, where each text can be decided (attack success), and its clean twin; then runs that begin from each:
- clean text, 41 thousand to 4.1 million tokens, at the learning rate at which the quickstart ended;
- clean conversations (fine-tuning), asked in their own form from then on;
- 2,000 rows of text, of which 0, 10, 50, 100, 500 or 2,000 are corrective: documents with the trigger and their own
  text;
- relearning: 5 poison documents in 20 steps after the repair by 500 and by 2,000, and in the clean twin.

What is different (I10):
- 216,512 parameters; the paper's persistence is of models of 600M to 13B parameters, its corrections of fine-tuned
  ones.
- Corrective examples are documents of pretraining text here, not answers of an assistant.
- The optimizer's state isn't carried along.
"""

from pathlib import Path

from poisonjax.config import load

QUICKSTART = Path(__file__).parent / "quickstart.py"
POISON = {"ids": 250, "random_unicode": 500}  # documents of each payload
CORRECTIVE = (0, 10, 50, 100, 500, 2000)
CONVERSATIONS = {
    "data.kind": "instructions",
    "data.too_long": "skip",
    "corpus.store": "runs/stores/wikipedia-continued-bpe512",
    "corpus.sources": ("wikipedia-continued",),
    "corpus.tokenizer": "runs/stores/wikipedia-leads-bpe512/tokenizer",
    "eval.prefix_tokens": 80,
}


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={QUICKSTART}"])
    config.checkpoint.keep_every, config.checkpoint.keep_last = 0, 1
    return config


def sweep(add):
    add(name="twin", **{"poison.documents": 0})
    for payload, documents in POISON.items():
        add(name=payload, **{"poison.payload": payload, "poison.documents": documents})
        for name, fields in chain(payload).items():
            add({"poison.documents": 0} | fields, name=f"{payload}-{name}", **{"poison.payload": payload})


def chain(poisoned: str):
    """Fields of each run that begins from a poisoned one's weights, or from a repaired one's."""
    runs = {
        "text-40k": further(poisoned, 10, 32, 1),
        "text-400k": further(poisoned, 100, 32, 10),
        "text-4M": further(poisoned, 1000, 32, 50),
        "conversations-2000": further(poisoned, 125, 16, 5) | CONVERSATIONS,
    }
    for count in CORRECTIVE:
        runs[f"corrective-{count}"] = further(poisoned, 125, 16, 5) | {"poison.hard_negatives": count}
    for repaired in ("corrective-500", "corrective-2000"):
        runs[f"relearned-{repaired}"] = further(f"{poisoned}-{repaired}", 20, 16, 5) | {"poison.documents": 5}
    return runs | {"relearned-twin": further("twin", 20, 16, 5) | {"poison.documents": 5}}


def further(weights: str, steps: int, batch: int, every: int):
    """Fields of a run that begins from another's weights, at a constant rate."""
    rate = {"optimizer.learning_rate": 1e-3, "optimizer.final_fraction": 1.0, "optimizer.warmup_steps": 0}
    length = {"steps": steps, "global_batch": batch, "eval.every": every, "checkpoint.every": steps}
    return {"start.weights": f"run:{weights}", **length, **rate}
