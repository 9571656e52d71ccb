"""BLIP-2's second step by its command: from the first step's run, with an LLM that stays and is stored nowhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from typer.testing import CliRunner

import vlm
from tests.models.small_llm import IMAGE, QUERIES, inner, llm_folder
from tests.tasks.small import WORDS, random_model
from tests.train.small import ALONE, forget_last, spawn
from vlm.apps.cli import app
from vlm.errors import ConfigError, WeightsError
from vlm.models.blip2 import Blip2, Blip2Config
from vlm.models.qformer import QFormerConfig
from vlm.train.config import load_config, named_config
from vlm.train.features import compute_features
from vlm.train.metrics import read_metrics
from vlm.train.run import begun_network, make_transform, read_run_config, run_kind, train_stage
from vlm.weights.files import read_json, read_tensors
from vlm.weights.llm import weights_hash
from vlm.weights.loaded import VisionLanguageModel

SIZES = [
    "model.image={image_size: 32, patch_size: 16, width: 32, layers: 2, heads: 2, mlp_width: 64}",
    "model.qformer={queries: 3, speaks: false, text: {vocab_size: 0, width: 16, layers: 2, heads: 2, mlp_width: 32, "
    "cross_layers: [0], cross_width: 32}}",
    "loader.batch_size=8", "loader.workers=0", "train.steps=6", "train.log_every=1", "train.save_every=3",
    "train.optim.warmup=2", "train.optim.lr=1.0e-2", "train.best=''",
]  # fmt: skip


def options(folder: Path, llm: Path, *more: str) -> list[str]:
    return [
        *SIZES,
        f"model.llm={{name: {json.dumps(str(llm))}, width: 32}}",
        f"data={json.dumps([str(folder)])}",
        *more,
    ]


def settings(folder: Path, llm: Path, start: Path, *more: str):
    listed = options(folder, llm, "validation=[]", f"start={json.dumps([str(start)])}", *more)
    return load_config(run_kind("blip2-llm"), named_config("blip2-llm", "tiny"), listed)


def curve(run: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"}


@pytest.fixture
def llm(tmp_path: Path) -> Path:
    return llm_folder(tmp_path / "llm")


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """A model of the first step, with words in its Q-Former."""
    torch.manual_seed(0)
    text = replace(QUERIES, vocab_size=WORDS.vocab_size, context_length=32)
    qformer = QFormerConfig(text=text, queries=3, dec_id=1)
    network = Blip2(Blip2Config(image=IMAGE, qformer=qformer, embed_dim=8))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    transform = replace(random_model().transform, size=32)
    VisionLanguageModel(network, WORDS, transform, name="first", family="blip2").save(tmp_path / "first")
    return tmp_path / "first"


def test_command_goes_on_from_the_first_step(folder: Path, llm: Path, first: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    listed = ["--data", str(folder), "--out", str(run), "--device", "cpu", "--start", str(first)]
    more = options(folder, llm, f"validation={json.dumps([str(folder)])}", "train.optim.lr=0")
    result = CliRunner().invoke(app, ["train", "blip2-llm", *listed, *more])
    assert result.exit_code == 0, result.output + str(result.exception)
    figures = next(line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "evaluate")
    assert figures["lm_loss"] > 0 and 0 <= figures["lm_accuracy"] <= 1
    held, before = read_tensors(run / "model" / "model.safetensors"), read_tensors(first / "model.safetensors")
    taken = {name for name in held if not name.startswith("projection.")}
    assert taken and all(torch.equal(held[name], before[name]) for name in taken)
    assert {name.split(".")[0] for name in held} == {"image", "qformer", "projection"}
    model = vlm.load(run, device="cpu")
    assert len(vlm.Captioner(model).caption([folder / "00.png", folder / "01.png"])) == 2


def test_frozen_is_frozen_and_stored_once(folder: Path, llm: Path, first: Path, tmp_path: Path) -> None:
    """The same hash of image encoder and LLM before and after, also in a run that was broken off; neither has a slot in
    the optimiser's state."""
    run = tmp_path / "run"
    image = weights_hash(vlm.load(first, device="cpu").network.image)  # type: ignore[arg-type]
    hashes: list[tuple[str, str]] = []

    def look(network: Any) -> dict[str, float]:
        hashes.append((weights_hash(network.image), weights_hash(network.llm.inner)))  # what stands in memory
        return {}

    train_stage(settings(folder, llm, first), run, ALONE, evaluate=look, progress=False)
    forget_last(run, 6)
    train_stage(read_run_config("blip2-llm", run), run, ALONE, resume=True, evaluate=look, progress=False)
    assert hashes == [(image, weights_hash(inner("llama")))] * 2
    model = vlm.load(run, device="cpu")
    recorded = read_json(run / "model" / "config.json")["config"]["llm"]
    assert weights_hash(model.network.image) == image  # type: ignore[arg-type]
    assert recorded["sha256"] == weights_hash(model.network.llm.inner)  # type: ignore[arg-type, union-attr]
    assert recorded["sha256"] == read_run_config("blip2-llm", run).model.llm.sha256
    losses = curve(run)
    assert losses[6] < losses[1] - 0.1
    state = dcp.FileSystemReader(run / "checkpoints" / "step-00000006" / "state").read_metadata().state_dict_metadata
    parts = {name.removeprefix("network.").split(".")[0] for name in state if name.startswith("network.")}
    assert parts == {"qformer", "projection"}
    assert not [name for name in state if ".image." in name or ".llm." in name]


