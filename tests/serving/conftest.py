"""One small pruned model behind a server, for all tests of a module."""

import pytest

from saap.serving.server import open_served
from saap.serving.server_app import Served
from tests.serving.running import running, saved


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Served:
    return open_served(saved(tmp_path_factory.mktemp("served") / "tiny"), None, None)


@pytest.fixture(scope="module")
def client(served):
    with running(served) as client:
        yield client
