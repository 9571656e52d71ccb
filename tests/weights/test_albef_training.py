"""A training step from an official checkpoint: the losses that the paper writes, from a reference of other parts."""

import pytest
import torch
import torch.nn.functional as F

from tests.weights.albef_reference import POSITIONS, SIZES, reference
from vlm.data.batch import Batch
from vlm.data.tokenizers import wordpiece
from vlm.models.albef import Albef
from vlm.models.stage import Taught, joint_loss
from vlm.objectives.mlm import IGNORED
from vlm.train.config import TeacherConfig
from vlm.train.teacher import Teaching
from vlm.weights.official import read_official

TEXTS = ["a cat", "two dogs in a wood, late at night", "a red house", "the sea"]
ALPHA = 0.4


@pytest.fixture(scope="module")
def theirs():
    return reference(3)


@pytest.fixture(scope="module")
def teaching(theirs, tmp_path_factory):
    """Our student and its teaching, both from the official file."""
    path = tmp_path_factory.mktemp("albef") / "ALBEF.pth"
    torch.save({"model": theirs.checkpoint()}, path)
    found = read_official(path, training=True)
    student = Albef(found.config).eval()
    student.load_state_dict(found.network)
    config = TeacherConfig(queue=6, alpha=ALPHA, ramp=0.0)
    teaching = Teaching(student, config, width=found.config.embed_dim, steps_per_epoch=1)
    taught = found.training
    teaching.start_from(taught.teacher, taught.image_queue, taught.text_queue, taught.pointer)
    return student, teaching


def rows() -> Batch:
    pixels = torch.randn(4, 3, SIZES["image_size"], SIZES["image_size"], generator=torch.Generator().manual_seed(2))
    tokens = wordpiece(max_length=POSITIONS)(TEXTS)
    hidden = torch.zeros_like(tokens.input_ids, dtype=torch.bool)
    hidden[0, 2] = hidden[1, 3] = hidden[1, 5] = hidden[3, 1] = True
    ids = torch.arange(8).reshape(2, 4).T.contiguous()
    labels = tokens.input_ids.masked_fill(~hidden, IGNORED)
    return Batch(pixels, tokens, ids, tuple(TEXTS), masked_ids=tokens.input_ids.masked_fill(hidden, 103), labels=labels)


def expected_itc(theirs, some: Batch):
    """Eq. 1 and 6: student's rows against the teacher's batch and queue, one-hot and softmax mixed."""
    tokens = (some.tokens.input_ids, some.tokens.attention_mask)
    own, teacher = theirs.parts(some.pixels, *tokens), theirs.parts(some.pixels, *tokens, "_m")
    stored, loss = theirs.checkpoint(), torch.zeros(())
    for rows, columns in (("image", "text"), ("text", "image")):
        everything = torch.cat([teacher[columns].T, stored[f"{columns}_queue"]], dim=1)  # (D, B + Q)
        known = F.one_hot(torch.arange(4), everything.shape[1]).float()
        targets = ALPHA * (teacher[rows] @ everything / theirs.temp).softmax(dim=1) + (1 - ALPHA) * known
        loss = loss + 0.5 * F.cross_entropy(own[rows] @ everything / theirs.temp, targets)
    return loss


def expected_itm(theirs, some: Batch, partners):
    """Eq. 2: three pairs a row, the mean over all."""
    ids, mask, own = some.tokens.input_ids, some.tokens.attention_mask, torch.arange(4)
    pairs = [(own, own), (own, partners["text"]), (partners["image"], own)]
    logits = torch.cat([theirs.parts(some.pixels[i], ids[t], mask[t])["itm"] for i, t in pairs])
    return F.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 8))


def expected_mlm(theirs, some: Batch):
    """Eq. 3 and 7: the hidden tokens alone, label and teacher mixed."""
    given, place = (some.pixels, some.masked_ids, some.tokens.attention_mask), some.labels != IGNORED
    own, teacher = theirs.parts(*given)["mlm"][place], theirs.parts(*given, "_m")["mlm"][place]
    known = F.one_hot(some.labels[place], own.shape[1]).float()
    return F.cross_entropy(own, ALPHA * teacher.softmax(dim=1) + (1 - ALPHA) * known)


@torch.no_grad()
def test_the_losses_are_the_papers(theirs, teaching):
    student, teaching = teaching
    some, queue = rows(), teaching.queue.rows()
    features, states, inputs = teaching.teacher.network(some)
    columns = {name: torch.cat([features[name], queue[name]]) for name in ("image", "text")}
    alpha = teaching.alpha(5)
    taught = Taught({n: features[n] for n in columns}, columns, torch.cat([some.ids, queue["ids"]]), alpha)
    targets = teaching.teacher.network.teach(some, states, inputs)
    drawn = torch.rand(2, 4, 1, generator=torch.Generator().manual_seed(8))
    losses = joint_loss(student, some, draws=lambda kind, _: drawn[int(kind == "text")], taught=taught, targets=targets)
    own = student(some)
    ids = {"row_ids": some.ids, "ids": some.ids}
    partners = student.choose(
        some, own.features, own.features, **ids, draws=lambda kind, _: drawn[int(kind == "text")]
    ).partners
    assert alpha == ALPHA and all((partners[kind] != torch.arange(4)).all() for kind in ("image", "text"))
    wanted = {
        "itc": expected_itc(theirs, some),
        "itm": expected_itm(theirs, some, partners),
        "mlm": expected_mlm(theirs, some),
    }
    for name, value in wanted.items():
        torch.testing.assert_close(
            losses[name], value, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    torch.testing.assert_close(losses["loss"], sum(wanted.values()), rtol=0, atol=2e-4)


def test_the_next_rows_replace_the_oldest(theirs, teaching):
    """The pointer of the file says where: 4 of 6."""
    _, teaching = teaching
    before = teaching.queue.image.clone()
    new = F.normalize(torch.randn(3, before.shape[1], generator=torch.Generator().manual_seed(1)), dim=1)
    teaching.queue.push(new, new, torch.zeros(3, 2, dtype=torch.long))
    expected = before.clone()
    expected[[4, 5, 0]] = new
    assert torch.equal(teaching.queue.image, expected) and int(teaching.queue.pointer) == 1
