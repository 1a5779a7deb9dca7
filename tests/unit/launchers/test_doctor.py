"""What `isentrope doctor` says of this machine and of one where something is wrong."""

import json

from launchers import doctor
from launchers.doctor import BAD, examine
from tests.unit.launchers.test_cli import call


def test_this_machine_is_examined(capsys, tmp_path):
    code, out, _ = call(capsys, "doctor", "--folder", str(tmp_path), "--json")
    findings = json.loads(out)
    assert {"python", "versions", "shared memory", "ports", "disk"} <= {finding["subject"] for finding in findings}
    assert code == (1 if any(finding["level"] == BAD for finding in findings) else 0)
    assert all(finding["remedy"] for finding in findings if finding["level"] != "ok")


def test_a_version_that_does_not_fit_is_named_with_what_is_wanted(monkeypatch, tmp_path):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "0.4.0" if name == "sglang" else real(name))
    monkeypatch.setattr(
        doctor, "_wanted", lambda owner, name: doctor.Requirement("sglang>=0.5") if name == "sglang" else None
    )
    found = [finding for finding in examine(tmp_path) if finding.subject == "sglang"]
    assert [finding.level for finding in found] == [BAD]
    assert "0.4.0 is installed" in found[0].words
    assert ">=0.5" in found[0].remedy
