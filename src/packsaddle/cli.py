"""The command line: packsaddle demo | run | reproduce | certify | report | compressors | plan | bench."""

import os
import sys
from collections.abc import Callable
from typing import Any

import tyro

from packsaddle.commands.benching import bench
from packsaddle.commands.certifying import certify
from packsaddle.commands.console import is_first
from packsaddle.commands.planning import plan
from packsaddle.commands.reading import compressors, report
from packsaddle.commands.reproducing import reproduce
from packsaddle.commands.training import demo, run
from packsaddle.exchange import WorkerFailedError, under_launcher
from packsaddle.schema import ConfigError

_COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "run": run,
    "reproduce": reproduce,
    "certify": certify,
    "report": report,
    "compressors": compressors,
    "plan": plan,
    "bench": bench,
}


def main() -> None:
    """Entry point of the console script: bad input is one line on stderr and exit code 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(_COMMANDS, prog="packsaddle")
    except ConfigError as error:
        if is_first():
            print(f"packsaddle: error: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkerFailedError as error:
        print(f"packsaddle: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if under_launcher():
        # The work is done and on disk. Interpreters that take themselves apart beside gloo's threads abort now and
        # then, which the launcher would report as a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
