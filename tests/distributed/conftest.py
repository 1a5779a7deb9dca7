from pathlib import Path

import pytest
from gang import Gang

PROCESSES = Gang()


@pytest.fixture(scope="session")
def gang():
    return PROCESSES


def pytest_runtest_teardown(nextitem):
    """The processes end with the last test that may need them: their idle threads would slow all tests that follow."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        PROCESSES.close()
