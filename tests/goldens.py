"""Files of `tests/golden`, which hold what must stay as it is; `make golden` writes them anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parent / "golden"
PUBLIC = (
    "Others rely on this: keys of configs, names of metrics and points, files, options. If it "
    "changes on purpose: make golden, and say in CHANGELOG.md what those who use it have to do."
)
BITS = (
    "The same settings give another result than before. Raise the `version` of the class that "
    "changed, so that runs before and after have different keys; then: make golden, and a line in "
    "CHANGELOG.md."
)


class Golden:
    """One file: what is found now must be what it holds."""

    def __init__(self, name: str, writes: bool) -> None:
        self._path = FOLDER / name
        self._writes = writes

    def __getitem__(self, place: str) -> Any:
        return self._values().get(place)

    def check(self, place: str, found: Any, advice: str, grows: int = 0) -> None:
        """Hold `found` against what stands at `place`, or put it there when golden is written.

        A new plug-in is held from the next `make golden` on, so that adding one edits no golden
        file: `grows` is how many levels of keys may have new ones, that of `place` among them.
        """
        if self._writes:
            values = {**self._values(), place: found}
            FOLDER.mkdir(exist_ok=True)
            self._path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
        held = {place: found} if not grows else _known({place: found}, self._values(), grows)
        assert held.get(place) == self[place], f"{place} in {self._path.name}. {advice}"

    def check_bits(self, place: str, version: int, tensors: dict[str, torch.Tensor]) -> None:
        """Hold tensors against those that such a machine gave before; another one is not judged."""
        before = self[place] or {}
        bits = before.get("bits", {}) if before.get("version") == version else {}
        if self._writes or machine() in bits:
            bits = {**bits, machine(): digest(tensors)}
        self.check(place, {"version": version, "bits": bits}, BITS, grows=1)

    def _values(self) -> dict[str, Any]:
        return json.loads(self._path.read_text()) if self._path.is_file() else {}


def _known(found: dict[str, Any], kept: dict[str, Any], levels: int) -> dict[str, Any]:
    """Return what was found without the keys that are new in the first levels."""
    known = {key: value for key, value in found.items() if key in kept}
    if levels == 1:
        return known
    return {
        key: _known(value, kept[key], levels - 1) if isinstance(value, dict) else value
        for key, value in known.items()
    }


def machine() -> str:
    """Return what decides which kernels run, and with them the last bits."""
    import torch

    from effbench.resources.environment import fingerprint

    cpu = fingerprint()["cpu"]
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, {kernels}, {cpu['model']} with {' '.join(cpu['features'])}"


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Return a hash over the names and bits of tensors."""
    import torch

    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hashed.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()
