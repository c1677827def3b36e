"""The command line: a thin skin over the package's functions; nothing heavy is imported until a verb needs it."""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import typer

from zoo.cli import benchmarks, datasets, deployment, listing, picking, predictions, pretraining, runs, serving, tuning
from zoo.errors import EXIT_MISTAKE, EXIT_SIGINT, EXIT_SIGTERM, Interrupted, ZooError

app = typer.Typer(
    name="zoo",
    help="Fine-tune and compare pretrained image backbones, with tables that can be believed.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
datasets.add_to(app)
listing.add_to(app)
runs.add_to(app)
benchmarks.add_to(app)
deployment.add_to(app)
predictions.add_to(app)
pretraining.add_to(app)
tuning.add_to(app)
picking.add_to(app)
serving.add_to(app)


def _version(wanted: bool) -> None:
    if wanted:
        from zoo import __version__

        typer.echo(f"zoo {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    home: Annotated[
        Path | None, typer.Option("--home", help="Folder to work in; else $ZOO_HOME, else the current one.")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if home is not None:
        os.environ["ZOO_HOME"] = str(home)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C with an exit code of its own."""

    exit_code = EXIT_SIGTERM


_terminated = False
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def _terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    global _terminated  # noqa: PLW0603
    _terminated = True
    raise _Terminated


def main() -> NoReturn:
    """Run the command line; a user's mistake is one line on standard error and exit code 1."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    signal.signal(signal.SIGTERM, _terminate)
    # Where whoever starts it closed them (`>&-`), Python has None.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    try:
        code = app(standalone_mode=False)
        if code == EXIT_SIGINT:  # typer turns an interruption into this number, whatever the signal was
            _exit_interrupted("interrupted", EXIT_SIGTERM if _terminated else EXIT_SIGINT)
        sys.stdout.flush()  # here, where it may still be told that it cannot be written
        sys.exit(code if isinstance(code, int) else 0)
    except Interrupted as error:
        _exit_interrupted(str(error), error.exit_code)
    except ZooError as error:
        _say(f"error: {error}")
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt as stop:
        _exit_interrupted("interrupted", getattr(stop, "exit_code", EXIT_SIGINT))
    except typer.Abort:
        _exit_interrupted("interrupted", EXIT_SIGINT)
    except (BrokenPipeError, SystemExit) as end:
        # The reader went away (`zoo list models | head`): nothing is wrong, and nothing more can be said.
        if isinstance(end, SystemExit) and not isinstance(end.__context__, BrokenPipeError):
            raise  # click itself turns a broken pipe into exit code 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in _NO_ROOM or not _while_printing(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _say(f"error: cannot write standard output: {error.strerror}; free space there, or send it elsewhere")
        sys.exit(EXIT_MISTAKE)
    except Exception as error:
        _exit_for_usage(error)


def _while_printing(error: OSError) -> bool:
    """Return whether standard output is what could not be written: the error itself does not say."""
    import traceback

    last = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return last.parent == Path(__file__).parent or bool({"click", "rich", "typer"} & set(last.parts))


def _say(text: str) -> None:
    from contextlib import suppress

    with suppress(OSError):
        print(text, file=sys.stderr)


def _exit_interrupted(text: str, code: int) -> NoReturn:
    _say(text)
    # Where the signal fell into exec() or eval() of a string, as imports do for dataclasses, CPython notes that nobody
    # caught it, and dies of SIGINT after all; running another string clears the note.
    exec("")
    sys.exit(code)


def _exit_for_usage(error: Exception) -> NoReturn:
    """Show what click says of a wrong command line; a programming error keeps its traceback."""
    show = getattr(error, "show", None)
    code = getattr(error, "exit_code", None)
    if code is None:
        raise error
    if show is not None:
        show()
    sys.exit(code)
