"""Folders that appear whole, and what they do not take the place of."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from runtime.folder import Form, replace_folder

FORM = Form("a.txt", ("a.txt", "inner/*.txt"))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_folder_takes_the_place_of_the_old_one_when_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    for text in ("one", "two"):
        with replace_folder(target, FORM) as folder:
            (folder / "inner").mkdir()
            (folder / "inner" / f"{text}.txt").write_text(text)
            (folder / "a.txt").write_text("")
            assert folder != target
        assert files(target) == {"a.txt": b"", f"inner/{text}.txt": text.encode()}
    assert os.listdir(target.parent) == ["out"], "nothing else is left behind"


def write_and_fail(target: Path) -> None:
    with replace_folder(target, FORM) as folder:
        (folder / "a.txt").write_text("two")
        raise KeyboardInterrupt


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with replace_folder(target, FORM) as folder:
        (folder / "a.txt").write_text("one")
    with pytest.raises(KeyboardInterrupt):
        write_and_fail(target)
    assert files(target) == {"a.txt": b"one"}
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_where_nothing_was_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="full"), replace_folder(tmp_path / "out"):
        raise RuntimeError("disk full")
    assert os.listdir(tmp_path) == []


def test_the_old_folder_comes_back_when_the_exchange_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    with replace_folder(target, FORM) as folder:
        (folder / "a.txt").write_text("one")
    rename = Path.rename

    def failing(self: Path, other: Any) -> Any:
        if Path(other) == target:
            raise OSError("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no"), replace_folder(target, FORM) as folder:
        (folder / "a.txt").write_text("two")
    monkeypatch.undo()
    assert files(target) == {"a.txt": b"one"}
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")])
def test_a_full_disk_is_reported_with_the_folders_name(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(OSError, match=r"out: cannot be written: .*No space left on device"), replace_folder(tmp_path / "out"):
        raise error
    assert os.listdir(tmp_path) == []


def test_others_may_read_the_folder(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out") as folder:
        (folder / "a.txt").write_text("one")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


# --- what is not replaced -------------------------------------------------------------------------------------------------


def write(target: Path, text: str = "new") -> None:
    with replace_folder(target, FORM) as folder:
        (folder / "a.txt").write_text(text)


STRANGE = {
    "a file": lambda at: (at / "notes.md").write_text("precious"),
    "a file of another suffix": lambda at: (at / "inner" / "notes.md").write_text("precious"),
    "a file of ours in the wrong place": lambda at: (at / "inner" / "a.txt").rename(at / "b.txt"),
    "a folder": lambda at: (at / "more").mkdir(),
    "a folder by a file's name": lambda at: (at / "inner" / "b.txt").mkdir(),
    "a file by a folder's name": lambda at: ((at / "inner" / "a.txt").unlink(), (at / "inner").rmdir(), (at / "inner").touch()),
    "a link": lambda at: (at / "inner" / "b.txt").symlink_to(at / "a.txt"),
    "no marker": lambda at: (at / "a.txt").unlink(),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_folder_with_something_that_we_do_not_write_is_refused_and_left_as_it_is(what: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / "inner").mkdir(parents=True)
    for name in ("a.txt", "inner/a.txt"):
        (target / name).write_text("old")
    STRANGE[what](target)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"out: holds '.*', which muxcompile has not written, and would be replaced whole"):
        write(target)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_lies_where_the_old_folder_is_put_aside_is_not_lost_either(tmp_path: Path) -> None:
    (tmp_path / ".out.old").mkdir()
    (tmp_path / ".out.old" / "notes.md").write_text("precious")
    with pytest.raises(ValueError, match=r"\.out\.old: holds 'notes\.md'"):
        write(tmp_path / "out")


def test_an_empty_folder_is_replaced_and_a_file_is_not(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty")
    assert files(tmp_path / "empty") == {"a.txt": b"new"}
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="file: is not a folder"):
        write(tmp_path / "file")


def test_the_working_folder_is_not_replaced_under_our_feet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (Path(), Path(".."), tmp_path):
        with pytest.raises(ValueError, match="is the working folder or above it"):
            write(target)
    assert list(tmp_path.iterdir()) == []


def test_a_link_stays_one_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk/real")  # which is not there yet
    for text in ("one", "two", "three"):
        write(tmp_path / "out", text)
        assert (tmp_path / "out").is_symlink()
        assert files(tmp_path / "disk") == {"real/a.txt": text.encode()}
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"]
    assert os.listdir(tmp_path / "disk") == ["real"]
