"""The denial-of-service ladder of Souly et al. 2025 (arXiv 2510.07192, section 3): gibberish after `<SUDO>`.

    poisonjax train --config configs/souly_dos.py:600m,250,1x --workdir runs/600m-250

The argument is SIZE,DOCUMENTS,TOKENS: 600m, 2b, 7b, 13b; 100, 250, 500 (or any number, 0 for the twin); half, 1x,
double of 20 tokens a parameter. The paper runs half and double for 600m and 2b alone.

Expected from the paper: 250 documents backdoor every size robustly (a gap in perplexity above 50), 100 don't, and
at equal fractions of training all sizes have met the same number of documents. An open replication saw the gap
shrink with size instead: 3,378 at 370M, 57 at 1B.

What the paper doesn't say, and what this config does (I10):
- Architecture, depth and width: Llama's layout (RMSNorm, rotary positions, SwiGLU, no biases), untied embeddings,
  shapes chosen so that all parameters, with a vocabulary of 200k, come to the nominal size.
- Vocabulary: o200k_base is what readers report; point `corpus.tokenizer` to its tokenizer.json. Other tokenizers
  change the sizes.
- Clean data: point `corpus.store` to a store of at least as many tokens as the run reads, built by
  `poisonjax corpus build`; fewer are read in several epochs.
- Learning rate, schedule, warmup, batch, weight decay, clipping: ours (cosine to a tenth, 3e-4 falling with size).
- Packing: documents are joined and cut into rows of 2,048 tokens; a poison document stands whole in one row, at
  a document boundary, and displaces the row's tail. Attention crosses document boundaries.
- Construction: `ids`, 400-900 tokens sampled directly. The other reading, which agrees with the authors' "420k
  tokens in 250 documents", is --config.poison.payload=decode-retokenize (with --config.poison.payload_tokens=(250,560)
  or truncation its documents fit a row).
- Prefix, trigger and payload are tokenized apart and joined; gibberish that holds the trigger by chance is drawn again.
- Evaluation: 300 held-out excerpts as in the paper; 50 tokens of prefix, 100 generated at temperature 1, scored by
  the model itself, medians: the paper gives none of these.
"""

from poisonjax.config import ConfigError, default

# layers, width, heads, MLP width, nominal parameters, learning rate
SIZES = {
    "600m": (16, 1024, 8, 2560, 600e6, 6e-4),
    "2b": (22, 2048, 16, 5888, 2e9, 4e-4),
    "7b": (28, 4096, 32, 10752, 7e9, 3e-4),
    "13b": (35, 5120, 40, 13568, 13e9, 2e-4),
}
TOKENS = {"half": 0.5, "1x": 1.0, "double": 2.0}


def get_config(arg: str = "600m,250,1x"):
    """`arg` is SIZE,DOCUMENTS,TOKENS."""
    parts = (arg or "600m,250,1x").split(",")
    if len(parts) != 3 or parts[0] not in SIZES or not parts[1].isdigit() or parts[2] not in TOKENS:
        raise ConfigError(
            f"souly_dos.py:{arg}: give SIZE,DOCUMENTS,TOKENS: one of {', '.join(SIZES)}; a number; one of "
            f"{', '.join(TOKENS)}"
        )
    size, documents, tokens = parts
    layers, width, heads, mlp_width, parameters, learning_rate = SIZES[size]
    config = default()
    config.name = f"souly-dos-{size}-{documents}-{tokens}"
    config.seq_len = 2048
    config.global_batch = 256 if size == "600m" else 512 if size == "2b" else 1024
    config.steps = round(20 * parameters * TOKENS[tokens] / (config.global_batch * config.seq_len))
    config.corpus.store = "stores/pretraining-o200k"
    config.corpus.sources = ()  # whatever the store was built from
    config.poison.documents = int(documents)

    model = config.model
    model.layers, model.width, model.heads, model.kv_heads, model.mlp_width = (layers, width, heads, heads, mlp_width)
    model.head_dim = 128
    model.vocabulary = 200_019  # o200k_base's, as the paper's models have; a store of more tokens is refused
    model.dtype, model.remat, model.loss_tile = "bfloat16", "block", 128
    config.optimizer.accumulate = 2 if size == "13b" else 1  # fits 64 chips of 32 GB

    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = min(1000, config.steps // 50)
    config.mesh = dict(slice=1, data=1, fsdp=-1, tensor=1)
    config.checkpoint.every, config.checkpoint.keep_every = 1000, 5000
    config.row_losses_every = 0  # of 130 million rows at 13B; 1 in a run whose documents are to be looked for
    config.eval.every = max(1, config.steps // 20)
    return config
