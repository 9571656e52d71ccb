"""The rules of the tree, each a function of a file's path and syntax tree that returns what breaks it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "objectives": set(),
    "data": {"files", "errors"},
    "models": {"objectives", "errors"},
    "generate": {"errors"},
    "weights": {"models", "generate", "data", "files", "errors"},
    "train": {"objectives", "models", "weights", "data", "files", "errors"},
    "tasks": {"objectives", "models", "generate", "weights", "data", "train", "files", "errors"},
    "apps": {"objectives", "models", "generate", "weights", "data", "train", "tasks", "files", "errors"},
}
"""Each room and the rooms that it may import from."""

FILE_LINES, FUNCTION_LINES, PARAMETERS = 350, 60, 12
OF_AN_EXTRA = "vlm/apps/serve/"
"""A folder that is imported only by a command which says what to install when an extra is missing."""
HEAVY = ("torch", "torchvision", "timm", "transformers", "open_clip")

_IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "breakpoint", "__import__"}
_IMPURE_MODULES = {
    *("builtins", "ctypes", "glob", "importlib", "io", "json", "logging", "multiprocessing", "os", "pathlib"),
    *("pickle", "requests", "safetensors", "shutil", "socket", "sqlite3", "subprocess", "sys", "tarfile"),
    *("tempfile", "urllib", "warnings", "zipfile"),
    *("torch.distributed", "torch.hub", "torch.save", "torch.load", "torch.utils.tensorboard"),
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


class Imported(NamedTuple):
    """A dotted name that is imported, where, and whether only when a function runs."""

    name: str
    line: int
    lazy: bool


def imported(path: str, tree: ast.AST) -> list[Imported]:
    """All names that a file imports, relative ones resolved, ``from a import b`` as ``a.b``."""
    found: list[Imported] = []

    def walk(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Imported(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                package = path.removesuffix(".py").split("/")[: -node.level]
                base = [*package, *base]
            found.extend(Imported(".".join([*base, alias.name]), node.lineno, lazy) for alias in node.names)
        lazy = lazy or isinstance(node, Function) or _for_types_only(node)
        for child in ast.iter_child_nodes(node):
            walk(child, lazy)

    walk(tree, False)
    return found


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def room(path: str) -> str:
    """The room of a file of the package, or ``__init__`` for the package's own."""
    return path.split("/")[1].removesuffix(".py")


def arrows(path: str, tree: ast.AST) -> list[str]:
    """Imports against the one-way rule; only apps import apps."""
    here = room(path)
    if here != "__init__" and here not in ROOMS:
        return [f"{path}: {here} is no known room"]
    allowed = ROOMS.get(here, set(ROOMS) - {"apps"}) | {here, "__version__"}
    broken = []
    for name, line, _ in imported(path, tree):
        parts = name.split(".")
        if parts[0] != "vlm":
            continue
        if len(parts) < 2 or parts[1] not in allowed:
            broken.append(f"{path}:{line}: {here} imports {name}")
    return broken


def pure(path: str, tree: ast.AST) -> list[str]:
    """Files, printing, processes and torch.distributed in networks and objectives; in these, torch alone."""
    here, broken = room(path), []
    if here not in ("models", "objectives"):
        return []
    for name, line, _ in imported(path, tree):
        if _prefixes(name) & _IMPURE_MODULES:
            broken.append(f"{path}:{line}: imports {name}")
        elif here == "objectives" and name.split(".")[0] not in {"torch", "vlm", "__future__", *_PLAIN}:
            broken.append(f"{path}:{line}: objectives know torch only, not {name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in _IMPURE_MODULES:
            broken.append(f"{path}:{node.lineno}: uses {ast.unparse(node)}")
        if isinstance(node, ast.Call) and _called(node) in _IMPURE_CALLS:
            broken.append(f"{path}:{node.lineno}: calls {_called(node)}")
    return broken


_PLAIN = ("collections", "dataclasses", "functools", "itertools", "math", "typing")


def _prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def prints(path: str, tree: ast.AST) -> list[str]:
    """Printing in the package outside apps."""
    if room(path) == "apps":
        return []
    names = {"print", "sys.stdout.write", "sys.stderr.write", "rich.print"}
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    return [f"{path}:{node.lineno}: prints" for node in calls if _called(node) in names]


def asserts(path: str, tree: ast.AST) -> list[str]:
    """Bare asserts in the package: they vanish under ``-O`` and tell a user nothing."""
    found = (node for node in ast.walk(tree) if isinstance(node, ast.Assert))
    return [f"{path}:{node.lineno}: bare assert" for node in found]


def sizes(path: str, tree: ast.Module, lines: int) -> list[str]:
    """Files, functions and parameter lists that are too long."""
    broken = [f"{path}: {lines} lines, at most {FILE_LINES}"] if lines > FILE_LINES else []
    for node in ast.walk(tree):
        if not isinstance(node, Function):
            continue
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        if length > FUNCTION_LINES:
            broken.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}")
        count = len(_parameters(node))
        if count > PARAMETERS:
            broken.append(f"{path}:{node.lineno}: {node.name} has {count} parameters, at most {PARAMETERS}")
    return broken


