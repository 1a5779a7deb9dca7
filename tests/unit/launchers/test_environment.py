"""What the launchers do to the environment of a run."""

import pytest

from launchers import environment


@pytest.fixture
def token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "ray" / "token"))
    return tmp_path / "ray" / "token"


def test_rays_token_is_made_for_its_owner_alone(token):
    environment.guard_ray_token()
    made = token.read_text()
    assert (len(made), token.stat().st_mode & 0o777) == (64, 0o600)
    environment.guard_ray_token()
    assert token.read_text() == made


def test_a_token_that_others_can_read_is_closed(token):
    token.parent.mkdir()
    token.write_text("abc")
    token.chmod(0o644)
    environment.guard_ray_token()
    assert (token.read_text(), token.stat().st_mode & 0o777) == ("abc", 0o600)


def test_a_token_given_as_a_variable_needs_no_file(token, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    environment.guard_ray_token()
    assert not token.exists()
