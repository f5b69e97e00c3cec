"""Keeps tests, and every Python that they start, from the network: only this machine is reached.

An attempt fails with an OSError that names the address, and is noted in a file: code that makes
the best of a network that is not there would hide it. Nothing is imported that the guarded program
does not import itself: sockets are guarded when `socket` comes.
"""

import os
import sys

TRIED = "EFFBENCH_TEST_TRIED"
"""Variable with the file in which attempts are noted."""
HOSTS = "EFFBENCH_TEST_HOSTS"
"""Variable with hosts that may be reached, with commas between them, or `ANY`."""
ANY = "*"
HERE = ("", "localhost", "0.0.0.0", "::", "::1")


def install() -> None:
    """Guard sockets, now or once the module is imported."""
    if "socket" in sys.modules:
        guard(sys.modules["socket"])
    else:
        sys.meta_path.insert(0, Finder())


class Finder:
    """Finds `socket`, once, as the others do, and guards it when it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "socket":
            return None
        sys.meta_path.remove(self)
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path)
        spec = next(spec for spec in found if spec is not None)
        load = spec.loader.exec_module

        def load_guarded(module):
            load(module)
            guard(module)

        spec.loader.exec_module = load_guarded
        return spec


def guard(socket) -> None:
    """Have the functions of the module that reach for another machine refuse to."""
    if hasattr(socket, "unguarded"):
        return
    socket.unguarded = look_up = socket.getaddrinfo

    def getaddrinfo(host, port, *rest, **named):
        if not is_here(socket, host, look_up_names=False):
            refuse(host, port)
        return look_up(host, port, *rest, **named)

    socket.getaddrinfo = getaddrinfo
    for name in ("connect", "connect_ex"):
        setattr(socket.socket, name, guarded(socket, getattr(socket.socket, name)))


def guarded(socket, connect):
    def only_here(self, address):
        if isinstance(address, tuple) and not is_here(socket, address[0]):
            refuse(*address[:2])
        return connect(self, address)

    return only_here


def is_here(socket, host, look_up_names=True) -> bool:
    """Whether a host is this machine, or one that may be reached; by address, nothing is asked."""
    host = host.decode() if isinstance(host, bytes) else host or ""
    if host in HERE or host.startswith("127.") or host == socket.gethostname():
        return True
    allowed = os.environ.get(HOSTS, "").split(",")
    if host in allowed or ANY in allowed:
        return True
    return is_address(socket, host) and (not look_up_names or is_own(socket, host))


def is_address(socket, host) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
            return True
        except OSError:
            pass
    return False


def is_own(socket, host) -> bool:
    """Whether an address is one of this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def attempts() -> str:
    """Return what was noted since the last call, a line for each attempt."""
    if not os.access(os.environ[TRIED], os.F_OK):
        return ""
    from pathlib import Path

    place = Path(os.environ[TRIED])
    told = place.read_text()
    place.unlink()
    return told


def refuse(host, port) -> None:
    """Note an attempt to reach a host, and refuse it."""
    told = f"{host}:{port}"
    if place := os.environ.get(TRIED):
        from pathlib import Path

        with Path(place).open("a") as file:
            file.write(f"{told} (process {os.getpid()}: {' '.join(sys.argv[:3])})\n")
    raise OSError(101, f"tests reach no other machine, and this is {told}")
