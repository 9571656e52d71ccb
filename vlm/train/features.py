"""Features of a run's frozen image encoder for a run's data: computed once, then trained on without pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from vlm.data.augment import Augment
from vlm.data.features import Encoded, FeatureStore, open_features, pictures_of
from vlm.data.sources import Source, open_source
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, with_article
from vlm.files import held_alone


def encoder_digest(encoder: nn.Module) -> str:
    """Hash of an image encoder's weights and settings, the same on every machine and device."""
    found = hashlib.sha256(json.dumps(asdict(encoder.config), sort_keys=True).encode())  # type: ignore[call-overload]
    for name, value in sorted(encoder.state_dict().items()):
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value  # FSDP2 keeps shards
        found.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        found.update(whole.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def encoded_by(network: Any, transform: ImageTransform, source: Source) -> Encoded:
    """What features of a source's pictures are of. Raises ConfigError for a network without a frozen encoder."""
    if not hasattr(network, "look"):
        raise ConfigError(
            f"features: {with_article(type(network).__name__)} trains its image encoder, so that what it sees changes "
            "with each step; only stages with a frozen one (blip2, blip2-llm) can train on features"
        )
    if any(parameter.requires_grad for parameter in network.image.parameters()):
        raise ConfigError("features: with lora on the image encoder what it sees changes with each step; leave one out")
    settings = json.dumps(transform.to_dict(), sort_keys=True)
    preprocessing = hashlib.sha256(settings.encode()).hexdigest()
    return Encoded(encoder_digest(network.image), preprocessing, source.fingerprint(), len(source))


def features_of_run(
    folder: str, network: nn.Module, transform: ImageTransform, source: Source, augment: Augment
) -> FeatureStore | None:
    """The features that a run trains on; None where `folder` is empty.

    Raises ConfigError where pictures are to be augmented too, DataError for features that are missing or stale.
    """
    if not folder:
        return None
    if augment != Augment():
        raise ConfigError("features were computed of unchanged pictures: set loader.augment={} to train on them")
    return open_features(Path(folder), encoded_by(network, transform, source))


@torch.no_grad()
def compute_features(
    network: Any,
    transform: ImageTransform,
    data: tuple[str, ...],
    folder: Path,
    *,
    device: torch.device,
    kind: Literal["float32", "float16"] = "float32",
    batch_size: int = 64,
    workers: int = 2,
    progress: Callable[[int, int], None] = lambda done, samples: None,
) -> FeatureStore:
    """Encode every picture of a source that the folder doesn't hold yet.

    network: with a frozen image encoder and its weights. data: as for `open_source`. kind: of the numbers kept;
    float16 takes half the room, and losses then differ in the fourth digit. progress: called with the samples done
    and all of them. Raises ConfigError for another kind of network, DataError where the folder holds other features
    or can't be written.
    """
    source = open_source(data)
    encoded = encoded_by(network, transform, source)
    network.to(device).eval()
    side = transform.size
    states = network.look(torch.zeros(1, 3, side, side, device=device))  # (1, N, D)
    with held_alone(folder):
        store = FeatureStore.create(folder, encoded, (states.shape[1], states.shape[2]), kind)
        missing = store.missing()
        done = len(source) - len(missing)
        for numbers, pixels, pictures, bad in pictures_of(
            source, transform, missing, batch_size=batch_size, workers=workers
        ):
            seen = network.look(pixels.to(device)).float().cpu() if numbers else states[:0].float().cpu()
            store.write(numbers, seen, pictures, bad)
            done += len(numbers) + len(bad)
            progress(done, len(source))
    return store
