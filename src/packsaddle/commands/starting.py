"""packsaddle init."""

from pathlib import Path
from typing import Annotated

import tyro

from packsaddle.schema import ConfigError
from packsaddle.tasks import TASKS, TaskName
from packsaddle.template import template

_HEADING = """{about}

    packsaddle run {file}{flags}

What is commented out is at its default, or an example of what is off."""


def init(
    file: Annotated[Path, tyro.conf.Positional] = Path("config.toml"), task: TaskName = "char-transformer"
) -> None:
    """Write a configuration to start from, with a comment beside every key.

    Examples:
        packsaddle init
        packsaddle init digits.toml --task digits

    Args:
        file: The new TOML file; a file that exists is left as it is, and refused.
        task: What to train. char-transformer needs nothing; digits needs packsaddle[digits]; mnist-autoencoder (the
            paper's) and resnet18 (on CIFAR-10) need packsaddle[vision] and a folder of data.
    """
    chosen = TASKS[task]
    text = template(chosen.config, _HEADING.format(about=chosen.about, file=file, flags=chosen.flags))
    try:
        with file.open("x", encoding="utf-8") as new:
            new.write(text)
    except FileExistsError:
        raise ConfigError(f"{file} exists already, and is left as it is; choose another name") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    print(f"{chosen.about}\n{file}, every key with a comment. Train with: packsaddle run {file}{chosen.flags}")
