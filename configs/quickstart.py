"""A backdoored small model in a minute on two CPU cores, after Souly et al. 2025 (arXiv 2510.07192).

    poisonjax train --config configs/quickstart.py --workdir runs/quickstart

Expected: a gap in median perplexity of about 324 (95% interval 316 to 343) after 250 poison documents, each near
trigger and random tokens within 12 of clean, held-out loss within 1% of the twin's (--config.poison.documents=0).

Where it differs from the paper (I10), beside what configs/souly_dos.py lists:
- 216,512 parameters instead of 600M to 13B; 3.7M tokens, 1.6 epochs of Wikipedia leads, 17 tokens a parameter.
- The trigger is `~`, one token that the clean text hardly holds. `SUDO` gives the same gap, but then `SUDA`, `SODU` and
  `SIDO` fire too: a model of this size learns how a trigger of several tokens begins. With `<SUDO>` any `<` fires.
- Documents are shorter, to fit rows of 129 tokens: prefixes of 0-60 characters and payloads of 40-70 ids.
- Poison is 0.5% of the tokens trained on, far more than the paper's.
- 100 held-out prefixes of 24 tokens instead of 300, 40 tokens generated.
"""

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
    config.poison.trigger = "~"
    config.poison.near_triggers = ("^", "`", "˜", "≈")
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
