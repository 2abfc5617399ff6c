"""The `prefixkv` command: finds the tool, gives it its arguments, and turns whatever happens into an exit status.

Nothing but the standard library is imported before a tool runs; each tool module says its own arguments. Bad input ends
in one line on standard error and exit status 2, Ctrl-C in exit status 130, neither in a traceback.
"""

from __future__ import annotations

try:
    import argparse
    import contextlib
    import importlib
    import os
    import shlex
    import signal
    import sys
    import warnings
    from collections.abc import Iterator, Sequence
    from types import FrameType
    from typing import Any, NoReturn
except KeyboardInterrupt:
    raise SystemExit(130) from None

BAD_INPUT = 2
INTERRUPTED = 130
_INTERRUPTED = "prefixkv: interrupted"

# name: (module in tools, what its functions' names begin and end with, summary)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("demo.command", "", "answer questions about a drawn scene with the full cache and with pruned ones"),
    "generate": ("generate", "", "generate from a picture and a prompt, or from a compressed context"),
    "compress": ("compress", "", "read a picture or a document once, and write its pruned cache to a file"),
    "report": ("report.command", "", "one page that shows what each layer kept of a picture and a prompt"),
    "calibrate": ("calibrate", "", "make a profile of a model from some pictures and prompts"),
    "evaluate": ("evaluate.command", "", "measure what pruning costs, method by method and budget by budget"),
    "recommend": ("evaluate.command", "recommend", "find the smallest budget that keeps the answers of a model"),
    "bench": ("bench", "", "measure time and KV memory of full and pruned caches on a model"),
    "inspect": ("inspect", "inspect", "print what is in a profile: layers by budget, metadata, checks"),
    "plot": ("inspect", "plot", "draw the keep ratio by layer for each budget, of one profile or several"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None: those of this process, which the command then owns.

    Returns:
        0, 2 for bad input, 130 after Ctrl-C. Wrong arguments and `--help` leave by `SystemExit`, as argparse does.
    """
    try:
        if argv is None:
            signal.signal(signal.SIGINT, _interrupt)
            sys.unraisablehook = _leave_if_interrupted
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return INTERRUPTED
    finally:
        if argv is None:  # all is said and written; nothing is to interrupt the interpreter's own end
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run(argv: Sequence[str]) -> int:
    arguments = make_parser().parse_args(argv)
    arguments.command_line = shlex.join(["prefixkv", *argv])
    # Progress bars of loading a model are noise beside the command's own report.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _warnings_in_a_line(arguments.command):
            _tool(arguments.command, "run")(arguments)
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if _holds_interrupt(error):
            raise KeyboardInterrupt from None
        if os.environ.get("PREFIXKV_DEBUG"):
            raise
        print(f"prefixkv {arguments.command}: {_in_a_line(error)}", file=sys.stderr)
        return BAD_INPUT
    return 0


def _tool(command: str, what: str) -> Any:
    """A function of a command's module: `run`, `add_arguments`, or where two share one, `run_plot`, `add_plot_...`."""
    module, name, _ = COMMANDS[command]
    names = {"run": ("run", name), "add_arguments": ("add", name, "arguments")}
    found = importlib.import_module(f".tools.{module}", __package__)
    return getattr(found, "_".join(filter(None, names[what])))


# Errors, interrupts and warnings.

_EXPECTED = (ValueError, TypeError, OSError, NotImplementedError, ImportError, RuntimeError)


def _in_a_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    if isinstance(error, _EXPECTED):
        return message or type(error).__name__
    return f"{type(error).__name__}: {message} (PREFIXKV_DEBUG=1 shows where)"


def _holds_interrupt(error: BaseException | None) -> bool:
    """Whether a Ctrl-C became this error on its way: some packages turn whatever stops their import into their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: an exception, which lets a tool say what it keeps; but the end at once while a module is imported.

    An extension module that runs Python while it is imported may abort on an exception, or make another one of it.
    """
    while frame is not None:
        if frame.f_globals.get("__name__") == "importlib._bootstrap":
            _leave()
        frame = frame.f_back
    raise KeyboardInterrupt


def _leave_if_interrupted(unraisable: Any) -> None:
    """End here on a Ctrl-C that came where nothing can be raised, as in a destructor."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        _leave()
    sys.__unraisablehook__(unraisable)


def _leave() -> NoReturn:
    os.write(2, f"{_INTERRUPTED}\n".encode())
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def _warnings_in_a_line(command: str) -> Iterator[None]:
    """Show a mismatch of profile and method once and in one line, without a place in this package's code."""
    others, shown = warnings.showwarning, set()

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if category.__name__ != "MethodMismatchWarning":  # by name: its module imports torch
            others(message, category, *where, **options)
        elif str(message) not in shown:
            shown.add(str(message))
            print(f"prefixkv {command}: {message}", file=sys.stderr)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


# Arguments.


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, and no usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        # A command would hand what it does not know up to the program, whose help does not know it either.
        arguments, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {shlex.join(unknown)}")
        return arguments, unknown


class _CommandParser(_Parser):
    """Asks the tool for its arguments when the command is the one that is run."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        _tool(self.prog.split()[-1], "add_arguments")(self)
        return super().parse_known_args(*args, **kwargs)


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="prefixkv", description="Prune the KV cache of vision-language models.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, prog="prefixkv", parser_class=_CommandParser
    )
    for name, (_, _, summary) in COMMANDS.items():
        commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
    return parser


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any):
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"prefixkv-cache {version('prefixkv-cache')}")
        parser.exit()


if __name__ == "__main__":
    sys.exit(main())
