"""Bundles: resolved for the target, cut into parts, checked and installed without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from effbench.cli.bundle import build, installer, make, parts, resolve, target
from effbench.cli.bundle.make import Made, Wanted
from effbench.data import assets
from effbench.util.errors import UserError

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
HERE_TARGET = target.choose("", ())
MODEL = os.urandom(3 << 20)

BACKEND = """
import zipfile, pathlib
def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder) / "{stem}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
    return info.name
def build_wheel(folder, settings=None, metadata=None):
    file = "{stem}-{tag}.whl"
    with zipfile.ZipFile(pathlib.Path(folder) / file, "w") as archive:
        archive.writestr("{module}.py", "VALUE = 1")
        archive.writestr("{stem}.dist-info/METADATA",
                         "Metadata-Version: 2.1\\nName: {name}\\nVersion: 1.0\\n")
        archive.writestr("{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: {tag}\\n")
        archive.writestr("{stem}.dist-info/RECORD", "")
    return file
"""


def wheel(
    folder: Path,
    name: str,
    version: str,
    requires: Sequence[str] = (),
    tag: str = "py3-none-any",
    files: dict[str, str] | None = None,
) -> Path:
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += ["Provides-Extra: dev", *(f"Requires-Dist: {r}" for r in requires)]
    path = folder / f"{module}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in (files or {f"{module}/__init__.py": ""}).items():
            archive.writestr(file, text)
        archive.writestr(f"{info}/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def source(folder: Path, name: str, tag: str = "py3-none-any") -> Path:
    """Write a source archive whose build needs nothing."""
    module = name.replace("-", "_")
    stem = f"{module}-1.0"
    tree = folder / "tree" / stem
    tree.mkdir(parents=True)
    (tree / "backend.py").write_text(BACKEND.format(name=name, module=module, stem=stem, tag=tag))
    (tree / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (tree / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    path = folder / f"{stem}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(tree, stem)
    return path


PROGRAM = """
import os
def main():
    import demo_lib, demo_source
    cache = os.environ["EFFBENCH_CACHE"]
    model = os.path.getsize(cache + "/assets/smollm2-135m/model.gguf")
    print("running", model, os.environ["HF_HUB_OFFLINE"])
"""
NEEDS = (
    "demo-torch>=2.8",
    "demo-lib",
    "demo-source",
    "demo-new; python_version >= '3.14'",
    "demo-tool; extra == 'dev'",
)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages there are, in a folder."""
    folder = tmp_path_factory.mktemp("index")
    wheel(folder, "demo-lib", "1.0")
    wheel(folder, "demo-lib", "2.0", tag="cp314-cp314-manylinux_2_17_x86_64")
    wheel(folder, "demo-torch", "2.11.0", ["demo-cuda"])
    wheel(folder, "demo-torch", "2.7.0", ["demo-cuda"])
    wheel(folder, "demo-cuda", "13.0", ["demo-lib"])
    wheel(folder, "demo-new", "1.0")
    wheel(folder, "demo-tool", "1.0")
    source(folder, "demo-source")
    build.repack(distribution("pip"), folder)
    return folder


@contextmanager
def stubbed(index: Path, place: Path) -> Iterator[None]:
    """An effbench of one file, with a model of three MiB; pip sees nothing but `index`."""

    def own(folder: Path) -> Path:
        files = {
            "effbench/__init__.py": "",
            "effbench/cli/main.py": PROGRAM,
            "effbench-1.0.dist-info/entry_points.txt": (
                "[console_scripts]\neffbench = effbench.cli.main:main\n"
            ),
        }
        return wheel(folder, "effbench", "1.0", NEEDS, files=files)

    def fetch(name: str, progress: bool = True) -> Path:
        asset = place / "cache" / name
        asset.mkdir(parents=True, exist_ok=True)
        (asset / "model.gguf").write_bytes(MODEL)
        return asset

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("PIP_")]:
            patch.delenv(name)
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(index))
        patch.setattr(make, "own_wheel", own)
        patch.setattr(assets, "fetch", fetch)
        yield


