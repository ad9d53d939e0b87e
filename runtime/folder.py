"""Folders that appear whole, and take the place of nothing but what was written in the same way before."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from safetensors import SafetensorError

from runtime.comm import Ranks


@dataclass(frozen=True, slots=True)
class Form:
    """What a folder of ours looks like, by which it is told from one that holds somebody's files.

    Args:
        marker: the file that every such folder has.
        files: all that it may have, the marker among them: "*/state.safetensors", by `fnmatch` part for part.
    """

    marker: str
    files: tuple[str, ...]

    def foreign(self, folder: Path) -> Path | None:
        """The first path below that we would not have written; None: there is none, or the folder is empty."""
        patterns = [tuple(pattern.split("/")) for pattern in self.files] if (folder / self.marker).is_file() else []
        return _foreign(folder, patterns)


def _foreign(folder: Path, patterns: Sequence[tuple[str, ...]]) -> Path | None:
    for path in sorted(folder.iterdir()):
        below = [rest for first, *rest in patterns if fnmatchcase(path.name, first)]
        # A link is somebody's arrangement: we write none.
        if path.is_symlink() or not (any(below) if path.is_dir() else [] in below):
            return path
        if path.is_dir() and (found := _foreign(path, [tuple(rest) for rest in below if rest])) is not None:
            return found
    return None


# A folder that must not be there, or be empty.
NOTHING = Form("", ())


def set_aside(target: Path) -> Path:
    """Where the old folder is while it is exchanged for the new one."""
    return target.with_name(f".{target.name}.old")


def check_replaceable(target: Path, form: Form, ranks: Ranks | None = None, who: str = "") -> None:
    """Refuse to put a folder in the place of what we did not write. Of several ranks all find what the first one does.

    Args:
        who: what a refusal begins with.

    Raises:
        ValueError: naming the first such file; or the folder, if it is none, or this process works in it.
    """

    def check() -> None:
        if (ranks is None or not ranks.rank) and (found := _refusal(target, form)):
            raise ValueError(f"{who}{found}")

    check() if ranks is None else ranks.by_all(check)


def _refusal(target: Path, form: Form) -> str:
    real = target.resolve()
    for place in (real, set_aside(real)) if real.name else (real,):
        if not place.exists():
            continue
        if not place.is_dir():
            return f"{place}: is not a folder"
        if Path.cwd().is_relative_to(place):
            return f"{place}: is the working folder or above it, and would be replaced whole: name another one"
        if (path := form.foreign(place)) is not None:
            return f"{place}: holds {str(path.relative_to(place))!r}, which muxcompile has not written, and would be replaced whole"
    return ""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong with the disk in here is said of `path`: a full one is reported without a name.

    Raises:
        OSError: naming it.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: cannot be written: {error}") from error


@contextlib.contextmanager
def replace_folder(target: Path, form: Form = NOTHING) -> Iterator[Path]:
    """Yield a fresh folder that takes the place of `target` when the block ends well; on an error `target` is as it was.

    Where `target` is a link, what it leads to is replaced.

    Args:
        form: of what may be there before.

    Raises:
        ValueError: something else is there; nothing was changed then.
        OSError: it cannot be written; the error names it.
    """
    check_replaceable(target, form)
    with writing(target), _exchanged(target.resolve()) as fresh:
        yield fresh


@contextlib.contextmanager
def _exchanged(target: Path) -> Iterator[Path]:
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        fresh.chmod(0o755)
        yield fresh
        for path in fresh.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        old = set_aside(target)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        try:
            fresh.rename(target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
