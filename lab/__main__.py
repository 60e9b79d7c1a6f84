"""The commands of the lab: `python -m lab` lists them."""

from packsaddle.cli import Group, ImportedCommands, serve
from packsaddle.cli.commands import Entry

PROGRAM = "python -m lab"
COMMANDS = Group(
    "The lab of packsaddle. The paper's figures are scripts of their own, python -m lab.paper.figure1, figure2, "
    "language and table1, and the races are python -m lab.race.",
    ImportedCommands(
        {"demo": Entry("Show an escape from a saddle, and training over a slow link.", "lab.demo.command")}
    ),
)


def main() -> None:
    serve(COMMANDS, PROGRAM)


if __name__ == "__main__":
    main()
