"""Texts from a network that speaks through a language model: what is given is read at once, then searched from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, ones_like

from vlm.data.tokenizers import Tokenizer
from vlm.errors import ConfigError
from vlm.generate import Generated, GenerationConfig, generate
from vlm.models.llm import prompt_of


def say(
    network: Any,
    visual: Tensor,
    prompt: Mapping[str, Tensor],
    config: GenerationConfig,
    *,
    tokenizer: Tokenizer,
    draws: Tensor | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Generated:
    """Search for the texts of some images.

    Args:
        network: `vlm.models.blip2_llm.Blip2Llm` with its language model.
        visual: (B, Q, D) from its `visual_prompt`.
        prompt: tokens (B, P) of how each text begins, as the tokenizer gives them; rows may differ in length, and none
            depends on the others. Penalties for what was there before leave it out.
        config, draws: see `vlm.generate.generate`.
        tokenizer: of the language model.
        on_tokens: called with the tokens (R,) of the running rows, each time that all have a further one; not with
            those that end a search. Of use where rows aren't reordered: greedy and nucleus search.

    Raises:
        ConfigError: visual prompt, prompt and text together are longer than the language model's texts can be, or the
            tokenizer may have cut the prompt.
    """
    ids, mask = prompt_of(prompt)
    longest, limit = visual.shape[1] + ids.shape[1] + config.max_new_tokens, network.speaker.context_length
    if limit is not None and longest > limit:
        raise ConfigError(
            f"a visual prompt of {visual.shape[1]} tokens, a text of {ids.shape[1]} and {config.max_new_tokens} new "
            f"ones are more than {network.config.llm.name} can read, {limit}; lower max_new_tokens or shorten the text"
        )
    if ids.shape[1] + 1 >= tokenizer.max_length:  # of models without a limit of their own, such as T5
        raise ConfigError(
            f"a text of {ids.shape[1]} tokens: at most {tokenizer.max_length - 2} can be read; shorten it"
        )
    state = network.begin(visual, ids, mask)

    def step(tokens: Tensor, held: Any) -> Tensor:
        first = held.take_first()
        if first is not None:  # the prompt was read already
            return first
        if on_tokens is not None:
            on_tokens(tokens[:, -1])
        return network.step(tokens, held)

    begun = {"input_ids": ids[:, :1], "attention_mask": ones_like(ids[:, :1])}
    return generate(step, state, begun, config, end_id=tokenizer.end_id, pad_id=tokenizer.pad_id, draws=draws)
