"""python -m packsaddle.cli, which torchrun's -m takes as well."""

from packsaddle.cli import main

if __name__ == "__main__":
    main()
