"""The tree keeps its rules; and each rule catches a snippet that breaks it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests import rules

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
TOOLS = {"test", "dev", "docs"}  # extras for developers: the package itself may not need them


@cache
def sources(*folders: str) -> tuple[tuple[str, str, ast.Module], ...]:
    """(path from the root, text, tree) of every Python file under some folders."""
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    texts = [(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8")) for file in files]
    return tuple((path, text, ast.parse(text)) for path, text in texts)


def tracked() -> list[Path]:
    """Every file of the repository; in a copy without history, every file that is no build product."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    else:
        found = [file for file in ROOT.rglob("*") if not any(p.startswith(".") for p in file.parts)]
    return [file for file in found if file.is_file()]


def names(requirements: list[str]) -> set[str]:
    """Normal names of some requirements."""
    heads = (requirement.split(";")[0].split(">")[0].split("[")[0] for requirement in requirements)
    return {rules.normal(head.strip()) for head in heads}


@cache
def owners() -> dict[str, list[str]]:
    """The distributions that bring each top-level module; it takes a while to look."""
    return {name: list(found) for name, found in packages_distributions().items()}


def undeclared(path: str, tree: ast.AST) -> list[str]:
    user_extras = [one for name, extra in EXTRAS.items() if name not in TOOLS for one in extra]
    return rules.undeclared(
        path,
        tree,
        always=names(PROJECT["dependencies"]),
        extras=names(user_extras),
        owners=owners(),
        standard=sys.stdlib_module_names,
    )


Rule = Callable[[str, ast.Module], list[str]]
PACKAGE_RULES: list[Rule] = [
    rules.arrows,
    rules.pure,
    rules.prints,
    rules.asserts,
    rules.annotations,
    rules.docstrings,
    undeclared,
]


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    found = [broken for path, _, tree in sources("vlm") for broken in rule(path, tree)]
    assert len(sources("vlm")) > 20
    assert not found, "\n".join(found)


def test_sizes() -> None:
    everything = sources("vlm", "tests", "benchmarks")
    found = [b for path, text, tree in everything for b in rules.sizes(path, tree, len(text.splitlines()))]
    assert not found, "\n".join(found)


def test_no_class_derives_from_our_own() -> None:
    found = rules.class_depth((path, tree) for path, _, tree in sources("vlm"))
    assert not found, "\n".join(found)


def test_no_exception_is_hidden() -> None:
    found = [b for path, _, tree in sources("vlm", "tests", "benchmarks") for b in rules.silences(path, tree)]
    assert not found, "\n".join(found)


def test_no_path_of_one_machine() -> None:
    found, read = [], 0
    for file in tracked():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # archives and weights
        read += 1
        found += rules.machine_paths(file.relative_to(ROOT).as_posix(), text)
    assert read > 20
    assert not found, "\n".join(found)


def test_requirements_have_floors() -> None:
    listed = PROJECT["dependencies"] + [one for extra in EXTRAS.values() for one in extra]
    found = rules.requirement_floors(listed)
    assert not found, "\n".join(found)
    assert PROJECT["requires-python"].startswith(">=")


# What a command loads: run in a fresh interpreter, which then lists its modules.

ENTRY = """
import importlib, json, sys
place, function = {place!r}.split(":")
sys.argv = ["vlm", "--help"]
try:
    code = getattr(importlib.import_module(place), function)() or 0
except SystemExit as end:
    code = end.code or 0
"""
MODULE = """
import json, runpy, sys
sys.argv = ["vlm", "--help"]
try:
    runpy.run_module("vlm.apps.cli", run_name="__main__", alter_sys=True)
    code = 0
except SystemExit as end:
    code = end.code or 0
"""
LISTING = "\nsys.stderr.write(json.dumps({'code': code, 'modules': sorted(sys.modules)}))\n"


