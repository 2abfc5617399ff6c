"""The `prefixkv` command: arguments in, one call of a module that does the work, an exit status out.

What a command needs beyond the package itself is imported inside it. A mistake in the arguments or files ends in
one line on standard error and exit status 2, never in a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

BAD_INPUT = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments after the program's name; None: those of this process.

    Returns:
        0, 2 for bad input, 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    arguments.command_line = shlex.join(["prefixkv", *(sys.argv[1:] if argv is None else argv)])
    # Progress bars of loading a model are noise beside the command's own report.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with _warnings_in_a_line(arguments.command, getattr(arguments, "tells_cure", False)):
            arguments.run(arguments)
    except KeyboardInterrupt:
        print("prefixkv: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, TypeError, OSError, NotImplementedError, ImportError, RuntimeError) as error:
        if os.environ.get("PREFIXKV_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"prefixkv {arguments.command}: {message}", file=sys.stderr)
        return BAD_INPUT
    except Exception as error:
        if os.environ.get("PREFIXKV_DEBUG"):
            raise
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        print(f"prefixkv {arguments.command}: {what} (PREFIXKV_DEBUG=1 shows where)", file=sys.stderr)
        return BAD_INPUT
    return 0


@contextlib.contextmanager
def _warnings_in_a_line(command: str, tells_cure: bool) -> Iterator[None]:
    """Show a profile's mismatch as the commands say all else: in one line, without a place in this package's code.

    Args:
        command: its name.
        tells_cure: whether the command takes the options that the warning knows of, and shall name them.
    """
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        # By name, since its module imports torch, which not every command needs.
        if category.__name__ == "ProfileMismatchWarning":
            cure = getattr(message, "options", None) if tells_cure else None
            print(f"prefixkv {command}: {message}{f'; here: {cure}' if cure else ''}", file=sys.stderr)
        else:
            others(message, category, *where, **options)

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = others


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with the arguments in one line, as the commands do with all else, and no usage around it."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        # A command would hand what it does not know up to the program, whose help does not know it either.
        arguments, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unrecognized arguments: {shlex.join(unknown)}")
        return arguments, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="prefixkv", description="Prune the KV cache of vision-language models.", allow_abbrev=False)
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (add_arguments, run, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


class _Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __init__(self, option_strings: Sequence[str], dest: str, **_: Any):
        super().__init__(option_strings, dest, nargs=0, help="print the version and exit")

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"prefixkv-cache {version('prefixkv-cache')}")
        parser.exit()


# Arguments that several commands share.


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help="folder or hub id of an image-text-to-text model")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", metavar="D", help="such as cpu, cuda:0; default: a GPU if there is one")
    parser.add_argument("--device-map", metavar="MAP", help="spread the model by accelerate, such as auto")
    parser.add_argument("--attn-implementation", metavar="A", help="eager, sdpa, ...; default: the model's")


def _load(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from .loading import load_model

    return load_model(
        arguments.model,
        dtype=arguments.dtype,
        device=arguments.device,
        device_map=arguments.device_map,
        attn_implementation=arguments.attn_implementation,
    )


def _queries(text: str) -> int | str:
    return text if text == "all" else int(text)


_queries.__name__ = "queries ('all' or an integer)"


def _add_cache(parser: argparse.ArgumentParser) -> None:
    """Which cache: where its lengths come from, and its rule. `generate.cache_options` makes arguments of it."""
    parser.add_argument("--profile", metavar="P", help="file or bundled name; default: the model's own, or none")
    parser.add_argument(
        "--queries",
        type=_queries,
        metavar="Q",
        help="'all', or how many last prompt tokens count (32; with --paper all)",
    )
    parser.add_argument(
        "--paper", action="store_true", help="the paper's rule instead of the default: all queries, fixed point"
    )
    parser.set_defaults(tells_cure=True)


# prefixkv demo


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=2_000_000_017, help="which scene to draw (default: a held-out one)")
    parser.add_argument("--out", default="out/demo.png", metavar="PNG", help="picture of what was kept (%(default)s)")
    parser.add_argument("--model", metavar="M", help="another model folder than the bundled one")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads for torch (%(default)s)")


def _demo(arguments: argparse.Namespace) -> None:
    from .demo.run import run_demo

    run_demo(seed=arguments.seed, out=arguments.out, model_name=arguments.model, threads=arguments.threads)


# prefixkv generate


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--budget", type=float, default=0.5, help="fraction of the KV pairs kept, in (0, 1]")
    _add_cache(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--compare", action="store_true", help="generate with the full cache, too")


def _generate(arguments: argparse.Namespace) -> None:
    from .generate import run_generate

    run_generate(arguments, lambda: _load(arguments))


# prefixkv report


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="page to write (%(default)s)")
    parser.add_argument(
        "--budgets", type=_budgets, metavar="B,...", help="fractions of the KV pairs kept (0.7,0.5,0.3,0.2,0.1)"
    )
    _add_cache(parser)
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of each answer (%(default)s)")


def _report(arguments: argparse.Namespace) -> None:
    from .report.command import run_report

    run_report(arguments, lambda: _load(arguments))


# prefixkv calibrate


def _calibrate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--data", metavar="FILE", help="LLaVA conversation JSON, MM-Vet JSON, or JSONL of either")
    parser.add_argument("--images", metavar="DIR", help="where the file's images lie; without --data: all images there")
    parser.add_argument("--prompt", metavar="TEXT", help="said to every image, instead of what the file says")
    parser.add_argument("--out", required=True, metavar="P", help="profile to write, a name in .safetensors")
    parser.add_argument(
        "--samples", type=_count, default=10, metavar="N", help="records to take, or 'all' (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which records (%(default)s)")
    parser.add_argument("--budgets", type=_budgets, metavar="B,...", help="grid, fractions kept (default: 0.05 to 1)")
    _add_ranking(parser)
    parser.add_argument("--sink", type=int, default=1, help="first tokens that are never pruned (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="records in a forward (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted calibration stopped")


def _add_ranking(parser: argparse.ArgumentParser) -> None:
    """How the cache will rank its keys. What is not given is None, so that `--paper` can tell what was asked for."""
    group = parser.add_argument_group("ranking", "how the cache that will use the profile ranks its keys")
    group.add_argument(
        "--queries", type=_queries_or_text, metavar="Q", help="'all', 'text', or how many last prompt tokens count (32)"
    )
    group.add_argument("--novelty", type=float, metavar="E", help="price of repeating better keys, 0: none (8)")
    group.add_argument("--diversity", type=float, metavar="S", help="share of being unlike the mean key, 0 to 1 (0.5)")
    group.add_argument("--average", choices=["sum", "visible"], help="over the queries that count (sum)")
    group.add_argument("--heads", choices=["mean", "max", "each"], help="how heads agree on keys (mean)")
    group.add_argument("--pooling", type=int, metavar="W", help="window of neighbours, an odd number (1)")
    group.add_argument("--value-norm", action="store_true", default=None, help="times the norm of the value")
    group.add_argument("--paper", action="store_true", help="the paper's: all queries, summed, and nothing else")


def _queries_or_text(text: str) -> int | str:
    return text if text == "text" else _queries(text)


_queries_or_text.__name__ = "queries ('all', 'text' or an integer)"


def _count(text: str) -> int | None:
    return None if text == "all" else int(text)


_count.__name__ = "count ('all' or an integer)"


def _budgets(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


_budgets.__name__ = "budgets (numbers with commas between)"


def _calibrate(arguments: argparse.Namespace) -> None:
    from .calibrate_command import run_calibrate

    run_calibrate(arguments, lambda: _load(arguments))


# prefixkv evaluate


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument(
        "--data", required=True, metavar="D", help="scenes or boards (drawn), or a file as for `prefixkv calibrate`"
    )
    parser.add_argument("--images", metavar="DIR", help="where the file's images lie")
    parser.add_argument("--prompt", metavar="TEXT", help="said to every image, instead of what the file says")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for tables, drawings and the state")
    parser.add_argument(
        "--methods", metavar="M,...", default="prefixkv,online,paper,elastic,h2o,streaming,snapkv,pyramid,uniform",
        help="also full, random; with options: 'online:queries=all;distance=none' (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--budgets", type=_budgets, metavar="B,...", default=(0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
        help="fractions kept (0.05,0.1,0.2,0.3,0.5,0.7,0.9)",
    )  # fmt: skip
    parser.add_argument("--metrics", default="ppl,rouge,accuracy,kl", metavar="M,...", help="any of %(default)s")
    parser.add_argument("--reference", metavar="M", help="method for paired differences; default: the first one")
    parser.add_argument("--profile", metavar="P", help="file or bundled name, for prefixkv; default: the model's own")
    parser.add_argument("--as-published", action="store_true", help="with the positions and rules of the papers' code")
    parser.add_argument("--samples", type=_samples, metavar="N", help="pictures (100), or records of a file (all)")
    parser.add_argument("--seed", type=int, default=0, help="which records; sampling, resampling (%(default)s)")
    parser.add_argument("--split", choices=["validation", "test"], help="of drawn pictures (validation)")
    parser.add_argument("--task", choices=["descriptions", "questions"], help="of drawn pictures; default: both")
    parser.add_argument("--kinds", metavar="K,...", help="kinds of questions, such as object,colour,size; default: all")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="of a generated text (%(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=25, metavar="N", help="samples in a batch (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped, or add to it")


def _samples(text: str) -> int | str:
    return text if text == "all" else int(text)


_samples.__name__ = "count ('all' or an integer)"


def _evaluate(arguments: argparse.Namespace) -> None:
    from .evaluate.command import run_evaluate

    run_evaluate(arguments, lambda: _load(arguments))


# prefixkv inspect, prefixkv plot


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="P", help="file or bundled name")
    parser.add_argument(
        "--budgets", type=_budgets, metavar="B,...", help="at these budgets; default: the profile's own"
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from .profile import PrefixProfile
    from .profile_report import describe_profile

    print(describe_profile(PrefixProfile.load(arguments.profile), arguments.budgets))


def _plot_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profiles", nargs="+", metavar="P", help="file or bundled name; two are drawn side by side")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write: .png, .svg or .pdf")
    parser.add_argument(
        "--budgets", type=_budgets, metavar="B,...", help="at these budgets; default: the profile's own"
    )


def _plot(arguments: argparse.Namespace) -> None:
    from .profile import PrefixProfile
    from .profile_report import plot_profiles

    profiles = {name: PrefixProfile.load(name) for name in arguments.profiles}
    plot_profiles(profiles, arguments.out, arguments.budgets)


# prefixkv bench


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--tokens", type=int, metavar="N", help="random text of N tokens instead of picture and prompt")
    parser.add_argument(
        "--budgets", type=_budgets, default=(0.5, 0.2), metavar="B,...", help="fractions kept (0.5,0.2)"
    )
    _add_cache(parser)
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="equal rows (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=64, metavar="N", help="decode steps (%(default)s)")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="the medians of N turns count (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print all figures as a last line of JSON, too")


def _bench(arguments: argparse.Namespace) -> None:
    from .bench import run_bench

    run_bench(arguments, lambda: _load(arguments))


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], None], str]] = {
    "demo": (_demo_arguments, _demo, "answer questions about a drawn scene with the full cache and with pruned ones"),
    "generate": (_generate_arguments, _generate, "generate from a picture and a prompt with a pruned cache"),
    "report": (_report_arguments, _report, "one page that shows what each layer kept of a picture and a prompt"),
    "calibrate": (_calibrate_arguments, _calibrate, "make a profile of a model from some pictures and prompts"),
    "evaluate": (_evaluate_arguments, _evaluate, "measure what pruning costs, method by method and budget by budget"),
    "bench": (_bench_arguments, _bench, "measure time and KV memory of full and pruned caches on a model"),
    "inspect": (_inspect_arguments, _inspect, "print what is in a profile: layers by budget, metadata, checks"),
    "plot": (_plot_arguments, _plot, "draw the keep ratio by layer for each budget, of one profile or several"),
}

if __name__ == "__main__":
    sys.exit(main())
