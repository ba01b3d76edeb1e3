"""What installing refuses, what a wheel holds, and that importing only registers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture()
def script(tmp_path: Path) -> Path:
    """A copy of tools/install.py and its requirements, so that no run can reach the checkout."""
    project = tmp_path / "project"
    shutil.copytree(ROOT / "requirements", project / "requirements")
    (project / "tools").mkdir()
    (project / "pyproject.toml").touch()
    return Path(shutil.copy(ROOT / "tools" / "install.py", project / "tools"))


def interpreter(version: str) -> str:
    """Return a Python of this version, from the PATH or pyenv; skip the test without one."""
    if version == "{}.{}".format(*sys.version_info[:2]):
        return sys.executable
    places = sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*/bin/python"))
    for candidate in [shutil.which(f"python{version}"), *map(str, places)]:
        if candidate is None:
            continue
        query = [candidate, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        if answer.stdout.strip() == version:
            return candidate
    pytest.skip(f"no Python {version} on the PATH or in ~/.pyenv/versions")


def install(python: str, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the script where pip, if it got that far, could not reach an index."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        **{"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONDONTWRITEBYTECODE": "1"},
    }
    return subprocess.run(
        [python, str(script), *map(str, arguments)],
        env=environment,
        cwd=script.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture()
def occupied(tmp_path: Path) -> Path:
    """A folder that is in use and not a virtual environment."""
    file = tmp_path / "occupied" / "thesis" / "chapter1.tex"
    file.parent.mkdir(parents=True)
    file.write_text("the only copy")
    return tmp_path / "occupied"


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("3.6", "this is Python 3.6."),
        ("3.8", "this is Python 3.8."),
        ("3.9", "needs Python 3.10 to 3.14"),
        ("3.10", "is not a virtual environment"),  # it passes the check of the Python
        ("3.11", "is not a virtual environment"),
        ("3.13", "is not a virtual environment"),
    ],
)
def test_install_refuses_old_pythons_and_folders_in_use(
    version: str, said: str, script: Path, occupied: Path
) -> None:
    done = install(interpreter(version), script, "--folder", occupied)
    assert done.returncode != 0
    assert said in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in occupied.rglob("*")] == ["thesis", "chapter1.tex"]


def test_install_leaves_a_complete_environment_alone(script: Path, occupied: Path) -> None:
    if not (3, 10) <= sys.version_info[:2] <= (3, 14):
        pytest.skip("the package does not support this Python")
    query = "import sys; sys.path.insert(0, sys.argv[1]); import install; "
    query += "print(install.fingerprint('wheel'))"
    stamp = subprocess.run(
        [sys.executable, "-B", "-c", query, str(script.parent)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    (occupied / "resnext_det.installed").write_text(stamp)
    done = install(sys.executable, script, "--folder", occupied)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # Other requirements, or another Detectron2, end in the refusal above.
    source = install(sys.executable, script, "--folder", occupied, "--detectron2", "source")
    assert "is not a virtual environment" in source.stderr
    with (script.parents[1] / "requirements" / "lock.txt").open("a") as file:
        file.write("# changed\n")
    changed = install(sys.executable, script, "--folder", occupied)
    assert "is not a virtual environment" in changed.stderr


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True
    )


def test_importing_only_registers(tmp_path: Path) -> None:
    """No file, no log handler, no environment variable, no warning (or filter of warnings)."""
    program = """
import importlib, logging, os, warnings
import cv2, torch, torchvision, pycocotools, matplotlib  # theirs is not ours
filters = list(warnings.filters)
before = dict(os.environ), list(logging.getLogger().handlers)
import resnext_det
assert warnings.filters == filters
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.data import DatasetCatalog
importlib.reload(resnext_det.registered)
assert (dict(os.environ), list(logging.getLogger().handlers)) == before
assert not logging.getLogger("resnext_det").handlers
for name in ("build_resnext_backbone", "build_resnext_fpn_backbone",
             "build_retinanet_resnext_fpn_backbone"):
    assert name in BACKBONE_REGISTRY, name
for name in ("coco_2014_minival", "toy_coco_train", "toy_coco_minival"):
    assert name in DatasetCatalog.list(), name
"""
    done = python(program, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.iterdir())


def test_importing_explains_a_broken_detectron2(tmp_path: Path) -> None:
    (tmp_path / "detectron2.py").write_text("import pkg_resources_that_is_not_there")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import resnext_det"
    done = python(program, ROOT)
    assert done.returncode != 0
    last = done.stderr.strip().partition("ImportError: resnext_det needs Detectron2")[2]
    assert "make setup" in last and "sal-detectron2==0.7.2" in last


def test_importing_without_detectron2_is_harmless_until_it_is_needed(tmp_path: Path) -> None:
    program = """
import sys
for name in ("torch", "torchvision", "detectron2"):
    sys.modules[name] = None
import resnext_det
assert not hasattr(resnext_det, "no_such_name")
from resnext_det import prediction, image_files
from resnext_det import load_config
"""
    done = python(program, tmp_path)
    assert done.returncode != 0
    assert "resnext_det needs Detectron2" in done.stderr and "make setup" in done.stderr


def test_wheel(tmp_path: Path) -> None:
    """It holds every module, config and marker; installed, it finds its configs."""
    source, output, installed = tmp_path / "source", tmp_path / "wheel", tmp_path / "installed"
    # From a copy, as a build leaves folders behind.
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "-w", output, source], check=True, capture_output=True)
    with zipfile.ZipFile(next(output.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        (entry_points,) = (name for name in held if name.endswith("/entry_points.txt"))
        assert b"resnext-det = resnext_det_cli:main" in wheel.read(entry_points)
        wheel.extractall(installed)
    expected = {
        str(path.relative_to(ROOT))
        for package in ("resnext_det", "resnext_det_cli")
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".j2") or path.name == "py.typed"
    }
    configs = [path for path in (ROOT / "configs").iterdir() if path.suffix in (".yaml", ".py")]
    expected |= {f"resnext_det/configs/{path.name}" for path in configs}
    assert expected <= held, sorted(expected - held)
    assert not [name for name in held if name.startswith(("tools/", "tests/", "configs/"))]
    program = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import resnext_det.model_zoo as zoo
name = "faster_rcnn_X_101_64x4d_FPN_paper"
print(zoo.__file__)
print(zoo.get_config(name).MODEL.RESNETS.NUM_GROUPS)
print(zoo.get_lazy_config(name).model.backbone.bottom_up.template)
assert not [module for module in sys.modules if module.startswith("resnext_det.configs")]
"""
    done = python(program, tmp_path)
    place = str(installed / "resnext_det" / "model_zoo.py")
    assert done.stdout.splitlines() == [place, "64", "64x4d"], done.stderr
