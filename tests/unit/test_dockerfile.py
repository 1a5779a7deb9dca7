"""The image is not built here; what can be seen without that: every version is pinned, served, and the one that tests
run with.
"""

import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from launchers.doctor import SERVED

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
WORDS = [word.strip('"') for line in re.findall(r"pip install ([^&\n]*)", TEXT) for word in line.split()]
PINS = dict(re.fullmatch(r"([\w-]+)(?:\[\w+\])?==([\w.]+)", word).groups() for word in WORDS if "==" in word)
# Others than what tests run with on CPUs, for Transformer Engine's and SGLang's sake.
OTHERS = {"torch", "sglang", "megatron-core", "transformer-engine", "pybind11", "setuptools", "wheel"}


def test_everything_is_pinned():
    options = {"--no-build-isolation", "--index-url", "https://download.pytorch.org/whl/cu130"}
    assert [word for word in WORDS if "==" not in word and word not in options] == []
    assert re.search(r"^FROM \S+:\d[\w.-]+$", TEXT, re.MULTILINE)


@pytest.mark.parametrize("name", SERVED)
def test_versions_are_served(name):
    assert PINS[name] in SpecifierSet(SERVED[name])


def test_other_packages_are_those_that_tests_run_with():
    lines = "\n".join(path.read_text() for path in (ROOT / "requirements").glob("*.txt"))
    tested = {name.lower().replace("_", "-"): v for name, v in re.findall(r"^([\w.-]+)==([\w.]+)", lines, re.MULTILINE)}
    assert {name: version for name, version in PINS.items() if name not in OTHERS} == {
        name: tested[name] for name in PINS.keys() - OTHERS
    }


def test_nccl_finds_its_adapters_in_the_image():
    """What `isentrope doctor` looks for and names as the remedy."""
    (installed,) = re.findall(r"apt-get install ([^&]*)", TEXT)
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(installed.split())