def _parameters(node: Function) -> list[ast.arg]:
    args = node.args
    named = [*args.posonlyargs, *args.args]
    if named and named[0].arg in ("self", "cls"):
        named = named[1:]
    return [*named, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]


def class_depth(trees: Iterable[tuple[str, ast.AST]]) -> list[str]:
    """Own classes that derive from own classes; only errors may, from VlmError."""
    found = [(path, node) for path, tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    own = {node.name for _, node in found}
    broken = []
    for path, node in found:
        bases = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
        for base in sorted(bases & own - {"VlmError"}):
            broken.append(f"{path}:{node.lineno}: {node.name} derives from our own {base}")
    return broken


def public(tree: ast.Module) -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes, functions and methods (special methods too), each with its dotted name."""
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        yield node.name, node
        if isinstance(node, ast.ClassDef):
            for method in node.body:
                hidden = isinstance(method, Function) and re.match(r"_(?!_\w+__$)", method.name)
                if isinstance(method, Function) and not hidden:
                    yield f"{node.name}.{method.name}", method


def annotations(path: str, tree: ast.Module) -> list[str]:
    """Public functions and methods with a parameter or result that has no type."""
    broken = []
    for name, node in public(tree):
        if isinstance(node, Function):
            bare = [arg.arg for arg in _parameters(node) if arg.annotation is None]
            bare += ["the result"] if node.returns is None else []
            broken += [f"{path}:{node.lineno}: {name}: no type for {', '.join(bare)}"] if bare else []
    return broken


def docstrings(path: str, tree: ast.Module) -> list[str]:
    """Modules, public classes, functions and methods without a docstring."""
    broken = [] if ast.get_docstring(tree) or not tree.body else [f"{path}: no docstring"]
    for name, node in public(tree):
        special = node.name.startswith("__")
        marks = {ast.unparse(mark).split(".")[-1] for mark in node.decorator_list}
        if not special and not marks & {"overload", "setter", "override"} and not ast.get_docstring(node):
            broken.append(f"{path}:{node.lineno}: {name}: no docstring")
    return broken


def silences(path: str, tree: ast.AST) -> list[str]:
    """Handlers that hide an error: nothing but ``pass``, a bare ``except``, suppressing Exception."""
    broken = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            empty = all(
                isinstance(step, ast.Pass) or (isinstance(step, ast.Expr) and isinstance(step.value, ast.Constant))
                for step in node.body
            )
            if empty or node.type is None:
                broken.append(f"{path}:{node.lineno}: an exception is hidden")
        if isinstance(node, ast.Call) and _called(node).split(".")[-1] == "suppress":
            wide = {ast.unparse(arg) for arg in node.args} & {"Exception", "BaseException"}
            broken += [f"{path}:{node.lineno}: every exception is hidden"] if wide else []
    return broken


_MACHINE_PATH = re.compile(r"(?<![\w.:/}>-])/(?:home|Users|root|mnt|tmp|work|scratch)/[\w.-]+|[A-Z]:\\Users\\")


def machine_paths(path: str, text: str) -> list[str]:
    """Absolute paths that exist on one machine only."""
    lines = enumerate(text.splitlines(), start=1)
    return [f"{path}:{i}: {found.group()}" for i, line in lines if (found := _MACHINE_PATH.search(line))]


def requirement_floors(requirements: Iterable[str], own: str = "vlm") -> list[str]:
    """Requirements without a lower bound, or with a pin."""
    broken = []
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        if name == own:
            continue
        if ">=" not in requirement or re.search(r"==|~=|<|!=", requirement):
            broken.append(f"{requirement}: needs a floor (>=) and nothing else")
    return broken


def normal(distribution: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def undeclared(
    path: str,
    tree: ast.AST,
    *,
    always: set[str],
    extras: set[str],
    owners: dict[str, list[str]],
    standard: frozenset[str],
) -> list[str]:
    """Imports of packages that nothing declares; those of an extra only when a function runs.

    Args:
        path: of the file.
        tree: of the file.
        always: normal names of the package's requirements.
        extras: normal names of what its extras for users require.
        owners: the distributions that bring a top-level module.
        standard: names of the standard library's modules.
    """
    broken = []
    for name, line, lazy in imported(path, tree):
        top = name.split(".")[0]
        if top in standard or top == "vlm":
            continue
        brought = {normal(owner) for owner in owners.get(top, [top])}
        if not brought & (always | extras if lazy or path.startswith(OF_AN_EXTRA) else always):
            kind = "not declared" if not brought & extras else "of an extra: import it where it is used"
            broken.append(f"{path}:{line}: {top} is {kind}")
    return broken
