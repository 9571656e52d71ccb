"""A model folder and pictures for the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.apps.speaker import SHORT, small
from tests.tasks.small import COLOURS, plain, random_model


class Ran(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "random"
    random_model().save(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A picture for each colour, by its name."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in COLOURS:
        plain(name).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`vlm` with some arguments, as the console script runs it."""
    from vlm.apps.cli import main

    def ran(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["vlm", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        code = end.value.code or 0
        assert isinstance(code, int)
        return Ran(code, *capsys.readouterr())

    return ran


@pytest.fixture(scope="session")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "speaker"
    small().save(folder)
    return str(folder)


@pytest.fixture
def caption(run: Run, speaker: str) -> Run:
    return lambda *rest: run("caption", *rest, *SHORT, "--model", speaker, "--device", "cpu")
