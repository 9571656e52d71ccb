"""Reading and writing weights: nothing is unpickled freely, nothing is half-written or half-loaded."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlm.data.tokenizers import Tokenizer
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, WeightsError, reason, with_article
from vlm.files import write_folder
from vlm.weights.base import BASE, Base, shared_parts, without_shared
from vlm.weights.rules import refuse

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
INDEX, TORCH_WEIGHTS = "model.safetensors.index.json", "pytorch_model.bin"
DAMAGED = (
    SafetensorError, RuntimeError, EOFError, ValueError, OSError, LookupError, TypeError, AttributeError, struct.error,
)  # fmt: skip
"""What reading a file that is no checkpoint raises: torch takes any bytes for a pickle, and stumbles anyhow."""
WRITTEN = (
    r"(open_clip_)?(config\.json|model\.safetensors)|model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json|"
    r"README\.md|vocab\.(txt|json)|merges\.txt|special_ids\.json|chat_template\.(jinja|json)|qformer_tokenizer|"
    r"(generation|(video_)?(pre)?processor|tokenizer)_config\.json|(tokenizer|added_tokens|special_tokens_map)\.json"
)
"""Names of what a model's folder consists of, as vlm and transformers write it; all else there is somebody's own."""
Network = TypeVar("Network", bound=nn.Module)


class Configured(Protocol):
    """A network that carries its configuration, a dataclass."""

    config: Any

    def state_dict(self) -> Mapping[str, Tensor]:
        """Its tensors by name."""


def read_tensors(path: Path, *, without: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint file: safetensors, or torch's format with weights only.

    A mapping under ``state_dict``, ``model`` or ``module`` is taken out. without: tensors whose names begin so are
    left out, and of safetensors not even read. Raises WeightsError when the file is
    missing, damaged, no checkpoint, or would have to run code to be read.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with path.open("rb") as file:
        head = file.read(64)
    if head.lstrip()[:1] == b"<" or head.startswith(b"version https://git-lfs"):
        kind = "a Git LFS pointer" if head.startswith(b"version") else "a web page"
        raise WeightsError(f"{path}: this is {kind}, not weights; download the file itself")
    try:
        if path.suffix == ".safetensors":
            return load_file(path) if not without else _load_without(path, without)
        # Mapped, so that what isn't asked for (a teacher, a queue, an optimiser) isn't read; older files can't be.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: holds more than tensors, so reading it could run foreign code ({str(error)[:200]}); "
            "save its state dict as safetensors, or get a version that is"
        ) from error
    except DAMAGED as error:
        if "TorchScript" in str(error):
            raise WeightsError(
                f"{path}: a TorchScript program, which isn't run here; its weights come with "
                "open_clip:ARCH/openai (such as open_clip:ViT-B-32/openai), or save its state dict as safetensors"
            ) from error
        said = (
            reason(error)
            if isinstance(error, (SafetensorError, RuntimeError, OSError, EOFError))
            else "no tensors there"
        )
        raise WeightsError(f"{path}: damaged or not a checkpoint ({said}); {_remedy(path)}") from error
    for name in ("state_dict", "model", "module"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(name), Mapping):
            loaded = loaded[name]
    if not isinstance(loaded, Mapping):
        raise WeightsError(f"{path}: expected named tensors, got {type(loaded).__name__}")
    named = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    if not named:
        raise WeightsError(f"{path}: holds no tensors")
    return {name: value for name, value in named.items() if not (without and name.startswith(without))}


def _remedy(path: Path) -> str:
    """What to do about a damaged file; what one's own run has written can't be fetched."""
    run = next((folder for folder in list(path.parents)[1:4] if (folder / "config.yaml").is_file()), None)
    if run is None:
        return "fetch it again"
    return f"take the model of an earlier step in {run / 'checkpoints'}, or train again"


def _load_without(path: Path, start: str) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        names = file.keys()
        return {name: file.get_tensor(name) for name in names if not name.startswith(start)}


def read_weights(folder: Path, *, without: str = "") -> dict[str, Tensor]:
    """All tensors of a folder as ``transformers`` writes it, in one file or in shards; without: see `read_tensors`.

    Raises WeightsError when there are none or a file can't be read.
    """
    if (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
        read = (read_tensors(folder / name, without=without) for name in names)
        return {key: value for part in read for key, value in part.items()}
    for name in (WEIGHTS, TORCH_WEIGHTS):
        if (folder / name).is_file():
            return read_tensors(folder / name, without=without)
    raise WeightsError(f"{folder}: no weights there, expected {WEIGHTS} or {TORCH_WEIGHTS}")


def build(make: Callable[[], Network], tensors: Mapping[str, Tensor], *, where: str) -> Network:
    """A network of which these tensors become the weights, in their own type, without a second copy; all or nothing.

    make: gives the network; nothing is drawn or stored for the weights that it begins with. Raises WeightsError where
    its sizes can't be, and as `assign` does.
    """
    try:
        with torch.device("meta"):
            network = make()
        if _needs_more(network):
            network = make()
            assign(network, tensors, where=where)
            return network
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from error
    adopt(network, tensors, where=where)
    return network


def adopt(network: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Make these tensors the weights of a network, without a second copy; all or nothing. Raises as `assign`."""
    _check_fit(network, tensors, where)
    own = {name: value if value.is_floating_point() else value.float() for name, value in tensors.items()}
    network.load_state_dict({name: value.contiguous() for name, value in own.items()}, assign=True, strict=False)


