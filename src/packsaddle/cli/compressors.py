"""The command `packsaddle compressors`, which prints a table of the compressors with their bytes and their speed."""

from dataclasses import asdict
from json import dumps

from packsaddle.cli.console import brief, digits, number_table, print_table, short_exchange
from packsaddle.errors import ConfigError, config_errors


def compressors(d: int = 1_000_000, ratio: float = 0.01, workers: int = 4, json: bool = False) -> None:
    """List the compressors with their bytes and their speed.

    Also lists the contraction mu (a lower bound on the fraction of the squared norm that compression keeps), linearity
    and the communication protocol. The time is measured on this machine.

    Examples:
        packsaddle compressors --d 1000000 --ratio 0.01 --workers 8

    Args:
        d: Length of the Gaussian float32 vector that is compressed.
        ratio: Fraction of the coordinates to send, in (0, 1], for compressors that have one.
        workers: Number of workers, which determines the bytes that each of them sends and receives.
        json: Print JSON lines instead of a table.
    """
    from packsaddle.compressors import registry
    from packsaddle.plan import coding as coding_speed

    if d < 1 or workers < 1:
        raise ConfigError(f"d and workers must be at least 1, got {d} and {workers}")
    with config_errors():
        listed = registry.compressors(ratio)

    # Each JSON line is printed as soon as its compressor is timed.
    if json:
        for compressor in listed:
            print(dumps(asdict(coding_speed.tabulate(compressor, d, workers))))
        return
    table = number_table("compressor", "mu", "kept %", "linear", "exchange", "sent kB", "received kB", "ms")
    for e in (coding_speed.tabulate(compressor, d, workers) for compressor in listed):
        cells = [f"{e.mu:.2g}", f"{100 * e.kept:.1f}", "yes" if e.linear else "no", short_exchange(e.protocol)]
        cells += [digits(e.sent / 1e3), digits(e.received / 1e3), f"{e.milliseconds:.1f}"]
        table.add_row(brief(e.compressor), *cells)
    print_table(table, "--json prints it whole")
    print(f"d = {d:,}, {workers} workers. mu holds for every vector; kept, 100 (1 - ||v - C(v)||^2 / ||v||^2), is")
    print("measured on a Gaussian one. Bytes and ms: of one step, per worker.")
