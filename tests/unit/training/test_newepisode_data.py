"""NewEpisode's data: the published layouts are read, generic mentions decided by a person, and nothing leaks."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.customize_errors import FramesSeen
from training.newepisode import flintstones, pororo
from training.newepisode.foreign import read_array, read_pickle, text_of
from training.newepisode.records import Clip, Corpus, DataInvalid, Window
from training.newepisode.registry import SHIPPED, NewCharacter, Registry, found_by_name
from training.newepisode.relabelling import accepted, decisions, proposals, write_proposals
from training.newepisode.split import ALL, STRICT, Protocol, build_split, check_leaks

ALIEN = NewCharacter(
    id="alien", names=("Zorp",), mentions=("alien", "green man"), phrase="a small green alien", noun="alien"
)
ROCKY = NewCharacter(id="rocky", names=("Rocky",), phrase="a lizard-like creature", noun="creature")
REGISTRY = Registry((ALIEN, ROCKY))


def flintstones_folder(folder: Path, count: int = 12) -> Path:
    """A folder in the layout, in which clip 3 names the alien, clip 4 mentions him, and clips 8 to 11 name Rocky."""
    told = {n: f"Fred walks in the yard, clip {n}." for n in range(count)}
    told[3] = "Zorp lands in the yard."
    told[4] = "The alien talks to Fred."
    told |= {n: f"Rocky roars at Fred, clip {n}." for n in range(8, count)}
    entries = [
        {"globalID": f"s_01_e_01_shot_{n:06d}", "description": told[n], "characters": [{"entityLabel": " Fred "}]}
        for n in range(count)
    ]
    ids = [entry["globalID"] for entry in entries]
    (folder / flintstones.ANNOTATIONS).write_text(json.dumps(entries), encoding="utf-8")
    following = {ids[n]: ids[n + 1 : n + 5] for n in range(count - 4)}
    (folder / flintstones.FOLLOWING).write_bytes(pickle.dumps(following))
    split = {"train": ids[:8], "val": ids[8:10], "test": ids[10:]}
    (folder / flintstones.SPLIT).write_text(json.dumps(split), encoding="utf-8")
    (folder / flintstones.FRAMES).mkdir()
    for n, one in enumerate(ids):
        frames = np.stack([np.full((128, 128, 3), 10 * n + frame, np.uint8) for frame in range(4)])
        np.save(folder / flintstones.FRAMES / f"{one}.npy", frames)
    return folder


def pororo_folder(folder: Path, count: int = 10) -> Path:
    """The same for PororoSV: paths as bytes in object arrays, captions by path in a pickled dictionary."""
    paths = [f"Pororo_ENGLISH1_1_ep1/{n}.png" for n in range(count)]
    (folder / "Pororo_ENGLISH1_1_ep1").mkdir()
    for n, path in enumerate(paths):
        strip = np.concatenate([np.full((32, 32, 3), 10 * n + part, np.uint8) for part in range(3)])
        Image.fromarray(strip).save(folder / path)
    stories = count - 4
    np.save(folder / pororo.FIRST, np.array([path.encode() for path in paths[:stories]]))
    np.save(folder / pororo.FOLLOWING, np.array([[p.encode() for p in paths[n + 1 : n + 5]] for n in range(stories)]))
    rows = np.empty(3, dtype=object)
    rows[:] = [np.arange(3), np.arange(3, 5), np.arange(5, stories)]
    np.save(folder / pororo.ROWS, rows, allow_pickle=True)
    does = ["Crong runs" if n < 7 else "Tutu drives" for n in range(count)]
    told = {path.removesuffix(".png"): [f"{does[n]}, {n}."] for n, path in enumerate(paths)}
    np.save(folder / pororo.DESCRIPTIONS, np.array(told, dtype=object), allow_pickle=True)
    return folder


class Harmful:
    """What a pickle may hold: something that is called when it is read."""

    def __reduce__(self) -> Any:
        return (print, ("it ran",))


# --- what is read of the published folders


def test_flintstones_folder_is_read(tmp_path: Path) -> None:
    corpus = flintstones.read_flintstones(flintstones_folder(tmp_path))
    assert len(corpus.clips) == 12
    assert [window.split for window in corpus.windows] == ["train"] * 8
    first = corpus.windows[0]
    assert first.clips[0] == first.id == "s_01_e_01_shot_000000"
    assert corpus.clips[first.id].known == {"fred"}
    assert corpus.unread == ()


def test_a_flintstones_frame_is_the_third_or_drawn_by_a_seed(tmp_path: Path) -> None:
    folder, clip = flintstones_folder(tmp_path), "s_01_e_01_shot_000002"
    assert flintstones.frame_of(folder, clip)[0, 0, 0] == 22
    drawn = [flintstones.frame_of(folder, clip, random.Random(5))[0, 0, 0] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert {int(flintstones.frame_of(folder, clip, random.Random(n))[0, 0, 0]) for n in range(30)} == {20, 21, 22, 23}


def test_a_clip_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataInvalid, match="no id of a clip"):
        flintstones.frame_of(flintstones_folder(tmp_path), "../../secret")
    with pytest.raises(DataInvalid, match="leads out"):
        pororo.frame_of(tmp_path, "../secret")


def test_a_window_without_all_clips_is_left_out_and_told(tmp_path: Path) -> None:
    folder = flintstones_folder(tmp_path)
    following = {"s_01_e_01_shot_000000": ["s_01_e_01_shot_000001"], "s_01_e_01_shot_000001": ["x", "y", "z", "w"]}
    (folder / flintstones.FOLLOWING).write_bytes(pickle.dumps(following))
    corpus = flintstones.read_flintstones(folder)
    assert corpus.windows == ()
    assert corpus.unread == ("s_01_e_01_shot_000000", "s_01_e_01_shot_000001")


def test_pororo_folder_is_read(tmp_path: Path) -> None:
    corpus = pororo.read_pororo(pororo_folder(tmp_path))
    assert [window.split for window in corpus.windows] == ["train"] * 3 + ["validation"] * 2 + ["test"]
    assert corpus.windows[0].clips == tuple(f"Pororo_ENGLISH1_1_ep1/{n}" for n in range(5))
    assert corpus.clips["Pororo_ENGLISH1_1_ep1/7"].caption == "Tutu drives, 7."


def test_a_pororo_frame_is_a_square_of_its_strip(tmp_path: Path) -> None:
    folder = pororo_folder(tmp_path)
    frame = pororo.frame_of(folder, "Pororo_ENGLISH1_1_ep1/4")
    assert frame.shape == (32, 32, 3)
    assert int(frame[0, 0, 0]) == 40
    Image.new("RGB", (32, 50)).save(folder / "odd.png")
    with pytest.raises(DataInvalid, match="no strip of squares"):
        pororo.frame_of(folder, "odd")


@pytest.mark.parametrize("name", [flintstones.ANNOTATIONS, flintstones.SPLIT, flintstones.FOLLOWING])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = flintstones_folder(tmp_path)
    (folder / name).unlink()
    with pytest.raises(DataInvalid, match=name.replace(".", r"\.")):
        flintstones.read_flintstones(folder)


def test_a_pickle_that_calls_something_is_refused_and_calls_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "harm.pkl").write_bytes(pickle.dumps({"a": Harmful()}))
    with pytest.raises(DataInvalid, match=r"asks for builtins\.print"):
        read_pickle(tmp_path / "harm.pkl")
    held = np.empty(1, dtype=object)
    held[0] = Harmful()
    np.save(tmp_path / "harm.npy", held, allow_pickle=True)
    with pytest.raises(DataInvalid, match=r"asks for builtins\.print"):
        read_array(tmp_path / "harm.npy")
    assert capsys.readouterr().out == ""


def test_arrays_are_read_as_numpy_reads_them(tmp_path: Path) -> None:
    for number, array in enumerate(
        (np.arange(12).reshape(3, 4), np.asfortranarray(np.eye(3)), np.array([b"a", b"bc"]))
    ):
        np.save(tmp_path / f"{number}.npy", array)
        assert np.array_equal(read_array(tmp_path / f"{number}.npy"), array)
    whole = (tmp_path / "0.npy").read_bytes()
    (tmp_path / "cut.npy").write_bytes(whole[:-8])
    with pytest.raises(DataInvalid, match="shorter"):
        read_array(tmp_path / "cut.npy")
    (tmp_path / "none.npy").write_bytes(b"nothing of the kind")
    with pytest.raises(DataInvalid, match="no array file"):
        read_array(tmp_path / "none.npy")


def test_a_text_is_read_however_it_was_kept() -> None:
    assert {text_of(one) for one in (b"ep/1.png", np.bytes_(b"ep/1.png"), "b'ep/1.png'", "ep/1.png")} == {"ep/1.png"}


# --- who is new, by rule


def test_names_are_found_as_words_and_mentions_decide_nothing() -> None:
    assert ALIEN.is_named_in("ZORP lands.")
    assert not ALIEN.is_named_in("Zorpia lands.")
    assert ALIEN.is_perhaps_in("The alien lands.")
    assert not ALIEN.is_perhaps_in("Zorp the alien lands.")  # a name is there, so nothing is left to decide
    assert not ALIEN.is_perhaps_in("Aliens land.")


def test_who_has_no_name_is_labelled_by_a_mention() -> None:
    nameless = replace(ALIEN, names=())
    assert nameless.is_meant_by("Green alien")
    assert not nameless.is_meant_by("aliens")
    assert not ALIEN.is_meant_by("alien"), "whose name would stand there"
    assert ALIEN.is_meant_by("zorp")


@pytest.mark.parametrize("label", ["Slaghoople", " MRS. Slaghoople "])
def test_whom_the_data_set_itself_says_is_there_is_there_whatever_the_caption_calls_them(
    tmp_path: Path, label: str
) -> None:
    folder = flintstones_folder(tmp_path)
    entries = json.loads((folder / flintstones.ANNOTATIONS).read_text(encoding="utf-8"))
    for number in (0, 1, 5, 6, 7):  # she is named in some of them, and labelled in all
        entries[number]["description"] = "A lady speaks to Fred." if number < 6 else "Slaghoople speaks to Fred."
        entries[number]["characters"].append({"entityLabel": label})
    (folder / flintstones.ANNOTATIONS).write_text(json.dumps(entries), encoding="utf-8")
    registry = Registry.read(SHIPPED / "flintstones.json")
    corpus = found_by_name(flintstones.read_flintstones(folder), registry)
    shown = {clip.id[-2:] for clip in corpus.clips.values() if clip.new == {"slaghoople"}}
    assert shown == {"00", "01", "05", "06", "07"}
    assert all(clip.known == {"fred"} for clip in corpus.clips.values())  # she is nobody else beside herself
    split = build_split(corpus, frozenset({"slaghoople"}), Protocol())
    assert not any(split.pretraining.values())
    assert split.lessons["slaghoople"].id[-2:] == "03"  # clips 3 to 7: three of five, as in two windows after it
    leaking = replace(split, pretraining={"train": corpus.windows[:1]})
    with pytest.raises(FramesSeen, match="shows slaghoople"):
        check_leaks(leaking, frozenset({"slaghoople"}))


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("Zorp waves at Fred.", "a small green alien waves at Fred."),
        ("The alien waves.", "A small green alien waves."),
        ("Fred sees an alien, and the alien waves.", "Fred sees a small green alien, and the alien waves."),
        ("Fred waves.", "Fred waves."),
    ],
)
def test_a_caption_is_told_by_the_phrase(caption: str, told: str) -> None:
    assert ALIEN.told_by_phrase(caption) == told


def test_the_shipped_registries_are_whole_and_name_whom_the_paper_names() -> None:
    found = {path.stem: Registry.read(path).ids for path in SHIPPED.glob("*.json")}
    assert found == {"flintstones": {"slaghoople", "rockzilla", "alien"}, "pororo": {"tutu", "pipi", "popo"}}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"characters": []},
        {"characters": {}},
        {"characters": [{"id": "a", "phrase": "b"}]},
        {"characters": [{"id": "A!", "names": ["a"], "phrase": "b", "noun": "c"}]},
        {"characters": [{"id": "a", "phrase": "b", "noun": "c"}]},
        {"characters": [{"id": "a", "names": "x", "phrase": "b", "noun": "c"}]},
        {"characters": [{"id": "a", "names": ["x"], "phrase": "b", "noun": "c", "extra": 1}]},
        {"characters": [{"id": i, "names": ["x"], "phrase": f"b{i}", "noun": "c"} for i in "ab"]},
    ],
)
def test_a_registry_that_is_none_is_refused(tmp_path: Path, document: Any) -> None:
    path = tmp_path / "registry.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataInvalid):
        Registry.read(path)


# --- mentions are decided by a person


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return found_by_name(flintstones.read_flintstones(flintstones_folder(tmp_path)), REGISTRY)


def decided(path: Path, proposal: str, value: Any, by: Any = "somebody") -> Path:
    path.write_text(json.dumps({"proposal": proposal, "accepted": value, "by": by}) + "\n", encoding="utf-8")
    return path


def test_nothing_changes_before_a_person_has_decided(corpus: Corpus, tmp_path: Path) -> None:
    (one,) = found = proposals(corpus, REGISTRY)
    assert (one.before, one.after) == ("The alien talks to Fred.", "A small green alien talks to Fred.")
    write_proposals(found, tmp_path / "proposals.jsonl")
    with pytest.raises(DataInvalid, match="accepted is neither"):
        decisions(tmp_path / "proposals.jsonl")  # as written, it decides nothing
    with pytest.raises(DataInvalid, match="1 proposals are not decided"):
        accepted(corpus, found, {})


@pytest.mark.parametrize("is_accepted", [True, False])
def test_a_decision_is_followed(corpus: Corpus, tmp_path: Path, is_accepted: bool) -> None:
    (one,) = found = proposals(corpus, REGISTRY)
    after = accepted(corpus, found, decisions(decided(tmp_path / "a.jsonl", one.digest, is_accepted)))
    clip = after.clips[one.clip]
    assert (clip.caption, clip.new) == ((one.after, {"alien"}) if is_accepted else (one.before, frozenset()))
    assert proposals(after, REGISTRY) == ([] if is_accepted else found)


@pytest.mark.parametrize(("value", "by"), [(None, "a"), (1, "a"), (True, ""), (True, None)])
def test_a_line_that_decides_nothing_is_refused(tmp_path: Path, value: Any, by: Any) -> None:
    with pytest.raises(DataInvalid):
        decisions(decided(tmp_path / "a.jsonl", "0" * 16, value, by))


def test_a_decision_about_other_words_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    (one,) = found = proposals(corpus, REGISTRY)
    told = replace(corpus.clips[one.clip], caption="The alien talks to Wilma.")
    changed = corpus.with_clips([told])
    with pytest.raises(DataInvalid, match="not decided"):
        accepted(changed, proposals(changed, REGISTRY), {one.digest: True})
    with pytest.raises(DataInvalid, match="no proposal of this corpus"):
        accepted(corpus, found, {one.digest: True, "f" * 16: True})


def test_a_model_that_sees_says_its_word_and_no_more(corpus: Corpus) -> None:
    asked: list[str] = []

    def ask(picture: Any, question: str) -> str:
        asked.append(f"{picture.shape} {question}")
        return "Yes, it does."

    (one,) = proposals(corpus, REGISTRY, see=lambda clip: np.zeros((8, 8, 3), np.uint8), ask=ask)
    assert one.said == "mention, seen"
    assert asked == ["(8, 8, 3) Does this picture show a small green alien? Answer yes or no."]
    (unsure,) = proposals(corpus, REGISTRY, see=lambda clip: np.zeros((8, 8, 3), np.uint8), ask=lambda *_: "Perhaps")
    assert unsure.said == "mention, unsure"


# --- the split


def chain(count: int, new_at: dict[int, str]) -> Corpus:
    """Clips in a row, every five of them a window."""
    ids = [f"c{n:03d}" for n in range(count)]
    clips = {one: Clip(id=one, caption="", new=frozenset(new_at.get(n, "").split())) for n, one in enumerate(ids)}
    windows = [Window(id=ids[n], clips=tuple(ids[n : n + 5]), split="train") for n in range(count - 4)]
    return Corpus("chain", clips, tuple(windows))


def test_pretraining_shows_nobody_new_whatever_the_published_split_says(tmp_path: Path) -> None:
    corpus = found_by_name(pororo.read_pororo(pororo_folder(tmp_path)), Registry.read(SHIPPED / "pororo.json"))
    split = build_split(corpus, frozenset({"tutu"}), Protocol())
    assert [window.id for window in split.pretraining["train"]] == [f"Pororo_ENGLISH1_1_ep1/{n}" for n in range(3)]
    assert split.pretraining["validation"] == split.pretraining["test"] == ()
    assert split.lessons["tutu"].id == "Pororo_ENGLISH1_1_ep1/5"
    assert [window.id for window in split.tests["tutu"]] == [f"Pororo_ENGLISH1_1_ep1/{n}" for n in (3, 4)]


def test_a_lesson_shows_the_character_throughout_with_the_fewest_others() -> None:
    corpus = chain(20, dict.fromkeys(range(3, 10), "a") | {5: "a b", 15: "b", 16: "b"})
    split = build_split(corpus, frozenset("a"), Protocol())
    assert split.lessons["a"].id == "c003"  # c003 to c005 all hold clip 5, where b is; the smallest id of equals
    sole = corpus.with_clips([replace(corpus.clips["c003"], known=frozenset({"fred"}))])
    assert build_split(sole, frozenset("a"), Protocol()).lessons["a"].id == "c004"


def test_strict_leaves_out_what_any_lesson_held() -> None:
    corpus = chain(20, dict.fromkeys(range(10), "a"))
    split = build_split(corpus, frozenset("a"), Protocol())
    assert split.lessons["a"].id == "c000"
    next_one = split.tests["a"][0]
    assert split.measured("a", next_one, ALL) == ("c001", "c002", "c003", "c004", "c005")
    assert split.measured("a", next_one, STRICT) == ("c005",)


def test_so_many_tests_are_drawn_and_the_same_every_time() -> None:
    corpus = chain(60, dict.fromkeys(range(50), "a"))
    first, again = (build_split(corpus, frozenset("a"), Protocol(tests_max=10)) for _ in range(2))
    assert len(first.tests["a"]) == 10
    assert first.to_dict() == again.to_dict()
    assert first.to_dict() != build_split(corpus, frozenset("a"), Protocol(tests_max=10, seed=1)).to_dict()


def test_somebody_with_nothing_to_test_on_is_refused() -> None:
    with pytest.raises(DataInvalid, match="0 stories of b"):
        build_split(chain(20, dict.fromkeys(range(10), "a")), frozenset("ab"), Protocol())


def test_a_leak_is_found_in_a_split_however_it_was_made() -> None:
    corpus = chain(20, dict.fromkeys(range(10), "a"))
    split = build_split(corpus, frozenset("a"), Protocol())
    leaking = replace(split, pretraining={"train": (corpus.windows[9],)})
    with pytest.raises(FramesSeen, match="c009, in window c009 of pretraining, shows a"):
        check_leaks(leaking, frozenset("a"))
    with pytest.raises(FramesSeen, match="is tested on"):
        check_leaks(replace(split, tests={"a": (split.lessons["a"],)}), frozenset("a"))


@pytest.mark.parametrize("clips", [("a", "b", "c", "d"), ("a", "b", "c", "d", "d")])
def test_a_window_is_of_five_different_clips(clips: tuple[str, ...]) -> None:
    with pytest.raises(DataInvalid):
        Window(id="w", clips=clips, split="train")


def test_a_corpus_has_every_clip_of_its_windows() -> None:
    window = Window(id="w", clips=("a", "b", "c", "d", "e"), split="train")
    with pytest.raises(DataInvalid, match="not there"):
        Corpus("x", {}, (window,))
