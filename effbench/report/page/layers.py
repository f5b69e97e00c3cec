"""Heat maps of how alike the layers of a model are, as SVG that needs no script.

A cell is a square of one of `STEPS` shades; squares of one shade are one path, so that a map of 30
layers takes a few kB.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from effbench.report.layer_similarity import Layers
from effbench.report.table import points
from effbench.results.records import Record
from effbench.results.store import Store, evaluation_stem
from effbench.util.errors import UserError

MATRICES = {"attention": "attention maps (cosine)", "keys": "keys (CKA)", "values": "values (CKA)"}
STEPS = 16
MAPS = 8
"""Most runs and operating points that are shown."""


def layer_maps(records: Sequence[Record], store: Store) -> list[tuple[str, str]]:
    """Return a title and the maps below it, for each evaluation of similarity whose folder is here.

    Args:
        records: The runs.
        store: Where their folders are.
    """
    found: list[tuple[str, str]] = []
    for record in records:
        for point in points(record):
            layers = _layers(record, point, store)
            if layers is not None and len(found) < MAPS:
                title = f"{record.label} {point}".rstrip() + f", {record.key[:8]}"
                found.append((title, "".join(_drawn(layers, *each) for each in MATRICES.items())))
    return found


def _layers(record: Record, point: str, store: Store) -> Layers | None:
    folder = store.run(record.key).path
    name = f"{evaluation_stem('similarity', point)}.layers.jsonl"
    if not (folder / "evaluations" / name).is_file():
        return None
    try:
        return Layers.read(folder, point)
    except UserError:  # what is damaged is not shown
        return None


def _drawn(layers: Layers, name: str, title: str) -> str:
    """Return one matrix, the first layer at the bottom left."""
    matrix = layers.matrix(name)
    size, shades = len(matrix), dict[int, list[str]]()
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            shade = min(STEPS, max(0, round(value * STEPS)))
            shades.setdefault(shade, []).append(f"M{column} {size - 1 - row}h1v1h-1z")
    paths = "".join(
        f'<path class="heat" fill-opacity="{shade / STEPS:.3g}" d="{"".join(cells)}"/>'
        for shade, cells in sorted(shades.items())
    )
    lowest = min(min(row) for row in matrix)
    words = f"{title}: {size} layers from bottom left; full colour is 1, lowest {lowest:.2f}"
    return (
        f'<figure class="map"><svg viewBox="0 0 {size} {size}" role="img" '
        f'aria-label="{escape(words)}">{paths}</svg><figcaption>{escape(words)}</figcaption></figure>'
    )
