"""The machine that a bundle is for: its Python, its platform, and what it has already."""

from __future__ import annotations

import platform
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from effbench.util.errors import UserError

OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
"""Names from before the glibc version stood in the tag, by the minor version they mean."""
SYSTEMS = {"manylinux": "linux", "musllinux": "linux", "linux": "linux", "macosx": "darwin"}


@dataclass(frozen=True)
class Target:
    """The Python and the platforms that wheels have to fit."""

    python: str
    """Major and minor version: 3.12."""
    platforms: tuple[str, ...]
    """Platform tags, best first; none means this machine's own."""
    title: str
    """The platform, as it was asked for."""

    @property
    def foreign(self) -> bool:
        """Whether it is another Python or platform than the one that runs now."""
        return bool(self.platforms)

    def pip_options(self) -> list[str]:
        """Return the options that make pip choose wheels for the target."""
        if not self.foreign:
            return []
        chosen = ["--python-version", self.python, "--implementation", "cp"]
        chosen += [word for tag in self.platforms for word in ("--platform", tag)]
        return [*chosen, "--only-binary=:all:"]

    def environment(self) -> dict[str, str]:
        """Return the values of environment markers on the target."""
        from packaging.markers import default_environment

        found = {k: str(v) for k, v in default_environment().items()}
        if self.foreign:
            kind, _, rest = self.platforms[0].partition("_")
            system = SYSTEMS.get(re.sub(r"\d+$", "", kind), "win32")
            found["python_version"] = self.python
            found["python_full_version"] = f"{self.python}.0"
            found["implementation_version"] = f"{self.python}.0"
            found["sys_platform"] = system
            found["platform_system"] = {"linux": "Linux", "darwin": "Darwin"}.get(system, "Windows")
            found["os_name"] = "nt" if system == "win32" else "posix"
            found["platform_machine"] = re.sub(r"^[\d_]*_|^\d+$", "", rest) or rest
        return found


def choose(python: str, platforms: Sequence[str]) -> Target:
    """Return the target; what is not said is as it is here.

    Raises:
        UserError: When `python` is not a version that effbench runs on.
    """
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    python = ".".join((python or here).split(".")[:2])
    if not re.fullmatch(r"3\.\d+", python) or int(python[2:]) < 11:
        raise UserError(f"effbench does not run on Python {python}.", "Say 3.11 or newer.")
    if not platforms and python == here:
        return Target(python, (), f"{sys.platform} {platform.machine()}, as here")
    named = list(platforms) or [_own_platform()]
    expanded = dict.fromkeys(tag for name in named for tag in expand(name))
    return Target(python, tuple(expanded), " ".join(named))


def expand(name: str) -> list[str]:
    """Return a platform tag and all older ones whose wheels run there too, best first.

    pip compares tags letter by letter, so that `manylinux_2_28_x86_64` alone would miss a wheel for
    `manylinux_2_17_x86_64`.
    """
    for minor, old in OLD_NAMES.items():
        name = re.sub(rf"^{old}_", f"manylinux_2_{minor}_", name)
    found = re.fullmatch(r"(many|musl)linux_(\d+)_(\d+)_(\w+)", name)
    if not found:
        return [name]
    kind, major, newest, machine = found[1], found[2], int(found[3]), found[4]
    tags = []
    for minor in range(newest, (5 if kind == "many" else 1) - 1, -1):
        tags.append(f"{kind}linux_{major}_{minor}_{machine}")
        if kind == "many" and minor in OLD_NAMES:
            tags.append(f"{OLD_NAMES[minor]}_{machine}")
    return [*tags, f"linux_{machine}"]


def _own_platform() -> str:
    libc, release = platform.libc_ver()
    if libc == "glibc":
        return f"manylinux_{release.replace('.', '_')}_{platform.machine()}"
    return re.sub(r"[-.]", "_", sysconfig.get_platform())


# -- what is there already ---------------------------------------------------------------------


def plain_name(name: str) -> str:
    """Return the name of a package as comparisons take it."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def left_out(words: Iterable[str]) -> dict[str, str]:
    """Return the packages to leave out, with their version on the target, "" where not known.

    Args:
        words: Names, `name==version`, lists of them with commas, or `@FILE` with one a line as
            `pip list --format=freeze` prints them.

    Raises:
        UserError: For a file that cannot be read, or a word that names no package.
    """
    found = {}
    for item in _items(words):
        parsed = re.fullmatch(
            r"([A-Za-z0-9][\w.-]*)(?:\[[^]]*\])?\s*(?:===?\s*([^\s;]+)|@\s.*)?", item
        )
        if not parsed:
            raise UserError(
                f"--without {item!r} is not understood.",
                "Give names, name==version, or @FILE with the output of: pip list --format=freeze",
            )
        found[plain_name(parsed[1])] = parsed[2] or ""
    return found


def _items(words: Iterable[str]) -> Iterator[str]:
    for word in words:
        if word.startswith("@"):
            yield from _lines(Path(word[1:]).expanduser())
        else:
            yield from (item.strip() for item in word.split(",") if item.strip())


def _lines(path: Path) -> Iterator[str]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read: {getattr(error, 'strerror', '') or error}.",
            "Make it on the target: python3 -m pip list --format=freeze > FILE",
        ) from None
    for line in text.splitlines():
        line = line.partition("#")[0].partition(";")[0].strip()
        if line and not line.startswith("-"):
            yield line


def versions_here() -> dict[str, str]:
    """Return the public version of every package that is installed here."""
    found: dict[str, str] = {}
    for package in distributions():
        name = package.metadata["Name"]
        if name and package.version:
            found.setdefault(plain_name(name), package.version.partition("+")[0])
    return found


def version_here(name: str) -> str:
    """Return the version of a package here, "" when it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
