"""Assets: resumed, verified, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from effbench.data import assets, download
from effbench.data.assets import Asset, Wheel
from effbench.util import cache
from effbench.util.errors import UserError

DATA = bytes(range(256)) * 40_000


def wheel_bytes(package: str, members: dict[str, bytes]) -> bytes:
    module = package.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    files = {
        **members,
        f"{module}/__init__.py": b"raise RuntimeError('must not be imported')",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return buffer.getvalue()


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


WHEEL = wheel_bytes("demo-data", {"demo_data/big.bin": DATA, "demo_data/sets/a.txt": b"a"})
SECOND = wheel_bytes("demo-more", {"demo_more/big.bin": b"the rest"})


class Registry:
    """A package index on this machine that can be told to break."""

    def __init__(self) -> None:
        self.files = {"demo_data-1.0-py3-none-any.whl": WHEEL}
        self.ranges: list[str] = []
        self.break_after: int | None = None
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.answer(self)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.rstrip("/").rpartition("/")[2]
        if name not in self.files:
            links = [f'<a href="/{f}#sha256={sha(c)}">{f}</a>' for f, c in self.files.items()]
            self.send(request, 200, "<html>{}</html>".format("".join(links)).encode(), "text/html")
            return
        content = self.files[name]
        start = request.headers.get("Range")
        self.ranges.append(start or "")
        if start:
            content = content[int(start.removeprefix("bytes=").rstrip("-")) :]
        self.send(request, 206 if start else 200, content, "application/zip")

    def send(self, request: BaseHTTPRequestHandler, code: int, body: bytes, kind: str) -> None:
        request.send_response(code)
        request.send_header("Content-Type", kind)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if self.break_after is not None and kind == "application/zip":
            body = body[: self.break_after]
        request.wfile.write(body)


@pytest.fixture
def registry() -> Iterator[Registry]:
    served = Registry()
    yield served
    served.server.shutdown()
    served.server.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EFFBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EFFBENCH_WHEELS", raising=False)
    monkeypatch.delenv("EFFBENCH_VERIFY", raising=False)
    return tmp_path / "cache"


def demo(**changes: Any) -> Asset:
    values: dict[str, Any] = {
        "name": "demo",
        "summary": "a test",
        "wheels": (
            Wheel(
                "demo-data",
                "1.0",
                sha(WHEEL),
                {"demo_data/big.bin": "big.bin", "demo_data/sets/": "s/"},
            ),
        ),
        "licence": "none",
        "megabytes": 10,
        **changes,
    }
    return Asset(**values)


@pytest.fixture
def demo_asset(monkeypatch: pytest.MonkeyPatch) -> Asset:
    monkeypatch.setitem(assets.ASSETS, "demo", demo())
    return assets.ASSETS["demo"]


@pytest.fixture
def resolved(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry, with pip's part already done."""

    def resolve(package: str, version: str) -> tuple[str, str]:
        return f"{registry.url}/{package.replace('-', '_')}-{version}-py3-none-any.whl", sha(WHEEL)

    monkeypatch.setattr(download, "_resolve", resolve)
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0.0)
    return registry


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    (folder / "demo_data-1.0-py3-none-any.whl").write_bytes(WHEEL)
    (folder / "demo_more-1.0-py3-none-any.whl").write_bytes(SECOND)
    monkeypatch.setenv("EFFBENCH_WHEELS", str(folder))
    return folder


def part_file(own_cache: Path) -> Path:
    return own_cache / "downloads" / "demo_data-1.0.whl.part"


