"""`panfm-predict app FOLDER`: the page of a classifier on this computer, until Ctrl-C."""

import argparse
from collections.abc import Sequence

from panfm_predict.app.server import run_app


def run(arguments: Sequence[str]) -> int:
    """Serve the page as the arguments say; return the exit code. Raises PredictError."""
    parser = argparse.ArgumentParser(
        prog="panfm-predict app",
        description="Open a classifier folder as a page in this computer's browser, in English and French: drag an "
        "image in and see what it says. Nothing leaves the computer. For research only; gives no diagnosis.",
        epilog="Example: panfm-predict app my_classifier",
    )
    parser.add_argument("folder", help="Classifier folder that `panfm adapt` wrote.")
    parser.add_argument("--port", type=int, default=0, help="Port on 127.0.0.1; 0 (the default) takes a free one.")
    parser.add_argument("--no-browser", action="store_true", help="Print the address, open nothing.")
    parser.add_argument("--threads", type=int, default=0, help="Processor threads; 0: as many as there are cores.")
    options = parser.parse_args(arguments)
    run_app(options.folder, options.port, not options.no_browser, options.threads)
    return 0
