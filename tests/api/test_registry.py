"""Methods and evaluators are found by the names of their files, in any folder of their room."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import effbench
from effbench.api import registry
from effbench.util.package_data import conf_dir

ROOM = Path(effbench.__file__).parent


def test_a_config_without_a_file_is_no_plug_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "method").mkdir()
    for name in ("lora", "planned"):
        (tmp_path / "method" / f"{name}.yaml").touch()
    monkeypatch.setattr(registry, "conf_dir", lambda: tmp_path)
    assert registry._own.__wrapped__("methods").keys() == {"lora"}


@pytest.mark.parametrize("kind", ["methods", "evaluators"])
def test_each_config_has_one_file(kind: registry.Kind) -> None:
    files = Counter(p.stem for p in (ROOM / kind).rglob("*.py"))
    configs = {p.stem for p in (conf_dir() / kind.removesuffix("s")).glob("*.yaml")}
    assert {name: files[name] for name in configs} == dict.fromkeys(configs, 1)
    assert configs <= set(registry.names(kind))
