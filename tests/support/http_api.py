"""A server and OpenAI's client of it: fixtures for the tests of chat, speech and HTTP.

A test file assigns them to names of its own, because ruff takes fixtures that are imported by name
for unused ones that the arguments of the tests hide:

    server, address, client = http_api.server, http_api.address, http_api.client

`address` is that of the test file's `server`, which may be one of its own.
"""

import dataclasses

import openai
import pytest

from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from tests.support.conversations import GREEDY
from tests.support.server import running

OPTIONS = dataclasses.replace(GREEDY, max_new_tokens=12, max_flush_units=15)
SEA = {"role": "user", "content": "What is the sea?"}


@pytest.fixture(scope="module")
def server(model, warm_engine, tmp_path_factory):
    voices = tmp_path_factory.mktemp("server") / "voices"
    server = Server(model, OPTIONS, Limits(sessions=3, context=1000), voices=voices)
    server.worker.start()
    yield server
    assert server.worker.stop(20)


@pytest.fixture(scope="module")
def address(server):
    with running(server) as address:
        yield address


@pytest.fixture
def client(address):
    return openai.OpenAI(api_key="unused", base_url=f"http://{address}/v1", max_retries=0)
