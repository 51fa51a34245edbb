"""The command line: `videopipe` and `python -m videopipe`.

Exit codes: 0 done, 1 the run failed or a clip could not be written (those that were finished stay), 2 the input cannot
be rendered (found before any weight is read), 130 Ctrl-C, 143 SIGTERM. An error is one line on standard error.
"""

import signal
import sys
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from pipelines.cli_decode import decode
from pipelines.cli_errors import CommandError
from pipelines.cli_explain import explain
from pipelines.cli_render import render
from pipelines.compare_cli import compare

app = typer.Typer(name="videopipe", add_completion=False, pretty_exceptions_enable=False)


def _print_version(asked: bool) -> None:
    if asked:
        from videopipe import __version__

        typer.echo(f"videopipe {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Render video with diffusion transformers on two decoupled GPU groups joined by a bounded queue."""


# One line for one command; a command lives in a module of its own and imports torch only when it runs.
app.command("render")(render)
app.command("decode")(decode)
app.command("explain")(explain)
app.command("compare")(compare)

# What a misspelt option raises: click's UsageError, or typer's own copy of it; typer exports only this subclass.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit the process; `argv` without the program's name, sys.argv's where None."""
    signal.signal(signal.SIGTERM, _end_in_order)
    sys.exit(run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    try:
        code = typer.main.get_command(app).main(with_dashes(argv), prog_name="videopipe", standalone_mode=False)
    except _UsageError as error:
        message = " ".join(str(getattr(error, "format_message", error.__str__)()).split())
        return _fail(CommandError(f"{message} (see --help)", 2))
    except CommandError as error:
        return _fail(error)
    except KeyboardInterrupt:
        return _fail(CommandError("interrupted", 130))
    return code if isinstance(code, int) else 0


def with_dashes(argv: Sequence[str]) -> list[str]:
    """`--num_frames` as `--num-frames`; values, and all that follows a bare `--`, stay as they are."""
    normal: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return normal + list(argv[position:])
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
        normal.append(word)
    return normal


def _fail(error: CommandError) -> int:
    print(f"videopipe: {error}", file=sys.stderr)
    if error.details:
        print(error.details.rstrip(), file=sys.stderr)
    sys.stderr.flush()
    return error.code


def _end_in_order(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
