"""Stage 5, BLIP-2's second step (arXiv 2301.12597 §3.3): what the Q-Former reads becomes words for a frozen LLM.

The queries' states go through one linear layer and stand before the text's embeddings, as a soft visual prompt. The
LLM says the text; Q-Former and linear layer learn from how well it does. Image encoder and LLM stay as they are: no
gradient, no optimiser slot, eval mode, and the LLM is stored nowhere, only its name and a hash of its weights.
Letters in shapes, besides `vlm.models.stage`'s: D width of the LLM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vlm.errors import ConfigError
from vlm.models.llm import LanguageModel, LlmState
from vlm.models.lora import MARK, LoraConfig, add_all
from vlm.models.qformer import QFormer, QFormerConfig
from vlm.models.stage import Choice, Draws, Encoded, Pairs, joint_loss
from vlm.models.transformer import TransformerConfig
from vlm.models.vit import ViT, ViTConfig
from vlm.objectives.lm import lm_sums, next_tokens
from vlm.objectives.mlm import IGNORED

WEIGHTS = ("fp32", "bf16", "fp16", "int8", "nf4")


def _qformer() -> QFormerConfig:
    layers = tuple(range(0, 12, 2))
    text = TransformerConfig(vocab_size=0, width=768, layers=12, heads=12, mlp_width=3072, cross_layers=layers)
    return QFormerConfig(text=text, speaks=False)


@dataclass(frozen=True)
class LlmConfig:
    """The language model that a stage speaks with, and how it is held."""

    name: str = "smollm2"
    """`smollm2` (the embedded one), a Hub repo id, a folder, or a GGUF file."""
    sha256: str = ""
    """Of its weights, written when the stage is first trained: another language model is refused from then on."""
    width: int = 576
    """Features of its tokens."""
    weights: Literal["fp32", "bf16", "fp16", "int8", "nf4"] = "fp32"
    """How its weights are held: int8, or nf4 (4 bits, with an fp32 scale for every 64) by bitsandbytes."""
    start_first: bool = False
    """Whether the start token of a text stands before the visual prompt instead of behind it, as in BLIP-2. A causal
    model keeps what attention doesn't need in whatever comes first (attention sinks, arXiv 2309.17453): visual tokens
    there grow a hundredfold on the way up, and what is said hangs on their smallest change. Without a prompt the first
    word is then said at the last visual token."""


@dataclass(frozen=True)
class Blip2LlmConfig:
    """Image encoder, Q-Former, LLM and what is said; defaults as in the paper, but for the sizes of both ends."""

    image: ViTConfig = field(default_factory=ViTConfig)
    qformer: QFormerConfig = field(default_factory=_qformer)
    """Without words: `text.vocab_size` 0, `speaks` false. An `instructed` one has them (InstructBLIP); such a model is
    used and not trained."""
    llm: LlmConfig = field(default_factory=LlmConfig)
    prompt: str = ""
    """How every caption begins, such as "a photo of"; it is read, not learnt."""
    question: str = "Question: {} Answer:"
    """How a question is asked: of samples with question and answer, and in use."""
    split: bool = False
    """Prefix LM, for seq2seq LLMs: a caption's first words, up to a random one, go to the encoder (§3.3)."""
    label_smoothing: float = 0.0
    """Share of LM's target that is spread over the whole vocabulary."""
    lora: LoraConfig = field(default_factory=LoraConfig)


class Rows(Protocol):
    """What the stage reads of a batch."""

    @property
    def pixels(self) -> Tensor:
        """(b, 3, H, W) normalised pixels."""

    @property
    def seen(self) -> Tensor | None:
        """(b, N, width) states of the image encoder, made before; None to look at `pixels`."""

    @property
    def tokens(self) -> Mapping[str, Tensor]:
        """`input_ids` and `attention_mask`, each (b, L), of prompts with their texts."""

    @property
    def given(self) -> Tensor | None:
        """(b,) leading tokens of each text that aren't said; None for the start token alone."""


