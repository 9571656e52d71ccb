"""YAML and overrides become typed settings; what is unknown or wrong is refused with its name."""

from dataclasses import dataclass, field

import pytest

from vlm.errors import ConfigError
from vlm.train.config import OptimConfig, TrainConfig, load_config, named_config, to_yaml


@dataclass(frozen=True)
class Run:
    train: TrainConfig = field(default_factory=TrainConfig)
    data: tuple[str, ...] = ()


def test_yaml_and_overrides(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: [one]\ntrain:\n  epochs: 3\n  optim: {lr: 1e-3, freeze: [text.tokens]}\n")
    run = load_config(Run, path, ["train.seed=7", "train.optim.lr_scale.text.layers.0=0.1", "data=[a, b]"])
    assert run.train.epochs == 3.0 and run.train.seed == 7 and run.data == ("a", "b")
    assert run.train.optim == OptimConfig(lr=1e-3, freeze=("text.tokens",), lr_scale={"text.layers.0": 0.1})
    again = tmp_path / "b.yaml"
    again.write_text(to_yaml(run))
    assert load_config(Run, again) == run


@pytest.mark.parametrize(
    ("text", "override", "message"),
    [
        ("train: {epoch: 3}", None, r"a\.yaml: unknown key train\.epoch \(did you mean 'epochs'\?\)"),
        ("train: {optim: {lrr: 3}}", None, r"train\.optim\.lrr \(did you mean 'lr'\?\)"),
        ("data: [a]", "train.sed=3", r"override 'train\.sed=3': unknown key sed \(did you mean 'seed'"),
        ("data: [a]", "trian.seed=3", r"unknown key trian \(did you mean 'train'"),
        ("data: [a]", "train.seed", "expected section.key=value"),
        ("data: [a]", "train.seed=x", r"train\.seed = 'x': input should be a valid integer"),
        ("data: [a]", "data=b", r"a\.yaml with data=b: wrong value\n  data = 'b': expected a list, such as \[a, b\]"),
        ("train: {optim: 3}", None, r"train\.optim = 3: expected a section with keys"),
        ("train: {precision: fp8}", None, "'auto', 'fp32', 'bf16' or 'fp16'"),
        ("train: {log_every: 0}", None, r"train\.log_every must be at least 1, got 0"),
        ("train: {accumulate: 0}", None, r"train\.accumulate must be at least 1"),
        ("train: {epochs: 0}", None, r"train\.epochs must be above 0"),
        ("train: {ema: 1.0}", None, r"train\.ema is a decay"),
        ("train: {optim: {lr: -1}}", None, r"train\.optim\.lr must be at least 0"),
        ("train: {optim: {betas: [0.9, 1.0]}}", None, r"train\.optim\.betas"),
        ("train: {teacher: {decay: 1}}", None, r"train\.teacher\.decay must be below 1, got 1\.0$"),
        ("train: {teacher: {alpha: 1.5}}", None, r"train\.teacher\.alpha is a share and must be at most 1, got 1\.5$"),
        ("- a", None, "expected sections"),
        ("a: [", None, "not valid YAML"),
    ],
)
def test_refused(tmp_path, text, override, message):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Run, path, [override] if override else [])


def test_named_configs():
    assert named_config("clip", "tiny").name == "clip-tiny.yaml"
    assert named_config("clip", "base-16").name == "clip-base-16.yaml"
    with pytest.raises(ConfigError, match=r"'tny' \(did you mean 'tiny'\?\).*base, base-16, tiny"):
        named_config("clip", "tny")
    with pytest.raises(ConfigError, match="no such configuration file"):
        named_config("clip", "absent.yaml")
