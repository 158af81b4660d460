"""How `omni2 serve` starts and ends: what it refuses to start with, and what a signal does."""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import openai
import pytest
import websockets

from omni2_jax.generate import omni2 as omni2_module
from omni2_jax.serve.limits import Limits
from tests.support.commands import is_error_line
from tests.support.conversations import clip
from tests.support.realtime import MANUAL, talk, until
from tests.support.releases import linked
from tests.support.server import base64_of, get, pcm

KEY = "the-key-of-a-client"


@pytest.fixture
def refused(omni2, checkpoint_dir, tmp_path):
    """Run `omni2 serve` with these arguments -> the one line that it ends with, exit code 1."""

    def refused(*arguments: object, checkpoint: Path = checkpoint_dir) -> str:
        line, out, err = omni2("serve", "--checkpoint", checkpoint, "--port", 0, *arguments)
        assert is_error_line(line) and not out and "listening" not in err
        return line

    return refused


def test_a_port_that_is_taken(refused, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused("--port", port)
    (tmp_path / "keys").write_text(KEY)
    elsewhere = ("--host", "nowhere.invalid", "--key-file", tmp_path / "keys")
    assert "cannot listen on nowhere.invalid:0" in refused(*elsewhere)


def test_open_to_others_without_keys(refused, tmp_path):
    for host in ("0.0.0.0", "::"):
        assert "give API keys with --key-file" in refused("--host", host)
    (tmp_path / "keys").write_text("\n \n")
    (tmp_path / "foreign").write_text("secret\nschlüssel\n", encoding="utf-8")
    for path, words in {
        tmp_path / "keys": "holds no key",
        tmp_path / "foreign": "the key of line 2 has characters other than A-Z a-z 0-9 . _ ~ -",
        tmp_path / "none": "No such file",
        tmp_path: "Is a directory",
    }.items():
        assert words in refused("--key-file", path)


def test_certificates(refused, tmp_path):
    text, none = tmp_path / "text.pem", tmp_path / "none.pem"
    text.write_text("hello")
    both = ("--certificate", "--private-key")
    assert f"{none} is not a file" in refused(both[0], none, both[1], text)
    assert "belong together" in refused(both[0], text)
    assert "are no certificate and its key" in refused(both[0], text, both[1], text)


def test_checkpoints_that_cannot_speak(refused, omni2, checkpoint_dir, tmp_path):
    """Without a decoder or a voice; and a voice that it does not have."""
    for name, words in {"params/vocoder": "lacks vocoder", "voices": "it has none"}.items():
        checkpoint = linked(checkpoint_dir, tmp_path / name.replace("/", "_"))
        for path in sorted((checkpoint / name).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (checkpoint / name).rmdir()
        assert words in refused("--sessions", 1, checkpoint=checkpoint)
    speak = ["speak", "Good evening.", "--out", tmp_path / "a.wav", "--voice", "nobody"]
    line, *_ = omni2(*speak, "--checkpoint", checkpoint_dir)
    assert is_error_line(line) and "voice 'nobody' is neither a file nor a voice of" in line


@pytest.mark.parametrize("sessions", ["0", "-1", "many", "1.5", "\u0664", ""])
def test_a_number_of_sessions_that_is_none(refused, sessions):
    assert f"{sessions!r} is neither a number from 1 nor 'auto'" in refused(
        f"--sessions={sessions}"
    )


def test_folder_of_voices(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot create" in refused("--sessions", 1, "--voices", tmp_path / "file" / "voices")


@contextlib.contextmanager
def started(checkpoint: Path, log: Path, *arguments: object):
    """An `omni2 serve` in a process of its own, of an engine that other tests have compiled."""
    code = (
        "import functools; from omni2_jax.cli.main import main; "
        "from omni2_jax.generate import omni2, options; "
        f"omni2.BUCKET = {omni2_module.BUCKET}; options.Options = functools.partial("
        "options.Options, unit_temperature=0.0, unit_vocabulary='all', chunk=10, left_chunks=2); "
        "main()"
    )
    sizes = ["--sessions", 3, "--context", 1000, "--max-new-tokens", 12, "--max-flush-units", 15]
    command = ["serve", "--checkpoint", checkpoint, "--port", 0, *sizes, *arguments]
    with (
        log.open("w") as file,
        subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stderr=file) as process,
    ):
        try:
            while not (found := re.search(r"listening on http://(\S+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                time.sleep(0.1)
            yield process, found[1]
        finally:
            process.kill()


@pytest.mark.slow
def test_a_signal_ends_the_server(checkpoint_dir, tmp_path):
    """The answer in progress is finished, its client is told, and the process ends within a time.

    What its clients did wrong before is in no log: neither keys nor paths nor tracebacks.
    """
    (tmp_path / "keys").write_text(f"another\n{KEY}\n")
    log = tmp_path / "log"

    async def conversation(link):
        await link.send_raw('{"type": "session.update", "session": {"voice": "/etc/passwd"}}')
        await until(link, "error")
        await link.session.update(session=MANUAL)
        await link.input_audio_buffer.append(audio=base64_of(pcm(clip("short_d"))))
        await link.input_audio_buffer.commit()
        await link.response.create()
        events = await until(link, "response.output_audio.delta")
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(websockets.ConnectionClosed):
            while True:
                events.append(await link.recv())
        return events

    async def too_large(link):
        await link.send_raw("x" * Limits.event_bytes)
        await until(link, "error")  # it is read, and is no event
        with pytest.raises(websockets.ConnectionClosed):
            await link.send_raw("x" * (Limits.event_bytes + 1))
            await link.recv()

    with started(checkpoint_dir, log, "--key-file", tmp_path / "keys") as (process, address):
        talk(address, too_large, key=KEY)
        assert get(f"http://{address}/v1/models", Authorization=f"Bearer {KEY}x")[0] == 401
        assert get(f"http://{address}/../../etc/passwd")[0] == 404
        client = openai.OpenAI(api_key=KEY, base_url=f"http://{address}/v1", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="the audio"):
            audio = {"data": base64_of(b"hello"), "format": "wav"}
            part = {"type": "input_audio", "input_audio": audio}
            client.chat.completions.create(
                model="omni2", messages=[{"role": "user", "content": [part]}]
            )
        events = talk(address, conversation, key=KEY)
        process.wait(30)
    kinds = [event.type for event in events]
    assert "response.done" in kinds and kinds[-1] == "error"
    assert events[-1].error.code == "server_stopping"
    text = log.read_text()
    for secret in (KEY, "Traceback", "/etc", str(tmp_path)):
        assert secret not in text
