"""`omni2 serve`: a server to talk to."""

from pathlib import Path
from typing import Annotated

import typer

from omni2_jax.cli.chat import DEFAULTS, number
from omni2_jax.cli.mesh import Mesh
from omni2_jax.cli.paths import Checkpoint, chosen
from omni2_jax.console import console, say

MEASURED = "auto"


def sessions_of(text: str) -> str:
    """The value of --sessions. Raises BadParameter if it is neither a number from 1 nor "auto"."""
    if text != MEASURED and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise typer.BadParameter(f"{text!r} is neither a number from 1 nor {MEASURED!r}")
    return text


def serve(
    checkpoint: Checkpoint = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than loopback need --key-file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 is a free one.")] = 8000,
    sessions: Annotated[
        str,
        typer.Option(
            parser=sessions_of,
            metavar="N|auto",
            help="Clients at the same time; more are refused. auto measures how many this device "
            "can speak to in real time; to start takes longer than with a number.",
        ),
    ] = MEASURED,
    context: Annotated[
        int,
        typer.Option(
            min=512,
            help="LLM positions of a conversation, at most the checkpoint's max_prompt (of Nano "
            "2048); the oldest turns are forgotten.",
        ),
    ] = 4096,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=4096, help="Text tokens of one answer at most.")
    ] = 256,
    max_flush_units: Annotated[
        int, number("max_flush_units", "Speech tokens at most after the end of an answer's text.")
    ] = DEFAULTS.max_flush_units,
    key_file: Annotated[
        Path | None,
        typer.Option(help="A file of API keys, one a line; clients must have one of them."),
    ] = None,
    origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages of this origin may use the server, as https://example.org."),
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="A TLS certificate (PEM); with --private-key.")
    ] = None,
    private_key: Annotated[Path | None, typer.Option(help="The certificate's key (PEM).")] = None,
    recogniser: Annotated[
        str | None,
        typer.Option(
            help="Shows users what they said: a Whisper model of faster-whisper (a directory or a "
            "Hugging Face id), or the URL of audio transcriptions, http://HOST/v1. The model does "
            "not need it."
        ),
    ] = None,
    voices: Annotated[
        Path | None,
        typer.Option(
            help="Clients may add voices; they are kept in this folder. Without it, none is taken."
        ),
    ] = None,
    no_wav: Annotated[bool, typer.Option("--no-wav", help="Answer in text only.")] = False,
    mesh: Mesh = None,
) -> None:
    """Serve a model: OpenAI's Realtime API and chat completions."""
    import socket

    import uvicorn

    from omni2_jax.serve.access import LOOPBACK, read_keys

    checkpoint = chosen(checkpoint)
    keys = read_keys(key_file) if key_file else ()
    if host not in LOOPBACK and not keys:
        raise ValueError(f"--host {host} is open to others: give API keys with --key-file")
    for path in filter(None, (certificate, private_key)):
        if not path.is_file():
            raise ValueError(f"{path} is not a file")
    if (certificate is None) != (private_key is None):
        raise ValueError("--certificate and --private-key belong together")
    if certificate and private_key:
        check_certificate(certificate, private_key)
    # The port is taken before minutes are spent on the model.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror}") from None

    from omni2_jax.generate.options import Options
    from omni2_jax.serve import capacity, memory
    from omni2_jax.serve.app import GracefulServer, create_app
    from omni2_jax.serve.limits import Limits
    from omni2_jax.serve.server import Server
    from omni2_jax.sharding import parse_mesh

    devices = parse_mesh(mesh) if mesh else None
    measured = sessions == MEASURED
    limits = Limits(context=context) if measured else Limits(int(sessions), context=context)
    options = Options(max_new_tokens=max_new_tokens, max_flush_units=max_flush_units)
    with console.status("loading and measuring" if measured else "loading"):
        server = Server.load(
            checkpoint,
            options,
            limits,
            measured=measured,
            decoder=not no_wav,
            recogniser=recogniser,
            voices=voices,
            mesh=devices,
        )
    with console.status("compiling"):
        server.worker.start()
        seconds = capacity.step_seconds(server.worker.engine)
        memory.settle()
    say(capacity.describe(server.worker.engine, seconds))
    address = f"[{host}]" if ":" in host else host
    scheme = "https" if certificate else "http"
    listener.listen()  # from here on connections wait for uvicorn, instead of being refused
    say(f"listening on {scheme}://{address}:{listener.getsockname()[1]}")
    config = uvicorn.Config(
        create_app(server, keys, tuple(origin or ())),
        log_level="warning",
        ws_max_size=limits.event_bytes,
        ssl_certfile=certificate,
        ssl_keyfile=private_key,
        timeout_graceful_shutdown=5,
    )
    GracefulServer(config, server).run(sockets=[listener])
    if server.worker.failure:
        raise RuntimeError(f"the model's thread has failed: {server.worker.failure}")


def check_certificate(certificate: Path, private_key: Path) -> None:
    """Raises ValueError if they are no certificate and its key."""
    import ssl

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            certificate, private_key
        )
    except OSError as error:  # SSLError is one
        raise ValueError(
            f"{certificate} and {private_key} are no certificate and its key (PEM): "
            f"{error.strerror or error}"
        ) from None
