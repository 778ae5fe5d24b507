"""The command line: one file a noun, imports inside each command so that `panfm --help` is instant.

Exit codes: 0 done, 1 some part failed (and was named), 2 the user's input (one line, no traceback), 75 stopped on a
signal after saving (run the same command again), 130 Ctrl-C; of `monitor` 3 drift, 4 too few patients to tell.
`--debug` shows tracebacks.
"""

import errno
import os
import sys
import time
from typing import Annotated, NoReturn

import typer

from panfm import __version__
from panfm.cli import (
    adapt,
    audit,
    data,
    demo,
    doctor,
    embed,
    encoders,
    evaluate,
    export,
    leaderboard,
    monitor,
    predict,
    pretrain,
    report,
    runs,
    select,
    shards,
    synth,
    tasks,
)
from panfm.cli import app as app_page  # `app` is the command line itself
from panfm.errors import UserError

EXIT_USER = 2
EXIT_INTERRUPTED = 130  # Ctrl-C
SECONDS_FOR_RANK_0 = 3.0
# What a user's paths, permissions and disks cause; any other OSError is ours to explain with a traceback.
USER_ERRNOS = {
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOSPC,
    errno.EROFS,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EDQUOT,
    errno.EFBIG,
}

app = typer.Typer(
    name="panfm",
    help="Self-supervised multimodal foundation models in dermatology: archive -> shards -> pretraining -> evaluation "
    "-> leaderboard. Start with: panfm demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("demo")(demo.run)
app.command("doctor")(doctor.run)
app.command("synth")(synth.run)
app.add_typer(shards.app, name="shards")
app.command("report")(report.run)
app.command("audit", cls=audit.SeveralFolders)(audit.run)
app.add_typer(data.app, name="data")
app.command("pretrain")(pretrain.run)
app.command("runs")(runs.run)
app.command("export")(export.run)
app.command("embed")(embed.run)
app.command("encoders")(encoders.run)
app.command("adapt")(adapt.run)
app.command("predict")(predict.run)
app.command("monitor")(monitor.run)
app.command("select")(select.run)
app.command("app")(app_page.run)
app.add_typer(tasks.app, name="tasks")
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(leaderboard.app, name="leaderboard")


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"panfm {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of user errors too.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del debug, version  # main() reads --debug from the arguments: it must also hold for faults in parsing them


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    # `panfm pretrain X --debug` reads as naturally as `panfm --debug pretrain X`; both work.
    arguments = (["--debug"] if debug else []) + [argument for argument in arguments if argument != "--debug"]
    try:
        app(args=arguments, prog_name="panfm")
    except UserError as error:
        if debug:
            raise
        _stop(str(error), EXIT_USER)
    except OSError as error:
        if debug or error.errno not in USER_ERRNOS:
            raise
        named = f"{error.filename}: " if error.filename else ""
        _stop(f"{named}{error.strerror}; nothing half-written was kept", EXIT_USER)
    except SystemExit as end:
        if end.code == EXIT_INTERRUPTED:
            _stop("stopped; run the same command again to go on", EXIT_INTERRUPTED)
        raise
    sys.exit(0)  # not reached: the command line exits by itself


def _stop(message: str, code: int) -> NoReturn:
    """Print one line, once: under torchrun every rank meets the same fault, and rank 0 speaks for all.

    A fault of another rank alone (its machine's disk) must be told as well; where rank 0 has it too, torchrun ends the
    others before they speak.
    """
    rank, line = os.environ.get("RANK", "0"), " ".join(message.split())
    if rank != "0":
        time.sleep(SECONDS_FOR_RANK_0)
        line = f"rank {rank}: {line}"
    sys.stderr.write(f"panfm: {line}\n")
    sys.exit(code)
