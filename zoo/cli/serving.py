"""`zoo serve`: bundles over HTTP, with a page."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zoo.cli.screen import HomeOption
from zoo.cores import cores

if TYPE_CHECKING:
    import socket

    from zoo.deployment.server.gate import Token

TOKEN_VARIABLE = "ZOO_TOKEN"


def add_to(parent: typer.Typer) -> None:
    """Add the verb to the command line."""
    parent.command()(serve)


def serve(
    bundles: Annotated[
        list[str] | None, typer.Argument(metavar="BUNDLE...", help="Names of `zoo list bundles`, or folders.")
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option("--name", metavar="NAME=BUNDLE", help="Serve a bundle under a name.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; any but this machine's own needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help=f"File with the token that clients must send; or set {TOKEN_VARIABLE}.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A further host name that clients may use.")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Cores of the network; all that it may use where left out.", min=1, max=1024)
    ] = None,
    queue: Annotated[int, typer.Option(help="Images that may wait; more are sent away.", min=1, max=10_000)] = 64,
    max_body_mb: Annotated[int, typer.Option(help="MiB of a request.", min=1, max=1024)] = 32,
    max_megapixels: Annotated[float, typer.Option(help="Megapixels of an image.", min=0.01, max=64)] = 50,
    json: Annotated[bool, typer.Option("--json", help="Say where it listens as one JSON line.")] = False,
    home: HomeOption = None,
) -> None:
    """Serve bundles over HTTP until SIGTERM or Ctrl-C; what is in flight is then answered."""
    _check_extra()
    from zoo.deployment.server.app import create_app
    from zoo.deployment.server.gate import Hosts
    from zoo.deployment.server.limits import Limits
    from zoo.deployment.server.process import bind, is_loopback
    from zoo.deployment.server.process import serve as run
    from zoo.deployment.server.served import facts_of, load_models, named_bundles
    from zoo.errors import ZooError
    from zoo.files import home as home_folder

    root = home_folder()
    token = _token(token_file)
    found = named_bundles(bundles or [], name or [], root)
    limits = Limits(body_bytes=max_body_mb << 20, pixels=int(max_megapixels * 1e6), queue_images=queue).fitting()
    with bind(host, port) as sock:
        if token is None and not is_loopback(sock):
            raise ZooError(
                f"--host {host} can be reached from other machines, and there is no token; "
                f"give one with --token-file FILE or {TOKEN_VARIABLE}"
            )
        hosts = Hosts.of(is_loopback(sock), allowed_host or ())
        models = load_models(found, root, threads)
        facts = {each: facts_of(each, model.bundle) for each, model in models.items()}
        app = create_app(models, facts, limits=limits, hosts=hosts, token=token, decoders=cores())
        unanswered = run(app, sock, limits, lambda: _tell(sock, list(models), json))
    if unanswered:
        raise ZooError(f"stopped with {unanswered} requests unanswered after {limits.grace_s:.0f} seconds")


def _check_extra() -> None:
    from zoo.errors import ZooError

    for package in ("fastapi", "uvicorn", "python_multipart", "prometheus_client"):
        try:
            __import__(package)
        except ImportError:
            missing = package.replace("_", "-")
            raise ZooError(f"{missing} is not installed; install it with: pip install 'zoo[serve]'") from None


def _token(file: Path | None) -> Token | None:
    """Return the token of the file or of the environment; it is taken out of the environment."""
    from zoo.deployment.server.gate import MAX_TOKEN, Token
    from zoo.errors import ZooError, one_line

    text = os.environ.pop(TOKEN_VARIABLE, None)
    if file is not None:
        try:
            with file.open("rb") as stream:
                text = stream.read(MAX_TOKEN + 2).decode("ascii")
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "no ASCII text"
            raise ZooError(f"--token-file {one_line(file)!r} cannot be read: {one_line(why)}") from None
    return None if text is None else Token(text)


def _tell(sock: socket.socket, names: list[str], json: bool) -> None:
    from zoo.deployment.server.process import is_loopback, url_of
    from zoo.files import to_json

    found: dict[str, Any] = {"url": url_of(sock), "models": names}
    lines = [to_json(found)] if json else [f"serving {', '.join(names)} at {found['url']}"]
    if not json and not is_loopback(sock):
        lines.append("the token and the images travel unencrypted; put a proxy with TLS in front")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # nobody reads it (`zoo serve x | true`), and it serves all the same
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
