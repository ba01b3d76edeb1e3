from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_importing_registers_and_does_nothing_else(tmp_path: Path) -> None:
    """No file, no handler on a logger, no environment variable; twice is harmless."""
    program = """
import importlib, logging, os
import detectron2.modeling, detectron2.data, pycocotools, matplotlib  # theirs is not ours
before = dict(os.environ), list(logging.getLogger().handlers)
import resnext_det
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
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", ["import resnext_det", None], ids=["import", "train_net.py"])
def test_detectron2_is_imported_quietly(program: str | None) -> None:
    """And without a lasting change: the next warning of that kind is the user's own to filter."""
    command = ["tools/train_net.py", "--help"]
    if program is not None:
        program = "import warnings, torch, torchvision, matplotlib; "
        program += "a = list(warnings.filters); import resnext_det; assert warnings.filters == a"
        command = ["-c", program]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "stand_in", ["raise ImportError('no module')", "import pkg_resources_that_is_not_there"]
)
def test_a_missing_or_broken_detectron2_is_explained(stand_in: str, tmp_path: Path) -> None:
    broken = tmp_path / "detectron2"
    broken.mkdir()
    (broken / "__init__.py").write_text(stand_in)
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import resnext_det"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode != 0
    last = done.stderr.strip().partition("ImportError: resnext_det needs Detectron2")[2]
    assert "make setup" in last
    assert "sal-detectron2==0.7.2" in last


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout, built from a copy: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in listed.stdout.split():
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    output = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [
            *[sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"],
            *["-w", str(output), str(source)],
        ],
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(output.glob("*.whl")))


def test_the_wheel_holds_every_module_config_and_marker(wheel: zipfile.ZipFile) -> None:
    held = set(wheel.namelist())
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
    (entry_points,) = (name for name in held if name.endswith("/entry_points.txt"))
    assert b"resnext-det = resnext_det_cli:main" in wheel.read(entry_points)


def test_the_installed_wheel_finds_its_configs(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Both kinds; and a LazyConfig, a .py in a folder of the package, is no module of it."""
    wheel.extractall(tmp_path)
    program = f"""
import pkgutil, sys
sys.path.insert(0, {str(tmp_path)!r})
import resnext_det.model_zoo as zoo
name = "faster_rcnn_X_101_64x4d_FPN_paper"
print(zoo.__file__)
print(zoo.get_config(name).MODEL.RESNETS.NUM_GROUPS)
print(zoo.get_lazy_config(name).model.backbone.bottom_up.template)
assert not [module for module in sys.modules if module.startswith("resnext_det.configs")]
packages = pkgutil.walk_packages([{str(tmp_path / "resnext_det")!r}], "resnext_det.")
assert not [package for package in packages if "configs" in package.name]
try:
    import resnext_det.configs.faster_rcnn_X_101_64x4d_FPN_paper
except ImportError as error:
    print(str(error).partition(",")[0])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        *[str(tmp_path / "resnext_det" / "model_zoo.py"), "64", "64x4d"],
        "this is a LazyConfig",
    ], done.stderr
