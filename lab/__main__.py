"""The commands of the lab: `python -m lab` lists them."""

from packsaddle.cli import Group, ImportedCommands, serve
from packsaddle.cli.commands import Entry

PROGRAM = "python -m lab"
COMMANDS = Group(
    "The lab of packsaddle: train from configuration files, compare the runs, and certify the points they reached.",
    ImportedCommands(
        {
            "demo": Entry("Show an escape from a saddle, and training over a slow link.", "lab.demo.command"),
            "init": Entry("Write a configuration file with a comment on every key.", "lab.cli.run"),
            "run": Entry("Train from a TOML configuration, in one process or several.", "lab.cli.run"),
            "certify": Entry("Certify a run's last point: saddle or second-order stationary.", "lab.cli.certify"),
            "report": Entry("Compare runs: tables, figures and an HTML page.", "lab.cli.report"),
        }
    ),
)


def main() -> None:
    serve(COMMANDS, PROGRAM)


if __name__ == "__main__":
    main()
