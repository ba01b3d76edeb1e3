"""tools/install.py, as far as it goes without installing: what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture()
def script(tmp_path: Path) -> Path:
    """A copy of the script and what it reads, so that no run can reach the checkout."""
    project = tmp_path / "project"
    shutil.copytree(CHECKOUT / "requirements", project / "requirements")
    (project / "tools").mkdir()
    (project / "pyproject.toml").touch()
    return Path(shutil.copy(CHECKOUT / "tools" / "install.py", project / "tools"))


def interpreter(version: str) -> str:
    """Return a Python of this version, from the PATH or pyenv; skip the test without one."""
    places = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in [shutil.which(f"python{version}"), *map(str, places)]:
        if candidate is None:
            continue
        query = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:
            return candidate
    pytest.skip(f"no Python {version} on the PATH or in ~/.pyenv/versions")


def run(python: str, script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script where pip can reach no index, should it ever come to pip."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        **{"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONDONTWRITEBYTECODE": "1"},
    }
    return subprocess.run(
        [python, str(script), *arguments],
        env=environment,
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def occupied(folder: Path) -> Path:
    """Make a folder that is in use and no virtual environment."""
    (folder / "thesis").mkdir(parents=True)
    (folder / "thesis" / "chapter1.tex").write_text("the only copy")
    return folder


def contents(folder: Path) -> dict[str, str | None]:
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else None
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("version", ["3.6", "3.8", "3.9"])
def test_another_python_is_refused_by_name(tmp_path: Path, script: Path, version: str) -> None:
    python = interpreter(version)
    folder = occupied(tmp_path / "occupied")
    before = contents(folder)
    done = run(python, script, "--folder", str(folder))
    assert done.returncode != 0
    assert "needs Python 3.10 to 3.14" in done.stderr
    assert f"this is Python {version}." in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(folder) == before


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.12", "3.13"])
def test_a_folder_in_use_is_refused_and_untouched(
    tmp_path: Path, script: Path, version: str
) -> None:
    """As well: a Python that the package is for gets past the question of the Python."""
    here = "{}.{}".format(*sys.version_info[:2])
    python = sys.executable if version == here else interpreter(version)
    folder = occupied(tmp_path / "occupied")
    before = contents(folder)
    done = run(python, script, "--folder", str(folder))
    assert done.returncode != 0
    assert f"{folder} is not a virtual environment" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(folder) == before


def test_an_unknown_kind_of_detectron2_is_refused(tmp_path: Path, script: Path) -> None:
    folder = occupied(tmp_path / "occupied")
    done = run(sys.executable, script, "--folder", str(folder), "--detectron2", "nightly")
    assert done.returncode == 2
    assert "nightly" in done.stderr and "wheel" in done.stderr and "source" in done.stderr


def test_a_complete_environment_is_left_alone(tmp_path: Path, script: Path) -> None:
    """The stamp of the same requirements ends the run before anything is made."""
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        pytest.skip("this Python is none that the package is for")
    folder = occupied(tmp_path / "occupied")
    query = "import sys; sys.path.insert(0, sys.argv[1]); import install; "
    query += "print(install.fingerprint(sys.argv[2]))"
    stamps = {
        kind: subprocess.run(
            [sys.executable, "-B", "-c", query, str(script.parent), kind],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for kind in ("wheel", "source")
    }
    assert stamps["wheel"] != stamps["source"]
    (folder / "resnext_det.installed").write_text(stamps["wheel"])
    before = contents(folder)
    done = run(sys.executable, script, "--folder", str(folder))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert contents(folder) == before
    # Changed requirements end in the refusal above: the run goes on past the stamp.
    with (script.parents[1] / "requirements" / "lock.txt").open("a") as file:
        file.write("# changed\n")
    changed = run(sys.executable, script, "--folder", str(folder))
    assert "is not a virtual environment" in changed.stderr
    assert contents(folder) == before
