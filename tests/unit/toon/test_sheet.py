"""The programs: contact sheets and the demo's first frames."""

import json
import struct

import numpy as np
import pytest

from training.toon import first_frames, sheet
from training.toon.crayon import beach_day
from training.toon.splits import belongs
from training.toon.world import sample_story


def png_size(path):
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def test_a_sheet_is_drawn_where_it_is_asked_for(tmp_path, capsys):
    sheet.main(["props", "stories", "--out", str(tmp_path), "--size", "32"])
    width, height = png_size(tmp_path / "props.png")
    assert width > height > 90
    assert "lost_and_found" in (tmp_path / "stories.txt").read_text()
    assert str(tmp_path / "props.png") in capsys.readouterr().out


def test_an_unknown_sheet_is_refused_by_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sheet.main(["dragons", "--out", str(tmp_path)])
    assert "no sheet named dragons" in capsys.readouterr().err


def test_one_of_the_first_frames_is_not_from_the_world(tmp_path):
    first_frames.main(["--out", str(tmp_path)])
    entries = json.loads((tmp_path / "first_frames.json").read_text())
    assert len(entries) == 3 + first_frames.GIFTS_COUNT
    assert sum("not made by the toon renderer" in entry["source"] for entry in entries) == 1
    for entry in entries:
        assert set(entry) == {"name", "image", "caption", "source"}
        assert png_size(tmp_path / entry["image"]) == (256, 256)


def test_the_first_frames_shipped_are_the_ones_made_here(tmp_path):
    first_frames.main(["--out", str(tmp_path)])
    for made in tmp_path.iterdir():
        assert (first_frames.HOME / made.name).read_bytes() == made.read_bytes(), made.name


def test_a_gift_is_the_first_story_of_somebody_who_begins_no_other():
    gifts = first_frames.gifts()
    assert [name.removesuffix("_gift") for name in gifts] == ["mina", "bruno", "luna"]
    for name, seed in gifts.items():
        heroes = [sample_story(number, "test").hero.id for number in range(seed + 1)]
        assert heroes.index(name.removesuffix("_gift")) == seed


def test_stories_of_the_demo_are_held_out():
    for seed in (*first_frames.TEST_STORIES.values(), *first_frames.gifts().values()):
        story = sample_story(seed, "test")
        assert not belongs(tuple(frame.scene for frame in story.frames), "train")


def test_the_crayon_drawing_is_always_the_same():
    assert (beach_day() == beach_day()).all()
    assert beach_day(size_px=64).shape == (64, 64, 3)
    assert np.unique(beach_day().reshape(-1, 3), axis=0).shape[0] > 5000  # grain and hatching, no flat colours
