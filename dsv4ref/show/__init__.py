"""What a reader sees: figures, tables, panels and source listings.

Everything here lays out results that other modules computed; nothing here measures, predicts or judges. The modules
are imported one by one (``from dsv4ref.show import tables``), because figures need matplotlib and panels need
ipywidgets while the command line needs neither. What they display is an `Html`, which JupyterLab and the static book
both render.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Html:
    """Something to display: HTML for a browser, plain text for a terminal and for screen readers of the raw notebook.

    Args:
        html: a fragment that needs no outside URL and sets no background colour, so that it reads in both themes.
        text: what stands in its place where HTML cannot be shown.
    """

    html: str
    text: str

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/html": self.html, "text/plain": self.text}
