"""The pack library: what is visible is whole and checked, whatever happened on the way."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from services.models import library as library_module
from services.models.errors import (
    PackBusy,
    PackDiskFull,
    PackError,
    PackFileDamaged,
    PackFileMissing,
    PackFileUnsafe,
    PackInUse,
    PackManifestInvalid,
    PackNameTaken,
    PackNotFound,
    PackSourceInvalid,
    PackSourceUnreadable,
    PackUnsupported,
)
from services.models.library import ADDING, Library, plan_sealed
from services.models.pack import MANIFEST, Pack, PackSettings, Sampling, load_pack, write_pack
from services.models.schedule import ScheduleConfig
from services.models.source import FolderSource, SourceFile
from services.models.vae import LatentScaling

BLOCK = 1000
KNOWN = ("storygen",)


def make_pack(folder: Path, *, name: str = "mine", seed: int = 0, architecture: str = "storygen") -> Pack:
    """A sealed pack whose weights are no network's: the library never looks into them."""
    torch.manual_seed(seed)
    for network, count in (("unet", 3000), ("vae", 500)):
        (folder / network).mkdir(parents=True)
        save_file({"w": torch.randn(count)}, folder / network / "diffusion_pytorch_model.safetensors")
        (folder / network / "config.json").write_text(json.dumps({"network": network}))
    settings = PackSettings(
        name=name,
        architecture=architecture,
        base="nothing",
        licence="MIT",
        made_by="a test",
        width_px=64,
        height_px=64,
        max_references=3,
        reference_range="unit",
        latents=LatentScaling(shift=(0.0,) * 4, scale=(1.0,) * 4),
        schedule=ScheduleConfig(),
        sampling=Sampling(sampler="ddim", default_steps=4, default_text_guidance=2.0, default_image_guidance=1.5),
    )
    return write_pack(folder, settings, created=datetime(2026, 1, 1, tzinfo=UTC))


class Counting(FolderSource):
    """A folder that gives small pieces, counts them, and may break off or call somebody in the middle of a file."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.read: list[tuple[str, int]] = []  # (path, from)
        self.bytes_read = 0
        self.at: int | None = None
        self.then: Callable[[], None] = lambda: None

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        self.read.append((path, start))
        for block in super().blocks(path, start):
            for begin in range(0, len(block), BLOCK):
                piece = block[begin : begin + BLOCK]
                if self.at is not None and path != MANIFEST and self.bytes_read + len(piece) > self.at:
                    self.then()
                self.bytes_read += len(piece) if path != MANIFEST else 0
                yield piece


def broken_off() -> None:
    raise PackSourceUnreadable("the line went dead")


def killed() -> None:
    os._exit(9)


@pytest.fixture
def published(tmp_path: Path) -> Pack:
    return make_pack(tmp_path / "elsewhere" / "mine")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "packs", (tmp_path / "shipped", tmp_path / "packs"))


def add(library: Library, source: FolderSource) -> Pack:
    return library.add(plan_sealed(source, source.files(), KNOWN), source).pack


def visible(library: Library) -> list[str]:
    return (
        [path.name for path in library.folder.iterdir() if not path.name.startswith(".")]
        if (library.folder.exists())
        else []
    )


def in_a_child(work: Callable[[], object]) -> int:
    """Runs `work` in a process of its own, which nothing cleans up after; its exit status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except PackDiskFull:
            os._exit(28)
        except BaseException:  # the child must not go on with the tests
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_an_added_pack_is_the_one_that_was_published(library: Library, published: Pack) -> None:
    shown: list[tuple[str, int, int]] = []
    source = FolderSource(published.folder)
    plan = plan_sealed(source, source.files(), KNOWN)
    added = library.add(plan, source, lambda *step: shown.append(step))
    assert added.pack.digest == published.digest == load_pack(library.folder / "mine").digest
    assert not added.was_there
    assert [path.name for path in library.folder.iterdir()] == ["mine"]
    assert not list((library.folder / "mine").rglob(".*"))
    assert shown[-1][1:] == (plan.size_bytes, plan.size_bytes)
    assert [done for _, done, _ in shown] == sorted(done for _, done, _ in shown)


