"""A server gives free memory back to the system."""

import asyncio
import ctypes.util
import dataclasses
import gc
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from omni2_jax.generate.session import Turn
from omni2_jax.serve import memory
from omni2_jax.serve.app import create_app
from omni2_jax.serve.conversation import Conversation, Item
from omni2_jax.serve.events import EventError
from omni2_jax.serve.limits import Limits

GLIBC = "libc.so.6" in (ctypes.util.find_library("c") or "")


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


@pytest.mark.skipif(not GLIBC, reason="the C library is not glibc")
def test_free_blocks_between_used_ones():
    random.seed(0)
    blocks = [bytearray(random.randint(10_000, 60_000)) for _ in range(4000)]  # 140 MB
    kept = blocks[::10]
    del blocks
    before = resident()
    assert memory.trim()
    assert resident() < before - 50 and len(kept) == 400


def test_it_is_done_while_the_server_runs(monkeypatch):
    done = asyncio.Event()
    stopped: list[float] = []
    server = SimpleNamespace(worker=SimpleNamespace(stop=stopped.append))
    app = create_app(server)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(memory, "INTERVAL", 0.001)
        monkeypatch.setattr(memory, "trim", lambda: loop.call_soon_threadsafe(done.set))
        async with app.router.lifespan_context(app):
            await asyncio.wait_for(done.wait(), 60)

    asyncio.run(run())
    assert stopped  # the worker, after it


def test_features_that_no_prompt_holds():
    """Of a long conversation the newest turns keep theirs; the model goes on from these."""
    conversation = Conversation(Limits())
    for number in range(5):
        conversation.add(Item(f"question {number}", "user", [np.zeros((3, 2))], is_audio=True))
        conversation.add(Item(f"answer {number}", "assistant", [f"{number}"], answer=[number]))
    conversation.add(Item("last", "user", [np.zeros((3, 2)), "and a text"]))
    resumed = []
    session = SimpleNamespace(turns=[], resume=resumed.extend)
    conversation.forget_features(3)
    assert [item.is_forgotten for item in conversation.items[::2]] == 3 * [True] + 3 * [False]
    assert len(conversation.question(session, conversation.items)) == 2
    assert [turn.answer for turn in resumed] == [[3], [4]]


def test_a_session_may_know_more_than_the_conversation():
    """Its cache is kept, unless an answer of the forgotten turns is another one."""
    features = [np.zeros((3, 2)) for _ in range(4)]
    conversation = Conversation(Limits())
    for number in range(3):
        question = Item(f"question {number}", "user", [features[number]], is_audio=True)
        conversation.add(question)
        conversation.add(Item(f"answer {number}", "assistant", [f"{number}"], answer=[number]))
    conversation.add(Item("last", "user", [features[3]], is_audio=True))
    conversation.forget_features(2)
    resumed = []
    turns = [Turn([features[number]], [number]) for number in range(3)]
    for held in (turns, turns[1:], turns[2:]):
        session = SimpleNamespace(turns=held, resume=resumed.append)
        assert conversation.question(session, conversation.items) == [features[3]]
        assert not resumed
    conversation.delete("answer 0")
    session = SimpleNamespace(turns=turns, resume=resumed.append)
    conversation.question(session, conversation.items)
    assert resumed == [turns[2:]]


def test_a_question_that_is_longer_than_what_is_kept():
    """It is refused; the model does not answer its end alone."""
    conversation = Conversation(Limits())
    for number in range(3):
        conversation.add(Item(f"{number}", "user", [np.zeros((3, 2))], is_audio=True))
    conversation.forget_features(2)
    with pytest.raises(EventError, match="longer than a conversation may be"):
        conversation.question(None, conversation.items)


def test_a_turn_that_is_being_heard_is_not_forgotten():
    """A response may wait for its features; when they are there and too old, they go."""

    async def run():
        conversation = Conversation(Limits())
        heard = asyncio.get_running_loop().create_future()
        for hearing in (heard, asyncio.get_running_loop().create_future()):
            conversation.add(Item(f"{id(hearing)}", "user", [], is_audio=True, hearing=hearing))
        first, second = conversation.items
        conversation.forget_features(1)
        assert first.hearing is heard and not heard.cancelled()
        heard.set_result([np.zeros((3, 2))])
        conversation.forget_features(1)
        assert first.is_forgotten and first.hearing is None and second.hearing

    asyncio.run(run())


def test_what_is_loaded_is_not_looked_at_again():
    frozen, loaded = gc.get_freeze_count(), [[number] for number in range(20_000)]
    memory.settle()
    assert gc.get_freeze_count() >= frozen + len(loaded)


def test_a_full_conversation_drops_its_oldest_items():
    """But not what the system wrote, nor an answer in progress, nor the item to come after."""
    conversation = Conversation(dataclasses.replace(Limits(), items=4, characters=10))
    items = [
        Item("rules", "system", ["r"], written=1),
        Item("old", "user", ["o"], written=1),
        Item("answer", "assistant", [], status="in_progress"),
        Item("new", "user", ["n"], written=1),
    ]
    for item in items:
        assert conversation.add(item)[1] == []
    previous, removed = conversation.add(Item("second", "user", ["s"], written=1), "old")
    assert (previous, [item.id for item in removed]) == ("old", ["new"])
    previous, removed = conversation.add(Item("long", "user", ["l"], written=7))
    assert (previous, [item.id for item in removed]) == ("answer", ["old"])
    with pytest.raises(EventError, match="at most 4 items and 10 characters"):
        conversation.add(Item("longer", "user", ["l"], written=10))
    assert [item.id for item in conversation.items] == ["rules", "second", "answer", "long"]
