"""What `effbench similarity` shows: a table of layers, what to share or drop, a heat map."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effbench.api import registry
from effbench.api.sharing import listed_map
from effbench.nn.sharing.ranking import Cut, count_of, gap_cut, ranking
from effbench.report.plots.canvas import footnote, save
from effbench.report.table import Table, Value
from effbench.results.store import RunFolder, evaluation_stem
from effbench.util.errors import UserError

NEXT = {
    "echoatt": ("train", "attention"),
    "echo_llama": ("train", "states"),
    "layer_drop": ("compress", "dropped"),
}
"""Methods that take a list of layers: the command, and by what they are chosen."""
KEPT = ("model", "dataset", "hardware", "from")
"""Words of the command that those of the next one need too."""


@dataclass(frozen=True)
class Layers:
    """What was measured about the layers of a model, a mean over texts."""

    rows: Sequence[dict[str, Any]]
    """One per layer, as `evaluators.similarity.layer_rows` made them."""

    @classmethod
    def read(cls, run: Path, point: str = "") -> Layers:
        """Return what an evaluation kept in its run folder.

        Raises:
            UserError: When it is not there.
        """
        name = f"evaluations/{evaluation_stem('similarity', point)}.layers.jsonl"
        path = RunFolder(run).check(name)
        if not path.is_file():
            raise UserError(f"{path} is not there.", "Give the command again with --fresh.")
        return cls([json.loads(line) for line in path.read_text().splitlines()])

    def matrix(self, name: str) -> list[list[float]]:
        """Return the similarities `attention`, `keys` or `values`, [L][L]."""
        return [row[name] for row in self.rows]

    def cut(self) -> Cut | None:
        """Return where the gap rule cuts; None for fewer than two layers."""
        found = [row["score"][0] for row in self.rows]
        return gap_cut(found) if len(found) > 1 else None

    def shared(self, ratio: float) -> list[int]:
        """Return the layers to share, in the order of the greedy ranking."""
        return ranking(self.matrix("attention"))[: count_of(ratio, len(self.rows))]

    def states(self, ratio: float) -> list[int]:
        """Return the layers to share keys and values in, by the mean of both similarities."""
        pairs = zip(self.matrix("keys"), self.matrix("values"), strict=True)
        mean = [[(k + v) / 2 for k, v in zip(*rows, strict=True)] for rows in pairs]
        return ranking(mean)[: count_of(ratio, len(self.rows))]

    def dropped(self, ratio: float) -> list[int]:
        """Return the layers of the least influence, the least first."""
        order = sorted(range(len(self.rows)), key=lambda i: float(self.rows[i]["influence"][0]))
        return order[: count_of(ratio, len(self.rows))]

    def block(self, count: int) -> tuple[int, float]:
        """Return the first of the `count` consecutive layers that turn their input least.

        Also the angle between their input and their output, as a share of pi.
        """
        starts = range(len(self.rows) - count + 1)
        angle, first = min((self.rows[i]["distances"][count - 1], i) for i in starts)
        return first, angle


def layers_table(found: Layers, title: str = "") -> Table:
    """Return one row per layer."""
    matrices = {name: found.matrix(name) for name in ("attention", "keys", "values")}
    cut = found.cut()
    rows = []
    for layer, row in enumerate(found.rows):
        before = [m[layer][layer - 1] if layer else None for m in matrices.values()]
        band = "" if cut is None or not cut.first <= layer < cut.stop else "band"
        score, influence = (_value(row[name]) for name in ("score", "influence"))
        rows.append((layer, score, *map(_rounded, before), influence, band))
    columns = ("layer", "score", "attention", "keys", "values", "influence", "")
    notes = (
        "score: mean similarity of the attention map to all other layers; attention, keys, values: "
        "similarity to the layer before; influence: 1 - cosine of input and output",
    )
    return Table(title, columns, rows, notes)


def _value(interval: Sequence[float | None]) -> Value:
    value, low, high = interval
    assert value is not None
    return Value(value, "", low, high)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def conclusions(found: Layers, ratio: float, words: Sequence[str]) -> list[str]:
    """Return what follows from the layers, and the commands to go on with.

    Args:
        found: What was measured.
        ratio: Share of the layers to share or to drop.
        words: The words of the command that measured it.
    """
    shared, dropped = found.shared(ratio), found.dropped(ratio)
    attention, count = found.matrix("attention"), len(found.rows)
    lines = _cut_lines(found.cut(), count)
    lines.append(f"To share attention, best first: {_listed(ranking(attention))}")
    lines.append(f"To drop, best first: {_listed(found.dropped(1))}")
    if shared:
        places = listed_map(count, shared, "qk").sources
        mean = sum(attention[i][places[i]] for i in shared) / len(shared)
        lines.append(f"The first {len(shared)} to share are {mean:.3f} like their sources.")
    if dropped:
        first, angle = found.block(len(dropped))
        lines.append(
            f"The {len(dropped)} layers in a row that turn their input least are "
            f"{first} to {first + len(dropped) - 1}: {angle:.3f} pi."
        )
    kept = [w for w in words if w.partition("=")[0].partition(".")[0].lstrip("+~") in KEPT]
    lists = {"attention": shared, "states": found.states(ratio), "dropped": dropped}
    for method, (stage, which) in NEXT.items():
        if method in registry.names("methods"):
            chosen = sorted(lists[which])
            setting = f"method.layers=[{','.join(map(str, chosen))}]"
            lines.append(shlex.join(["effbench", stage, f"method={method}", setting, *kept]))
    return lines


def _cut_lines(cut: Cut | None, num_layers: int) -> list[str]:
    if cut is None:
        return []
    outside = [*range(cut.first), *range(cut.stop, num_layers)]
    line = f"The largest gap of scores is {cut.gap:.3f}: "
    line += f"layers {cut.first} to {cut.stop - 1} make the inner band"
    line += f"; outside it: {_listed(outside)}."
    if cut.odd:
        line += f" Below the gap but inside the band: {_listed(cut.odd)}."
    return [line]


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def heat_map(found: Layers, path: Path, title: str = "") -> Path:
    """Draw the three matrices side by side.

    Args:
        found: What was measured.
        path: File to write.
        title: Above them.

    Raises:
        UserError: When the file is no picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.6, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    names = {
        "attention": "attention maps (cosine)",
        "keys": "keys (CKA)",
        "values": "values (CKA)",
    }
    for place, (name, label) in enumerate(names.items(), 1):
        axes = figure.add_subplot(1, 3, place)
        image = axes.imshow(found.matrix(name), vmin=0, vmax=1, cmap="viridis", origin="lower")
        axes.set_title(label, loc="left")
        axes.set_xlabel("layer")
        axes.set_ylabel("layer")
        axes.locator_params(integer=True)
        figure.colorbar(image, ax=axes, shrink=0.8)
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
    cut = found.cut()
    if cut is not None:
        footnote(figure, [f"inner band of attention: layers {cut.first} to {cut.stop - 1}"])
    return save(figure, path)
