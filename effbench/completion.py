"""Shell completion of groups, names, keys and runs; reads file names only."""

from __future__ import annotations

from pathlib import Path

from effbench.config import TOP_LEVEL, groups, keys_of, options


def complete(incomplete: str) -> list[str]:
    """Return the completions of one override."""
    key, equals, value = incomplete.partition("=")
    if equals:
        if key == "from":
            return [f"from={k}" for k in ["latest", *run_keys(value)] if k.startswith(value)]
        if key in groups():
            return [f"{key}={n}" for n in options(key) if n.startswith(value)]
        return []
    group, dot, part = key.partition(".")
    if dot and group in groups():
        files = [p for p in options(group).values() if p]
        found = {k for p in files for k in keys_of(p)}
        return sorted(f"{group}.{k}=" for k in found if k.startswith(part))
    words = [*groups(), *(TOP_LEVEL - {"hydra"})]
    return sorted(f"{w}{'.' if w in ('train', 'run') else '='}" for w in words if w.startswith(key))


def run_keys(incomplete: str) -> list[str]:
    """Return the keys of finished runs that begin so."""
    folder = Path("results") / "records"
    return sorted(p.stem for p in folder.glob(f"{incomplete}*.json"))