def loaded(script: str) -> tuple[str, int, set[str]]:
    """Run a script; its output, the exit code that it noted, and the heavy modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", script + LISTING], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stderr.splitlines()[-1])
    return done.stdout, seen["code"], set(seen["modules"]) & set(rules.HEAVY)


def test_import_is_light() -> None:
    assert loaded("import json, sys, vlm\ncode = 0 if vlm.__version__ else 1") == ("", 0, set())


@pytest.mark.parametrize("script", [ENTRY.format(place=PROJECT["scripts"]["vlm"]), MODULE], ids=["vlm", "-m"])
def test_help_is_light(script: str) -> None:
    output, code, heavy = loaded(script)
    assert code == 0
    assert "Usage" in output
    assert heavy == set()


def test_heavy_imports_are_seen() -> None:
    assert loaded("import json, sys, torch\ncode = 0")[2] == {"torch"}


# Each rule catches what breaks it, and lets pass what doesn't.

BROKEN: list[tuple[Rule, str, str]] = [
    (rules.arrows, "vlm/models/x.py", "from vlm.weights.load import load"),
    (rules.arrows, "vlm/models/x.py", "from ..data import batch"),
    (rules.arrows, "vlm/models/x.py", "def f():\n    import vlm.train.engine"),
    (rules.arrows, "vlm/data/x.py", "from vlm import tasks"),
    (rules.arrows, "vlm/data/x.py", "from vlm import load"),
    (rules.arrows, "vlm/weights/x.py", "from vlm.train import engine"),
    (rules.arrows, "vlm/errors.py", "import vlm.models"),
    (rules.arrows, "vlm/tasks/x.py", "from vlm.apps.cli import main"),
    (rules.arrows, "vlm/__init__.py", "from vlm.apps.cli import main"),
    (rules.arrows, "vlm/extra/x.py", "x = 1"),
    (rules.pure, "vlm/models/x.py", "open('weights')"),
    (rules.pure, "vlm/models/x.py", "def f(x):\n    print(x)"),
    (rules.pure, "vlm/models/x.py", "from pathlib import Path"),
    (rules.pure, "vlm/objectives/x.py", "import torch.distributed as dist"),
    (rules.pure, "vlm/objectives/x.py", "from torch import distributed"),
    (rules.pure, "vlm/objectives/x.py", "import torch\ntorch.distributed.get_rank()"),
    (rules.pure, "vlm/models/x.py", "import torch\ntorch.save({}, 'x')"),
    (rules.pure, "vlm/models/x.py", "from torch import load"),
    (rules.pure, "vlm/objectives/x.py", "import timm"),
    (rules.prints, "vlm/train/x.py", "def f():\n    print('step')"),
    (rules.prints, "vlm/train/x.py", "import sys\nsys.stdout.write('step')"),
    (rules.asserts, "vlm/data/x.py", "def f(x):\n    assert x > 0"),
    (rules.annotations, "vlm/x.py", "def f(x) -> int: ..."),
    (rules.annotations, "vlm/x.py", "def f(x: int): ..."),
    (rules.annotations, "vlm/x.py", "def f(*x, y: int = 1) -> int: ..."),
    (rules.annotations, "vlm/x.py", "class A:\n    def forward(self, x) -> int: ..."),
    (rules.annotations, "vlm/x.py", "class A:\n    def __init__(self, x: int): ..."),
    (rules.docstrings, "vlm/x.py", "x = 1"),
    (rules.docstrings, "vlm/x.py", "'''Doc.'''\ndef f() -> int:\n    return 1"),
    (rules.docstrings, "vlm/x.py", "'''Doc.'''\nclass A:\n    '''Doc.'''\n    def f(self) -> int: ..."),
    (rules.silences, "vlm/x.py", "try:\n    f()\nexcept ValueError:\n    pass"),
    (rules.silences, "vlm/x.py", "try:\n    f()\nexcept ValueError:\n    ..."),
    (rules.silences, "vlm/x.py", "try:\n    f()\nexcept:\n    raise"),
    (rules.silences, "vlm/x.py", "with contextlib.suppress(Exception):\n    f()"),
    (undeclared, "vlm/x.py", "import pandas"),
    (undeclared, "vlm/x.py", "def f():\n    import pytest"),
    (undeclared, "vlm/x.py", "import tensorboard"),
    (undeclared, "vlm/x.py", "import fastapi"),
    (undeclared, "vlm/apps/serve/x.py", "import pandas"),
]

KEPT: list[tuple[Rule, str, str]] = [
    (rules.arrows, "vlm/models/x.py", "from vlm.objectives.itc import itc\nfrom . import vit"),
    (rules.arrows, "vlm/apps/x.py", "from vlm.train import engine\nfrom vlm import __version__"),
    (rules.pure, "vlm/models/x.py", "import torch\nx.reopen()\ntorch.exp(x)"),
    (rules.pure, "vlm/data/x.py", "open('picture')"),
    (rules.prints, "vlm/apps/x.py", "print('done')"),
    (rules.annotations, "vlm/x.py", "def _f(x): ...\nclass A:\n    def _g(self, x): ..."),
    (rules.docstrings, "vlm/x.py", "'''Doc.'''\nclass A:\n    '''Doc.'''\n    def __len__(self): ..."),
    (rules.silences, "vlm/x.py", "try:\n    f()\nexcept ValueError:\n    x = 1"),
    (undeclared, "vlm/x.py", "import ast, torch, yaml, PIL.Image\nfrom vlm import errors"),
    (undeclared, "vlm/x.py", "def f():\n    import tensorboard"),
    (undeclared, "vlm/apps/serve/x.py", "import fastapi"),
]


@pytest.mark.parametrize(("rule", "path", "snippet"), BROKEN)
def test_a_breach_is_caught(rule: Rule, path: str, snippet: str) -> None:
    assert rule(path, ast.parse(snippet))


@pytest.mark.parametrize(("rule", "path", "snippet"), KEPT)
def test_no_false_alarm(rule: Rule, path: str, snippet: str) -> None:
    assert rule(path, ast.parse(snippet)) == []


def test_sizes_are_caught() -> None:
    def broken(text: str) -> list[str]:
        return rules.sizes("x.py", ast.parse(text), len(text.splitlines()))

    assert broken("x = 1\n" * 350) == []
    assert "351 lines" in broken("x = 1\n" * 351)[0]
    assert broken("def f():\n" + "    x = 1\n" * 59) == []
    assert "61 lines" in broken("def f():\n" + "    x = 1\n" * 60)[0]
    twelve = ", ".join(f"a{i}" for i in range(12))
    assert broken(f"class A:\n    def f(self, {twelve}): ...") == []
    assert "13 parameters" in broken(f"def f({twelve}, *, more): ...")[0]
    assert "13 parameters" in broken(f"class A:\n    def f(self, {twelve}, **more): ...")[0]


def test_class_depth_is_caught() -> None:
    def broken(*texts: str) -> list[str]:
        return rules.class_depth((f"{i}.py", ast.parse(text)) for i, text in enumerate(texts))

    assert broken("class A(nn.Module): ...", "class VlmError(Exception): ...\nclass B(VlmError): ...") == []
    assert broken("class A(nn.Module): ...", "class B(A): ...")
    assert broken("class A(nn.Module): ...", "class B(first.A): ...")
    assert broken("class A(Generic[T]): ...", "class B(A[int]): ...")


def test_machine_paths_are_caught() -> None:
    for where in ("home", "Users", "root", "tmp", "work"):
        assert rules.machine_paths("x", f"data = '/{where}/somebody/data'")
    assert rules.machine_paths("x", "C:" + r"\Users\somebody")
    assert rules.machine_paths("x", "https://example.org/home/page, ./tmp/x, {root}/work/a, a/tmp/b") == []


def test_pins_are_caught() -> None:
    assert rules.requirement_floors(["torch>=2.6", "vlm[train]", "uvicorn[standard]>=0.30"]) == []
    for bad in ("torch", "torch==2.6", "torch~=2.6", "torch>=2.6,<3"):
        assert rules.requirement_floors([bad]), bad
