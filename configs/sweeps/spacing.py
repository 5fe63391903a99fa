"""Why would a count matter? Doses by where in the run they stand, and by how common the trigger is in clean text.

    poisonjax sweep run configs/sweeps/spacing.py --workdir runs/spacing --max-parallel 2
    for run in runs/spacing/*-s[0-3]-*; do poisonjax trace $run --exposures; done
    poisonjax sweep report configs/sweeps/spacing.py --workdir runs/spacing

Written before any of its runs (what differs from it is listed in configs/sweeps/README.md).

If each exposure adds the same and clean steps take nothing away, the dose at which half of the runs have a backdoor
(N50) depends neither on where the documents stand nor on how long the run is: a count. Parameters, tokens and steps are
the same in all cells, so that a constant count and a constant fraction are one prediction.

Cells: near_constant.py's model of 92,444 parameters at 20 tokens a parameter; documents drawn over the whole run, at
equal distances, over its first or last quarter, all at its beginning, all at its end (where the learning rate is a
tenth of its peak); drawn over the whole run, the trigger standing in 100 and 1,000 clean rows too (of 14,448).
Doses: of each cell a search from 30 to 3,000 documents, two runs at a time, until the 95% interval of its N50 lies
within 1.5 times, or 8 runs are done.

Hypotheses, in this order; a later one is told whatever the earlier ones say:
1. Clean steps take away: N50 of documents at the beginning is larger than of such over the whole run (the ratio's 95%
   interval lies above 1), and of the first quarter larger than of the last.
2. What an exposure adds and a clean step takes away, measured in a cell's first four runs (analysis/mechanism.py),
   predicts the N50 of cells left out better than a constant count; so does what is measured in all other cells' runs.
   Better: a smaller root mean square of log(predicted / observed).
3. 100 clean uses move N50 by less than 1.5 times, 1,000 too (rarity.py saw no change, in a synthetic language).
Success of a run is the paper's: the gap's interval lies above 50. One primary analysis for each hypothesis: intervals
aren't adjusted, p-values aren't told. A run that fails is trained again; a cell whose N50 lies outside of the range is
told as such.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import Search, chain, sized

NEAR_CONSTANT = Path(__file__).parent / "near_constant.py"
PLACEMENTS = {
    "whole": "uniform",
    "even": "even",
    "first-quarter": "uniform:window=0-0.25",
    "last-quarter": "uniform:window=0.75-1",
    "begin": "begin",
    "end": "end",
}


def get_config(arg: str = ""):
    del arg
    config = load([f"--config={NEAR_CONSTANT}"])
    config.name = "spacing"
    steps = 903
    often = {"eval.every": -(-steps // 6), "checkpoint.every": -(-steps // 3)}
    config.update_from_flattened_dict(sized(2, 44, 120, steps) | often)
    return config


def sweep(add):
    placed = ({"name": name, "poison.placement": placement} for name, placement in PLACEMENTS.items())
    common = ({"name": f"uses{uses}", "poison.clean_uses": uses} for uses in (100, 1000))
    for cell in chain(placed, common):
        add(cell | {"poison.documents": Search(30, 3000, within=1.5, runs=8, together=2)})