def _needs_more(network: nn.Module) -> bool:
    """Whether stored tensors don't make a network whole that stands on the meta device."""
    weights = [value for _, value in network.named_parameters(remove_duplicate=False) if value.is_meta]
    tied = len(weights) > len({id(value) for value in weights})  # one weight under two names
    buffers = {name for name, value in network.named_buffers() if value.is_meta}
    return tied or bool(buffers - network.state_dict().keys())


def assign(network: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy tensors into a network, all or nothing.

    Raises one WeightsError that lists everything missing, unexpected or of the wrong shape.
    """
    _check_fit(network, tensors, where)
    with torch.no_grad():
        for name, value in network.state_dict().items():
            value.copy_(tensors[name])


def _check_fit(network: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    own = network.state_dict()
    shapes = [
        f"{name} {tuple(tensors[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    refuse(
        where,
        missing=[name for name in own if name not in tensors],
        unexpected=[name for name in tensors if name not in own],
        shapes=shapes,
    )


def save_model(
    network: Configured,
    tokenizer: Tokenizer,
    transform: ImageTransform,
    folder: Path | str,
    *,
    name: str,
    family: str = "clip",
    dtype: torch.dtype | None = None,
    card: str = "",
    base: Base | None = None,
) -> None:
    """Write a model folder that `vlm.load` reads: config.json, model.safetensors, vocabulary, README.md.

    dtype: of the stored tensors with fractions; None keeps them. card: text of README.md. base: a shipped model
    whose tensors aren't stored a second time. The folder appears whole or stays as it was. Raises WeightsError
    when it can't be written, or shares no part with its base.
    """
    config = {
        "family": family,
        "name": name,
        "config": dataclasses.asdict(network.config),
        "tokenizer": tokenizer.to_dict(),
        "transform": transform.to_dict(),
    }
    tensors = {
        key: (value.to(dtype) if dtype and value.is_floating_point() else value).detach().cpu().contiguous()
        for key, value in network.state_dict().items()
    }
    if base is not None:
        parts = shared_parts(tensors, base)
        tensors = without_shared(tensors, base.only(parts), whole=base)
        whole = parts == {name.split(".")[0] for name in base.tensors}
        config[BASE] = {"name": base.name, "sha256": base.sha256} | ({} if whole else {"parts": sorted(parts)})

    written = f"{with_article(family).capitalize()} model written by vlm."

    def fill(temporary: Path) -> None:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        # safetensors makes files that their owner alone can read; others get what any new file here would give.
        (temporary / WEIGHTS).chmod(temporary.stat().st_mode & 0o666)
        tokenizer.save(temporary)
        (temporary / CARD).write_text(card or f"# {name}\n\n{written}\n", "utf-8")
        write_json(temporary / CONFIG, config)

    write_model(Path(folder), fill)


def write_model(target: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a model's folder, which appears whole; a model that stood there is replaced.

    Raises WeightsError when it can't be written, or anything else than a model stands there.
    """
    check_target(target)
    try:
        write_folder(target, fill)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"{target}: the model can't be written ({error}); free space or choose another place"
        ) from error


def check_target(target: Path) -> None:
    """Raises WeightsError where a model written to `target` would take the place of something else, which it names."""
    models = ({CONFIG, WEIGHTS}, {"open_clip_config.json", "open_clip_model.safetensors"}, {CONFIG, INDEX})
    names = {path.name for path in target.iterdir()} if target.is_dir() else {target.name}
    held = any(model <= names for model in models)
    others = sorted(name for name in names if not (held and re.fullmatch(WRITTEN, name)))
    if target.exists() and others:
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        raise WeightsError(
            f"{target}: holds other files, which a model would replace: {', '.join(others[:5])}{more}; choose a new "
            "or empty folder, or move them away"
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises WeightsError when it can't be read."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: can't be read ({reason(error)})") from error
    if not isinstance(found, dict):
        raise WeightsError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, as one file of a folder that `write_model` fills."""
    path.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
