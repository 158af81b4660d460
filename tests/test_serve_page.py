"""The page in a real Chromium, whose microphone plays a recording."""

import dataclasses
import io
import itertools
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from omni2_jax.serve.limits import Limits
from omni2_jax.serve.server import Server
from tests.support.conversations import GREEDY, clip
from tests.support.paths import ROOT
from tests.support.server import eventually, running

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")

OPTIONS = dataclasses.replace(GREEDY, max_new_tokens=24, max_flush_units=30)
MINUTE = 60_000  # milliseconds, for everything that is waited for: machines of tests are slow
# Notes every text that the newest answer has shown.
TEXTS = """window.texts = [];
addEventListener("DOMContentLoaded", () => {
  new MutationObserver(() => {
    const [text] = [...document.querySelectorAll(".turn.assistant .words")].slice(-1);
    if (text?.textContent && text.textContent !== texts.at(-1)) texts.push(text.textContent);
  }).observe(document.body, { subtree: true, childList: true, characterData: true });
});"""
LOUDSPEAKER = ROOT / "tests" / "support" / "loudspeaker.js"


@pytest.fixture(scope="module")
def server(model, warm_engine, tmp_path_factory):
    """A server that knows two voices and, of what users say, always the same text."""
    voices = tmp_path_factory.mktemp("page") / "voices"
    recogniser = SimpleNamespace(workers=1, transcribe=lambda *recording: "What is the sky?")
    limits = Limits(sessions=3, context=1000, retry_seconds=1)
    server = Server(model, OPTIONS, limits, recogniser=recogniser, voices=voices)
    np.save(voices / "jane.npy", np.asarray(model.voice(None)) + 0.1)
    server.worker.start()
    yield server
    assert server.worker.stop(20)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Its microphone plays a question and silence, again and again.

    The silence is long: a question that comes before the answer to the one before stops it.
    """
    samples, rate = soundfile.read(clip("speech_a"), dtype="float32")
    path = tmp_path_factory.mktemp("microphone") / "question.wav"
    sound = np.concatenate([np.zeros(rate), samples, np.zeros(40 * rate)])
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

    def opened(address: str, status: str = "ready", microphone: bool = True, **settings):
        permissions = ["microphone"] if microphone else []
        context = browser.new_context(permissions=permissions, **settings)
        context.set_default_timeout(MINUTE)
        context.add_init_script(path=LOUDSPEAKER)
        context.add_init_script(TEXTS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://{address}")
        has_status(page, status)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors
    eventually(lambda: server.clients == 0)


def has_status(page, text: str) -> None:
    page.wait_for_selector(f"#status:text-is('{text}')")


def write(page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def answered(page, number: int):
    """The number-th answer of a page, once its audio has begun."""
    answer = page.locator(".turn.assistant").nth(number)
    answer.locator(".figures:not(:empty)").wait_for()
    return answer


def is_interrupted(answer) -> float:
    """Wait until an answer is interrupted -> the seconds of it that were heard."""
    playwright.expect(answer).to_have_class(re.compile("interrupted"), timeout=MINUTE)
    (seconds,) = re.findall(r"interrupted after (\S+) s", answer.inner_text())
    return float(seconds)


def heard(page) -> list[tuple[float, float]]:
    """What the loudspeaker got: the time of each block that was not silent, and its energy."""
    return [(block["time"], block["energy"]) for block in page.evaluate("heard")]


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


# The share of the waveform's picture that is drawn.
DRAWN = """() => {
  const { width, height } = document.getElementById("wave");
  const pen = document.getElementById("wave").getContext("2d");
  const pixels = pen.getImageData(0, 0, width, height).data;
  return pixels.filter((value, i) => i % 4 === 3 && value).length / (width * height);
}"""


@pytest.mark.slow
def test_conversation(opened, server):
    """A spoken question; a written one, whose answer is interrupted; and another tab beside it."""
    with running(server) as address:
        page, other = opened(address), opened(address)
        page.get_by_role("button", name="Talk").click()
        page.wait_for_function("document.getElementById('level').value > 0.5")
        first = answered(page, 0)
        page.get_by_role("button", name="Mute").click()
        question = page.locator(".turn.user .words")
        playwright.expect(question).to_have_text("What is the sky?", timeout=MINUTE)
        other.select_option("#voice", "jane")
        write(other, "What is the moon?")
        answered(other, 0)
        assert other.locator(".turn").count() == 2  # each tab has a conversation of its own
        voices = {connection.settings.voice for connection in server.connections}
        assert voices == {"espeak", "jane"}
        figures = re.compile(r"first audio \d+ ms, [1-9]\.\d s of speech, real-time factor \d")
        playwright.expect(first.locator(".figures")).to_have_text(figures, timeout=MINUTE)
        has_status(page, "ready")
        assert 0.01 < page.evaluate(DRAWN) < 0.9

        text, sound = downloads(page, 2)
        said = first.locator(".words").text_content()
        begun, *texts = page.evaluate("texts")  # which grows while it is spoken
        assert begun == "…" and len(texts) > 2 and texts[-1] == said
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(texts))
        assert text.path().read_text() == f"user: What is the sky?\nassistant: {said}"
        samples, rate = soundfile.read(io.BytesIO(sound.path().read_bytes()))
        assert rate == 24_000 and len(samples) > rate / 2 and np.abs(samples).max() > 0.01
        energy = sum(energy for _, energy in heard(page))
        assert energy == pytest.approx(np.square(samples).sum(), rel=0.01)

        count = page.locator(".turn.assistant").count()
        write(page, "What is the sea?")
        second = answered(page, count)
        page.keyboard.press("Escape")
        is_interrupted(second)
        write(page, "And the wind?")
        answered(page, count + 1)
        assert page.is_hidden("#notice")


@pytest.mark.slow
def test_interrupted_by_talking(opened, server, monkeypatch):
    """Talking over an answer silences it; the model forgets the rest, and answers what was said."""
    monkeypatch.setattr(server.worker, "options", GREEDY)  # an answer of some ten seconds
    with running(server) as address:
        page = opened(address)
        write(page, "What is the sea?")
        first = answered(page, 0)
        page.click("#microphone")
        seconds = is_interrupted(first)
        page.wait_for_selector(".turn.user >> nth=1")
        stopped = page.evaluate("stopped")
        assert heard(page) and max(time for time, _ in heard(page)) < stopped + 0.1
        (connection,) = server.connections
        answer = connection.conversation.items[1]
        assert answer.status == "incomplete"
        assert answer.num_samples / 24_000 == pytest.approx(seconds, abs=0.06)
        answered(page, 1)
        page.click("#microphone")
        roles = [item.role for item in connection.conversation.items]
        assert roles == ["user", "assistant", "user", "assistant"]
        assert page.is_hidden("#notice")


@pytest.mark.slow
def test_microphone_refused_and_server_gone(opened, server):
    """Without a microphone one can write. A server that comes back is told what was said."""
    with running(server) as address:
        page = opened(address, microphone=False)
        page.click("#microphone")
        page.wait_for_selector("#notice:has-text('the browser does not allow it')")
        write(page, "What is the sea?")
        answered(page, 0)
        has_status(page, "ready")
    has_status(page, "not connected; trying again")
    write(page, "And the moon?")
    page.fill("#text", "And the")  # a question that is being changed is not sent by itself
    with running(server, port=int(address.split(":")[1])):
        has_status(page, "ready")
        page.wait_for_selector(".note:text-is('Connected again.')")
        assert page.input_value("#text") == "And the" and page.locator(".turn.user").count() == 1
        write(page, "And the moon?")
        answered(page, 1)
        (connection,) = server.connections
        texts = ["".join(item.parts) for item in connection.conversation.items]
        assert [texts[0], texts[2]] == ["What is the sea?", "And the moon?"]
        assert texts[1] == page.locator(".turn.assistant .words").nth(0).text_content()


def test_no_place_and_no_key(opened, server):
    """A full server and one that wants a key say so; the page goes on when it can."""
    with running(server) as address:
        others = [opened(address) for _ in range(3)]
        page = opened(address, "not connected; trying again")
        page.wait_for_selector("#notice:has-text('all sessions of this server (3) are in use')")
        others[0].close()
        has_status(page, "ready")
        assert page.is_hidden("#notice")
    with running(server, keys=("secret",)) as address:
        page = opened(address, "not connected; trying again")
        page.wait_for_selector("#notice:has-text('This server needs an API key')")
        page.evaluate("location.hash = 'key=secret'")
        has_status(page, "ready")


@pytest.mark.slow
def test_idle(opened, server, monkeypatch):
    """A page that nobody uses gives its place up, and takes one again when it is used."""
    with running(server) as address:
        with monkeypatch.context() as patch:
            patch.setattr(server, "limits", dataclasses.replace(server.limits, idle_seconds=1))
            page = opened(address)
            has_status(page, "paused")
        eventually(lambda: server.clients == 0)
        page.wait_for_selector("#notice:has-text('Talk or write to go on')")
        write(page, "What is the sea?")
        answered(page, 0)
        assert page.is_hidden("#notice") and page.input_value("#text") == ""


CONTROLS = """
- banner:
  - heading "omni2-jax" [level=1]
  - status: ready
