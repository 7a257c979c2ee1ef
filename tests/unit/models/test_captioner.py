"""Published captioners become packs, asked as their own libraries would ask them, or are refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.models.captions import captioner, prompts
from services.models.captions.captioner import read_captioner
from services.models.captions.published import RenamedSource, is_captioner, plan_captioner
from services.models.captions.wording import PublishedWording
from services.models.captions.writers import choose, load_writer
from services.models.errors import PackError, PackFileUnsafe, PackManifestInvalid, PackSourceInvalid, PackUnsupported
from services.models.library import Library, plan_sealed
from services.models.pack import Captioner, CaptionerManifest, SealedPack, load_any_pack, load_pack, read_manifest
from services.models.published import Told
from services.models.source import FolderSource, read_start
from tests import caption_checkpoints as checkpoints

MODEL = "model.safetensors"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    checkpoints.write_llava(folder / "llava-1.5-tiny-hf", adapters=True)
    checkpoints.write_llava(folder / "saved", names="saved")
    checkpoints.write_llava(folder / "parts", parts=3)
    checkpoints.write_blip(folder / "blip")
    checkpoints.write_mpt(folder / "mpt")
    return folder


@pytest.fixture
def llava(published: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(published / "llava-1.5-tiny-hf", tmp_path / "llava-1.5-tiny-hf"))


def added(checkpoint: Path, folder: Path, **told: Any) -> SealedPack:
    source = FolderSource(checkpoint)
    plan, served = plan_captioner(source, source.files(), Told(**{"licence": "MIT", **told}))
    return Library(folder, (folder,)).add(plan, served).pack


def asked(pack: SealedPack) -> Captioner:
    assert isinstance(pack.manifest, CaptionerManifest)
    return pack.manifest.captioner


def test_a_published_llava_becomes_a_pack_with_its_files_as_they_are(published: Path, tmp_path: Path) -> None:
    pack = added(published / "llava-1.5-tiny-hf", tmp_path / "packs", base="vicuna")
    manifest = pack.manifest
    assert (pack.name, manifest.architecture, manifest.base) == ("llava-1-5-tiny-hf", "llava", "vicuna")
    assert (manifest.licence, manifest.dtype) == ("MIT", "float32")
    how = asked(pack)
    assert (how.opening, how.closing) == ("USER: <image>\n", " ASSISTANT:")
    assert (how.image_token, how.stop_ids, how.context_tokens) == ("<image>", (2,), 512)
    assert how.adapters == {"story": "adapters/story", "descriptive": "adapters/descriptive"}
    same = (published / "llava-1.5-tiny-hf" / MODEL).read_bytes()
    assert pack.path(f"captioner/{MODEL}").read_bytes() == same
    assert load_any_pack(pack.folder).digest == pack.digest
    assert read_captioner(pack).image_tokens_count == 4


def test_a_captioner_that_is_a_pack_already_is_added_as_it_is(published: Path, tmp_path: Path) -> None:
    pack = added(published / "blip", tmp_path / "packs")
    source = FolderSource(pack.folder)
    plan = plan_sealed(source, source.files(), captioner.ARCHITECTURES)
    again = Library(tmp_path / "more", (tmp_path / "more",)).add(plan, source).pack
    assert again.digest == pack.digest


def test_a_captioner_is_listed_and_cannot_draw(published: Path, tmp_path: Path) -> None:
    pack = added(published / "mpt", tmp_path / "packs")
    library = Library(tmp_path / "packs", (tmp_path / "packs",))
    assert [(each.name, each.architecture, each.fault) for each in library.packs()] == [("mpt", "causal-lm", "")]
    for read in (read_manifest, load_pack):
        with pytest.raises(PackManifestInvalid, match="is a causal-lm: it writes and cannot draw"):
            read(pack.folder)


def test_names_of_transformers_5_become_those_that_vllm_looks_for(published: Path, tmp_path: Path) -> None:
    source = FolderSource(published / "saved")
    plan, served = plan_captioner(source, source.files(), Told(licence="MIT"))
    assert isinstance(served, RenamedSource)
    assert any("vLLM looks for" in note for note in plan.notes)
    pack = Library(tmp_path / "packs", (tmp_path / "packs",)).add(plan, served).pack
    before = load_file(published / "saved" / MODEL)
    after = load_file(pack.path(f"captioner/{MODEL}"))
    assert before.keys() != after.keys()
    towers = [name for name in after if "vision_tower." in name]
    assert towers
    assert all("vision_tower.vision_model." in name for name in towers)
    for name, value in after.items():
        assert torch.equal(value, before[name.replace("vision_tower.vision_model.", "vision_tower.")])


def test_a_renamed_file_can_be_read_from_any_byte_on(published: Path) -> None:
    source = FolderSource(published / "saved")
    _, served = plan_captioner(source, source.files(), Told(licence="MIT"))
    size = served.files()[MODEL].size_bytes
    whole = read_start(served, MODEL, size)
    assert len(whole) == size
    for start in (1, 8, 500, 20_000, size - 3):
        assert b"".join(served.blocks(MODEL, start)) == whole[start:]
    assert b"".join(served.blocks("config.json", 3)) == b"".join(source.blocks("config.json", 3))


def test_weights_in_parts_are_taken_with_their_index(published: Path, tmp_path: Path) -> None:
    pack = added(published / "parts", tmp_path / "packs")
    parts = [path for path in pack.manifest.files if path.endswith(".safetensors")]
    assert len(parts) > 2
    assert f"captioner/{MODEL}.index.json" in pack.manifest.files


def spoilt(file: str, **changes: Any) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        document.update(changes)
        (folder / file).write_text(json.dumps({key: value for key, value in document.items() if value != "gone"}))

    return spoil


def only_pickles(folder: Path) -> None:
    (folder / MODEL).rename(folder / "pytorch_model.bin")


def own_layout(folder: Path) -> None:
    """As LLaVA's own repository names its weights."""
    state = load_file(folder / MODEL)
    named = {name.replace("language_model.model.", "model."): value for name, value in state.items()}
    save_file(named, folder / MODEL)