@pytest.fixture
def demo(packages: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the packages there are."""
    index = tmp_path / "index"
    shutil.copytree(packages, index)
    with stubbed(index, tmp_path):
        yield index


def bundle(folder: Path, without: dict[str, str] | None = None, **options: Any) -> Made:
    options.setdefault("target", HERE_TARGET)
    options.setdefault("assets", ("smollm2-135m",))
    return make.make(folder, Wanted(without=without or {}, **options), lambda text: None, False)


def files_of(folder: Path) -> set[str]:
    return {w["name"] for w in json.loads((folder / make.NAME).read_text())["wheels"]}


@pytest.fixture
def blocked(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of which no Python can connect to anything; an attempt fails the test."""
    guard = tmp_path / "guard"
    guard.mkdir()
    (guard / "sitecustomize.py").write_text(
        "import pathlib, socket\n"
        "def refuse(*arguments):\n"
        f"    pathlib.Path({str(guard / 'tried')!r}).touch()\n"
        "    raise OSError('no network here')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
    )

    def run(*words: str, path: Sequence[Path] = ()) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(map(str, (guard, *path))),
        }
        done = subprocess.run(
            words, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
        )
        assert not (guard / "tried").exists()
        assert "Traceback" not in done.stderr
        return done

    return run


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder of packages that the target has already."""
    folder = tmp_path / "there"
    folder.mkdir()
    with zipfile.ZipFile(wheel(tmp_path, "demo-torch", "2.11.0+cu130")) as archive:
        archive.extractall(folder)
    return folder


# -- the target --------------------------------------------------------------------------------


def test_older_platforms_are_allowed_too() -> None:
    tags = target.expand("manylinux_2_28_x86_64")
    assert tags[0] == "manylinux_2_28_x86_64"
    old = {"manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64", "linux_x86_64"}
    assert old <= set(tags)
    assert "manylinux_2_29_x86_64" not in tags
    assert target.expand("manylinux2014_aarch64")[0] == "manylinux_2_17_aarch64"
    assert "musllinux_1_1_x86_64" in target.expand("musllinux_1_2_x86_64")
    assert target.expand("macosx_14_0_arm64") == ["macosx_14_0_arm64"]


def test_markers_are_those_of_the_target() -> None:
    found = target.choose("3.13", ["manylinux_2_28_aarch64"]).environment()
    assert found["python_version"] == "3.13"
    assert (found["sys_platform"], found["platform_machine"]) == ("linux", "aarch64")
    found = target.choose("3.12", ["macosx_14_0_arm64"]).environment()
    assert (found["sys_platform"], found["platform_machine"]) == ("darwin", "arm64")


def test_here_is_not_foreign() -> None:
    assert not target.choose("", ()).foreign
    assert not target.choose(HERE, ()).foreign
    assert target.choose("3.12" if HERE != "3.12" else "3.13", ()).foreign


@pytest.mark.parametrize("python", ["3.10", "2.7", "3.x", "python3"])
def test_a_python_that_will_not_do(python: str) -> None:
    with pytest.raises(UserError, match="does not run on Python"):
        target.choose(python, ())


def test_left_out_from_words_and_files(tmp_path: Path) -> None:
    file = tmp_path / "there.txt"
    file.write_text(
        "# of the target\ntorch==2.11.0+cu130\nHuggingFace_Hub==1.33.0\n-e git+x\n"
        "local @ file:///x.whl\nnumpy\n"
    )
    found = target.left_out(["scipy, Jinja2==3.1.6", f"@{file}"])
    assert found == {
        "scipy": "",
        "jinja2": "3.1.6",
        "torch": "2.11.0+cu130",
        "huggingface-hub": "1.33.0",
        "local": "",
        "numpy": "",
    }


def test_left_out_that_is_not_understood(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="torch>=2"):
        target.left_out(["torch>=2"])
    with pytest.raises(UserError, match="cannot be read"):
        target.left_out([f"@{tmp_path}/nothing.txt"])


# -- sizes and parts ---------------------------------------------------------------------------


def test_sizes() -> None:
    assert parts.parse_size("60MiB") == parts.parse_size("60m") == 60 << 20
    assert parts.parse_size("1.5 GB") == 1_500_000_000
    for text in ("", "sixty", "60 parsecs", "-1MiB"):
        with pytest.raises(UserError, match="not a size"):
            parts.parse_size(text)
    with pytest.raises(UserError, match="too small") as caught:
        parts.parse_size("4k")
    assert "1MiB" in caught.value.hint


def test_parts_are_a_tar_cut_anywhere(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.bin").write_bytes(os.urandom(70_000))
    out = tmp_path / "out"
    out.mkdir()
    files = sorted((tmp_path / "in").iterdir())
    found = parts.write_parts(files, tmp_path, out, 40_000)
    assert [p.name for p in found][:2] == ["part-001-of-006", "part-002-of-006"]
    assert all(p.bytes == 40_000 for p in found[:-1])
    assert all(parts.piece(out, out / p.name) == p for p in found)
    whole = tmp_path / "whole.tar"
    whole.write_bytes(b"".join((out / p.name).read_bytes() for p in found))
    with tarfile.open(whole) as archive:
        assert archive.getnames() == ["in/0.bin", "in/1.bin", "in/2.bin"]
        inside = archive.extractfile("in/2.bin")
        assert inside is not None and inside.read() == files[2].read_bytes()


def test_too_many_parts(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100_000))
    with pytest.raises(UserError, match="999 parts") as caught:
        parts.write_parts([tmp_path / "a"], tmp_path, tmp_path, 10)
    assert "1MiB" in caught.value.hint


def test_archives_of_the_same_files_are_the_same(tmp_path: Path) -> None:
    (tmp_path / "asset").mkdir()
    (tmp_path / "asset" / "b").write_text("b")
    (tmp_path / "asset" / "a").write_text("a")
    parts.write_archive(tmp_path / "asset", "x", tmp_path / "1.tar.gz")
    os.utime(tmp_path / "asset" / "a", (1, 1))
    parts.write_archive(tmp_path / "asset", "x", tmp_path / "2.tar.gz")
    assert (tmp_path / "1.tar.gz").read_bytes() == (tmp_path / "2.tar.gz").read_bytes()


# -- what goes in ------------------------------------------------------------------------------


def test_all_that_it_needs(demo: Path, tmp_path: Path) -> None:
    made = bundle(tmp_path / "out")
    names = {"effbench", "demo-lib", "demo-torch", "demo-cuda", "demo-source", "pip"}
    assert files_of(tmp_path / "out") == names
    assert made.there == {}
    assert made.items[0][0] == "smollm2-135m"
    assert sum(size for _, size in made.items) == made.bytes
    left = {p.name for p in tmp_path.iterdir() if "unfinished" in p.name}
    assert left == set()


@pytest.mark.slow
def test_left_out_takes_along_what_only_it_needs(demo: Path, tmp_path: Path) -> None:
    said: list[str] = []
    without = {"demo-torch": "2.9.0a0+vendor", "nothing-of-ours": ""}
    wanted = Wanted(HERE_TARGET, without, assets=())
    made = make.make(tmp_path / "out", wanted, said.append, False)
    assert "Not needed in any case: nothing-of-ours" in said
    assert files_of(tmp_path / "out") == {"effbench", "demo-lib", "demo-source", "pip"}
    assert made.there == {"demo-torch": {"effbench": ">=2.8"}}


@pytest.mark.slow
def test_left_out_of_unknown_version(demo: Path, tmp_path: Path) -> None:
    bundle(tmp_path / "out", {"demo-torch": ""})
    assert files_of(tmp_path / "out") == {"effbench", "demo-lib", "demo-source", "pip"}


def test_version_there_outside_our_range(demo: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"effbench 1\.0 depends on demo-torch>=2\.8") as caught:
        bundle(tmp_path / "out", {"demo-torch": "2.7.0"})
    assert "demo-torch==2.7.0" in caught.value.message
    assert not [p for p in tmp_path.iterdir() if p.name.startswith((".", "out"))]


@pytest.mark.slow
def test_extras(demo: Path, tmp_path: Path) -> None:
    bundle(tmp_path / "out", extras=("dev",), assets=())
    assert "demo-tool" in files_of(tmp_path / "out")
    with pytest.raises(UserError, match="'dve'") as caught:
        bundle(tmp_path / "other", extras=("dve",))
    assert "'dev'" in caught.value.hint


@pytest.mark.slow
def test_another_python(demo: Path, tmp_path: Path) -> None:
    other = target.choose("3.14", ["manylinux_2_28_x86_64"])
    bundle(tmp_path / "out", target=other, assets=())
    manifest = json.loads((tmp_path / "out" / make.NAME).read_text())
    versions = {w["name"]: w["version"] for w in manifest["wheels"]}
    assert versions["demo-lib"] == "2.0"  # a wheel for that Python alone, of an older platform
    assert versions["demo-new"] == "1.0"  # asked for by a marker that holds there alone
    assert versions["demo-source"] == "1.0"  # built here


@pytest.mark.slow
def test_no_wheel_for_that_platform(demo: Path, tmp_path: Path) -> None:
    for file in demo.glob("demo_lib*"):
        file.unlink()
    wheel(demo, "demo-lib", "2.0", tag=f"cp{HERE.replace('.', '')}-none-any")
    other = target.choose("3.14", ["manylinux_2_28_x86_64"])
    with pytest.raises(UserError, match=r"no wheel of .*demo-lib.* for Python 3.14"):
        bundle(tmp_path / "out", target=other)


@pytest.mark.slow
def test_source_that_compiles_is_refused_by_name(demo: Path, tmp_path: Path) -> None:
    (demo / "demo_source-1.0.tar.gz").unlink()
    (demo / "tree").rename(tmp_path / "old-tree")
    tag = f"cp{HERE.replace('.', '')}-cp{HERE.replace('.', '')}-linux_x86_64"
    source(demo, "demo-source", tag)
    with pytest.raises(UserError, match="demo-source is published as source and compiles"):
        bundle(tmp_path / "out", target=target.choose("3.14", ["manylinux_2_28_x86_64"]))


def test_no_network() -> None:
    said = "WARNING: Retrying (…) after connection broken by 'NewConnectionError(…)': /simple/x/"
    error = resolve._refused(f"{said}\nERROR: No matching distribution found for x", HERE_TARGET)
    assert "cannot be reached" in error.message


# -- whole or not at all -----------------------------------------------------------------------


def test_a_folder_with_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not a bundle"):
        bundle(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_asset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="smollm2-135") as caught:
        bundle(tmp_path / "out", assets=("smollm2-135",))
    assert "'smollm2-135m'" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_interrupted_goes_on(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brought: list[str] = []
    original = make.download

    def counted(url: str, sha256: str, place: Path, *rest: Any) -> Path:
        if not place.exists():
            brought.append(place.name)
        if len(brought) == 4:
            raise KeyboardInterrupt
        return original(url, sha256, place, *rest)

    monkeypatch.setattr(make, "download", counted)
    with pytest.raises(KeyboardInterrupt):
        bundle(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    first = brought[:3]
    brought[:] = ["", "", "", "", ""]
    bundle(tmp_path / "out")
    assert not set(first) & set(brought)
    assert len(files_of(tmp_path / "out")) == 6


@pytest.mark.slow
def test_earlier_bundle_stays_until_the_new_one_is_whole(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle(tmp_path / "out", assets=())
    before = files_of(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(make, "_write_texts", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            bundle(tmp_path / "out", {"demo-torch": "2.11.0"}, assets=())
    assert files_of(tmp_path / "out") == before
    bundle(tmp_path / "out", {"demo-torch": "2.11.0"}, assets=())
    assert files_of(tmp_path / "out") < before


def test_no_room_for_parts(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(make.shutil, "disk_usage", lambda place: Usage)
    with pytest.raises(UserError, match="free"):
        bundle(tmp_path / "out", part_bytes=1 << 20)
    assert not (tmp_path / "out").exists()


def test_own_wheel_from_installed_files(tmp_path: Path) -> None:
    again = build.repack(distribution("pip"), tmp_path)
    site = tmp_path / "site"
    with zipfile.ZipFile(again) as archive:
        archive.extractall(site)
        names = archive.namelist()
    assert len(names) == len(set(names))
    assert not any(n.endswith((".pyc", "/direct_url.json")) for n in names)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    assert str(site) in done.stdout


# -- on the target -----------------------------------------------------------------------------

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def finished(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with stubbed(packages, folder):
        made = bundle(folder / "out", {"demo-torch": "2.11.0"}, part_bytes=1 << 20)
    assert len(made.pieces) >= 4
    assert all(p.bytes <= 1 << 20 for p in made.pieces)
    return folder / "out"


@pytest.fixture
def in_parts(finished: Path, tmp_path: Path) -> Path:
    """A bundle in parts that leaves demo-torch out."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def install(run: Run, folder: Path, *words: str, path: Sequence[Path] = ()) -> Any:
    words = (str(folder / "install.sh"), *words, "--python", sys.executable)
    return run(*words, path=path)


