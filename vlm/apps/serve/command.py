"""``vlm serve``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlm.apps.common import load_model, read_templates
from vlm.apps.serve.config import ServeConfig, with_options
from vlm.errors import ConfigError

if TYPE_CHECKING:
    from vlm.data.tokenizers import Tokenizer


def default_templates(templates: str | list[str] | None, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Templates of requests that name none: with ``auto``, open_clip's ensemble for models that read as CLIP does.

    Unlike a single run, a service computes a label set once and keeps it, so the ensemble costs nothing later. Its
    short form is taken (7 sentences, nearly as good as the 80), since the first request of a set waits for it.
    """
    from vlm.tasks.templates import resolve_templates

    automatic = templates in (None, "auto")
    ensemble = automatic and getattr(tokenizer, "kind", "") != "wordpiece"
    return resolve_templates("simple" if ensemble else templates, tokenizer)


@with_options
def serve(config: ServeConfig) -> None:
    """Serve zero-shot classification over HTTP: /v1/classify, /v1/embed, a page at /, documentation at /docs.

    Ends on Ctrl-C or SIGTERM when all that was accepted is answered.
    """
    try:
        from vlm.apps.serve.server import listen, run
    except ModuleNotFoundError as error:
        raise ConfigError(f"vlm serve needs {error.name}, which isn't installed: pip install 'vlm[serve]'") from error
    from vlm.apps.serve.app import create_app
    from vlm.models.packed import pack_linears

    templates = read_templates(config.templates)
    with listen(config.host, config.port) as place:
        model = load_model(config.model, config.device)
        # BLIP-2 has a feature for each of its queries.
        if not all(map(model.can, ("encode_image", "encode_text"))) or hasattr(model.network, "qformer"):
            raise ConfigError(
                f"{config.model}: {model.kind}, which has no one feature of a picture or of a text alone; "
                "vlm serve needs them, so name a CLIP, an ALBEF or a BLIP"
            )
        pack_linears(model.network)
        app = create_app(model, config, templates=default_templates(templates, model.tokenizer))
        run(app, config, place)
