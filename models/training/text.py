"""The text stage: a CLIPTextModel under throw-away heads that must read the scene off a caption."""

import logging

import numpy as np
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from models.training.fit import Worker, fit
from models.training.parts import TOKENS, build_text_encoder
from models.world import scenes
from models.world.captions import WORDS, describe
from models.world.layouts import sample_layout
from models.world.scenes import BACKGROUNDS, COLOURS, MAX_OBJECTS, RADII, RELATIONS, SHAPES, Layout, Scene

logger = logging.getLogger(__name__)


class Tokens:
    """A tokenizer that is a dictionary: captions to token ids, one for each of the scenes' words."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.ids = {w: tokenizer.convert_tokens_to_ids(w + "</w>") for w in WORDS}

    def __call__(self, captions: list[str]) -> Tensor:
        """Return token ids, int64 [n, 32]."""
        rows = np.full((len(captions), TOKENS), self.eos, np.int64)
        rows[:, 0] = self.bos
        for row, text in zip(rows, captions, strict=True):
            ids = [self.ids[w] for w in text.replace(",", " ,").split()]
            row[1 : len(ids) + 1] = ids
        return torch.from_numpy(rows)


class ReadingHeads(nn.Module):
    """A text encoder with heads that must name the scene: each object at its noun, all of it at the end token."""

    OBJECT = (len(SHAPES), len(COLOURS), len(RADII) + 1, len(RELATIONS) + 1)
    SLOT = tuple(n + 1 for n in OBJECT)  # one more: there is no such object

    def __init__(self, encoder: CLIPTextModel) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.hidden_size
        self.paint = PaintingHead(width)
        self.noun = nn.Linear(width, sum(self.OBJECT))
        self.end = nn.Linear(width, MAX_OBJECTS * sum(self.SLOT) + len(BACKGROUNDS) + 1)

    def forward(self, ids: Tensor, told: list[Scene], noun_ids: Tensor, layouts: list[Layout]) -> tuple[Tensor, Tensor]:
        """Return the mean losses of reading and of painting."""
        hidden = self.encoder(ids).last_hidden_state
        slots, backgrounds = scene_labels(told)
        end = (ids == ids[0, -1]).int().argmax(1).to(ids.device)
        losses = []
        for position in (end, torch.full_like(end, TOKENS - 1)):
            logits = self.end(hidden[torch.arange(len(ids)), position])
            parts = logits.split([*self.SLOT * MAX_OBJECTS, len(BACKGROUNDS) + 1], 1)
            labels = [*slots.flatten(1).T, backgrounds]
            losses += [nn.functional.cross_entropy(p, t.to(p.device)) for p, t in zip(parts, labels, strict=True)]
        # A noun said again ("and the red circle is ...") names an object already read: take the first ones.
        nouns = torch.isin(ids, noun_ids.to(ids.device))
        order = nouns.cumsum(1) * nouns
        repeated = torch.tensor(["and the" in s.caption for s in told], device=ids.device)
        for i in range(MAX_OBJECTS):
            nth = torch.where(repeated & (i == 2), 4, i + 1)
            row, column = (order == nth[:, None]).nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            parts = self.noun(hidden[row, column]).split(list(self.OBJECT), 1)
            labels = slots[row.cpu(), i].T.to(ids.device)
            losses += [nn.functional.cross_entropy(p, t) for p, t in zip(parts, labels, strict=True)]
        return torch.stack(losses).mean(), self.paint(hidden, cell_labels(layouts).to(ids.device))


def scene_labels(told: list[Scene]) -> tuple[Tensor, Tensor]:
    """Return class indices [n, object, (shape, colour, size, relation to the one before)], and of backgrounds [n].

    The last index of each means that there is none.
    """
    sizes, relations, grounds = (*RADII, None), (*RELATIONS, None), (*BACKGROUNDS, None)
    slots = torch.tensor([ReadingHeads.OBJECT] * MAX_OBJECTS).repeat(len(told), 1, 1)
    shapes, colours = list(SHAPES), list(COLOURS)
    for n, scene in enumerate(told):
        for i, (o, r) in enumerate(zip(scene.objects, (None, *scene.relations), strict=True)):
            labels = shapes.index(o.shape), colours.index(o.colour), sizes.index(o.size), relations.index(r)
            slots[n, i] = torch.tensor(labels)
    return slots, torch.tensor([grounds.index(s.background) for s in told])


class PaintingHead(nn.Module):
    """The head attends from the cells of an 8x8 picture to the text: what does each cell show?

    It asks of the text encoder what the UNet will ask of it, for a thousandth of the work: tokens that say of an object
    both what it is and where in the picture it belongs.
    """

    SIDE = 8
    NAMES = ((*COLOURS, *BACKGROUNDS), (*SHAPES, None), (*RADII, None))  # what a cell shows; None is background

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.cells = nn.Parameter(torch.randn(1, self.SIDE**2, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.out = nn.Linear(width, sum(map(len, self.NAMES)))

    def forward(self, hidden: Tensor, labels: Tensor) -> Tensor:
        x, _ = self.attention(self.cells.expand(len(hidden), -1, -1), hidden, hidden, need_weights=False)
        parts = self.out(x + self.feed_forward(x)).split([len(n) for n in self.NAMES], -1)
        losses = [nn.functional.cross_entropy(p.flatten(0, 1), t.flatten()) for p, t in zip(parts, labels, strict=True)]
        return torch.stack(losses).sum()


def cell_labels(layouts: list[Layout]) -> Tensor:
    """Return indices into PaintingHead.NAMES of what each cell shows, int64 [3, n, 64]."""
    colours, shapes, sizes = (list(names) for names in PaintingHead.NAMES)
    grid = (np.arange(PaintingHead.SIDE) + 0.5) * (scenes.IMAGE_SIZE / PaintingHead.SIDE)
    labels = np.empty((3, len(layouts), PaintingHead.SIDE, PaintingHead.SIDE), np.int64)
    for n, v in enumerate(layouts):
        empty = colours.index(str(v.scene.background)), shapes.index(None), sizes.index(None)
        labels[:, n] = np.array(empty)[:, None, None]
        for o, r, (x, y) in zip(v.scene.objects, v.radii, v.centres, strict=True):
            inside = np.hypot(grid[None, :] - x, grid[:, None] - y) < r
            shown = colours.index(o.colour), shapes.index(o.shape), sizes.index(o.size)
            labels[:, n, inside] = np.array(shown)[:, None]
    return torch.from_numpy(labels.reshape(3, len(layouts), -1))


def train_text(worker: Worker) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(worker.work / "tokenizer")
    tokens = Tokens(tokenizer)
    noun_ids = torch.tensor([tokens.ids[s] for s in SHAPES])
    heads = ReadingHeads(build_text_encoder(tokenizer)).to(worker.device)

    def sample(n: int, held_out: bool = False) -> tuple[list[Layout], list[Scene]]:
        layouts: list[Layout] = []
        told: list[Scene] = []
        while len(told) < n:
            layout = sample_layout(worker.rng)
            scene = describe(layout.scene, worker.rng)
            if scene.held_out == held_out:
                layouts.append(layout)
                told.append(scene)
        return layouts, told

    def loss(_: float) -> Tensor:
        layouts, told = sample(worker.args.text_batch)
        with worker.autocast():
            return sum(heads(tokens([s.caption for s in told]).to(worker.device), told, noun_ids, layouts))

    def report(ema: nn.Module) -> None:
        with torch.no_grad():
            for name, (layouts, told) in (("training", sample(256)), ("held-out", sample(256, held_out=True))):
                ids = tokens([s.caption for s in told]).to(worker.device)
                read, painted = ema(ids, told, noun_ids, layouts)
                logger.info("text: loss on %s captions: reading %.5f, painting %.4f", name, read, painted)

    ema = fit(
        worker,
        "text",
        heads,
        loss,
        lr=1e-3,
        minutes=worker.args.text_minutes,
        batch=worker.args.text_batch,
        ema_decay=0.9,
        report=report,
    )
    if worker.first:
        ema.encoder.save_pretrained(worker.work / "text_encoder")
