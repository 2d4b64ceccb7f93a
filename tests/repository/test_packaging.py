"""``persistrnn.kernels`` is the folder kernels/, once: in a wheel, in an editable install, and under no other name."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "__pycache__")
DATA = ("py.typed", "profiling/page.html.jinja")


def python(code: str, *arguments: object, cwd: Path) -> object:
    """What ``code`` prints, as JSON, in an interpreter that sees neither this folder nor PYTHONPATH."""
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run(*command: object, cwd: Path) -> None:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"


def modules() -> set[str]:
    """Every module of the package, as a path in the wheel."""
    upper = {path.relative_to(ROOT).as_posix() for path in (ROOT / "persistrnn").rglob("*.py")}
    return upper | {f"persistrnn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "kernels").rglob("*.py")}


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution and the wheel that is built from it, without a network."""
    tree = tmp_path_factory.mktemp("source") / "persistrnn"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCE)
    run(sys.executable, "-m", "build", "--no-isolation", cwd=tree)
    return tree / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*.whl")
    return path


def test_source_distribution_holds_the_kernels(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    here = {
        str(path.relative_to(ROOT)) for folder in ("persistrnn", "kernels") for path in (ROOT / folder).rglob("*.py")
    }
    assert here | {"LICENSE", "README.md", "pyproject.toml", "persistrnn/py.typed"} <= names


def test_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (licence,) = (name for name in names if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert {name for name in names if ".dist-info/" not in name} == modules() | {f"persistrnn/{n}" for n in DATA}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, its link as a link."""
    tree = tmp_path_factory.mktemp("copy") / "checkout"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCE, symlinks=True)
    return tree


@pytest.fixture(scope="module")
def fresh_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that sees torch, Triton and pip, and no persistrnn."""
    environment = tmp_path_factory.mktemp("fresh") / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    (site,) = environment.glob("lib/python*/site-packages")
    # What an editable install put into this folder works in the environment it belongs to only.
    (site / "around.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n")
    return environment / "bin" / "python"


PIP_INSTALL = "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps", "--no-build-isolation"
USE = "import persistrnn, torch; print(persistrnn.__version__); persistrnn.LSTM(2, 3)(torch.ones(4, 1, 2))"


def runs_in(checkout: Path, fresh_python: Path) -> None:
    """Everything that a person types in a checkout's root, in one process."""
    code = f"""
import runpy, sys
{USE}
plan = "plan --cell gru --hidden 64 --batch 1 --device h200"
for module, arguments in (("persistrnn", plan), ("bench.train.language_model", "--help")):
    sys.argv = [module, *arguments.split()]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, module
"""
    run(fresh_python, "-c", code, cwd=checkout)


def test_a_checkout_runs_before_beside_and_after_installations_of_itself(checkout: Path, fresh_python: Path) -> None:
    """Without one; after `pip install -e '.[train]'`, as `make train` does; after `pip install '.[profile]'` over it,
    where Python finds the folder persistrnn before the installed package; and then without the checkout."""
    runs_in(checkout, fresh_python)
    run(fresh_python, *PIP_INSTALL, "-e", ".[train]", cwd=checkout)
    runs_in(checkout, fresh_python)
    run(fresh_python, *PIP_INSTALL, ".[profile]", cwd=checkout)
    runs_in(checkout, fresh_python)
    shutil.rmtree(checkout)
    run(fresh_python, "-c", USE, cwd=checkout.parent)


def test_the_package_brings_in_what_every_call_needs(tmp_path: Path) -> None:
    """Neither the compilers, nor the kernels, nor the profile with its plots."""
    code = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
before = set(sys.modules)
import persistrnn
persistrnn.LSTM(2, 3)(torch.ones(4, 1, 2))
added = sorted(set(sys.modules) - before)
print(json.dumps([added, callable(persistrnn.profile)]))
"""
    added, profiles = python(code, ROOT, cwd=tmp_path)  # type: ignore[misc]
    parts = "persistrnn.kernels.device", "persistrnn.kernels.launch", "persistrnn.profiling"
    others = "triton", "torch._dynamo", "torch._inductor", "matplotlib", "jinja2", "tqdm"
    assert "persistrnn.decide" in added
    assert [name for name in added if name.startswith((*parts, *others))] == []
    assert profiles


def origin(module: str, cwd: Path) -> Path | None:
    code = """
import importlib.util, json, sys
spec = importlib.util.find_spec(sys.argv[1])
print(json.dumps(spec and spec.origin))
"""
    found = python(code, module, cwd=cwd)
    return Path(str(found)).resolve() if found else None


def test_editable_install_finds_the_kernels_of_the_checkout(tmp_path: Path) -> None:
    assert origin("persistrnn.kernels", cwd=tmp_path) == ROOT / "kernels" / "__init__.py"


def test_no_file_imports_a_second_copy_of_the_kernels() -> None:
    """kernels/ is imported as persistrnn.kernels."""
    wrong = re.compile(r"""^\s*(from|import) kernels\b|(import_module|run_module|importorskip)\(.kernels\b""", re.M)
    found = [path for path in ROOT.glob("[!.]*/**/*.py") if "runs" not in path.parts and wrong.search(path.read_text())]
    assert found == []
