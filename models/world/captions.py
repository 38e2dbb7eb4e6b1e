"""Captions of scenes: their wordings, and what each says."""

import re
from dataclasses import replace
from random import Random

from models.world.scenes import BACKGROUNDS, COLOURS, RADII, SHAPES, Object, Scene

_WORDING = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPENINGS = ("", "", "a picture of ", "there is ", "an image with ")
WORDS = tuple(
    sorted(
        {
            *SHAPES,
            *COLOURS,
            *BACKGROUNDS,
            *RADII,
            *" ".join(w for ws in _WORDING.values() for w in ws).split(),
            *" ".join(_OPENINGS).split(),
            *"a an and the is which on background ,".split(),
        }
    )
)


def caption(scene: Scene, rng: Random) -> str:
    """Return one of the wordings of a scene, at most 30 words and commas long; `parse` reads it back."""
    names = [_name(o) for o in scene.objects]
    chained = all(scene.relations)
    opening = rng.choice(_OPENINGS)
    again = len(names) == 3 and chained and rng.random() < 0.4
    if len(names) == 1:
        body = names[0]
    elif not chained:
        body = ", ".join(names[:-1]) + " and " + names[-1]
    else:
        words = [rng.choice(_WORDING[r]) for r in scene.relations if r]
        body = f"{names[0]} {words[0]} {names[1]}"
        if not opening and rng.random() < 0.3:
            body = f"{names[0]} is {words[0]} {names[1]}"
        if len(names) == 3:
            middle = scene.objects[1]
            opening = "" if again else opening  # both together would pass the text encoder's length
            body = body.replace(" is ", " ")
            body += f", and the {middle.colour} {middle.shape} is" if again else ", which is"
            body += f" {words[1]} {names[2]}"
    if scene.background is None:
        return opening + body
    if not opening and not again and rng.random() < 0.3:
        return f"on a {scene.background} background, {body}"
    return f"{opening}{body} on a {scene.background} background"


def _name(o: Object) -> str:
    words = " ".join(w for w in (o.size, o.colour, o.shape) if w)
    return ("an " if words[0] in "aeiou" else "a ") + words


_OBJECT = re.compile(rf"\b(a|an|the) (?:({'|'.join(RADII)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_RELATION = re.compile(r"\b(left of|right of|above|over|below|under)\b")


def parse(text: str) -> Scene:
    """Return the scene that a caption describes.

    Raises:
        ValueError: the text names no object, or is outside the grammar of `caption`.
    """
    unknown = set(re.findall(r"[a-z]+|[^a-z\s]", text)) - set(WORDS)
    if unknown:
        raise ValueError(f"got the words {sorted(unknown)} in {text!r}, expected words of models.world.captions.WORDS")
    objects = tuple(Object(m[4], m[3], m[2]) for m in _OBJECT.finditer(text) if m[1] != "the")
    meaning = {wording: name for name, wordings in _WORDING.items() for wording in wordings}
    relations: tuple[str | None, ...] = tuple(meaning[m[1]] for m in _RELATION.finditer(text))
    background = re.search(rf"\b({'|'.join(BACKGROUNDS)}) background", text)
    return Scene(objects, relations or (None,) * (len(objects) - 1), background[1] if background else None, text)


def describe(scene: Scene, rng: Random) -> Scene:
    """Leave some of a scene open and put the rest into words."""
    told = scene.reversed() if rng.random() < 0.5 else scene
    objects = tuple(replace(o, size=o.size if rng.random() < 0.7 else None) for o in told.objects)
    relations = told.relations if rng.random() < 0.9 else (None,) * len(told.relations)
    background = told.background if rng.random() < 0.65 else None
    told = Scene(objects, relations, background)
    return replace(told, caption=caption(told, rng))


def training_caption(scene: Scene, rng: Random, open_share: float = 1.0) -> str:
    """Return a wording of a seen scene that training may meet, or "" in the rare case that chance offers none.

    open_share: how many captions may leave something open, as `describe` does; the others tell the whole scene.
    """
    for _ in range(8):
        if rng.random() < open_share:
            told = describe(scene, rng)
        else:
            told = scene.reversed() if rng.random() < 0.5 else scene
            told = replace(told, caption=caption(told, rng))
        if not told.held_out:
            return told.caption
    return ""
