"""hf://OWNER/NAME[@REVISION]: detectors in repositories of the Hugging Face Hub.

`resnext-det push` writes such a repository. A download is untrusted: only its config (yaml) and its
weights (safetensors) are read, which hold no code, and only after their sizes are checked.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.utils.file_io import PathHandler, PathManager

from resnext_det.checkpoint_file import read_run
from resnext_det.config import parse_config
from resnext_det.errors import ConfigError, ResNeXtError, WeightsError, quoted
from resnext_det.files import file_digest, open_regular, size_text
from resnext_det.weights.fetching import LARGEST
from resnext_det.weights.reading import is_safetensors

SCHEME = "hf://"
CARD, CONFIG, WEIGHTS = "README.md", "config.yaml", "model.safetensors"
"""The files of a repository."""

_LIMITS = {CONFIG: 1 << 20, WEIGHTS: LARGEST}
_ADDRESS = re.compile(
    r"hf:(?://)?(\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@(\w[\w./-]{0,199}))?", re.ASCII
)
_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True)
class Address:
    """A repository, "OWNER/NAME", and its branch, tag or commit; None for the main branch."""

    repository: str
    revision: str | None = None

    @classmethod
    def of(cls, text: str) -> Address:
        """Read hf://OWNER/NAME[@REVISION]; the slashes after "hf:" may be left out.

        Raises:
            ConfigError: it is something else.
        """
        found = _ADDRESS.fullmatch(text)
        if found is None or ".." in text:
            raise ConfigError(
                f"{quoted(text)} must be hf://OWNER/NAME or hf://OWNER/NAME@REVISION."
            )
        return cls(found[1], found[2])

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}{f'@{self.revision}' if self.revision else ''}"


class HubHandler(PathHandler):
    """Gives Detectron2's path manager the weights at hf:// addresses."""

    def _get_supported_prefixes(self) -> list[str]:
        return [SCHEME]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        """Return a safetensors file in the hub's cache; `force` asks for a newer revision."""
        self._check_kwargs(kwargs)
        if force:
            fetch.cache_clear()
        return str(fetch(Address.of(path)))


def register() -> None:
    """Add hf:// to Detectron2's path manager; a second call changes nothing."""
    PathManager.register_handler(HubHandler(), allow_override=True)


@functools.cache  # one revision for the whole process, whatever is pushed in the meantime
def fetch(address: Address) -> Path:
    """Return the weights of a repository, downloaded if necessary, with config.yaml beside them.

    Both are in huggingface_hub's cache, which also serves them without a network. A download that
    is refused is removed.

    Raises:
        ConfigError: huggingface_hub is missing.
        WeightsError: a file cannot be downloaded, is too large or damaged, or is not what
            `resnext-det push` writes.
    """
    new: list[Path] = []
    with _explained(address) as hub:
        try:
            config = _download(hub, address, CONFIG, new)
            # At the same commit, whose name huggingface_hub gives to the folder.
            weights = _download(hub, replace(address, revision=config.parent.name), WEIGHTS, new)
            _check(address, weights, config)
        except BaseException:
            for file in new:
                _remove(file)
            raise
    return weights


def _download(hub: Any, address: Address, name: str, new: list[Path]) -> Path:
    """Return a file of a repository; add it to `new` if it was not in the cache."""
    where = {"repo_id": address.repository, "filename": name, "revision": address.revision}
    try:
        planned = hub.hf_hub_download(**where, dry_run=True)
        size, limit = planned.file_size, _LIMITS[name]
        if size is None or size > limit:
            shown = "an unknown size" if size is None else size_text(size)
            raise WeightsError(
                f"{address}: {name} has {shown}; at most {size_text(limit)} are downloaded."
            )
        file = Path(hub.hf_hub_download(**where))
    except hub.errors.RemoteEntryNotFoundError as error:
        raise WeightsError(
            f"{address} has no {name}: hf:// takes repositories that `resnext-det push` wrote."
        ) from error
    if not planned.is_cached:
        new.append(file)
        # The cache calls a large file by its digest, but huggingface_hub compares only its size.
        digest = _blob(file).name
        if len(digest) == 64 and file_digest(file) != digest:
            raise WeightsError(f"{address}: {name} was damaged in transit: try again.")
    return file


def _check(address: Address, weights: Path, config: Path) -> None:
    """Refuse weights without a record of their run, and a config that is not that run's alone."""
    if not is_safetensors(weights):
        raise WeightsError(f"{address}: {WEIGHTS} is not a safetensors file.")
    try:
        run = read_run(weights)
    except WeightsError as error:
        raise WeightsError(f"{address}: {error}") from error
    if run is None:
        raise WeightsError(
            f"{address}: {WEIGHTS} records no config and no classes; hf:// takes repositories that "
            "`resnext-det push` wrote."
        )
    with open_regular(config) as stream:
        text = stream.read(_LIMITS[CONFIG] + 1)
    if text != run.config.encode():
        raise WeightsError(
            f"{address}: {CONFIG} is not the config that {WEIGHTS} records. Push the run again "
            "instead of editing it there; settings can be overridden when it is used."
        )
    if "_BASE_" in parse_config(run.config, f"{address}: {CONFIG}"):
        raise WeightsError(f"{address}: {CONFIG} names another file, _BASE_, which is not read.")


def _blob(file: Path) -> Path:
    """Return what a file in a snapshot links to; without symbolic links, the file itself."""
    return file.parent / file.readlink() if file.is_symlink() else file


def _remove(file: Path) -> None:
    _blob(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def upload(files: Sequence[Path], address: Address, *, private: bool = False) -> str:
    """Upload files to a repository in one commit, creating it if necessary.

    Args:
        files: their names are kept.
        address: without a revision.
        private: create a private repository; refuse an existing public one.

    Returns:
        The commit.

    Raises:
        ConfigError: huggingface_hub is missing, or the repository is public.
        WeightsError: the hub refuses the files, or cannot be reached.
    """
    with _explained(address) as hub:
        api = hub.HfApi()
        api.create_repo(address.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(address.repository).private:
            raise ConfigError(
                f"{address} exists and is public: make it private on its page, name another, or "
                "omit --private. Nothing was uploaded."
            )
        added = [hub.CommitOperationAdd(file.name, file) for file in files]
        message = "Upload a detector trained with resnext_det"
        return str(api.create_commit(address.repository, added, commit_message=message).oid)


@contextlib.contextmanager
def _explained(address: Address) -> Iterator[Any]:
    """Import huggingface_hub, and put its errors into one line."""
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ConfigError(
            f"{address} needs huggingface_hub, and importing it failed ({quoted(error)}): "
            "pip install huggingface_hub"
        ) from error
    try:
        yield huggingface_hub
    except ResNeXtError:
        raise
    except Exception as error:  # also of the HTTP library, another one in each major version
        reason = _reason(huggingface_hub.errors, error, address)
        raise WeightsError(f"{address} {reason.rstrip('.')}.") from error


def _reason(errors: Any, error: Exception, address: Address) -> str:
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: ask for access on its page, and {_LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"does not exist: the repository has no revision {quoted(address.revision)}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return f"does not exist, or you have no access to it ({status}): {_LOGIN}"
    if status is not None:
        return f"failed: the hub answered {status} ({quoted(error, 100)})"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return "is not in the cache, and the hub cannot be reached: this machine may be offline"
    if "Consistency check" in str(error):  # an OSError like any other
        return "arrived incomplete: try again"
    return f"failed: {type(error).__name__}: {quoted(error)}"
