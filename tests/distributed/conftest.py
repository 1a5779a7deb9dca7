import pytest
from gang import Gang


@pytest.fixture(scope="session")
def gang():
    processes = Gang()
    yield processes
    processes.close()
