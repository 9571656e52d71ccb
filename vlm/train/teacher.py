"""The teacher of momentum distillation and its queue, for every stage that has them (ALBEF §3.2-3.3, BLIP §3.2).

The teacher is the network's own moving average. It is no part of what the optimiser sees, runs without
gradient and in eval mode, and moves once per optimiser step.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from vlm.errors import ConfigError
from vlm.train.config import TeacherConfig


class EmaTeacher:
    """A copy of a network that follows it: ``teacher <- decay * teacher + (1 - decay) * student``."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.network = copy.deepcopy(network).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, student: nn.Module) -> None:
        """Move towards the student's weights (ALBEF §3.2; MoCo, arXiv 1911.05722 eq. 2)."""
        own, theirs = self._both(student)
        torch._foreach_lerp_(own, theirs, 1 - self.decay)

    @torch.no_grad()
    def distance(self, student: nn.Module) -> float:
        """Length of the difference of all weights over the length of the student's."""
        own, theirs = self._both(student)
        gap = torch._foreach_sub(theirs, own)
        return float(_length(list(gap)) / _length(theirs).clamp(min=1e-12))

    def _both(self, student: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
        pairs = zip(self.network.parameters(), student.parameters(), strict=True)
        # Frozen parts stay equal by themselves.
        moving = [(own, theirs.detach()) for own, theirs in pairs if theirs.requires_grad]
        return [own for own, _ in moving], [theirs for _, theirs in moving]


class FeatureQueue:
    """The teacher's features of the latest rows, oldest overwritten first; any batch size fits any length."""

    def __init__(self, length: int, width: int, kinds: int, device: torch.device | str = "cpu") -> None:
        """length: rows kept; 0 keeps none. width: of a feature. kinds: of id; see `positives`."""
        self.length = length
        self.image = torch.zeros(length, width, device=device)
        self.text = torch.zeros(length, width, device=device)
        self.ids = torch.full((length, kinds), -1, dtype=torch.int64, device=device)
        self.pointer = torch.zeros(1, dtype=torch.int64)
        """Where the next row goes."""
        self.filled = torch.zeros(1, dtype=torch.int64)
        """Rows that hold something."""

    def __len__(self) -> int:
        return int(self.filled)

    @torch.no_grad()
    def push(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Take in rows: features (B, D) and ids (B, K). Of more rows than the queue is long, the last stay."""
        rows = min(len(ids), self.length)
        if rows == 0:
            return
        skipped = len(ids) - rows
        place = (int(self.pointer) + skipped + torch.arange(rows, device=self.ids.device)) % self.length
        for own, new in ((self.image, image), (self.text, text), (self.ids, ids)):
            own[place] = new[skipped:].to(own.dtype)
        self.pointer.copy_((self.pointer + len(ids)) % self.length)
        self.filled.copy_((self.filled + rows).clamp(max=self.length))

    def rows(self) -> dict[str, Tensor]:
        """What is held: ``image`` and ``text`` (n, D), ``ids`` (n, K); the order says nothing."""
        count = len(self)
        return {"image": self.image[:count], "text": self.text[:count], "ids": self.ids[:count]}

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, for a checkpoint to save, or to fill in place."""
        return {name: getattr(self, name) for name in ("image", "text", "ids", "pointer", "filled")}


class Teaching:
    """Teacher, queue, and how much of the targets is the teacher's at a step."""

    def __init__(
        self,
        network: nn.Module,
        config: TeacherConfig,
        *,
        width: int,
        steps_per_epoch: int,
        kinds: int = 2,
        device: torch.device | str = "cpu",
    ) -> None:
        """width: of the stage's features, or 0 where it has none (then there is no queue). kinds: of id."""
        self.config = config
        self.teacher = EmaTeacher(network, config.decay)
        self.queue = FeatureQueue(config.queue if width else 0, max(1, width), kinds, device)
        self.ramp = config.ramp * steps_per_epoch

    def alpha(self, step: int) -> float:
        """Share of the teacher's softmax at the step with number `step` (from 0): a ramp, then constant."""
        return self.config.alpha * min(1.0, step / self.ramp if self.ramp > 0 else 1.0)

    def start_from(self, teacher: Mapping[str, Tensor], image: Tensor, text: Tensor, pointer: int) -> None:
        """Go on with a published checkpoint's teacher and queue (Q, D), whose ids are unknown.

        Raises ConfigError when the queue has another length.
        """
        if len(image) != self.queue.length:
            raise ConfigError(
                f"the checkpoint's queue holds {len(image)} rows, train.teacher.queue is {self.queue.length}; "
                "make them equal"
            )
        # Each rank holds the whole checkpoint; FSDP2 keeps its own share of it.
        set_model_state_dict(self.teacher.network, dict(teacher), options=StateDictOptions(full_state_dict=True))
        # Every row is its own: unknown ids must not make rows positives of each other.
        unknown = -2 - torch.arange(self.queue.ids.numel()).view_as(self.queue.ids)
        for own, new in ((self.queue.image, image), (self.queue.text, text), (self.queue.ids, unknown)):
            own.copy_(new)
        self.queue.pointer.fill_(pointer)
        self.queue.filled.fill_(len(image))


def _length(tensors: list[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(tensors)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
