"""For the tests without other processes."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _no_disk_is_waited_for():
    """No test can lose the machine's power, so none can tell whether ``fsync`` waited: some 5 ms a call, of thousands.

    Tests of its failures put their own in this one's place.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield
