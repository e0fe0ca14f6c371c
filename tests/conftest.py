"""Two at a time (`make test`), the tests of a file share a process; each short run goes alone."""

import pytest


@pytest.hookimpl(tryfirst=True)                  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        alone = "short_run" in item.name
        item.add_marker(pytest.mark.xdist_group(item.name if alone else item.path.stem))
