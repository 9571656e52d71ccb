"""``vlm serve``."""

from __future__ import annotations

from vlm.apps.common import load_model, read_templates
from vlm.apps.serve.config import ServeConfig, with_options
from vlm.errors import ConfigError


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
    from vlm.tasks.templates import resolve_templates

    templates = read_templates(config.templates)
    with listen(config.host, config.port) as place:
        model = load_model(config.model, config.device)
        app = create_app(model, config, templates=resolve_templates(templates, model.tokenizer))
        run(app, config, place)
