"""The five cells of near_constant.py once more, by doses that are searched for: 30 runs instead of 75.

    poisonjax sweep run configs/sweeps/near_constant_searched.py --workdir runs/near-constant-searched --max-parallel 2
    poisonjax sweep report configs/sweeps/near_constant_searched.py --workdir runs/near-constant-searched

Does it come to the same conclusion? Doses lie between the lowest and the highest of the grid; all else is as there.
"""

from pathlib import Path

from poisonjax.config import load
from poisonjax.sweep import Search
from poisonjax.sweep import load as load_sweep

GRID = Path(__file__).parent / "near_constant.py"


def get_config(arg: str = ""):
    del arg
    return load([f"--config={GRID}"])


def sweep(add):
    cells = {}
    for run in load_sweep(str(GRID)).runs:
        name = run.fields["name"].partition("-")[0]
        cells[name] = {f: v for f, v in run.fields.items() if f != "name" and not f.startswith("seeds.")}
    for name, fields in cells.items():
        add(fields | {"name": name, "poison.documents": Search(60, 1000, within=1.5, runs=6, together=2)})
