"""The registry: a method is a file, listed without being imported."""

import subprocess
import sys

import pytest

from pipeline import registry


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package ``toys`` of two methods, one of which cannot be imported, and a helper."""
    folder = tmp_path / "toys"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "_helper.py").touch()
    (folder / "kite.py").write_text("STRING = 30\n")
    (folder / "ball.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "toys"
    for module in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        del sys.modules[module]


def test_methods_are_listed_by_name_without_being_imported(package):
    assert registry.names(package) == ("ball", "kite")
    assert "toys.kite" not in sys.modules


def test_a_method_is_imported_when_it_is_used(package):
    assert registry.load(package, "kite").STRING == 30


@pytest.mark.parametrize("name", ["kit", "_helper", "os.path"])
def test_an_unknown_method_is_told_the_known_ones(package, name):
    with pytest.raises(ValueError, match=rf"no '{name}': use one of ball, kite"):
        registry.load(package, name)


@pytest.mark.parametrize("package", ["pipeline.registry", "pipeline.nowhere"])
def test_what_is_no_package_has_no_methods(package):
    with pytest.raises(ValueError, match=f"'{package}' is no package"):
        registry.names(package)


def test_listing_needs_no_torch():
    program = (
        "import sys; from pipeline import registry; registry.names('pipeline.rollout'); "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
