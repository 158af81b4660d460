"""One server over a mesh of two devices, as `omni2 serve --mesh` starts it."""

import dataclasses

import jax
import pytest

from omni2_jax.generate.session import Session
from omni2_jax.serve import capacity
from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from omni2_jax.sharding import parse_mesh
from tests.support.conversations import GREEDY, SHORT, clip
from tests.support.realtime import MANUAL, ask, talk, until
from tests.support.server import pcm, running

OPTIONS = dataclasses.replace(GREEDY, **SHORT)


async def question(link) -> str:
    """The text of the answer to a spoken question."""
    await link.session.update(session=MANUAL)
    await until(link, "session.updated")
    events = await ask(link, pcm(clip("short_d")))
    assert events[-1].response.status in ("completed", "incomplete")
    return "".join(e.delta for e in events if e.type == "response.output_text.delta")


@pytest.fixture
def units(monkeypatch) -> list[int]:
    """The units of all replies: a server without the decoder computes them and sends none."""
    found: list[int] = []
    deliver = Session.deliver

    def recorded(self, *arguments):
        for one in deliver(self, *arguments):
            found.extend(one.units)
            yield one

    monkeypatch.setattr(Session, "deliver", recorded)
    return found


@pytest.mark.slow
def test_a_server_on_two_devices(checkpoint_dir, text_model, warm_text_engine, units, monkeypatch):
    """The same text and units as on one device; so many sessions are measured, too.

    Without the decoder, whose program takes long to compile for a mesh: its samples are tested by
    tests/test_sharding.py.
    """
    alone = Server(text_model, OPTIONS, Limits(sessions=3, context=1000))
    alone.worker.start()
    with running(alone) as address:
        expected = talk(address, question), list(units)
    assert alone.worker.stop(20)
    units.clear()

    monkeypatch.setattr(capacity, "MOST", 1)
    mesh = parse_mesh("tensor=2", jax.devices()[:2])
    limits = Limits(context=1000)
    server = Server.load(checkpoint_dir, OPTIONS, limits, True, decoder=False, mesh=mesh)
    assert server.limits.sessions == 1
    server.worker.start()
    compiled = server.worker.engine.compilations()
    assert capacity.step_seconds(server.worker.engine) > 0
    with running(server) as address:
        assert (talk(address, question), units) == expected
    assert units and expected[0] and server.worker.engine.compilations() == compiled
    assert server.worker.stop(20)
    (pairs, *_) = server.worker.engine.state.language.llm.pairs
    assert len(pairs.sharding.device_set) == 2
