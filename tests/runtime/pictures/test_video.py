"""Videos as files: what is written can be read, with its rate, its names and its request."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from engines import EngineError
from runtime.pictures import video
from tests.tools.drawn import SIZE, picture

MOVING = [Image.fromarray(np.roll(np.asarray(picture(*SIZE)), 6 * n, axis=1)) for n in range(6)]


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mov", "clip.gif", "clip"])
def test_what_is_written_can_be_read(tmp_path, name):
    path = tmp_path / name
    video.write(MOVING, path, 12.5, {"request": {"prompt": "a cat"}})
    clip = video.read(path, "frames")
    assert len(clip.frames) == 6 and clip.rate == (pytest.approx(12.5) if path.suffix else video.RATE)
    noise = {"": 0.0, ".gif": 12.0}.get(path.suffix, 6.0)  # nothing is lost, 256 colours, or coded
    assert np.abs(np.asarray(MOVING[0], float) - np.asarray(MOVING[1], float)).mean() > 2 * noise, "or frames may swap"
    for got, given in zip(clip.frames, MOVING, strict=True):
        assert np.abs(np.asarray(got, float) - np.asarray(given, float)).mean() <= noise
    assert video.metadata(path) == {"request": {"prompt": "a cat"}} and video.is_video(path)
    few = video.read(path, "frames", every=2, limit=2)
    assert len(few.frames) == 2 and few.rate == pytest.approx(clip.rate / 2)
    assert np.array_equal(few.frames[1], clip.frames[2])
    with pytest.raises(FileExistsError, match="pass --force"):
        video.write(MOVING, path, 5)
    video.write(MOVING[:2], path, 5, force=True, names=["first", "00000"] if name == "clip" else [])
    assert len(video.read(path, "frames").frames) == 2
    assert not [f for f in tmp_path.iterdir() if f.name != name], "something is left beside it"


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "clip.gif"
    video.write(MOVING, path, 10)
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        video.write([MOVING[0], "no picture"], path, 10, force=True)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_folder_is_read_in_the_order_of_its_numbers(tmp_path):
    for n in (1, 2, 10):
        MOVING[n % 6].save(tmp_path / f"frame-{n}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    clip = video.read(tmp_path, "frames")
    assert clip.names == ("frame-1", "frame-2", "frame-10")
    with pytest.raises(EngineError, match=r"holds no latentrt\.json: this program did not write it"):
        video.write(MOVING, tmp_path, 8, force=True)
    assert len(video.read(np.stack([np.asarray(f) for f in MOVING]), "frames").frames) == 6


def test_what_holds_no_request_says_so(tmp_path):
    MOVING[0].save(tmp_path / "clip.gif", save_all=True, append_images=MOVING[1:])
    with pytest.raises(ValueError, match="a video without a request in it"):
        video.metadata(tmp_path / "clip.gif")
    with pytest.raises(ValueError, match=r"ending '\.webm', expected \.mp4"):
        video.write(MOVING, tmp_path / "clip.webm", 8)