def left_over(own_cache: Path) -> list[str]:
    files = [p for p in own_cache.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return [p.relative_to(own_cache).as_posix() for p in files]


def test_pip_finds_the_wheel_on_the_configured_index(
    registry: Registry, demo_asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"{registry.url}/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    folder = assets.fetch("demo", progress=False)
    assert (folder / "big.bin").read_bytes() == DATA
    with pytest.raises(UserError, match=r"demo-data==2\.0 cannot be downloaded") as caught:
        download.download_wheel("demo-data", "2.0", sha(WHEEL), folder, show=False)
    assert "EFFBENCH_WHEELS" in caught.value.hint


def test_only_wanted_members_are_taken(resolved: Registry, demo_asset: Asset) -> None:
    folder = assets.fetch("demo", progress=False)
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names == [cache.MANIFEST, "big.bin", "s/a.txt"]
    assert (folder / "big.bin").read_bytes() == DATA


def test_second_fetch_downloads_nothing(
    resolved: Registry, demo_asset: Asset, own_cache: Path
) -> None:
    first = assets.fetch("demo", progress=False)
    requests = len(resolved.ranges)
    assert assets.fetch("demo", progress=False) == first == assets.path_of("demo")
    assert len(resolved.ranges) == requests
    assert not list((own_cache / "downloads").iterdir())


def test_download_goes_on_where_it_broke_off(
    resolved: Registry, demo_asset: Asset, own_cache: Path
) -> None:
    half = len(WHEEL) // 2
    part_file(own_cache).parent.mkdir(parents=True)
    part_file(own_cache).write_bytes(WHEEL[:half])
    folder = assets.fetch("demo", progress=False)
    assert resolved.ranges == [f"bytes={half}-"]
    assert (folder / "big.bin").read_bytes() == DATA


def test_broken_connection_is_retried_from_the_same_place(
    resolved: Registry, demo_asset: Asset
) -> None:
    resolved.break_after = len(WHEEL) // 3 + 1
    assert assets.fetch("demo", progress=False)
    assert resolved.ranges[0] == ""
    assert resolved.ranges[1:] == [f"bytes={n * resolved.break_after}-" for n in (1, 2)]


def test_hopeless_connection_keeps_the_part(
    resolved: Registry, demo_asset: Asset, own_cache: Path
) -> None:
    resolved.break_after = 1000
    with pytest.raises(UserError, match="broke off"):
        assets.fetch("demo", progress=False)
    assert part_file(own_cache).stat().st_size == 1000 * download.ATTEMPTS
    assert left_over(own_cache) == ["downloads/demo_data-1.0.whl.part"]
    resolved.break_after = None
    assert assets.fetch("demo", progress=False)


def test_wrong_checksum_leaves_nothing(
    resolved: Registry, demo_asset: Asset, own_cache: Path
) -> None:
    damaged = bytearray(WHEEL)
    damaged[len(damaged) // 2] ^= 1
    resolved.files["demo_data-1.0-py3-none-any.whl"] = bytes(damaged)
    with pytest.raises(UserError, match="SHA-256 differs"):
        assets.fetch("demo", progress=False)
    assert left_over(own_cache) == []
    assert assets.path_of("demo") is None


def test_pip_downloads_what_a_plain_request_cannot(
    resolved: Registry, demo_asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved.files = {}
    monkeypatch.setattr(
        download, "pip_download", lambda package, version, options, part: part.write_bytes(WHEEL)
    )
    monkeypatch.setattr(resolved, "answer", lambda request: request.send_error(403))
    assert assets.fetch("demo", progress=False)


def test_full_disk_while_downloading(
    resolved: Registry, demo_asset: Asset, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_append", full)
    with pytest.raises(UserError, match="No space is left") as caught:
        assets.fetch("demo", progress=False)
    assert "EFFBENCH_CACHE" in caught.value.hint
    assert assets.path_of("demo") is None


def test_full_disk_while_unpacking_leaves_nothing(
    wheels: Path, demo_asset: Asset, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = assets.shutil.copyfileobj
    calls = []

    def full(source: Any, target: Any, length: int) -> None:
        calls.append(target)
        if len(calls) == 2:
            target.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        copy(source, target, length)

    with monkeypatch.context() as patch:
        patch.setattr(assets.shutil, "copyfileobj", full)
        with pytest.raises(UserError, match="No space is left"):
            assets.fetch("demo", progress=False)
    assert left_over(own_cache) == []
    assert assets.path_of("demo") is None
    assert (assets.fetch("demo", progress=False) / "big.bin").read_bytes() == DATA


def test_wheel_on_disk_needs_no_network(
    wheels: Path, demo_asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_pip", lambda *a: pytest.fail("pip was called"))
    assert (assets.fetch("demo", progress=False) / "s/a.txt").read_bytes() == b"a"


def test_truncated_wheel_on_disk(wheels: Path, demo_asset: Asset, own_cache: Path) -> None:
    (wheels / "demo_data-1.0-py3-none-any.whl").write_bytes(WHEEL[:-100])
    with pytest.raises(UserError, match="truncated or not the published file"):
        assets.fetch("demo", progress=False)
    assert left_over(own_cache) == []


def test_parts_are_put_end_to_end(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = (
        Wheel("demo-data", "1.0", sha(WHEEL), {"demo_data/big.bin": "joined"}),
        Wheel("demo-more", "1.0", sha(SECOND), {"demo_more/big.bin": "joined"}),
    )
    joined = sha(DATA + b"the rest")
    monkeypatch.setitem(assets.ASSETS, "demo", demo(wheels=parts, contents={"joined": joined}))
    assert (assets.fetch("demo", progress=False) / "joined").read_bytes() == DATA + b"the rest"
    swapped = demo(wheels=parts[::-1], contents={"joined": joined})
    monkeypatch.setitem(assets.ASSETS, "swapped", swapped)
    monkeypatch.setattr(assets, "_folder", lambda asset: cache.cache_dir() / "swapped")
    with pytest.raises(UserError, match="not the expected file"):
        assets.fetch("swapped", progress=False)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_asset: Asset) -> Path:
    import base64

    site = tmp_path / "site"
    with zipfile.ZipFile(io.BytesIO(WHEEL)) as archive:
        archive.extractall(site)
        digests = {n: hashlib.sha256(archive.read(n)).digest() for n in archive.namelist()}
    lines = [
        f"{n},sha256={base64.urlsafe_b64encode(d).decode().rstrip('=')},"
        for n, d in digests.items()
    ]
    (site / "demo_data-1.0.dist-info" / "RECORD").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(download, "_pip", lambda *a: pytest.fail("pip was called"))
    return site


def test_installed_copy_is_read_and_not_imported(installed: Path) -> None:
    assert (assets.fetch("demo", progress=False) / "big.bin").read_bytes() == DATA
    assert "demo_data" not in sys.modules


def test_changed_installed_copy_is_refused(installed: Path, own_cache: Path) -> None:
    (installed / "demo_data" / "big.bin").write_bytes(DATA[::-1])
    with pytest.raises(UserError, match="not the file that was installed"):
        assets.fetch("demo", progress=False)
    assert left_over(own_cache) == []


@pytest.mark.parametrize("damage", ["shorter", "gone", "manifest"])
def test_damaged_asset_is_made_anew(wheels: Path, demo_asset: Asset, damage: str) -> None:
    folder = assets.fetch("demo", progress=False)
    if damage == "shorter":
        (folder / "big.bin").write_bytes(DATA[:-1])
    elif damage == "gone":
        (folder / "s" / "a.txt").unlink()
    else:
        (folder / cache.MANIFEST).write_text("{")
    assert assets.path_of("demo") is None
    assert (assets.fetch("demo", progress=False) / "big.bin").read_bytes() == DATA


def test_hashes_are_compared_once_before_use_and_on_request(
    wheels: Path, demo_asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = assets.fetch("demo", progress=False)
    (folder / "big.bin").write_bytes(DATA[::-1])
    assert assets.path_of("demo") == folder, "sizes alone tell what is there"
    assert assets.fetch("demo", progress=False) == folder
    assert (folder / "big.bin").read_bytes() == DATA
    (folder / "big.bin").write_bytes(DATA[::-1])
    assert assets.path_of("demo") == folder
    monkeypatch.setenv("EFFBENCH_VERIFY", "1")
    assert assets.path_of("demo") is None


def test_another_version_is_made_anew(
    wheels: Path, demo_asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets.fetch("demo", progress=False)
    changed = Wheel("demo-more", "1.0", sha(SECOND), {"demo_more/": ""})
    monkeypatch.setitem(assets.ASSETS, "demo", demo(wheels=(changed,)))
    assert assets.path_of("demo") is None
    assert (assets.fetch("demo", progress=False) / "big.bin").read_bytes() == b"the rest"


def test_two_at_once_make_it_once(own_cache: Path) -> None:
    made = []
    barrier = threading.Barrier(4)

    def make(folder: Path) -> None:
        made.append(folder)
        time.sleep(0.2)
        (folder / "file").write_text("x")

    def one() -> None:
        barrier.wait()
        cache.make_once(own_cache / "thing", {"a": 1}, make, "making a thing")

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert (own_cache / "thing" / "file").read_text() == "x"


def test_killed_maker_leaves_nothing_that_counts(own_cache: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from effbench.util.cache import make_once\n"
        "def make(folder):\n"
        "    (folder / 'file').write_text('half'); os.kill(os.getpid(), 9)\n"
        "make_once(Path(sys.argv[1]), {}, make, 'dying')"
    )
    target = own_cache / "thing"
    assert subprocess.run([sys.executable, "-c", code, str(target)]).returncode == -9
    assert not target.exists()
    done = cache.make_once(target, {}, lambda f: (f / "other").touch(), "making")
    assert sorted(p.name for p in done.iterdir()) == [cache.MANIFEST, "other"]


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match="smollm2-135") as caught:
        assets.fetch("smollm2-135")
    assert "'smollm2-135m'" in caught.value.hint


def test_forbidden_cache(demo_asset: Asset, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(self: Path, *arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", forbidden)
    with pytest.raises(UserError, match="Permission denied"):
        assets.fetch("demo", progress=False)


def test_status_names_every_asset(wheels: Path, demo_asset: Asset) -> None:
    assert {s.asset.name: s.path for s in assets.status()} == dict.fromkeys(assets.ASSETS)
    folder = assets.fetch("demo", progress=False)
    found = next(s for s in assets.status() if s.asset.name == "demo")
    assert found.path == folder
    assert found.bytes > len(DATA)


def test_every_hash_is_a_sha256() -> None:
    for asset in assets.ASSETS.values():
        for value in (*(w.sha256 for w in asset.wheels), *asset.contents.values()):
            assert len(bytes.fromhex(value)) == 32
