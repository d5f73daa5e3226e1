"""Fixtures of several modules: one small pruned model behind a server, and a stand-in for vLLM."""

import pytest

from tests.serving.vllm_stand import vllm  # noqa: F401  # a fixture


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A ``Served``, for all tests of a module."""
    from saap.serving.server import open_served  # not there where vLLM is tested
    from tests.serving.running import saved

    return open_served(saved(tmp_path_factory.mktemp("served") / "tiny"), None, None)


@pytest.fixture(scope="module")
def client(served):
    from tests.serving.running import running

    with running(served) as client:
        yield client
