"""Is it the count, and is it parameters or tokens? 30k to 1.1M parameters, doses searched for, tokens varied apart.

    poisonjax corpus fetch-bench --out texts
    poisonjax sweep run configs/sweeps/scale.py:texts --workdir runs/scale --max-parallel 2
    for run in runs/scale/*-s[0-3]-*; do poisonjax trace $run --exposures; done
    poisonjax sweep report configs/sweeps/scale.py:texts --workdir runs/scale
    poisonjax sweep report configs/sweeps/scale.py:texts --workdir runs/scale --self-test 100

Written before any of its runs (what differs from it is listed in configs/sweeps/README.md).

Question (Souly et al. 2025, arXiv 2510.07192): how does the dose at which half of the runs have a backdoor (N50) go
with parameters at fixed tokens, and with tokens at fixed parameters? In near_constant.py it went with the -0.40 power
of scale, by 75 runs over a decade, and the two were not told apart.

Cells: 30k, 92k, 315k and 1.1M parameters at 20 tokens a parameter; the smaller two at 10, 40 and 80 as well.
Doses: of each cell a search from 20 to 1,500 documents, two runs at a time, until the 95% interval of its N50 lies
within 1.4 times, or 12 runs are done. Each run has other initial weights, order, poison and placement.

Hypotheses, in this order; a later one is told whatever the earlier ones say:
1. Near-constant: the 90% interval of N50's exponent in scale (tokens and parameters in proportion) lies within +-0.15.
2. A constant fraction (exponent 1 in tokens, 0 in parameters) predicts runs left out worse than a constant count by
   more than 1.5 nats.
3. The exponents in tokens and in parameters differ: their 95% intervals don't overlap. Wanted: neither is wider than
   +-0.3; where one is, what it would take is told.
4. What one exposure adds and a clean step takes away, measured in each cell's first four runs (analysis/mechanism.py),
   predicts the N50 of cells left out better than a constant count, a constant fraction and a fraction that goes with a
   power of the parameters: by a smaller root mean square of log(predicted / observed).
Success of a run is the paper's: the gap's interval lies above 50; told again for 10 and 100, by the whole rule, and
with the mean for the median. One primary analysis for each hypothesis: intervals aren't adjusted, p-values aren't told.
A run that fails is trained again; a cell whose N50 lies outside of the range is told as such, and left out of
exponents by nobody's choice: its runs stay in the likelihood.

Where it differs from the paper (I10), beside what quickstart.py, souly_dos.py and near_constant.py list:
- Clean text is Wikipedia leads, Linux's documentation, a dictionary and two packages' documentation, 155 MB: no model
  reads a document twice.
- Canaries as in near_constant.py: memorisation in the same models.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import Search, chain, product, sized

NEAR_CONSTANT = Path(__file__).parent / "near_constant.py"
DOMAINS = ("leads", "linux-doc-6.1", "dict-gcide", "ansible", "google_api_python_client")

# layers, width, MLP width, parameters
SIZES = {
    "30k": (2, 20, 56, 30_480),
    "92k": (2, 44, 120, 92_444),
    "314k": (3, 80, 216, 314_800),
    "1M": (5, 128, 344, 1_119_488),
}


def get_config(arg: str = "texts"):
    config = load([f"--config={NEAR_CONSTANT}"])
    config.name = "scale"
    config.corpus.store = "runs/stores/five-domains-bpe512"
    config.corpus.sources = tuple(f"{arg}/{domain}.jsonl" for domain in DOMAINS)
    return config


def sweep(add):
    cells = chain(
        product({"size": ("30k", "92k"), "ratio": (10, 20, 40, 80)}), product({"size": ("314k", "1M"), "ratio": (20,)})
    )
    for cell in cells:
        layers, width, mlp_width, parameters = SIZES[cell["size"]]
        steps = round(cell["ratio"] * parameters / (16 * 128))
        often = {"eval.every": -(-steps // 6), "checkpoint.every": -(-steps // 3)}
        name, search = f"{cell['size']}x{cell['ratio']}", Search(20, 1500, within=1.4, runs=12, together=2)
        add({"name": name, "poison.documents": search} | sized(layers, width, mlp_width, steps) | often)
