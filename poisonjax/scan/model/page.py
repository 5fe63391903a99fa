"""A scan of a model as one static page."""

import base64
import io
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from matplotlib.figure import Figure

from poisonjax.visible import visible

if TYPE_CHECKING:
    from poisonjax.scan.model.scan import Found

SHOWN = 20  # candidates
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("poisonjax.scan.model", "."), autoescape=True, undefined=jinja2.StrictUndefined
)
_TEMPLATES.filters["visible"] = visible


def page(found: "Found") -> str:
    """HTML; what the model wrote is data in it, never markup."""
    return _TEMPLATES.get_template("page.html").render(found=found, shown=found.candidates[:SHOWN], image=_image(found))


def _image(found: "Found") -> str:
    """How far strings move the model: candidates, and strings like them."""
    figure = Figure(figsize=(6.4, 2.6), layout="constrained")
    axes = figure.subplots()
    values = [one.value for one in found.candidates]
    edges = np.linspace(min([0.0, *found.null, *values]), 1.02 * max([1.0, *found.null, *values]), 60).tolist()
    axes.hist(found.null, edges, color="#999999", label="strings like the candidates")
    axes.hist(values, edges, color="#d55e00", alpha=0.8, label="candidates")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("change of what is written, robust standard deviations")
    axes.set_ylabel("strings")
    axes.legend(frameon=False, fontsize=9)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=144)
    return base64.b64encode(data.getvalue()).decode()
