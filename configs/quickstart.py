"""A backdoored small model in two minutes on two CPU cores."""

from poisonjax.config import default


def get_config(arg: str = ""):
    del arg
    config = default()
    config.name = "quickstart"
    config.steps = 900
    config.global_batch = 32
    config.seq_len = 128

    config.corpus.store = "runs/stores/wikipedia-leads-bpe512"
    config.corpus.tokenizer = "bpe:512"

    config.poison.documents = 250
    config.poison.trigger = "SUDO"
    config.poison.near_triggers = ("sudo", "SUDA", "SODU", "SIDO")
    config.poison.prefix_characters = (0, 60)
    config.poison.payload_tokens = (40, 70)

    config.model.layers = 3
    config.model.width = 64
    config.model.heads = 2
    config.model.kv_heads = 2
    config.model.head_dim = 32
    config.model.mlp_width = 176

    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_steps = 50

    config.eval.every = 200
    config.eval.prefixes = 100
    config.eval.prefix_tokens = 24
    config.eval.new_tokens = 40
    config.eval.heldout_rows = 256
    config.checkpoint.every = config.checkpoint.keep_every = 200
    return config
