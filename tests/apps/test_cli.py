"""The command line as a whole: light, and every mistake of a user's answered without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlm
from tests.apps.conftest import Run

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "timm", "transformers", "open_clip", "numpy", "PIL", "pydantic", "rich.table")


def shell(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vlm.apps.cli", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"} | settings,
    )


@pytest.mark.parametrize("module", ["vlm", "vlm.apps.cli"])
def test_imports_are_light(module: str) -> None:
    script = f"import sys, json, {module}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(found.stdout) == []


@pytest.mark.parametrize("words", [["-m", "vlm.apps.cli", "--help"], ["-c", "import vlm"]], ids=" ".join)
def test_help_and_import_are_quick(words: list[str]) -> None:
    times = []
    for _ in range(4):
        before = os.times()
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
        after = os.times()
        # Processor time, since others may want this machine too.
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert done.returncode == 0 and not done.stderr
    assert min(times) < 0.5


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"{vlm.__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        (), ("classify",), ("models",), ("export",), ("demo",), ("train",), ("train", "clip"), ("eval",),
        ("eval", "zero-shot"), ("eval", "retrieval"), ("eval", "prompts"), ("data",), ("data", "build"),
        ("data", "check"),
    ],
)  # fmt: skip
def test_every_command_has_help(run: Run, command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.code == 0 and " ".join(["Usage: vlm", *command]) in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("clasify", "x.png"), "Did you mean 'classify'"),
        (("eval", "zeroshot"), "Did you mean 'zero-shot'"),
        (("data", "chek", "x"), "Did you mean 'check'"),
        (("classify", "x.png", "--lables", "a"), "--labels"),
        (("classify",), "Missing argument"),
        (("eval", "zero-shot"), "--data"),
    ],
)
def test_mistyped(run: Run, arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.code == 2 and message in done.err and not done.out


def test_no_traceback_in_a_shell(tmp_path: Path) -> None:
    done = shell("classify", str(tmp_path / "gone.png"), "--labels", "cat,cat")
    assert done.returncode == 2
    assert done.stderr == "vlm: labels: given more than once: cat; keep one of each\n"
    assert not done.stdout


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="this system has no /dev/full")
def test_no_traceback_on_a_full_disk(model: str, pictures: Path) -> None:
    command = [sys.executable, "-m", "vlm.apps.cli", "classify", str(pictures / "red.png"), "-l", "a", "-m", model]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and "no space left" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_letters_that_a_terminal_lacks(model: str, pictures: Path) -> None:
    done = shell("classify", str(pictures / "red.png"), "-l", "red,名前", "--model", model, PYTHONIOENCODING="latin-1")
    assert done.returncode == 0, done.stderr
    assert r"\u540d\u524d" in done.stdout and "#" in done.stdout


@pytest.mark.skipif(os.name != "posix", reason="names of bytes are POSIX's")
def test_a_name_of_odd_bytes(model: str, pictures: Path) -> None:
    try:
        os.rename(os.fsencode(pictures / "red.png"), os.fsencode(pictures) + b"/r\xffd.png")
    except OSError:
        pytest.skip("the file system takes no such name")
    for form in ("table", "jsonl", "csv"):
        done = shell("classify", str(pictures), "-l", "red,blue", "-f", form, "--model", model)
        assert done.returncode == 0, done.stderr
        assert r"r\udcffd.png" in done.stdout


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("vlm.apps.classify.find_pictures", stop)
    done = run("classify", "x.png", "--labels", "cat")
    assert done.code == 130 and "stopped" in done.err


def test_out_of_memory_says_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 5 GiB")

    monkeypatch.setattr("vlm.apps.classify.load_model", full)
    done = run("classify", __file__, "--labels", "cat")
    assert done.code == 2 and "smaller batch" in done.err


def test_a_bug_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm.apps.cli import main

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("vlm.apps.classify.find_pictures", broken)
    monkeypatch.setattr("sys.argv", ["vlm", "classify", "x.png", "--labels", "cat"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_lazy_package() -> None:
    from vlm.errors import VlmError
    from vlm.tasks.zero_shot import ZeroShotClassifier
    from vlm.weights.load import load

    assert (vlm.VlmError, vlm.ZeroShotClassifier, vlm.load) == (VlmError, ZeroShotClassifier, load)
    assert set(vlm.__all__) == set(dir(vlm))
    with pytest.raises(AttributeError, match="'laod'"):
        vlm.laod  # noqa: B018
