"""A python that has imported torch and packsaddle already: `python()` starts programs as forks of one that waits.

To import torch and torch._dynamo takes seconds of computing in every process that tests start; a fork takes none. Nor
does a fork compile the loops that the server has called: in a fresh checkout each process would. What a test gives to
subprocess is a small program in place of `sys.executable`: it hands its arguments, its folder, its environment and its
standard streams to the server, passes signals on, and ends as the fork ends; where it is killed, so is the fork. A fork
has a process id and a session of its own, the server's network, and as its `sys.executable` what `PYTHON_EXEC` says.
Tests of what importing does, of how the interpreter ends, or of hosts in other networks start real ones.

This file is the server (`python forked_python.py serve MODULES`, with a socket as its stdin), that small program
(`... SOCKET ARGUMENTS`), and the functions for tests.
"""

import array
import json
import os
import signal
import socket
import sys

MODULES = (
    "torch",
    "torch._dynamo",
    "torch.distributed.run",
    "packsaddle.cli",
    "packsaddle.numerics.kernels.preloaded",
    # What several programs import.
    "torch.distributed.fsdp",
    "scipy.stats",
    "sklearn.datasets",
    "matplotlib.figure",
    "jinja2",
)

SHARED = "FORKED_PYTHON"  # the variable that names the program


def python(*modules: str) -> str:
    """Return the program that stands for `sys.executable`; takes -u, -W, and -m MODULE, -c CODE or SCRIPT.

    Without modules, processes that this one starts afterwards have the same program. With modules, its forks have
    imported these too, if they are installed: a second server, itself a fork of the first, imports them once.
    """
    if SHARED in os.environ:
        _started.setdefault((), os.environ[SHARED])
    if modules not in _started:
        _started[modules] = _start(python() if modules else sys.executable, modules)
        os.environ.setdefault(SHARED, _started[modules])
    return _started[modules]


_started: dict[tuple[str, ...], str] = {}  # by modules


def _start(interpreter: str, modules: tuple[str, ...]) -> str:
    """Start a server that imports these modules too, and return the program that asks it."""
    import atexit
    import subprocess
    import tempfile
    from pathlib import Path

    folder = tempfile.TemporaryDirectory(prefix="python-")
    place, program = Path(folder.name) / "socket", Path(folder.name) / "python-forked"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {__file__} {place} "$@"\n')
    command = Path(folder.name) / "packsaddle"  # where scripts look for it: beside python
    command.write_text(f'#!/bin/sh\nexec {program} -m packsaddle.cli "$@"\n')
    alias = Path(folder.name) / "python"  # which scripts call by this name
    alias.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
    for made in (program, command, alias):
        made.chmod(0o755)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place))
    listener.listen(64)
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Where a fork asks for more threads, they must not spin while they wait: tests share the cores.
    variables = {**os.environ, **one, "OMP_WAIT_POLICY": "PASSIVE"}
    server = subprocess.Popen(
        [interpreter, __file__, "serve", *modules],
        stdin=listener.fileno(),
        stdout=subprocess.DEVNULL,
        env=variables,
        start_new_session=True,
    )
    listener.close()

    def end() -> None:
        server.kill()
        server.wait()
        folder.cleanup()

    atexit.register(end)
    return str(program)


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment for programs: of no launcher, one thread, forks as torchrun's workers."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python(), **more}


def torchrun(*arguments: object, workers: int = 2) -> list[str]:
    """Return the command line that starts so many workers by torchrun; see `environment`."""
    words = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}")
    return [python(), *words, *map(str, arguments)]


