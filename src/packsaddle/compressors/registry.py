"""The list of all compressors, and functions that parse a compressor from text or describe it as text or a dict."""

import ast
import re
from collections.abc import Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from packsaddle.compressors.base import Compressor
from packsaddle.compressors.linear_sketch import LinearSketch
from packsaddle.compressors.low_rank import LowRank
from packsaddle.compressors.quantized import QSGD, Rounded, Sign
from packsaddle.compressors.shared import SharedTopK, SketchTopK
from packsaddle.compressors.sparse import AdaptiveTopK, Identity, RandomK, TopK
from packsaddle.compressors.stages import Stages

_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)%(?=\s*[,)])")


@dataclass(frozen=True)
class Summary:
    """A compressor's row in the table of the documentation."""

    mu: str  # formula of the contraction mu
    message: str  # contents of a message


SUMMARIES: Mapping[type[Compressor], Summary] = {
    Identity: Summary("1", "d values"),
    RandomK: Summary("k/d, rounded up to whole cells", "k values in cells; no indices, because the seed is shared"),
    TopK: Summary(">= k/d; with chunk the least k/n of a chunk", "k values and k coded indices"),
    AdaptiveTopK: Summary("the share, for every v", "as TopK; k varies"),
    SharedTopK: Summary("K/B >= k/d, in the mean", "projections of each of B blocks, 2 bytes each; K blocks of values"),
    SketchTopK: Summary("k/d", "rows x columns counters of 2 bytes; oversample x k values"),
    Sign: Summary("||v||_1^2 / (d ||v||_2^2)", "a bit for each coordinate, and a scale"),
    Rounded: Summary("4/256 or better, by format", "a few bits for each coordinate; scales or levels of each 256"),
    QSGD: Summary("1 / (1 + min(b/s^2, sqrt(b)/s))", "levels, in about their entropy; a norm for each bucket"),
    LinearSketch: Summary("c/(c + d - 1) or better", "c counters"),
    LowRank: Summary("matrix_rank / min(n, m), in the mean", "matrix_rank (n + m) values for each matrix"),
    Stages: Summary("1 - (1 - mu of C)^passes", "C's message of each pass"),
}


def compressors(ratio: float) -> list[Compressor]:
    """Return all compressors, some in several variants, with this `ratio` if they have one. Raises ValueError unless it
    is in (0, 1]."""
    return [
        Identity(),
        RandomK(ratio),
        RandomK(ratio, block_size=1),
        RandomK(ratio, values="bfloat16"),
        TopK(ratio),
        TopK(ratio, values="int8"),
        TopK(ratio, values="int2", chunk=4096),
        AdaptiveTopK(0.5),
        SharedTopK(ratio),
        SketchTopK(ratio),
        LinearSketch(ratio),
        Sign(),
        Stages(Sign()),
        Rounded(),
        QSGD(),
        QSGD(127),
        LowRank(),
    ]


def parse_compressor(text: str) -> Compressor:
    """Parse a constructor call in `text`, such as TopK(1/32), TopK(1%), Stages(Sign(), 3) or Sign. Arguments are
    literals, quotients or nested calls. Raises ValueError if the text is not such a call or an argument is invalid."""
    written = _PERCENT.sub(r"\1/100", text)
    try:
        call = ast.parse(written if "(" in written else f"{written}()", mode="eval").body
        return _called(call)
    except (SyntaxError, AssertionError):
        raise ValueError(f"a compressor must look like RandomK(0.01), got {text!r}") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def classes() -> dict[str, type[Compressor]]:
    return {kind.__name__: kind for kind in SUMMARIES}


def _called(call: ast.expr) -> Compressor:
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    known = classes()
    if call.func.id not in known:
        near = get_close_matches(call.func.id, known, 1)
        hint = f" (did you mean {near[0]}?)" if near else f"; there is {', '.join(known)}"
        raise ValueError(f"no compressor {call.func.id}{hint}")
    named = {k.arg or "": _argument(k.value) for k in call.keywords}
    return known[call.func.id](*map(_argument, call.args), **named)


def _argument(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in classes():
        return _called(node)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        over, under = _argument(node.left), _argument(node.right)
        assert all(isinstance(part, int | float) for part in (over, under))
        assert under != 0
        return over / under
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise AssertionError from None


def describe(compressor: Compressor) -> str:
    """Return a compressor's constructor call as text, without default values; no arguments if it is not a dataclass."""
    given = [(f, getattr(compressor, f.name)) for f in _fields(compressor)]
    shown = [f"{f.name}={_described(value)}" for f, value in given if value != f.default]
    return f"{type(compressor).__name__}({', '.join(shown)})"


def _fields(compressor: Compressor) -> "list[Field[Any]]":
    if not is_dataclass(compressor):
        return []
    return [f for f in fields(compressor) if not f.metadata.get("internal")]


def _described(value: Any) -> str:
    if isinstance(value, Compressor):
        return describe(value)
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def identify(compressor: Compressor) -> dict[str, Any]:
    """Return a compressor's class name as "kind", and its fields, as a dict of plain types for a checkpoint."""
    values = {f.name: _plain(getattr(compressor, f.name)) for f in _fields(compressor)}
    return {"kind": type(compressor).__name__, **values}


def _plain(value: Any) -> Any:
    if isinstance(value, Compressor):
        return identify(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value)  # also converts numpy.float64
    return value if isinstance(value, str | int | None) else repr(value)
