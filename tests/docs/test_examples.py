"""Every public name has an example of a few lines, in its docstring or on its page of docs/api, which runs.

The examples of the two files to copy, examples/reference.py and examples/simple.py, run too.
"""

import doctest
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch.distributed as dist
from api_pages import PAGES, documented, found

import packsaddle
from examples import reference, simple

PARSER = doctest.DocTestParser()


def on_page(page: Path) -> list[str]:
    """The examples that are on a page of the API rather than in a docstring."""
    return re.findall(r"```pycon\n(.*?)```", page.read_text(), re.DOTALL)


def examples(name: str) -> list[doctest.Example]:
    return PARSER.get_examples(inspect.getdoc(found(name)) or "")


def test_every_public_name_has_an_example() -> None:
    without = []
    for page in PAGES:
        shown = "\n".join(on_page(page))
        for name in documented(page):
            in_page = re.search(rf"\b{name.rpartition('.')[2]}\b", shown)
            if not in_page and not examples(name):
                without.append(name)
    assert without == []
    exported = {getattr(packsaddle, name) for name in packsaddle.__all__}
    assert exported <= {found(name) for page in PAGES for name in documented(page) if not inspect.ismodule(found(name))}


@pytest.fixture
def no_group() -> Iterator[None]:
    """Examples that fail leave no process group behind."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    texts = {name: inspect.getdoc(found(name)) or "" for name in documented(page)}
    texts[page.name] = "\n".join(on_page(page))
    printed: list[str] = []
    for name, text in texts.items():
        test = PARSER.get_doctest(text, {}, name, str(page), 0)
        doctest.DocTestRunner(verbose=False).run(test, out=printed.append)
    assert not printed, "".join(printed)


@pytest.mark.usefixtures("no_group")
@pytest.mark.parametrize("module", [reference, simple], ids=lambda module: module.__name__)
def test_examples_of_the_files_to_copy_run(module: ModuleType) -> None:
    failed, tried = doctest.testmod(module)
    assert failed == 0 < tried