def test_install_beside_what_is_there(
    in_parts: Path, tmp_path: Path, blocked: Run, there: Path
) -> None:
    prefix = tmp_path / "my effbench"
    done = install(blocked, in_parts, str(prefix), path=[there])
    assert done.returncode == 0, done.stderr
    assert "ok       demo-torch 2.11.0+cu130" in done.stdout
    assert "export HF_HUB_OFFLINE=1" in done.stdout
    assert not (prefix / "site" / "demo_torch").exists()
    started = blocked(str(prefix / "bin" / "effbench"), path=[there])
    assert started.stdout == f"running {len(MODEL)} 1\n", started.stderr
    sourced = blocked("sh", "-c", f". '{prefix}/activate' && effbench", path=[there])
    assert sourced.stdout == started.stdout
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".my")]


@pytest.mark.slow
def test_install_twice(in_parts: Path, tmp_path: Path, blocked: Run, there: Path) -> None:
    prefix = tmp_path / "eff"
    install(blocked, in_parts, str(prefix), path=[there])
    (prefix / "cache" / "models").mkdir()
    (prefix / "cache" / "models" / "mine").write_text("made by a run")
    again = install(blocked, in_parts, str(prefix), path=[there])
    assert again.returncode == 0
    assert "already" in again.stdout
    assert f". {prefix}/activate" in again.stdout
    mark = prefix / ".effbench-bundle"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "bundle": "an earlier one"}))
    newer = install(blocked, in_parts, str(prefix), path=[there])
    assert newer.returncode == 0, newer.stderr
    assert (prefix / "cache" / "models" / "mine").read_text() == "made by a run"