def test_adding_the_same_pack_again_copies_nothing(library: Library, published: Pack) -> None:
    add(library, FolderSource(published.folder))
    source = Counting(published.folder)
    added = library.add(plan_sealed(source, source.files(), KNOWN), source)
    assert added.was_there
    assert [path for path, _ in source.read] == [MANIFEST]


@pytest.mark.parametrize("at", [0, 500, 2500, 9000, 13500])
def test_a_killed_add_goes_on_where_it_was(library: Library, published: Pack, at: int) -> None:
    source = Counting(published.folder)
    total = sum(entry.size_bytes for entry in published.manifest.files.values())
    assert at < total
    source.at, source.then = at, killed
    assert in_a_child(lambda: add(library, source)) == 9
    assert visible(library) == []
    assert [each.unfinished for each in library.packs()] == [True]
    again = Counting(published.folder)
    assert add(library, again).digest == published.digest
    # What a killed process had not handed to the system is lost; nothing else is read twice.
    assert again.bytes_read <= total - at + 8192 + 2 * BLOCK
    assert [path.name for path in library.folder.iterdir()] == ["mine"]


def test_a_file_goes_on_in_its_middle(library: Library, published: Pack) -> None:
    source = Counting(published.folder)
    source.at, source.then = 6500, broken_off
    with pytest.raises(PackSourceUnreadable):
        add(library, source)
    assert visible(library) == []
    parts = [path.name for path in library.folder.rglob("*.part")]
    assert parts == [".diffusion_pytorch_model.safetensors.part"], "half a file has another name"
    again = Counting(published.folder)
    add(library, again)
    starts = {path: start for path, start in again.read if path != MANIFEST}
    assert starts["unet/diffusion_pytorch_model.safetensors"] >= 5000
    assert "unet/config.json" not in starts, "it was complete"
    assert again.bytes_read + source.bytes_read == sum(e.size_bytes for e in published.manifest.files.values())


def test_a_half_file_of_another_version_is_not_gone_on_with(library: Library, published: Pack, tmp_path: Path) -> None:
    source = Counting(published.folder)
    source.at, source.then = 6500, broken_off
    with pytest.raises(PackSourceUnreadable):
        add(library, source)
    other = make_pack(tmp_path / "newer" / "mine", seed=1)
    again = Counting(other.folder)
    assert add(library, again).digest == other.digest != published.digest


def test_a_half_file_that_rotted_is_copied_afresh(library: Library, published: Pack) -> None:
    source = Counting(published.folder)
    source.at, source.then = 6500, broken_off
    with pytest.raises(PackSourceUnreadable):
        add(library, source)
    (part,) = library.folder.rglob("*.part")
    data = bytearray(part.read_bytes())
    data[100] ^= 1
    part.write_bytes(data)
    again = Counting(published.folder)
    assert add(library, again).digest == published.digest
    assert [start for path, start in again.read if path.startswith("unet/diff")][-1] == 0


def test_a_complete_file_that_rotted_is_copied_afresh(library: Library, published: Pack) -> None:
    source = Counting(published.folder)
    source.at, source.then = 13_500, broken_off
    with pytest.raises(PackSourceUnreadable):
        add(library, source)
    (whole,) = library.folder.rglob("unet/*.safetensors")
    data = bytearray(whole.read_bytes())
    data[-1] ^= 1
    whole.write_bytes(data)
    assert add(library, FolderSource(published.folder)).digest == published.digest


def test_a_source_that_gives_other_bytes_is_refused_and_nothing_is_visible(library: Library, published: Pack) -> None:
    weights = published.folder / "unet/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PackFileDamaged, match="SHA-256"):
        add(library, FolderSource(published.folder))
    assert visible(library) == []


