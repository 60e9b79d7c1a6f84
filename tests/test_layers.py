"""Data flows one way: a module imports lower layers only, and exchange alone knows torch.distributed (with the
benchmarks' peers, which are torch.distributed's own)."""

import ast
from pathlib import Path

import packsaddle

ROOT = Path(packsaddle.__file__).parent
LAYERS = [
    {"wording", "meeting", "stopping"},
    {"missing"},
    {"schema"},
    {"world", "failure", "ending", "sharded"},
    {"kernels.parts"},
    {"kernels.cuda", "kernels.cells", "kernels.random", "kernels.sampling", "kernels.selection"},
    {"kernels.quantization"},
    {"kernels.cpu"},
    {"kernels"},
    {
        "lanczos",
        "certificate",
        "finite",
        "flat",
        "seeds",
        "ledger",
        "skips",
        "tomllines",
        "dataset",
        "transformer",
        "exchange",
        "durable",
        "calendar",
        "tally",
        "standstill",
        "walk",
        "background",
        "network",
        "rate",
        "bench.timing",
        "bench.result",
        "bench.hosts",
        "compress.wire",
        "compress.base",
        "compress.cells",
        "compress.selection",
        "problems.base",
    },
    {"counter", "recorded"},
    {
        "noise",
        "simulate",
        "sketch",
        "hashing",
        "progress",
        "runfolder",
        "saving",
        "checkpointfiles",
        "channel",
        "monitor",
        "state",
        "table1",
        "problems.separable",
        "problems.matrices",
        "problems.others",
        "problems.oracle",
    },
    {"compress.apportion"},
    {"compress.sparse", "compress.quantize", "compress.lowrank", "linearised", "collectives"},
    {"compress.sketching", "problems", "theory"},
    {"compress"},
    {"average", "testing", "agree", "together"},
    {"direction", "drift", "guard"},
    {"feedback", "sections"},
    {"owners", "gradmemory", "allocation", "perturb", "escape", "curvature", "rates", "ef21", "localsteps"},
    {"memories", "stability", "gradientnoise"},
    {"choose", "certify", "iterates", "steptime", "stepsneeded", "pace"},
    {"exchanger", "warmup"},
    {"transaction"},
    {"bucketexchange", "fsdp"},
    {"ddphook"},
    {"afterstep"},
    {"ddp"},
    {"config", "integrations.hooks"},
    {"text", "integrations"},
    {"data", "demo", "norms", "template"},
    {"tasks"},
    {"models", "linkprobe", "aggregate", "trackers"},
    {"curves", "tables", "integrations.lightning", "integrations.huggingface"},
    {"marks"},
    {"figures"},
    {"page"},
    {"checkpointed"},
    {"shared"},
    {"reshard", "parts", "rotation"},
    {"checkpoint"},
    {"readings"},
    {"optimizer", "report", "catalogue", "inspection", "bench.contenders", "bench.workload"},
    {"bench.step", "bench.compress", "bench.exchange", "bench.peers", "bench.outcome", "workload"},
    {"bench.race"},
    {"bench.worker", "bench.train"},
    {"bench.link"},
    {"bench"},
    {"footing", "noisecheck"},
    {"preparation"},
    {"keeping"},
    {"training"},
    {"folderlock"},
    {"resuming"},
    {"doctor", "experiment", "audit", "plan", "linkplan", "diagnostics.trajectory"},
    {"reach"},
    {"reproduce.study", "reproduce.drawing", "reproduce.pool"},
    {"reproduce.runner", "reproduce.results"},
    {"reproduce.figure1", "reproduce.figure2"},
    {"reproduce.beyond"},
    {"reproduce"},
    {"diagnostics.memory", "diagnostics.localise", "diagnostics.escapes"},
    {"diagnostics.coupling"},
    {"diagnostics"},
    {"reproduce.theorem"},
    {"reproduce.exponents"},
    {"reproduce.scaling"},
    {"reproduce.tabulated"},
    {"commands.console", "commands.parsing"},
    {"commands.linking"},
    {
        "commands.training",
        "commands.reading",
        "commands.certifying",
        "commands.planning",
        "commands.benching",
        "commands.reproducing",
        "commands.completing",
        "commands.starting",
        "commands.examining",
    },
    {"commands"},
    {"cli"},
]


def module_path(module: str) -> str:
    return module.removeprefix("packsaddle").strip(".").replace(".", "/")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {
                alias.name for alias in node.names if (ROOT / module_path(node.module) / f"{alias.name}.py").exists()
            }
            names |= {f"{node.module}.{name}" for name in inside}
            names |= {node.module} if len(inside) < len(node.names) else set()
    return names


MODULES = {module_name(p): imports(p) for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py"}
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}


def test_every_module_has_a_layer() -> None:
    assert MODULES.keys() == LEVEL.keys()


def test_imports_go_down() -> None:
    for name, imported in MODULES.items():
        for target in imported:
            short = target.removeprefix("packsaddle.")
            if target.startswith("packsaddle.") and short in LEVEL:
                assert LEVEL[short] < LEVEL[name], f"{name} imports {short}"


def test_only_exchange_and_the_peers_import_torch_distributed() -> None:
    users = {name for name, imported in MODULES.items() if any(t.startswith("torch.distributed") for t in imported)}
    assert users == {"exchange", "bench.peers"}


def test_reports_know_no_algorithm() -> None:
    for name in ("report", "page", "tables", "marks", "figures"):
        assert {t for t in MODULES[name] if t in {"torch", "packsaddle.optimizer", "packsaddle.compress"}} == set()
