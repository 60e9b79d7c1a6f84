"""Entry point of `python -m packsaddle.cli` and `torchrun -m packsaddle.cli`."""

from packsaddle.cli import main

if __name__ == "__main__":
    main()
