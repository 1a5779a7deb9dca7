"""For all tests."""

from collections import Counter

from hypothesis import settings

settings.register_profile("isentrope", deadline=None)  # a busy machine is no failure
settings.load_profile("isentrope")


def pytest_collection_modifyitems(items):
    """Files of processes first, so that a worker keeps those processes from file to file; then files of many tests.

    Two workers that take the next file whenever they are free end at nearly the same time.
    """
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: ("distributed" not in item.path.parts, -tests[item.path]))
