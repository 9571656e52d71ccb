"""Where `vlm caption` writes: nothing of somebody else's is replaced, and captions of other settings are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.apps.conftest import Run
from tests.apps.speaker import lines_of, said, shard


def test_text_files_beside_the_pictures(caption: Run, pictures: Path) -> None:
    done = caption(pictures, "-f", "txt", "-n", 2)
    assert done.code == 0 and "5 of 5 pictures have captions, " in done.err
    for path, texts in said(*sorted(pictures.glob("*.png")), sequences=2).items():
        assert Path(path).with_suffix(".txt").read_text("utf-8").splitlines() == texts
    (pictures / "red.txt").unlink()
    done = caption(pictures, "-f", "txt", "-n", 2)
    assert "5 of 5 pictures have captions, 4 of them from before" in done.err and (pictures / "red.txt").exists()


def test_texts_of_others_stay(caption: Run, pictures: Path) -> None:
    own = pictures / "red.txt"
    own.write_text("my own words\n", "utf-8")
    done = caption(pictures, "-f", "txt")
    assert done.code == 0 and "4 of 5 pictures have captions, " in done.err and "from before" not in done.err
    assert "kept 1 text that wasn't written by this command; --overwrite replaces it" in done.err
    (pictures / "blue.txt").write_text("mended by hand\n", "utf-8")
    done = caption(pictures, "-f", "txt", "--fresh", "--min-new-tokens", 5)
    assert "3 of 5 pictures" in done.err and "kept 2 texts that weren't" in done.err
    assert own.read_text("utf-8") == "my own words\n" and (pictures / "blue.txt").read_text("utf-8").startswith(
        "mended"
    )
    longer = said(*sorted(pictures.glob("*.png")), min_new_tokens=5)
    assert (pictures / "green.txt").read_text("utf-8").splitlines() == longer[str(pictures / "green.png")]
    done = caption(pictures, "-f", "txt", "--overwrite", "--min-new-tokens", 5)
    assert "5 of 5 pictures have captions, 3 of them from before" in done.err and "kept" not in done.err
    assert own.read_text("utf-8").splitlines() == longer[str(pictures / "red.png")]
    assert caption(pictures, "--overwrite").code == 2


def test_texts_of_other_settings_are_refused(caption: Run, pictures: Path) -> None:
    assert caption(pictures / "red.png", "-f", "txt").code == 0
    record = pictures / ".vlm-captions.jsonl"
    record.write_text(record.read_text("utf-8") + '{"text": "half a l', "utf-8")
    done = caption(pictures, "-f", "txt", "--strategy", "greedy")
    assert done.code == 2 and "red.txt: holds captions of an earlier run with strategy 'beam'" in done.err
    assert "now it is 'greedy'" in done.err and "--fresh" in done.err
    assert [path.name for path in pictures.glob("*.txt")] == ["red.txt"]
    assert caption(pictures / "blue.png", "-f", "txt", "--strategy", "greedy").code == 0
    assert "1 of 1 picture has captions, 1 of them" in caption(pictures / "red.png", "-f", "txt").err


@pytest.mark.parametrize("unfinished", [False, True])
def test_other_settings_are_refused(caption: Run, pictures: Path, tmp_path: Path, unfinished: bool) -> None:
    file, journal = tmp_path / "found.jsonl", tmp_path / ".found.jsonl.part"
    assert caption(pictures / "red.png", "-o", file, "--prompt", "a").code == 0
    before = file.read_bytes()
    if unfinished:
        journal.write_bytes((tmp_path / ".found.jsonl.settings").read_bytes() + before)
        file.unlink()
    for options, named in (
        (("--prompt", "a", "--strategy", "greedy"), "strategy 'beam', and now it is 'greedy'"),
        (("--prompt", "the"), "prompt 'a', and now it is 'the'"),
    ):
        done = caption(pictures, "-o", file, *options)
        assert done.code == 2 and f"{file}: holds captions of an earlier run with {named}" in done.err
        assert "another --output, or write all anew with --fresh" in done.err
        assert (journal if unfinished else file).read_bytes().endswith(before)
    done = caption(pictures, "-o", file, "--prompt", "a", "--batch-size", 1)
    assert done.code == 0 and "1 of them from before" in done.err and not journal.exists()
    assert caption(pictures, "-o", file, "--fresh").code == 0
    assert "5 of them from before" in caption(pictures, "-o", file).err


def test_unknown_settings_are_said(caption: Run, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    assert caption(pictures / "red.png", "-o", file).code == 0
    (tmp_path / ".found.jsonl.settings").unlink()
    done = caption(pictures, "-o", file, "--strategy", "greedy")
    assert done.code == 0 and "nothing tells with which settings" in done.err and "1 of them from before" in done.err


def test_a_full_disk_is_told_by_the_result_s_name(
    caption: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path.open

    def full(self: Path, *rest: Any, **more: Any) -> Any:
        if ".part" in self.name:
            raise OSError(28, "No space left on device", str(self))
        return own(self, *rest, **more)

    monkeypatch.setattr(Path, "open", full)
    done = caption(pictures, "-o", tmp_path / "found.jsonl")
    assert done.code == 2 and f"{tmp_path / 'found.jsonl'}: can't be written (No space left" in done.err
    assert ".part" not in done.err


@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_a_refusal_leaves_all_as_it_was(run: Run, pictures: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    where, model = tmp_path / "captions", tmp_path / "none.pt"
    where.mkdir()
    refused = ("caption", pictures, "-o", where / "found.jsonl", "--model", model, "--device", "cpu", *more)
    assert run(*refused).code == 2 and not list(where.iterdir())
    (where / ".found.jsonl.part").write_text('{"settings": {"prompt": ""}}\n{"path": "a.png", "captions": []}\n')
    before = (where / ".found.jsonl.part").read_bytes()
    done = run(*refused)
    assert done.code == 2 and "none.pt" in done.err
    assert [path.read_bytes() for path in where.iterdir()] == [before]


def test_text_files_that_would_be_shared(caption: Run, pictures: Path, tmp_path: Path) -> None:
    (pictures / "red.jpg").write_bytes((pictures / "red.png").read_bytes())
    done = caption(pictures, "-f", "txt")
    assert done.code == 2 and "red.txt with" in done.err
    done = caption(shard(tmp_path / "web.tar", pictures), "-f", "txt")
    assert done.code == 2 and "has no place beside it" in done.err


@pytest.mark.parametrize("fresh", [(), ("--fresh",)])
def test_a_file_that_is_no_result_is_kept(caption: Run, pictures: Path, tmp_path: Path, fresh: tuple[str, ...]) -> None:
    file = tmp_path / "notes.jsonl"
    for form, text in (("jsonl", '{"a": 1}\n'), ("csv", "name,age\nx,3\n"), ("jsonl", "[1]\n"), ("jsonl", "mine")):
        file.write_text(text)
        done = caption(pictures, "-f", form, "-o", file, *fresh)
        assert done.code == 2 and "something else than captions" in done.err and "--fresh" not in done.err
        assert file.read_text() == text
        assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["notes.jsonl"]


def test_an_output_is_never_an_input(caption: Run, pictures: Path, tmp_path: Path) -> None:
    tar = shard(tmp_path / "web.tar", pictures)
    for place, output in ((pictures, pictures / "red.png"), (tar, tar)):
        before = output.read_bytes()
        done = caption(place, "-o", output, "--fresh")
        assert done.code == 2 and "is one of the inputs" in done.err
        assert output.read_bytes() == before


def test_a_damaged_result_is_named_by_its_row(caption: Run, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "found"
    for form in ("jsonl", "csv"):
        assert caption(pictures, "-f", form, "-o", file, "--fresh").code == 0
        whole = file.read_text("utf-8")
        file.write_text(whole + "mine\n")
        done = caption(pictures, "-f", form, "-o", file)
        assert done.code == 2 and f"found, {'line' if form == 'jsonl' else 'row'} 6: damaged" in done.err
        assert "--fresh" in done.err and file.read_text("utf-8") == whole + "mine\n"


def test_a_result_goes_on_in_another_form(caption: Run, pictures: Path, tmp_path: Path) -> None:
    file = tmp_path / "found"
    caption(pictures / "red.png", "-f", "csv", "-o", file)
    done = caption(pictures, "-o", file)
    assert done.code == 0 and "1 of them from before" in done.err
    assert set(lines_of(file.read_text("utf-8"))) == {str(path) for path in pictures.iterdir()}