def chat(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


REFUSED: list[tuple[str, Callable[[Path], object], type[PackError], str]] = [
    ("pickles", only_pickles, PackFileUnsafe, "fabula pack convert"),
    ("no safetensors", lambda f: (f / MODEL).write_bytes(b"\x80\x04" * 50), PackFileUnsafe, "not a safetensors"),
    ("its own layout", own_layout, PackUnsupported, "made for transformers"),
    ("another network", spoilt("config.json", architectures=["T5ForThings"]), PackUnsupported, "T5ForThings"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), PackSourceInvalid, "tokenizer.json"),
    ("no image token", spoilt("config.json", image_token_index=5), PackSourceInvalid, "no token for pictures"),
    ("blind chat", chat("{{ messages[0]['content'][1]['text'] }}"), PackUnsupported, "does not put '<image>' before"),
    ("deaf chat", chat("<image>"), PackUnsupported, "exactly once"),
    ("broken chat", chat("{% if %}"), PackUnsupported, "cannot be filled in"),
    ("chat that refuses", chat("{{ raise_exception('no pictures') }}"), PackUnsupported, "no pictures"),
    ("chat that digs", chat("{{ ''.__class__.__mro__[1].__subclasses__() }}"), PackUnsupported, "cannot be filled in"),
    (
        "an adapter of another kind",
        spoilt("adapters/story/adapter_config.json", use_dora=True),
        PackUnsupported,
        "no plain LoRA",
    ),
    (
        "an adapter without weights",
        lambda f: (f / "adapters/story/adapter_model.safetensors").unlink(),
        PackSourceInvalid,
        "has no adapters/story",
    ),
]


@pytest.mark.parametrize(("spoil", "error", "said"), [each[1:] for each in REFUSED], ids=[each[0] for each in REFUSED])
def test_what_cannot_write_is_refused_before_copying(
    llava: Path, spoil: Callable[[Path], object], error: type[PackError], said: str
) -> None:
    spoil(llava)
    source = FolderSource(llava)
    with pytest.raises(error, match=said) as raised:
        plan_captioner(source, source.files(), Told(licence="MIT"))
    assert type(raised.value) is error


@pytest.mark.parametrize("told", [{"steps": 4}, {"family": "sd15"}, {"reference_range": "unit"}, {"licence": ""}])
def test_what_is_told_must_make_sense_for_a_captioner(llava: Path, told: dict[str, Any]) -> None:
    source = FolderSource(llava)
    with pytest.raises(PackSourceInvalid):
        plan_captioner(source, source.files(), Told(**{"licence": "MIT", **told}))


def test_a_pipeline_is_no_captioner(llava: Path) -> None:
    assert is_captioner(FolderSource(llava).files())
    (llava / "model_index.json").write_text("{}")
    assert not is_captioner(FolderSource(llava).files())


def wording(**changes: Any) -> PublishedWording:
    how = Captioner(
        **{
            "opening": "USER: <image>\n",
            "closing": " ASSISTANT:",
            "image_token": "<image>",
            "image_px": 28,
            "context_tokens": 512,
            "stop_ids": (2,),
            **changes,
        }
    )
    return PublishedWording(checkpoints.llama_tokenizer(), how)


