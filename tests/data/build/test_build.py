"""The recipe: names, captions, splits, likeness, rendering; and a whole build from a small made-up package set."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vlm.data.build import build, merge_identical, with_own_keys
from vlm.data.build.clean import description, emoji_key, from_stem, is_collection, keywords, slug, web_caption
from vlm.data.build.human import family
from vlm.data.build.items import Item
from vlm.data.build.packages import CLIPART, EMOJIBASE, FLUENT, FLUENT_3D, NOTO, OPENMOJI, TWEMOJI, Package, fetch
from vlm.data.build.perceptual import near_identical, signatures
from vlm.data.build.render import harmless, render
from vlm.data.build.split import assign, human_split, web_split
from vlm.data.sources import open_source
from vlm.errors import DataError


@pytest.mark.parametrize(
    ("text", "key"),
    [("1F600", "1f600"), ("0023-FE0F-20E3", "23-20e3"), ("1F3C3-200D-2642-FE0F", "1f3c3-200d-2642")],
)
def test_emoji_key(text, key):
    assert emoji_key(text) == key


@pytest.mark.parametrize(
    ("stem", "author", "caption"),
    [
        ("acquila_architetto_franc_01", "Architetto Francesco Rollandin", "acquila"),
        ("aiga_stairs_", "Jean-Victor Balin", "stairs"),
        ("duck_yellow_ii_kurt_cagl_", "Kurt Cagle", "duck yellow ii"),
        ("star_46pt13step", "", "star"),
        ("greenBox", "", "green Box"),
        ("steak-v0.1", "", "steak"),
    ],
)
def test_file_names_become_captions(stem, author, caption):
    assert from_stem(stem, author) == caption


@pytest.mark.parametrize(
    ("title", "count", "stem", "folder", "caption"),
    [
        ("Green Fedora", 1, "x", "hats", "green fedora"),
        ("Part of the Flat Icon Collection (Wed Aug 25)", 599, "sort_incr", "computer/icons", "sort incr"),
        ("Clipart by Nicu Buculei - contour_chipmunk", 13, "contour_baboon", "animals", "contour baboon"),
        ("house", 40, "pinkhome", "buildings", "pinkhome"),
        ("yemen", 1, "yemen", "signs/flags/asia", "yemen flag"),
        ("12", 1, "34", "unsorted", ""),
    ],
)
def test_web_captions(title, count, stem, folder, caption):
    assert web_caption(title, count, stem, "", folder) == caption


def test_collections_keywords_descriptions():
    assert is_collection("Lemon SVG theme", 2) and is_collection("cup", 13) and not is_collection("cup", 3)
    assert keywords(["HASH(0x86)", "hash", "computer", "bird", "bird", "map_sym"]) == ["bird", "map sym"]
    assert description("Cartoon of a happy woman. Second sentence.", "happy woman") == "Cartoon of a happy woman"
    assert description("write to me@example.org please", "x") == "" == description("Happy Woman", "happy woman")
    assert slug("Piñata / 2") == "pinata-2"


def test_variants_of_a_concept_share_a_family():
    assert family("man running") == family("woman running") == family("person running facing right")
    assert family("family: man, woman, boy") == family("family: adult, child")
    assert family("man") == family("person") and family("cat") != family("dog")
    assert human_split("emoji:running") == human_split("emoji:running")
    shares = [human_split(f"emoji:{i}") for i in range(4000)]
    assert 0.085 < shares.count("unseen-concept") / 4000 < 0.115
    webs = [web_split(f"clip:{i}") for i in range(8000)]
    assert 0.042 < webs.count("web-val") / 8000 < 0.058 and 0.042 < webs.count("web-test") / 8000 < 0.058


def drawing(seed: int, colour: tuple[int, int, int] = (200, 30, 30)) -> Image.Image:
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (96, 96), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = rng.integers(5, 60), rng.integers(5, 60), rng.integers(8, 35), rng.integers(8, 35)
        shade = tuple(int(v) for v in rng.integers(0, 200, 3)) if rng.random() < 0.5 else colour
        draw.ellipse((x, y, x + w, y + h), fill=shade)
    return image


def test_near_identical_pictures():
    base = drawing(1)
    shifted = Image.new("RGB", base.size, "white")
    shifted.paste(base, (1, 0))
    noisy = Image.fromarray(
        np.clip(np.asarray(base).astype(int) + np.random.default_rng(0).integers(-6, 7, (96, 96, 3)), 0, 255).astype(
            np.uint8
        )
    )
    recoloured = Image.fromarray(np.asarray(base)[:, :, ::-1].copy())
    images = [base, shifted, noisy, recoloured, drawing(2), drawing(3), Image.new("RGB", (96, 96), "white")]
    sig = signatures(images)
    pairs = {(i, j) for i, j in near_identical(sig, sig) if i < j}
    assert {(0, 1), (0, 2)} <= pairs
    assert not any(j >= 3 for _, j in pairs if _ < 3), pairs


def item(key: str, kind: str, cluster: str) -> Item:
    meta = {"captions": [key], "tags": [], "concept": key, "sibling": cluster}
    return Item(key, Path(key), kind, cluster, CLIPART, meta)


def test_alike_web_pictures_share_a_split_and_evaluation_drops_what_training_shows():
    names = [f"clip:{i}" for i in range(60)]
    items = [item(name, "web", name) for name in names]
    images = [drawing(i) for i in range(60)]
    twin = next(n for n in range(60) if web_split(names[n]) != web_split("clip:twin"))
    items.append(item("clip:twin", "web", "clip:twin"))
    images.append(images[twin])
    trained = next(n for n in range(60) if web_split(names[n]) == "web-train" and n != twin)
    items.append(Item("open", Path("open"), "openmoji", "o", OPENMOJI, {}))
    images.append(images[trained])
    splits, left_out = assign(items, images, images)
    assert splits[60] == splits[twin]
    assert splits[61] == "" and left_out["unseen-artist"] == 1


def test_pictures_that_only_compression_makes_alike_are_left_out():
    names = [f"clip:{i}" for i in range(40)]
    items = [item(name, "web", name) for name in names] + [Item("open", Path("o"), "openmoji", "o", OPENMOJI, {})]
    images = [drawing(i) for i in range(41)]
    trained = next(n for n in range(40) if web_split(names[n]) == "web-train")
    assert assign(items, images, images)[0][40] == "unseen-artist"
    assert assign(items, images, [*images[:40], images[trained]])[0][40] == ""


def test_copies_merge_their_texts_and_keys_differ():
    items = [item("a", "web", "x"), item("b", "web", "x"), item("c", "human", "y"), item("c", "human", "y")]
    kept = with_own_keys(items)
    assert [one.key for one in kept] == ["a", "b", "c"]
    images = [drawing(1), drawing(1), drawing(1)]
    left, _, merged = merge_identical(kept, images)
    assert [one.key for one in left] == ["a", "c"] and merged == 1 and left[0].meta["captions"] == ["a", "b"]
    again = with_own_keys([item("a", "web", "x"), item("a", "web", "x")])
    assert [one.key for one in again] == ["a", "a--2"]


SVG = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {size}>{inside}</svg>'
RED = '<rect x="20" y="20" width="40" height="20" fill="red"/>'


def svg(path: Path, inside: str = RED, size: str = 'width="200" height="100"') -> Path:
    path.write_text(SVG.format(size=size, inside=inside), "utf-8")
    return path


def test_svg_is_centred_on_white_and_cropped(tmp_path):
    path = svg(tmp_path / "a.svg")
    whole, cropped = np.asarray(render(path)), np.asarray(render(path, crop=True))
    assert whole.shape == cropped.shape == (96, 96, 3)
    assert tuple(whole[0, 0]) == (255, 255, 255)
    red = (whole[..., 0] > 200) & (whole[..., 1] < 60)
    larger = (cropped[..., 0] > 200) & (cropped[..., 1] < 60)
    assert larger.sum() > 3 * red.sum() > 300


def test_svg_reads_no_files_and_asks_for_no_giant_canvas(tmp_path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (50, 50), "blue").save(secret)
    inside = (
        RED
        + f'<image xlink:href="{secret}" x="100" width="50" height="50"/>'
        + f'<image href="file://{secret}" width="9" height="9"/>'
    )
    pixels = np.asarray(render(svg(tmp_path / "a.svg", inside)))
    assert not ((pixels[..., 2] > 200) & (pixels[..., 0] < 60)).any()
    assert np.asarray(render(svg(tmp_path / "b.svg", size='width="30000" height="30000"'), crop=True)).shape == (
        96,
        96,
        3,
    )
    cleaned = harmless(
        b'<!DOCTYPE svg [<!ENTITY c "red">]><svg><style>@import url(http://a/b.css);</style>'
        b'<a fill="&c;" href="#ok"/></svg>'
    )
    assert b"http" not in cleaned and b'fill="red"' in cleaned and b'href="#ok"' in cleaned


def test_blank_and_broken_pictures_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"a\.svg: blank on white"):
        render(svg(tmp_path / "a.svg", '<rect width="50" height="50" fill="#fefefe"/>'))
    broken = tmp_path / "b.svg"
    broken.write_text("<svg")
    with pytest.raises(DataError, match=r"b\.svg: the SVG can't be drawn"):
        render(broken)


@pytest.mark.parametrize("package", [NOTO, CLIPART], ids=lambda package: package.client)
def test_packages_unpack_in_a_folder_named_from_here(tmp_path, monkeypatch, package):
    monkeypatch.chdir(tmp_path)
    work = Path("deep/work")
    work.mkdir(parents=True)
    tree = tmp_path / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {package.name}\nVersion: {package.version}\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"
    )
    (tree / "a.txt").write_text("a")
    if package.client == "npm":
        with tarfile.open(work / f"{package.folder}.tgz", "w:gz") as tar:
            tar.add(tree / "a.txt", "a.txt")
    else:
        if shutil.which("dpkg-deb") is None:
            pytest.skip("no dpkg-deb here")
        archive = work / f"{package.name}_{package.version}_all.deb"
        subprocess.run(["dpkg-deb", "-b", str(tree), str(archive)], check=True, capture_output=True)
    assert (fetch(package, work) / "a.txt").read_text() == "a"


def test_a_download_that_was_cut_is_named(tmp_path):
    archive = tmp_path / f"{NOTO.folder}.tgz"
    archive.write_bytes(b"\x1f\x8b cut")
    with pytest.raises(DataError, match=rf"{NOTO.folder}\.tgz: .*delete it"):
        fetch(NOTO, tmp_path)


def test_a_missing_client_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="`npm` isn't installed"):
        fetch(NOTO, tmp_path)
    with pytest.raises(DataError, match="`apt-get` isn't installed"):
        fetch(CLIPART, tmp_path)


def fake_packages(work: Path) -> None:
    """A few pictures of each package, laid out as the real ones."""

    def folder(package: Package, inside: str) -> Path:
        path = work / package.folder / inside
        path.mkdir(parents=True, exist_ok=True)
        return path

    rows, messages = [], {"groups": [{"key": "animals", "order": 3}, {"key": "flags", "order": 9}]}
    messages["subgroups"] = [{"key": "mammal", "order": 20}]
    for number in range(40):
        code, group = f"1F{600 + number}", 9 if number % 8 == 0 else 3
        rows.append(
            {
                "label": f"beast {number}",
                "hexcode": code,
                "tags": ["wild"],
                "emoji": "x",
                "group": group,
                "subgroup": 20,
            }
        )
        for package, inside, suffix in (
            (NOTO, "package/img/google/64", "png"), (TWEMOJI, "package/img/twitter/64", "png"),
            (FLUENT_3D, "package/assets", "webp"),
        ):  # fmt: skip
            drawing(number * 7 + len(inside)).save(folder(package, inside) / f"{code.lower()}.{suffix}")
        for look in ("modern", "flat", "high-contrast"):
            svg(folder(FLUENT, f"package/icons/{look}") / f"beast-{number}.svg", shape(number, look))
        for look in ("color", "black"):
            svg(folder(OPENMOJI, f"package/{look}/svg") / f"{code}.svg", shape(number, look))
        about = f"<metadata><dc:title>thing number{number}</dc:title><rdf:li>toy</rdf:li></metadata>"
        svg(folder(CLIPART, "usr/share/openclipart/svg/toys") / f"thing{number}x.svg", about + shape(number, "web"))
    (folder(OPENMOJI, "package") / "LICENSE.txt").write_text("Attribution-ShareAlike 4.0")
    english = folder(EMOJIBASE, "package/en")
    (english / "data.json").write_text(json.dumps(rows))
    (english / "messages.json").write_text(json.dumps(messages))


def shape(number: int, look: str) -> str:
    rng = np.random.default_rng([number, len(look)])
    parts = []
    for _ in range(5):
        x, y, r = rng.integers(10, 180), rng.integers(10, 90), rng.integers(5, 30)
        red, green, blue = rng.integers(200, size=3)
        parts.append(f'<circle cx="{x}" cy="{y}" r="{r}" fill="rgb({red},{green},{blue})"/>')
    return "".join(parts)


def test_a_whole_build_reads_back_and_repeats(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    fake_packages(tmp_path / "work")
    manifest = build(tmp_path / "out", work=tmp_path / "work", workers=1)
    again = build(tmp_path / "again", work=tmp_path / "work", workers=2)
    assert manifest == again
    assert sum(manifest["splits"].values()) + sum(manifest["left_out"].values()) == 40 * 9
    for shard in manifest["shards"]:
        source = open_source(str(tmp_path / "out" / shard["file"]))
        assert len(source) == shard["samples"] and source.meta(0)["split"] == shard["split"]
    assert manifest["splits"]["unseen-artist"] + manifest["left_out"].get("unseen-artist", 0) <= 80