def _ask(place: str, words: list[str]) -> None:
    """Have the server fork, and end as the fork does."""
    server = socket.socket(socket.AF_UNIX)
    server.connect(place)
    request = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
    streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
    server.sendmsg([f"{len(request):>16}".encode()], streams)
    server.sendall(request)
    answers = server.makefile()
    fork = int(answers.readline())

    def passed_on(number: int, frame: object) -> None:
        os.kill(fork, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, passed_on)
    code = int(answers.readline() or 1)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _serve(modules: list[str]) -> None:
    """Fork for each that asks, tell it how its fork has ended, and kill the forks of those that have ended.

    stdin is the socket on which they ask.
    """
    import gc
    import importlib
    import select
    from contextlib import suppress

    listener = socket.socket(fileno=os.dup(0))
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    for name in (*MODULES, *modules):
        with suppress(ImportError):
            importlib.import_module(name)
    del sys.modules["torch.distributed.run"]  # runpy warns of one that is there
    _compile_loops()
    # Its events bear the name of the function that caused them, for which inspect.stack looks through all modules.
    rendezvous = sys.modules["torch.distributed.elastic.rendezvous.dynamic_rendezvous"]
    rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name  # type: ignore[attr-defined]
    gc.freeze()
    parent = os.getppid()
    heard, woken = socket.socketpair()
    woken.setblocking(False)
    signal.set_wakeup_fd(woken.fileno())
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    clients: dict[int, socket.socket] = {}
    while os.getppid() == parent:
        ready = select.select([listener, heard, *clients.values()], [], [], 1.0)[0]
        if heard in ready:
            heard.recv(4096)
        for fork, client in list(clients.items()):
            ended, status = os.waitpid(fork, os.WNOHANG)
            if ended:
                with suppress(OSError):
                    client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
                clients.pop(fork).close()
            elif client in ready:  # it says nothing after its request, so it has ended
                os.kill(fork, signal.SIGKILL)
                os.waitpid(fork, 0)
                clients.pop(fork).close()
        if listener in ready:
            client, streams = listener.accept()[0], []
            client.settimeout(10.0)  # nobody else is served meanwhile
            try:
                size, streams, _, _ = socket.recv_fds(client, 16, 3)
                words, folder, variables = json.loads(_received(client, int(size)))
            except (OSError, ValueError):  # it was killed before it had asked
                client.close()
                for stream in streams:
                    os.close(stream)
                continue
            client.settimeout(None)
            fork = os.fork()
            if fork == 0:
                for other in (listener, heard, woken, client, *clients.values()):
                    other.close()
                _become(words, folder, variables, streams)
            for stream in streams:
                os.close(stream)
            with suppress(OSError):
                client.sendall(f"{fork}\n".encode())
            clients[fork] = client


def _compile_loops() -> None:
    """Call numba's loops in both precisions, as compressors and optimizers do for vectors of a model's size."""
    import torch
    from families import COMPRESSORS

    from packsaddle.numerics.finite import add_if_finite
    from packsaddle.numerics.seeds import sample_without_replacement

    sample_without_replacement(5000, 5, seed=0, step=0)
    for dtype in (torch.float32, torch.float64):
        v = torch.randn(1300, generator=torch.Generator().manual_seed(0), dtype=dtype)
        add_if_finite([(v.clone(), v, 0.5)])
        for compressor in COMPRESSORS:
            parts = compressor.encode(v, seed=0, step=0).parts
            message = compressor.receive(parts, len(v), seed=0, step=0)
            compressor.support_of(message, len(v))
            compressor.add_decoded(message, torch.zeros_like(v))


def _received(client: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (part := client.recv(size - len(found))):
            raise ConnectionError("the program that asked has ended")
        found += part
    return found


def _become(words: list[str], folder: str, variables: dict[str, str], streams: list[int]) -> None:
    """In a fork: run what python would run with these arguments, and end as it would, but for the destructors.

    streams: the open files that replace stdin, stdout and stderr.
    """
    import atexit
    import threading
    import traceback

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has ignored in what runs in the background
    code = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        sys.executable = os.environ.get("PYTHON_EXEC", sys.executable)
        code = _run(words)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
        code = code or 120  # Python's, where a stream cannot be flushed
    os._exit(code)


_globals: list[dict[str, object]] = []  # of the program, until the process ends


def _run(words: list[str]) -> int:
    """Return the exit code of the program; one that Ctrl-C ends, ends this process as well.

    The program's globals are kept, so that their destructors do not run. A model behind DistributedDataParallel would
    destroy gloo's process group, which joins gloo's threads with the GIL held. That deadlocks, or aborts, while a
    thread still releases Python callbacks, such as those of torch's PowerSGD hook.
    """
    import runpy
    import traceback
    import warnings

    import numpy as np
    import torch

    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    try:
        while words[0] in ("-u", "-W"):
            if words.pop(0) == "-W":
                sys.warnoptions.append(words[0])
                warnings.simplefilter(words.pop(0))  # type: ignore[arg-type]
            else:
                sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        sys.path[0] = os.getcwd()
        if words[0] == "-m":
            sys.argv = words[1:]
            _globals.append(runpy.run_module(words[1], run_name="__main__", alter_sys=True))
        elif words[0] == "-c":
            sys.argv = ["-c", *words[2:]]
            _globals.append({"__name__": "__main__"})
            exec(words[1], _globals[0])
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(words[0]))
            sys.argv = words
            _globals.append(runpy.run_path(words[0], run_name="__main__"))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2:])
    else:
        _ask(sys.argv[1], sys.argv[2:])