def test_a_question_is_cut_into_the_tokens_that_the_tokenizer_itself_makes_of_it() -> None:
    tokenizer = checkpoints.llama_tokenizer()
    story = (
        "USER: <image>\nStory so far: 'A.' Current frame story caption: 'The B.', "
        "What is the next frame story caption? ASSISTANT:"
    )
    assert list(wording().story_prompt(["A.", "The B."], 400).ids) == tokenizer.encode(story).ids
    description = (
        "USER: <image>\nCast: Pip, a cat. Previous frame story caption: 'A.', Current frame story caption: 'The B.', "
        "What is the description of this caption? ASSISTANT:"
    )
    assert (
        list(wording().description_prompt("A.", "The B.", 400, ["Pip, a cat"]).ids) == tokenizer.encode(description).ids
    )
    pieces = [*tokenizer.encode("USER: <image>\nStory").ids, *tokenizer.encode(" so far").ids]
    assert pieces != tokenizer.encode("USER: <image>\nStory so far").ids, "piece by piece would be other tokens"


@pytest.mark.parametrize("hostile", ["<image>", "<image><image>", "</s>", "<s>", "<im<image>age>", "<pad> <unk>"])
def test_special_tokens_in_a_caption_are_data(hostile: str) -> None:
    words = wording()
    image = checkpoints.llama_tokenizer().token_to_id("<image>")
    for ids in (
        words.story_prompt([hostile, hostile], 400).ids,
        words.description_prompt(hostile, hostile, 400, [hostile]).ids,
    ):
        assert ids.count(image) == 1
        assert ids.count(1) == 1, "one beginning"
        assert not {0, 2} & set(ids)


def test_a_template_that_brings_its_own_beginning_gets_no_second_one() -> None:
    assert wording(opening="<s>[INST] <image>\n").story_prompt(["A."], 400).ids.count(1) == 1


def test_a_long_story_keeps_its_first_and_its_newest_captions() -> None:
    words = wording()
    captions = [f"Day {number}." for number in range(60)]
    prompt = words.story_prompt(captions, 300)
    assert len(prompt.ids) <= 300
    kept = prompt.captions_kept
    assert kept[0] == 0
    assert kept[-1] == 59
    assert list(kept[1:]) == list(range(60 - len(kept) + 1, 60)), "the newest, without a gap"
    longer = words.story_prompt(captions, 400).captions_kept
    assert len(longer) > len(kept)
    assert words.story_prompt(captions, 10_000).captions_kept == tuple(range(60))
    with pytest.raises(ValueError, match="newest caption needs"):
        words.story_prompt(captions, 20)


def test_a_caption_is_read_up_to_a_limit_and_stays_inside_its_quotes() -> None:
    words = wording()
    said = words.decode(words.description_prompt("a\\" * 500, "'" * 500, 600).ids)
    assert said.count("Current frame story caption:") == 1
    inside = said.partition("Previous frame story caption: '")[2].partition("', Current frame")[0]
    assert inside.endswith("\\\\") or not inside.endswith("\\")
    assert len(words.encode(inside)) <= prompts.CAPTION_TOKENS_MAX


def test_a_pack_without_its_image_token_is_refused() -> None:
    with pytest.raises(ValueError, match="does not know the image token"):
        wording(image_token="<photo>", opening="<photo>")
    with pytest.raises(ValueError, match="exactly once"):
        wording(opening="nothing to see")


@pytest.mark.parametrize("kind", ["mpt", "blip"])
def test_a_writer_refuses_weights_that_are_not_all_there(published: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(published / kind, tmp_path / kind))
    state = load_file(folder / MODEL)
    gone = sorted(state)[3]
    save_file({name: value for name, value in state.items() if name != gone}, folder / MODEL, metadata={"format": "pt"})
    architecture = {"mpt": "causal-lm", "blip": "blip"}[kind]
    with pytest.raises(PackError, match="missing"):
        load_writer(architecture, folder, dtype=torch.float32, device="cpu")


def test_tokens_are_drawn_from_those_that_hold_the_mass() -> None:
    logits = torch.tensor([0.6, 0.25, 0.1, 0.05]).log()

    def drawn(top_p: float, temperature: float = 1.0, forbidden: tuple[int, ...] = ()) -> list[int]:
        generator = torch.Generator().manual_seed(0)
        return [
            choose(logits, temperature=temperature, top_p=top_p, generator=generator, forbidden=forbidden)
            for _ in range(2000)
        ]

    shares = [drawn(1.0).count(token) / 2000 for token in range(4)]
    assert shares == pytest.approx([0.6, 0.25, 0.1, 0.05], abs=0.04)
    assert set(drawn(0.61)) == {0, 1}
    assert set(drawn(0.0001)) == {0}
    assert set(drawn(1.0, forbidden=(0, 1))) == {2, 3}
    assert set(drawn(1.0, temperature=0.0, forbidden=(0,))) == {1}
    assert drawn(1.0, temperature=2.0).count(0) < drawn(1.0, temperature=0.5).count(0)
