"""The shape of the checkout: four packages side by side, tests that mirror them, files short enough to read."""

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = ("muxcompile", "passes", "codegen", "runtime")
MOST_LINES = 450

# Folders under tests/ that are named for what their tests need or hold, not for a product folder.
OTHER_TEST_FOLDERS = {"benchmarks", "golden", "gpu", "dist"}


def folders_below(top: Path) -> list[Path]:
    return [path for path in sorted(top.rglob("*")) if path.is_dir() and path.name != "__pycache__"]


def test_the_four_packages_lie_side_by_side_in_this_checkout() -> None:
    # Another distribution may ship a package named `runtime` or `passes`; its files must not be the ones imported.
    places = {}
    for name in TOPS:
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"{name} cannot be imported"
        assert spec.origin is not None, f"{name} has no __init__.py"
        places[name] = Path(spec.origin).resolve().parents[1]
    assert places == dict.fromkeys(TOPS, ROOT)


def test_pyproject_names_every_package_folder_and_no_other() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    on_disk = [
        ".".join(folder.relative_to(ROOT).parts)
        for top in TOPS
        for folder in [ROOT / top, *folders_below(ROOT / top)]
        if (folder / "__init__.py").exists()
    ]
    assert sorted(listed) == sorted(on_disk)


def test_every_folder_with_product_code_is_a_package() -> None:
    bare = {
        str(path.parent.relative_to(ROOT))
        for top in TOPS
        for path in (ROOT / top).rglob("*.py")
        if not (path.parent / "__init__.py").exists()
    }
    assert not bare, "these folders have no __init__.py"


def test_every_test_folder_mirrors_a_product_folder() -> None:
    strays = [
        str(folder.relative_to(ROOT))
        for folder in folders_below(ROOT / "tests")
        for parts in [folder.relative_to(ROOT / "tests").parts]
        if parts[0] not in OTHER_TEST_FOLDERS and (parts[0] not in TOPS or not ROOT.joinpath(*parts).is_dir())
    ]
    assert not strays, "these test folders mirror no product folder"


def test_no_product_file_is_too_long_to_read_in_one_sitting() -> None:
    files = [path for top in TOPS for path in sorted((ROOT / top).rglob("*.py"))]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    too_long = {path: lines for path, lines in lengths.items() if lines >= MOST_LINES}
    assert not too_long, f"product files stay under {MOST_LINES} lines; one that outgrows that is asking for a new noun"


class Seen:
    """A plugin of pytest that notes the files it comes to, each of which its plugin for Python would then import."""

    def __init__(self) -> None:
        self.files: set[Path] = set()

    def pytest_collect_file(self, file_path: Path, parent: Any) -> None:
        self.files.add(file_path)


def test_pytest_comes_to_every_file_of_tests() -> None:
    # It passes over folders by their names alone, without a word: "dist" and "build" are among them where nobody says otherwise.
    seen, without = Seen(), [f"-pno:{name}" for name in ("python", "terminal", "cacheprovider", "xdist")]
    pytest.main(["--collect-only", "--noconftest", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), *without], [seen])
    assert {path for path in (ROOT / "tests").rglob("test_*.py") if path not in seen.files} == set()
    assert seen.files


def test_what_is_recorded_has_no_branches() -> None:
    # While a record with branches ran, streams of other lanes stood still (docs/meshes.md).
    forks = [str(path.relative_to(ROOT)) for path in (ROOT / "codegen").rglob("*.py") if "cuda.Stream" in path.read_text("utf-8")]
    assert not forks, "kernels are launched in the caller's stream"
