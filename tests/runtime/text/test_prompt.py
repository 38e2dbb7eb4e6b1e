"""Weighted prompts: what they say, how they are cut into chunks, what weights do."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from runtime import Request
from runtime.text.prompt import LESS, MORE, emphasize, fill, parse


@pytest.mark.parametrize(("prompt", "expected"), [
    ("", [[]]),
    ("a cat", [[("a cat", 1)]]),
    ("a (cat)", [[("a ", 1), ("cat", MORE)]]),
    ("a ((cat))", [[("a ", 1), ("cat", MORE * MORE)]]),
    ("a [cat] b", [[("a ", 1), ("cat", LESS), (" b", 1)]]),
    ("(a:1.3)", [[("a", 1.3)]]),
    ("(a :1.3)(b: .5 )(c:+2)", [[("a ", 1.3), ("b", 0.5), ("c", 2)]]),
    ("(a:0)(b:-1)", [[("a", 0), ("b", -1)]]),
    ("(a (b:2) c:3)", [[("a ", 3), ("b", 6), (" c", 3)]]),
    ("[a (b)]", [[("a ", LESS), ("b", MORE * LESS)]]),
    ("(a)(b)", [[("ab", MORE)]]),
    ("(a) b (c", [[("a", MORE), (" b ", 1), ("c", MORE)]]),
    ("a [b", [[("a ", 1), ("b", LESS)]]),
    ("a) b]", [[("a) b]", 1)]]),
    (r"a \(b\) \[c\] \\", [[("a (b) [c] \\", 1)]]),
    (r"(a\):1.5)", [[("a)", 1.5)]]),
    (r"a\b", [[(r"a\b", 1)]]),
    ("a:1.3", [[("a:1.3", 1)]]),
    ("a:1.3)", [[("a:1.3)", 1)]]),
    ("(a:b)", [[("a:b", MORE)]]),
    ("at 12:30 (sharp:1.2)", [[("at 12:30 ", 1), ("sharp", 1.2)]]),
    ("a BREAK b", [[("a", 1)], [("b", 1)]]),
    ("BREAK a BREAK", [[], [("a", 1)], []]),
    ("BREAKFAST", [[("BREAKFAST", 1)]]),
    ("(a BREAK b:2) c", [[("a", 2)], [("b", 2), (" c", 1)]]),
    ("(a)BREAK(b)", [[("a", MORE)], [("b", MORE)]]),
])
def test_what_a_weighted_prompt_says(prompt, expected):
    got = [[(run.text, pytest.approx(run.weight)) for run in section] for section in parse(prompt)]
    assert got == expected


@pytest.mark.parametrize("prompt", ["[cat:dog:0.5]", "a [cat:10]", "[cat|dog]", "[(cat:1.2):dog:.3]", "cat AND dog"])
def test_what_only_the_web_ui_has_is_refused(prompt):
    with pytest.raises(ValueError, match=r"prompt: got '.*expected words.* not supported"):
        Request(prompt, prompt_style="weighted")
    with pytest.raises(ValueError, match="not supported"):
        Request("a cat", negative_prompt=prompt, prompt_style="weighted")
    assert Request(prompt).prompt == prompt  # text, in the plain style


def units(text: str) -> list[tuple[tuple[int, ...], float]]:
    """Letters as tokens; capitals in a row are one unit."""
    found: list[tuple[int, ...]] = []
    for before, letter in pairwise(f" {text}"):
        if letter.isupper() and before.isupper():
            found[-1] += (ord(letter),)
        else:
            found.append((ord(letter),))
    return [(ids, 1.0) for ids in found]


@pytest.mark.parametrize(("text", "room", "expected"), [
    ("", 4, [""]),
    ("abcd", 4, ["abcd"]),
    ("abcde", 4, ["abcd", "e"]),
    ("ab,cde", 4, ["ab,", "cde"]),  # what follows a comma that is near moves on
    ("abc,de", 4, ["abc,", "de"]),
    ("abcd,e", 4, ["abcd", ",e"]),  # a comma itself does not fit any more
    ("a,b,cd", 4, ["a,b,", "cd"]),
    ("a," + 25 * "b", 24, ["a," + 22 * "b", "bbb"]),  # too far back
    ("a," + 21 * "b", 22, ["a," + 20 * "b", "b"]),
    ("a," + 20 * "b", 21, ["a,", 20 * "b"]),
    ("abcXY", 4, ["abc", "XY"]),  # vectors of one embedding stay together
    ("abXY", 4, ["abXY"]),
])
def test_chunks(text, room, expected):
    got = fill(units(text), room, ord(","))
    assert ["".join(chr(i) for i, _ in chunk) for chunk in got] == expected


def test_weights_keep_the_mean():
    states = np.random.default_rng(0).standard_normal((7, 5)).astype(np.float32) + 0.5
    weights = np.array([1, 1.5, 1.5, 0.2, 1, 1, 1], np.float32)
    got = emphasize(states, weights)
    assert got.mean() == pytest.approx(states.mean(), rel=1e-5)
    ratio = got / states
    np.testing.assert_allclose(ratio / ratio[0], np.repeat(weights[:, None], 5, 1), rtol=1e-5)
    centred = states - states.mean()
    np.testing.assert_array_equal(emphasize(centred, weights), centred * weights[:, None])  # there is none to keep
    assert (emphasize(states, np.zeros(7, np.float32)) == 0).all()