class Endless(FolderSource):
    """Says one size and gives more."""

    def blocks(self, path: str, start: int) -> Iterator[bytes]:
        yield from super().blocks(path, start)
        if path != MANIFEST:
            for number in range(1_000_000):
                assert number < 10, "nobody stops it"
                yield bytes(1 << 16)


def test_a_file_that_never_ends_is_left(library: Library, published: Pack) -> None:
    with pytest.raises(PackFileDamaged):
        add(library, Endless(published.folder))
    assert visible(library) == []


def test_a_disk_without_room_is_named_before_anything_is_copied(
    library: Library, published: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(library_module.shutil, "disk_usage", lambda _: usage)
    source = Counting(published.folder)
    with pytest.raises(PackDiskFull, match="1000 are free"):
        add(library, source)
    assert source.bytes_read == 0
    assert visible(library) == []


def test_a_disk_that_fills_up_leaves_nothing_visible_and_adding_goes_on_later(
    library: Library, published: Pack
) -> None:
    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))  # no file may grow beyond it
        add(library, FolderSource(published.folder))

    assert in_a_child(on_a_full_disk) == 28
    assert visible(library) == []
    assert add(library, FolderSource(published.folder)).digest == published.digest


def test_two_cannot_add_the_same_pack_at_once(library: Library, published: Pack) -> None:
    source = Counting(published.folder)

    def another() -> None:
        source.at = None
        with pytest.raises(PackBusy):
            add(library, FolderSource(published.folder))
        with pytest.raises(PackBusy):
            library.remove("mine")

    source.at, source.then = 3000, another
    assert add(library, source).digest == published.digest


def test_a_name_that_is_taken_is_not_taken_twice(library: Library, published: Pack, tmp_path: Path) -> None:
    add(library, FolderSource(published.folder))
    other = make_pack(tmp_path / "other" / "mine", seed=1)
    with pytest.raises(PackNameTaken, match="remove mine"):
        add(library, FolderSource(other.folder))
    assert load_pack(library.folder / "mine").digest == published.digest
    shipped = make_pack(tmp_path / "shipped" / "toon", name="toon")
    mine = make_pack(tmp_path / "toon", name="toon", seed=2)
    with pytest.raises(PackNameTaken, match="found first"):
        add(library, FolderSource(mine.folder))
    assert load_pack(tmp_path / "shipped" / "toon").digest == shipped.digest


def unsafe(folder: Path) -> None:
    """A pickle that the manifest vouches for."""
    (folder / "unet/weights.bin").write_bytes(b"x")
    document = json.loads((folder / MANIFEST).read_text())
    document["files"]["unet/weights.bin"] = {"sha256": "0" * 64, "size_bytes": 1}
    (folder / MANIFEST).write_text(json.dumps(document))


REFUSED: list[tuple[str, Callable[[Path], object], type[PackError]]] = [
    ("manifest is not JSON", lambda f: (f / MANIFEST).write_text("{"), PackManifestInvalid),
    ("manifest is huge", lambda f: (f / MANIFEST).write_text(" " * (5 << 20)), PackManifestInvalid),
    ("file missing", lambda f: (f / "vae/config.json").unlink(), PackFileMissing),
    ("file of another size", lambda f: (f / "vae/config.json").write_text("{}"), PackFileDamaged),
    ("pickle in the manifest", unsafe, PackFileUnsafe),
]


