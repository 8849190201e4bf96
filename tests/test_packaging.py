"""What is installed is what is in the tree: a wheel holds every module, and the names it promises work."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKED = ("passes", "lowering", "kernels")  # folders at the root that are linked into the package


def test_links() -> None:
    for name in LINKED:
        link = ROOT / "kvc_compile" / name
        assert link.is_symlink() and not link.readlink().is_absolute()
        assert link.resolve() == ROOT / name


@pytest.mark.slow
def test_wheel_holds_the_tree(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: building in the checkout would leave build/ and egg-info there
    tree.mkdir()
    for name in ("kvc_compile", *LINKED):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    wheel_of = f"-P -m pip wheel --quiet --no-deps --no-build-isolation -w {tmp_path} {tree}"
    ran = subprocess.run([sys.executable, *wheel_of.split()], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as z:
        inside = {n for n in z.namelist() if ".dist-info/" not in n}
    expected = {
        str(p.relative_to(ROOT))
        for folder in ("kvc_compile", *(f"kvc_compile/{n}" for n in LINKED))
        for p in (ROOT / folder).rglob("*")
        if p.is_file() and "__pycache__" not in p.parts and p.suffix in (".py", ".yaml", ".json", ".html", ".cpp")
    }
    assert inside == expected
    assert "kvc_compile/spec/schema.json" in inside and "kvc_compile/spec/presets/kivi-4bit.yaml" in inside
    assert {f"kvc_compile/{n}/__init__.py" for n in LINKED} <= inside


def test_backend_by_name() -> None:
    import torch

    assert "kvc" in torch._dynamo.list_backends()
    (point,) = metadata.entry_points(group="torch_dynamo_backends", name="kvc")
    from kvc_compile.backend import kvc

    assert point.load() is kvc


def test_versions_agree() -> None:
    import kvc_compile

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == kvc_compile.__version__


def test_readme_names_the_extras() -> None:
    readme = (ROOT / "README.md").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "pip install -e '.[demo]' && kvc demo" in readme and "pip install -e '.[test]' && pytest" in readme
    assert {"demo", "test", "hf"} <= set(extras)


def test_readme_example_is_the_file() -> None:
    example = (ROOT / "examples" / "quickstart.py").read_text()
    assert example.partition('"""\n\n')[2].strip() in (ROOT / "README.md").read_text()
