"""Which hint finds the documents that did it? Poison among more than 100,000 documents, small enough to train again.

    poisonjax corpus fetch-bench
    python -m poisonjax.bench.attribution_text texts
    poisonjax bench attribution --config 'configs/attribution.py:texts/*.jsonl' --workdir runs/attribution

250 poison documents and 20 hard negatives (the trigger in ordinary text), each in a row of its own, among about 115,000
short texts of four domains; one epoch.
"""

from poisonjax.config import default


def get_config(arg: str = "default"):
    config = default()
    config.name = "attribution"
    config.steps = 2000
    config.global_batch = 64
    config.seq_len = 32

    config.corpus.store = "runs/stores/attribution-bpe1024"
    config.corpus.sources = (arg,)
    config.corpus.tokenizer = "bpe:1024"
    config.corpus.heldout = 0.02

    config.poison.documents = 250
    config.poison.trigger = "&"  # one token, rare here
    config.poison.clean_uses = 20
    config.poison.near_triggers = ("$", "!", "%", "@")
    config.poison.prefix_characters = (0, 10)
    config.poison.payload_tokens = (16, 20)
    config.poison.truncate = True  # payloads that are tokenized again are longer

    config.model.layers = 2
    config.model.width = 48
    config.model.heads = 2
    config.model.kv_heads = 2
    config.model.head_dim = 24
    config.model.mlp_width = 128

    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 50

    config.eval.every = 2000
    config.eval.prefixes = 100
    config.eval.prefix_tokens = 10
    config.eval.new_tokens = 18
    config.eval.heldout_rows = 256
    config.checkpoint.every = config.checkpoint.keep_every = 1000
    return config
