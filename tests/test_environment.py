"""The commit that figures are measured at: of the package's own checkout, or none."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from resnext_det.environment import commit, hardware, versions
from resnext_det.evaluation.results_file import write_metrics

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture()
def checkout(tmp_path: Path) -> Path:
    """Return a file of a package under version control."""
    source = tmp_path / "repository" / "package" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("1")
    git(source.parent, "init", "--quiet")
    git(source.parent, "add", ".")
    git(source.parent, "commit", "--quiet", "-m", "first")
    return source


@needs_git
def test_the_commit_is_that_of_the_checkout_and_changes_are_told(checkout: Path) -> None:
    head = git(checkout.parent, "rev-parse", "HEAD")
    assert commit(checkout) == head
    (checkout.parent / "output.txt").write_text("not under version control")
    assert commit(checkout) == head
    checkout.write_text("2")
    assert commit(checkout) == f"{head}+changes"
    git(checkout.parent, "commit", "--quiet", "-a", "-m", "second")
    assert commit(checkout) == git(checkout.parent, "rev-parse", "HEAD") != head


@needs_git
def test_a_package_installed_in_another_project_has_no_commit(checkout: Path) -> None:
    installed = checkout.parent / "venv" / "environment.py"
    installed.parent.mkdir()
    installed.write_text("1")
    assert commit(installed) is None


@needs_git
def test_neither_the_folder_nor_the_surroundings_of_the_user_count(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    ran = tmp_path / "ran"
    for folder in (other, checkout.parent):
        git(folder, "config", "core.fsmonitor", f"touch {ran}; false")
    ran.unlink(missing_ok=True)
    monkeypatch.chdir(other)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    found = commit(checkout)
    monkeypatch.delenv("GIT_DIR")
    assert found == git(checkout.parent, "-c", "core.fsmonitor=false", "rev-parse", "HEAD")
    assert not ran.exists()


@needs_git
def test_outside_of_a_checkout_and_before_a_first_commit_there_is_none(tmp_path: Path) -> None:
    source = tmp_path / "environment.py"
    source.write_text("1")
    assert commit(source) is None
    assert commit(tmp_path / "nowhere" / "environment.py") is None
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    assert commit(source) is None


def test_without_git_there_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() is None
    broken = tmp_path / "git"
    broken.write_text("#!/nowhere\n")
    broken.chmod(0o755)
    assert commit() is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="hardware() tells the GPU")
def test_one_thread_is_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for count, words in ((1, "CPU, 1 thread, no GPU"), (2, "CPU, 2 threads, no GPU")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert hardware().endswith(words)


def test_metrics_have_the_commit_beside_versions_and_hardware(tmp_path: Path) -> None:
    write_metrics(tmp_path, "toy", {"weights": "w"}, {})
    document = json.loads((tmp_path / "metrics.json").read_text())
    told = {key: document[key] for key in ("commit", "versions", "hardware")}
    assert told == {"commit": commit(), "versions": versions(), "hardware": hardware()}