def test_what_is_missing_or_damaged_is_named(
    in_parts: Path, tmp_path: Path, blocked: Run, there: Path
) -> None:
    names = sorted(p.name for p in in_parts.glob("part-*"))
    (in_parts / names[0]).unlink()
    damaged = bytearray((in_parts / names[1]).read_bytes())
    damaged[1000] ^= 1
    (in_parts / names[1]).write_bytes(damaged)
    (in_parts / names[-1]).write_bytes(b"cut short")
    checked = install(blocked, in_parts, "--check")
    assert checked.returncode == 1
    assert f"missing  {names[0]}" in checked.stdout
    assert f"damaged  {names[1]}" in checked.stdout
    assert f"ok       {names[2]}" in checked.stdout
    assert f"{len(names) - 3} of {len(names)} are here" in checked.stdout
    done = install(blocked, in_parts, str(tmp_path / "eff"), path=[there])
    assert done.returncode == 2
    assert f"missing: {names[0]}" in done.stderr.lower()
    assert f"damaged: {names[1]}, {names[-1]}" in done.stderr.lower()
    assert not (tmp_path / "eff").exists()


@pytest.mark.parametrize("found", ["", pytest.param("2.7.0", marks=pytest.mark.slow)])
def test_what_was_left_out_and_will_not_do(
    found: str, in_parts: Path, tmp_path: Path, blocked: Run
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    if found:
        with zipfile.ZipFile(wheel(tmp_path, "demo-torch", found)) as archive:
            archive.extractall(old)
    done = install(blocked, in_parts, str(tmp_path / "eff"), path=[old])
    assert done.returncode == 2
    assert f"demo-torch is {found or 'missing'}: effbench needs demo-torch >=2.8" in done.stderr
    assert not (tmp_path / "eff").exists()
    forced = install(blocked, in_parts, str(tmp_path / "eff"), "--force", path=[old])
    assert forced.returncode == 0, forced.stderr


def test_a_folder_that_is_not_ours(in_parts: Path, tmp_path: Path, blocked: Run) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    done = install(blocked, in_parts, str(tmp_path / "mine"))
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_another_python_is_refused(in_parts: Path, tmp_path: Path, blocked: Run) -> None:
    script = in_parts / "install.sh"
    script.write_text(script.read_text().replace(f"want={HERE}", "want=3.99"))
    done = install(blocked, in_parts, str(tmp_path / "eff"))
    assert done.returncode == 2
    assert "is for Python 3.99" in done.stderr
    assert install(blocked, in_parts, "--check").returncode == 0


def test_no_place_said(in_parts: Path, blocked: Run) -> None:
    done = install(blocked, in_parts)
    assert done.returncode == 2
    assert "Say where to install" in done.stderr


@pytest.mark.slow
def test_install_into_an_environment(demo: Path, tmp_path: Path, blocked: Run, there: Path) -> None:
    bundle(tmp_path / "out")
    prefix = tmp_path / "eff"
    done = install(blocked, tmp_path / "out", str(prefix), "--venv")
    assert done.returncode == 0, done.stderr
    sourced = blocked("sh", "-c", f". {prefix}/activate && effbench && command -v effbench")
    assert sourced.stdout == f"running {len(MODEL)} 1\n{prefix}/bin/effbench\n", sourced.stderr
    bundle(tmp_path / "out", {"demo-torch": "2.11.0"})
    done = install(blocked, tmp_path / "out", str(prefix), "--venv", path=[there])
    assert done.returncode == 0, done.stderr
    shown = blocked(str(prefix / "bin" / "python"), "-c", "import numpy; print(numpy.__file__)")
    assert str(prefix) not in shown.stdout  # what this Python has is seen from inside


# -- the command -------------------------------------------------------------------------------


def test_command(demo: Path, tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    words = ("bundle", "out", "--without", "demo-torch==2.11.0", "--part-size", "1MiB")
    status, out, err = cli(*words)
    assert status == 0
    assert "Finding out which packages it takes" in err
    assert "smollm2-135m" in out  # nothing else is fetched: both assets are this test's
    assert "parts in" in out
    assert "Left out, to be there already: demo-torch" in out
    status, _, err = cli("bundle", "out", "--part-size", "1k")
    assert status == 2
    assert "too small" in err


def test_prefix_is_taken_by_the_letter(tmp_path: Path) -> None:
    prefix = tmp_path / "it's $HOME, `id`"
    program = prefix / "site" / "bin" / "effbench"
    program.parent.mkdir(parents=True)
    program.write_text("import os; print(os.environ['EFFBENCH_CACHE'])")
    starter = tmp_path / "starter"
    starter.write_text(installer._starter(prefix))
    environment = {k: v for k, v in os.environ.items() if k != "EFFBENCH_CACHE"}
    said = subprocess.run(
        ["sh", str(starter)], capture_output=True, text=True, check=True, env=environment
    )
    assert said.stdout.strip() == str(prefix / "cache")