@pytest.mark.parametrize(("spoil", "error"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_what_cannot_become_a_pack_is_refused_before_copying(
    library: Library, published: Pack, spoil: Callable[[Path], object], error: type[PackError]
) -> None:
    spoil(published.folder)
    source = Counting(published.folder)
    with pytest.raises(error):
        add(library, source)
    assert not library.folder.exists()


def test_an_architecture_that_nobody_draws_with_is_refused_before_copying(library: Library, tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "crayon", name="crayon", architecture="crayon")
    with pytest.raises(PackUnsupported, match="'crayon'; it knows storygen"):
        add(library, FolderSource(pack.folder))
    assert not library.folder.exists()


def test_a_source_that_is_no_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(PackSourceInvalid, match="is no folder"):
        FolderSource(tmp_path / "absent")


def test_the_list_tells_what_is_found_hidden_damaged_and_unfinished(
    library: Library, published: Pack, tmp_path: Path
) -> None:
    add(library, FolderSource(published.folder))
    make_pack(tmp_path / "shipped" / "mine")
    make_pack(tmp_path / "packs" / "sick", name="sick")
    (tmp_path / "packs" / "sick" / MANIFEST).write_text("{")
    (tmp_path / "packs" / f"{ADDING}half-0123abcd").mkdir()
    (tmp_path / "packs" / "notes").mkdir()  # no pack at all
    listed = {(each.name, each.folder.parent.name): each for each in library.packs()}
    assert set(listed) == {("mine", "shipped"), ("mine", "packs"), ("sick", "packs"), ("half", "packs")}
    mine = listed["mine", "packs"]
    assert mine.hidden_by == tmp_path / "shipped" / "mine"
    assert (mine.architecture, mine.licence, mine.digest) == ("storygen", "MIT", published.digest)
    assert mine.size_bytes == sum(entry.size_bytes for entry in published.manifest.files.values())
    assert listed["sick", "packs"].reason == "PACK_MANIFEST_INVALID"
    assert listed["half", "packs"].unfinished
    assert library.names() == ["mine", "sick"]


def test_a_pack_is_removed_whole_or_not_at_all(library: Library, published: Pack, tmp_path: Path) -> None:
    add(library, FolderSource(published.folder))
    with pytest.raises(PackInUse, match="FABULA_FRAME_PACKS"):
        library.remove("mine", wanted=["mine"])
    assert load_pack(library.folder / "mine").digest == published.digest
    assert library.remove("mine", wanted=["mine"], force=True) > 10_000
    assert list(library.folder.iterdir()) == []
    with pytest.raises(PackNotFound):
        library.remove("mine")
    make_pack(tmp_path / "shipped" / "toon", name="toon")
    with pytest.raises(PackNotFound, match="only packs in"):
        library.remove("toon", force=True)
    with pytest.raises(PackNotFound):
        library.remove("../elsewhere/mine", force=True)


def test_a_damaged_pack_and_an_unfinished_one_can_be_removed(library: Library, published: Pack) -> None:
    source = Counting(published.folder)
    source.at, source.then = 6500, broken_off
    with pytest.raises(PackSourceUnreadable):
        add(library, source)
    assert library.remove("mine") > 5000
    assert list(library.folder.iterdir()) == []
    add(library, FolderSource(published.folder))
    (library.folder / "mine" / MANIFEST).write_text("{")
    library.remove("mine")
    assert list(library.folder.iterdir()) == []


def test_a_removal_that_was_killed_is_finished_later(
    library: Library, published: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(library, FolderSource(published.folder))
    with monkeypatch.context() as patched:
        patched.setattr(library_module.shutil, "rmtree", lambda *_, **__: killed())
        assert in_a_child(lambda: library.remove("mine")) == 9
    assert visible(library) == []
    assert len(list(library.folder.iterdir())) == 1
    other = make_pack(tmp_path / "other", name="other")
    add(library, FolderSource(other.folder))
    assert [path.name for path in library.folder.iterdir()] == ["other"]


class Listing(FolderSource):
    """A folder that also says where its files cannot be trusted."""

    def files(self) -> Mapping[str, SourceFile]:
        return {**super().files(), "../outside.json": SourceFile(size_bytes=1, version="1")}


def test_a_source_cannot_put_files_outside_of_the_pack(library: Library, published: Pack) -> None:
    document = json.loads((published.folder / MANIFEST).read_text())
    document["files"]["../outside.json"] = {"sha256": "0" * 64, "size_bytes": 1}
    (published.folder / MANIFEST).write_text(json.dumps(document))
    with pytest.raises(PackManifestInvalid, match="plain path"):
        add(library, Listing(published.folder))
