"""What `isentrope doctor` says of this machine and of one where something is wrong."""

import json
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from launchers import doctor
from launchers.doctor import BAD, NOTE, OK, examine
from tests.unit.launchers.test_cli import call


def test_this_machine_is_examined(capsys, tmp_path):
    code, out, _ = call(capsys, "doctor", "--folder", str(tmp_path), "--json")
    findings = json.loads(out)
    assert {"python", "versions", "shared memory", "ports", "disk"} <= {finding["subject"] for finding in findings}
    assert code == (1 if any(finding["level"] == BAD for finding in findings) else 0)
    assert all(finding["remedy"] for finding in findings if finding["level"] != "ok")


def test_a_version_that_isentrope_does_not_serve_is_named_with_what_is_wanted(monkeypatch, tmp_path):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.4.0" if name == "sglang" else real(name))
    monkeypatch.setattr(doctor, "_wanted", lambda owner, name: None)  # what an sglang that is really there wants
    found = [finding for finding in examine(tmp_path) if finding.subject == "sglang"]
    assert [finding.level for finding in found] == [BAD]
    assert "0.4.0 is installed" in found[0].words
    assert ">=0.5.17" in found[0].remedy


def test_a_pin_of_sglang_binds_on_gpus(monkeypatch):
    monkeypatch.setattr(doctor, "_wanted", lambda owner, name: Requirement("torch==2.0") if name == "torch" else None)
    for gpus, level in ((True, BAD), (False, NOTE)):
        (found,) = [finding for finding in doctor.environment(gpus) if finding.subject == "torch"]
        assert found.level == level
        assert "install torch==2.0" in found.remedy


@pytest.mark.parametrize(
    ("library", "found", "level"), [("libnone.so.9", None, BAD), ("libc.so.6", 0, BAD), ("libc.so.6", 2, OK)]
)
def test_adapters_that_nccl_would_not_find_are_named(monkeypatch, tmp_path, library, found, level):
    """Without the library, with it but not the adapters' providers, and with both."""
    (tmp_path / "mlx5_0").mkdir()
    monkeypatch.setattr(doctor, "ADAPTERS", tmp_path)
    monkeypatch.setattr(doctor, "VERBS", library)
    if found is not None:
        monkeypatch.setattr(doctor, "_verbs_devices", lambda: found)
    (finding,) = doctor._fabric()
    assert finding.level == level
    assert "mlx5_0" in finding.words
    assert ("libibverbs1 ibverbs-providers" in finding.remedy) == (level == BAD)


def test_a_machine_without_adapters_needs_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "ADAPTERS", tmp_path / "none")
    (finding,) = doctor._fabric()
    assert finding.level == OK


def test_the_versions_served_are_those_of_the_project():
    project = tomllib.loads((Path(doctor.__file__).parents[1] / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *optional["sglang"], *optional["gpu"]]]
    assert {r.name: str(r.specifier) for r in wanted if r.name in doctor.SERVED} == {
        name: str(doctor.SpecifierSet(text)) for name, text in doctor.SERVED.items()
    }