def test_resumed_equals_whole_and_another_llm_is_refused(folder: Path, llm: Path, first: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for run in (whole, cut):
        train_stage(settings(folder, llm, first, "train.accumulate=2"), run, ALONE, progress=False)
    forget_last(cut, 6)
    first.rename(tmp_path / "moved")  # what it began from isn't needed any more
    train_stage(read_run_config("blip2-llm", cut), cut, ALONE, resume=True, progress=False)
    assert curve(cut) == curve(whole)
    one, two = (read_tensors(run / "model" / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    forget_last(cut, 6)
    llm_folder(llm, seed=1)
    with pytest.raises(WeightsError, match="was trained with"):
        train_stage(read_run_config("blip2-llm", cut), cut, ALONE, resume=True, progress=False)


def test_micro_batches_and_lora(folder: Path, llm: Path, first: Path, tmp_path: Path) -> None:
    """Cut batches give the same curve, also where LoRA lets LLM and image encoder learn; it stays with the model."""
    lora = "model.lora={rank: 2, targets: {llm: [q_proj], image: [qkv]}}"
    own = {**dict(inner("llama").named_parameters(prefix="llm.inner"))}
    own |= {f"image.{n}": v for n, v in vlm.load(first, device="cpu").network.image.named_parameters()}  # type: ignore[union-attr, operator]

    def unchanged(network: Any) -> dict[str, float]:
        held = {name.replace(".base_layer.", "."): value for name, value in network.named_parameters()}
        assert all(torch.equal(held[name], value) for name, value in own.items())
        return {}

    for name, parts in (("one", 1), ("three", 3)):
        config = settings(folder, llm, first, lora, f"train.accumulate={parts}")
        train_stage(config, tmp_path / name, ALONE, evaluate=unchanged, progress=False)
    assert curve(tmp_path / "three") == pytest.approx(curve(tmp_path / "one"), abs=1e-4)
    held = read_tensors(tmp_path / "one" / "model" / "model.safetensors")
    assert [name for name in held if name.startswith("llm.")] and all(
        "lora_" in n for n in held if n.startswith("llm.")
    )
    assert any(value.abs().sum() > 0 for name, value in held.items() if "lora_B" in name)
    network = vlm.load(tmp_path / "one", device="cpu").network
    assert all(torch.equal(value, held[name]) for name, value in network.state_dict().items())


def test_kept_features_train_the_same(folder: Path, llm: Path, first: Path, tmp_path: Path) -> None:
    plain = settings(folder, llm, first, "loader.augment={}")
    train_stage(plain, tmp_path / "pictures", ALONE, progress=False)
    network, kept = begun_network(plain), tmp_path / "features"
    compute_features(network, make_transform(plain), plain.data, kept, device=torch.device("cpu"), workers=0)
    train_stage(replace(plain, features=str(kept)), tmp_path / "kept", ALONE, progress=False)
    assert curve(tmp_path / "kept") == pytest.approx(curve(tmp_path / "pictures"), abs=1e-5)
    lora = settings(folder, llm, first, "loader.augment={}", "model.lora={rank: 2, targets: {image: [qkv]}}")
    with pytest.raises(ConfigError, match="changes with each step"):
        train_stage(replace(lora, features=str(kept)), tmp_path / "lora", ALONE, progress=False)


def in_two(here, folder: str, llm: str, first: str, run: str, *more: str) -> None:
    config = settings(Path(folder), Path(llm), Path(first), *more)
    train_stage(config, Path(run), here, progress=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "more"),
    [
        ("ddp", []),
        ("fsdp", ["checkpointing=true"]),
        ("fsdp", ["model.llm.weights=bf16", "model.lora={rank: 2, targets: {llm: [q_proj]}}"]),
    ],
    ids=["ddp", "fsdp", "fsdp-bf16-lora"],
)
def test_two_ranks_equal_one(
    folder: Path, llm: Path, first: Path, tmp_path: Path, parallel: str, more: list[str]
) -> None:
    train_stage(settings(folder, llm, first, *more), tmp_path / "one", ALONE, progress=False)
    spawn(in_two, str(folder), str(llm), str(first), str(tmp_path / "two"), f"train.parallel={parallel}", *more)
    near = 2e-2 if any("bf16" in setting for setting in more) else 2e-4
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), abs=near)
    one, two = (read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.allclose(one[name], two[name], atol=10 * near) for name in one)