class Blip2Llm(nn.Module):
    """Image encoder, Q-Former and linear layer; the LLM is given to it, since networks read no files."""

    loss_weights: Mapping[str, float] = {"lm": 1.0}
    teachable = False

    def __init__(self, config: Blip2LlmConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.image = ViT(config.image).requires_grad_(False)
        self.qformer = QFormer(config.qformer)
        self.projection = nn.Linear(config.qformer.text.width, config.llm.width)
        self.llm: LanguageModel | None = None
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_dont_miss)

    def attach(self, llm: LanguageModel) -> None:
        """Take a language model. Raises ConfigError when it doesn't fit the configuration."""
        if llm.width != self.config.llm.width:
            raise ConfigError(
                f"model.llm.width is {self.config.llm.width}, but {self.config.llm.name} is {llm.width} wide; set it"
            )
        if llm.seq2seq and self.config.llm.start_first:
            raise ConfigError(
                f"model.llm.start_first: {self.config.llm.name} is a seq2seq model, whose start token its encoder "
                "doesn't read; set it false"
            )
        llm.start_first = self.config.llm.start_first
        self.llm = llm
        # Every rank reads it by itself; DDP needn't send it around.
        names = [*llm.named_parameters(), *llm.named_buffers()]
        self._ddp_params_and_buffers_to_ignore = [f"llm.{name}" for name, _ in names]

    def adapt(self) -> None:
        """Add LoRA where the configuration asks for it; the network then has other parameters' names."""
        add_all(self, self.config.lora)

    def train(self, mode: bool = True) -> Blip2Llm:
        """Set the mode; image encoder and LLM stay in eval mode."""
        super().train(mode)
        self.image.eval()
        return self

    # What the LLM reads (§3.3)

    def visual_prompt(self, pixels: Tensor, asked: Mapping[str, Tensor] | None = None) -> Tensor:
        """What (B, 3, H, W) normalised pixels are to the LLM: (B, Q, D); asked: see `read`."""
        return self.read(self.look(pixels), asked)

    def look(self, pixels: Tensor) -> Tensor:
        """The image encoder's states (B, N, width) of (B, 3, H, W) normalised pixels."""
        learns = any(parameter.requires_grad for parameter in self.image.parameters())  # by LoRA
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            return self.image(pixels)

    def read(self, states: Tensor, asked: Mapping[str, Tensor] | None = None) -> Tensor:
        """What image states (P, N, width) are to the LLM: (B, Q, D).

        asked: tokens (B, L) of instructions in the Q-Former's own vocabulary, for an instructed one and for no other;
        P may divide B, else it is B. Raises ValueError where it is missing, or isn't read.
        """
        if asked is None:
            return self.projection(self.qformer.queries(states))
        ids, mask = asked["input_ids"], asked["attention_mask"]
        return self.projection(self.qformer.queries(states, input_ids=ids, mask=mask))

    # What it says

    def lm_logits(
        self,
        pixels: Tensor,
        tokens: Mapping[str, Tensor],
        given: Tensor | None = None,
        *,
        asked: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Logits (B, L, V) of the token after each token; see `LanguageModel.logits`, and `read` for `asked`."""
        mask = tokens["attention_mask"].bool()
        return self.speaker.logits(self.visual_prompt(pixels, asked), tokens["input_ids"], mask, given)

    def begin(self, visual: Tensor, ids: Tensor, mask: Tensor) -> LlmState:
        """Read a visual prompt (B, Q, D) and how each text begins, ids and mask (B, L), start token first."""
        return self.speaker.begin(visual, ids, mask)

    def step(self, ids: Tensor, state: LlmState) -> Tensor:
        """Logits (R, V) of the token after the new ones (R, 1)."""
        return self.speaker.step(ids, state)

    @property
    def speaker(self) -> LanguageModel:
        """The language model. Raises ConfigError when none was attached."""
        if self.llm is None:
            raise ConfigError(f"no language model was attached: load {self.config.llm.name} and give it to `attach`")
        return self.llm

    # Training

    def forward(self, batch: Rows, pairs: Pairs | None = None) -> Encoded | dict[str, Tensor]:
        """Nothing is shared between rows; with `pairs`, whatever they hold, sums of `lm` and of what it got right."""
        if self.config.qformer.instructed:
            raise ConfigError("qformer.instructed: an instructed Q-Former is used, not trained; set it false")
        if pairs is None:
            return Encoded({}, {}, {})
        ids, mask = batch.tokens["input_ids"], batch.tokens["attention_mask"].bool()
        labels = self._labels(batch)  # (b, L - 1)
        seen = self.look(batch.pixels) if batch.seen is None else batch.seen
        logits = self.speaker.logits(self.read(seen), ids[:, :-1], mask[:, :-1], batch.given)
        said = labels != IGNORED
        chosen, truth = logits[said], labels[said]  # (M, V), (M,)
        return lm_sums(chosen, truth, smoothing=self.config.label_smoothing)

    def contrast(self, features: Mapping[str, Tensor], everyone: Mapping[str, Tensor], **_: Any) -> dict[str, Tensor]:
        """Nothing: rows aren't compared."""
        return {}

    def choose(
        self,
        batch: Rows,
        features: Mapping[str, Tensor],
        everyone: Mapping[str, Tensor],
        *,
        row_ids: Tensor,
        ids: Tensor,
        draws: Draws,
    ) -> Choice:
        """No partners; how many tokens are said, which the sums are divided by."""
        count = int((self._labels(batch) != IGNORED).sum())
        return Choice({}, {"lm": count, "lm_accuracy": count})

    def loss(self, batch: Any) -> dict[str, Tensor]:
        """Losses of one batch alone, without other ranks or micro-batches; ``loss`` is the total."""
        return joint_loss(self, batch)

    def _labels(self, batch: Rows) -> Tensor:
        given = 1 if batch.given is None else batch.given
        return next_tokens(batch.tokens["input_ids"], batch.tokens["attention_mask"], given=given)


def _leave_out(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """The LLM's own tensors are stored nowhere; what LoRA added to it is."""
    for name in [name for name in state if _is_llms_own(name.removeprefix(prefix))]:
        del state[name]


def _dont_miss(network: nn.Module, incompatible: Any) -> None:
    missing = incompatible.missing_keys
    missing[:] = [name for name in missing if not _is_llms_own(name)]


def _is_llms_own(name: str) -> bool:
    return name.startswith("llm.") and MARK not in name


def _check(config: Blip2LlmConfig) -> None:
    text = config.qformer.text
    if config.qformer.speaks or bool(text.vocab_size) != config.qformer.instructed:
        raise ConfigError(
            "qformer: in this stage it says no words, and reads none but an instruction; set speaks false, and "
            "text.vocab_size 0 unless instructed is true"
        )
    if (text.cross_width or text.width) != config.image.width:
        raise ConfigError(
            f"qformer.text.cross_width is {text.cross_width or text.width}, but image states are "
            f"{config.image.width} wide"
        )
    if config.llm.weights not in WEIGHTS:
        raise ConfigError(f"llm.weights {config.llm.weights!r}: expected one of {', '.join(WEIGHTS)}")
    if not 0 <= config.label_smoothing < 1:
        raise ConfigError(f"label_smoothing {config.label_smoothing} must be at least 0 and below 1")
