"""The page in a real Chromium, whose microphone plays a recording."""

import dataclasses
import io
import re
import shutil

import numpy as np
import pytest
import soundfile

from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from tests.support.conversations import GREEDY, clip
from tests.support.server import eventually, running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

OPTIONS = dataclasses.replace(GREEDY, max_new_tokens=24, max_flush_units=30)
MINUTE = 60_000  # milliseconds, for everything that is waited for: machines of tests are slow


@pytest.fixture(scope="module")
def server(model, warm_engine):
    server = Server(model, OPTIONS, Limits(sessions=3, context=1000))
    server.worker.start()
    yield server
    assert server.worker.stop(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Its microphone plays a question and silence, again and again."""
    samples, rate = soundfile.read(clip("speech_a"), dtype="float32")
    path = tmp_path_factory.mktemp("microphone") / "question.wav"
    sound = np.concatenate([np.zeros(rate), samples, np.zeros(5 * rate)])
    soundfile.write(path, sound, rate, "PCM_16")
    arguments = [
        "--no-sandbox",  # root has none
        "--use-fake-device-for-media-stream",
        f"--use-file-for-fake-audio-capture={path}",
        "--autoplay-policy=no-user-gesture-required",
    ]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, server):
    """Open the page in a tab that may use the microphone or not. Its errors fail the test."""
    contexts, errors = [], []

    def opened(address: str, microphone: bool = True):
        context = browser.new_context(permissions=["microphone"] if microphone else [])
        context.set_default_timeout(MINUTE)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://{address}/")
        page.wait_for_selector("#status:text-is('ready')")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors
    eventually(lambda: server.clients == 0)


def write(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page, number: int):
    """The number-th answer of a page, once its audio has begun."""
    answer = page.locator(".turn.assistant").nth(number)
    answer.locator(".figures:not(:empty)").wait_for()
    return answer


def downloads(page, number: int) -> list:
    """What the page saves when it is asked to."""
    saved: list = []
    page.on("download", lambda download: saved.append(download))
    page.click("#download")
    for _ in range(600):
        if len(saved) == number:
            break
        page.wait_for_timeout(100)
    return sorted(saved, key=lambda download: download.suggested_filename)


@pytest.mark.slow
def test_conversation(opened, server):
    """A spoken question; a written one, whose answer is interrupted; and another tab beside it."""
    with running(server) as address:
        page, other = opened(address), opened(address)
        page.click("#microphone")
        first = answered(page, 0)
        assert page.get_attribute("#microphone", "aria-pressed") == "true"
        page.click("#microphone")
        assert page.get_attribute("#microphone", "aria-pressed") == "false"
        assert page.inner_text(".turn.user >> nth=0") == "(spoken)"
        write(other, "What is the moon?")
        answered(other, 0)
        figures = re.compile(r"first audio \d+ ms, [1-9]\.\d s of speech, real-time factor \d")
        playwright.expect(first.locator(".figures")).to_have_text(figures, timeout=MINUTE)

        text, sound = downloads(page, 2)
        assert text.path().read_text().startswith("user: (spoken)\nassistant: ")
        samples, rate = soundfile.read(io.BytesIO(sound.path().read_bytes()))
        assert rate == 24_000 and len(samples) > rate / 2 and np.abs(samples).max() > 0.01

        count = page.locator(".turn.assistant").count()
        write(page, "What is the sea?")
        second = answered(page, count)
        page.keyboard.press("Escape")
        playwright.expect(second).to_have_class(re.compile("interrupted"), timeout=MINUTE)
        write(page, "And the wind?")
        answered(page, count + 1)
        assert page.is_hidden("#notice")


@pytest.mark.slow
def test_microphone_refused_and_server_gone(opened, server):
    """Without a microphone one can write. A server that comes back is found again."""
    with running(server) as address:
        page = opened(address, microphone=False)
        page.click("#microphone")
        page.wait_for_selector("#notice:has-text('cannot be used')")
        write(page, "What is the sea?")
        answered(page, 0)
    page.wait_for_selector("#status:has-text('not connected')")
    with running(server, port=int(address.split(":")[1])):
        page.wait_for_selector("#status:text-is('ready')")
        write(page, "And the moon?")
        answered(page, 1)
