"""The commit that figures are measured at, and what the processor is slow at."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from resnext_det.environment import commit, is_slow

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="there is no git here")


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        ("flags\t\t: fpu avx512_bf16 avx512_fp16\n", {"bf16", "fp16"}),
        ("flags\t\t: fpu amx_bf16 amx_tile\n", {"fp16"}),
        ("processor: 0\nflags\t\t: amx_bf16 amx_fp16\nbugs: spectre\n", set()),
        ("Features\t: fp asimd bf16\n", set()),  # ARM
        (None, set()),
    ],
)
def test_low_precision_is_slow_without_amx(
    cpuinfo: str | None, slow: set[str], tmp_path: Path
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_text(cpuinfo)
    assert {each for each in ("stock", "fp32", "bf16", "fp16") if is_slow(each, file)} == slow


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    command = ["git", "-C", str(folder), *identity, "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture()
def source(tmp_path: Path) -> Path:
    """A source file in a git repository, not committed yet."""
    file = tmp_path / "repository" / "package" / "environment.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    git(file.parent, "init", "--quiet")
    git(file.parent, "add", ".")
    return file


@needs_git
def test_commit_of_the_checkout(source: Path) -> None:
    assert commit(source) is None
    git(source.parent, "commit", "--quiet", "-m", "first")
    git(source.parent, "tag", "v1")
    head = git(source.parent, "rev-parse", "HEAD")
    (source.parent / "output.txt").write_text("not under version control")
    assert commit(source) == head
    source.write_text("2")
    assert commit(source) == f"{head}+changes"


@needs_git
def test_no_commit_outside_of_a_checkout(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git(source.parent, "commit", "--quiet", "-m", "first")
    installed = source.parent / "venv" / "environment.py"  # into another project's checkout
    installed.parent.mkdir()
    installed.write_text("1")
    assert commit(installed) is None
    assert commit(tmp_path / "nowhere" / "environment.py") is None
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert commit(source) is None


@needs_git
def test_commit_ignores_the_users_git_settings(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repository of a hook that runs this, and a program that git would run."""
    git(source.parent, "commit", "--quiet", "-m", "first")
    head = git(source.parent, "rev-parse", "HEAD")
    ran = tmp_path / "ran"
    git(source.parent, "config", "core.fsmonitor", f"touch {ran}; false")
    ran.unlink(missing_ok=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    assert commit(source) == head
    assert not ran.exists()
