"""Tests marked ``interpreter`` need TRITON_INTERPRET=1 before Triton is imported; all others need it unset."""

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from checkout import listing
from sample import sampled

if TYPE_CHECKING:
    from emulator import Session


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    if not pluginmanager.hasplugin("timeout"):  # as on a GPU machine without a package index
        parser.addini("timeout", "of pytest-timeout, which is not installed here")
    parser.addoption("--sample", type=int, default=1, metavar="N", help="one in N of the cases of each test")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")
    if os.environ.get("TRITON_INTERPRET") == "1":
        from interpreted import quicken  # only here: it imports Triton

        quicken()


@pytest.fixture(scope="session")
def checkout_before() -> list[set[tuple[str, int]]]:
    """What lay in the checkout when the test before ended, and before the first one."""
    return [listing()]


@pytest.fixture(scope="session")
def working_folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Empty; a test that leaves something there needs the next one."""
    return [tmp_path_factory.mktemp("working")]


@pytest.fixture(autouse=True)
def outside_the_checkout(
    request: pytest.FixtureRequest,
    checkout_before: list[set[tuple[str, int]]],
    working_folders: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[None]:
    """A test works in an empty folder, and fails if it leaves something in the checkout. Not on a GPU, where `make gpu`
    keeps its results while the tests run."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    if os.listdir(working_folders[-1]):
        working_folders.append(tmp_path_factory.mktemp("working"))
    before = os.getcwd()
    os.chdir(working_folders[-1])
    yield
    os.chdir(before)
    earlier, now = checkout_before[0], listing()
    checkout_before[:] = [now]
    if earlier != now:
        paths = ", ".join(sorted({path for path, _ in earlier ^ now}))
        pytest.fail(
            "left in the checkout, by this test (with -n perhaps by one that another worker runs: -n 0 tells) or by "
            f"something else meanwhile: {paths}; a test writes to its tmp_path",
            pytrace=False,
        )


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """forced(protocol, homes=..., rows=..., ...): every layer runs as this choice; see forced.py."""
    from forced import force  # only here: it imports the kernels

    return functools.partial(force, monkeypatch)


@pytest.fixture
def pipelines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """pipelines(protocol, groups=..., homes=..., ...): stacks run as this pipeline; fresh memory is NaN."""
    import torch
    from forced import force_pipelines

    torch.use_deterministic_algorithms(True)
    yield functools.partial(force_pipelines, monkeypatch)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., "Session"]]:
    """emulated("sm_90", ...): from then on compiled kernels run on tensors of the CPU, and fresh memory is NaN; see
    emulator.emulate."""
    import torch
    from emulator import emulate

    torch.use_deterministic_algorithms(True)
    yield functools.partial(emulate, monkeypatch)
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if bool(item.get_closest_marker("interpreter")) != interpreted:
            how = "set TRITON_INTERPRET=1" if not interpreted else "unset TRITON_INTERPRET"
            item.add_marker(pytest.mark.skip(reason=f"{how} for this test; `make test` runs both halves"))
    if (one_in := config.getoption("sample")) > 1:
        kept = sampled([item.nodeid for item in items], one_in)
        config.hook.pytest_deselected(items=[item for place, item in enumerate(items) if place not in kept])
        items[:] = [items[place] for place in sorted(kept)]