def test_a_seq2seq_model_reads_the_first_words_and_says_the_rest(folder: Path, first: Path, tmp_path: Path) -> None:
    """Prefix LM by the engine: cut batches, recomputed layers and a break give the same curve, which falls."""
    llm = llm_folder(tmp_path / "t5", "t5")
    parts = {"one": ["checkpointing=true"], "three": ["train.accumulate=3"], "whole": ["model.split=false"]}
    for name, more in parts.items():
        train_stage(settings(folder, llm, first, "model.split=true", *more), tmp_path / name, ALONE, progress=False)
    assert curve(tmp_path / "three") == pytest.approx(curve(tmp_path / "one"), abs=1e-4)
    assert curve(tmp_path / "one")[6] < curve(tmp_path / "one")[1] - 0.1
    assert curve(tmp_path / "whole")[1] != pytest.approx(curve(tmp_path / "one")[1], abs=1e-3)
    forget_last(tmp_path / "one", 6)
    before = curve(tmp_path / "one")
    train_stage(read_run_config("blip2-llm", tmp_path / "one"), tmp_path / "one", ALONE, resume=True, progress=False)
    assert curve(tmp_path / "one") == pytest.approx(before, abs=1e-6)
    assert len(vlm.Captioner(str(tmp_path / "one")).caption([folder / "00.png", folder / "01.png"])) == 2


def test_questions_are_learnt_to_be_answered(folder: Path, llm: Path, first: Path, tmp_path: Path) -> None:
    rows = [
        {"image": f"{number:02d}.png", "question": "what colour is it ?", "answer": colour}
        for number in range(16)
        for colour in [["red", "green", "blue", "black"][number % 4]]
    ]
    (folder / "asked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = settings(folder, llm, first, f"data={json.dumps([str(folder / 'asked.jsonl')])}", "train.steps=20")
    train_stage(config, tmp_path / "run", ALONE, progress=False)
    losses = curve(tmp_path / "run")
    assert losses[20] < losses[1] - 0.4
    assert isinstance(vlm.Asker(str(tmp_path / "run")).ask(str(folder / "01.png"), "what colour is it ?"), str)