- main:
  - log "Conversation"
- contentinfo:
  - meter "Microphone"
  - img "Waveform of the answer"
  - button "Talk"
  - button "Stop the answer Esc" [disabled]
  - combobox "Voice"
  - button "Download" [disabled]
  - textbox "Write a question"
  - button "Send"
"""
# The smallest ratio of luminances (WCAG 2) between a text and what is behind it.
CONTRAST = """() => {
  const pen = document.createElement("canvas").getContext("2d");
  const luminance = (color) => {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = color;
    pen.fillRect(0, 0, 1, 1);
    const [r, g, b, alpha] = [...pen.getImageData(0, 0, 1, 1).data].map((v) => v / 255);
    if (!alpha) return null;
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  };
  const behind = (node) =>
    luminance(getComputedStyle(node).backgroundColor) ?? behind(node.parentElement);
  const nodes = document.querySelectorAll("h1, #status, p, button:enabled, label");
  return Math.min(...[...nodes].map((node) => {
    const pair = [luminance(getComputedStyle(node).color), behind(node)].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05);
  }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_layout(opened, server, scheme):
    """Names for screen readers, the order of the Tab key, contrast, and the width of a phone."""
    with running(server) as address:
        page = opened(address, color_scheme=scheme, viewport={"width": 390, "height": 844})
        page.wait_for_selector("#voice:enabled")
        playwright.expect(page.locator("body")).to_match_aria_snapshot(CONTROLS)
        order = []
        for _ in range(5):
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id"))
        assert order == ["conversation", "microphone", "voice", "text", ""]
        page.evaluate(
            "import('./turns.js').then(({ Turns }) => {"
            "  const turns = new Turns(document.getElementById('conversation'));"
            "  for (const role of ['user', 'assistant'])"
            "    turns.add(role, role, 'word '.repeat(300)).figures.textContent = 'figures';"
            "  turns.note('Connected again.');"
            "  document.getElementById('microphone').classList.add('on');"
            "})"
        )
        page.wait_for_selector(".note")
        assert page.evaluate(CONTRAST) > 4.5
        for name in ("#microphone", "#stop", "#voice", "#download", "#text", "[type=submit]"):
            box = page.locator(name).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390, name
            assert box["y"] + box["height"] <= 844, name
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
