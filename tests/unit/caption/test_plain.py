"""Captioners in plain transformers: one token each in turn, alone or among others the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from services.caption.config import CaptionSettings
from services.caption.driver import Ask, DriverSettings
from services.caption.job import Finish
from services.caption.plain import PlainDriver, PlainEngine
from services.models.captions.captioner import BLIP, CAUSAL_LM
from services.models.captions.writers import State, load_writer
from services.models.errors import PackUnsupported
from services.runtime.errors import Internal
from tests import caption_checkpoints as checkpoints

ASK = Ask(ids=(1, 2), image=None, adapter=None, temperature=0.0, top_p=1.0, seed=1, max_tokens=4, stop_ids=(0,))


class Counting:
    """Says the number after the last one, or what it was told to say in the end."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def begin(self, ids: Sequence[int], picture: Image.Image | None) -> State:
        return State(new_ids=list(ids), seen_PD=None)

    def logits(self, state: State) -> Tensor:
        self.read.append(state.new_ids[-1])
        return torch.nn.functional.one_hot(torch.tensor((state.new_ids[-1] + 1) % 50), 50).float() * 9


def test_requests_take_turns_token_by_token() -> None:
    writer = Counting()
    engine = PlainEngine(writer)
    engine.add_request("long", replace(ASK, ids=(10,), max_tokens=5))
    engine.add_request("short", replace(ASK, ids=(20,), max_tokens=2))
    assert engine.step() == []
    ((number, reply),) = engine.step()
    assert (number, reply.ids, reply.finish, reply.prompt_tokens) == ("short", (21, 22), Finish.LENGTH, 1)
    assert writer.read == [10, 20, 11, 21]
    for _ in range(2):
        assert engine.step() == []
    assert engine.step()[0][1].ids == (11, 12, 13, 14, 15)
    assert engine.step() == []


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it() -> None:
    engine = PlainEngine(Counting())
    engine.add_request("a", replace(ASK, stop_ids=(5,), max_tokens=9))
    done = []
    while not done:
        done = engine.step()
    assert (done[0][1].ids, done[0][1].finish) == ((3, 4), Finish.STOP)


def test_who_gave_up_costs_no_more_tokens() -> None:
    writer = Counting()
    engine = PlainEngine(writer)
    engine.add_request("a", ASK)
    engine.step()
    engine.abort_request(["a", "nobody"])
    read = len(writer.read)
    assert engine.step() == []
    assert len(writer.read) == read


def test_forbidden_tokens_are_never_said() -> None:
    engine = PlainEngine(Counting())
    engine.add_request("a", replace(ASK, forbidden_ids=(3,), max_tokens=1))
    assert engine.step()[0][1].ids != (3,)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("blip")
    checkpoints.write_blip(folder)
    return folder


def settings(base: Path) -> DriverSettings:
    return DriverSettings(
        base=base,
        adapters={},
        adapter_rank_max=0,
        context_tokens=512,
        on_gpu=False,
        dtype="float32",
        threads=1,
        max_running=4,
        kv_cache_bytes=1 << 20,
        gpu_memory_ratio=0.5,
        stall_s=600.0,
    )


async def test_the_driver_answers_many_at_once_as_each_alone(blip: Path) -> None:
    driver = PlainDriver(settings(blip), BLIP)
    await driver.start()
    asks = [
        replace(
            ASK, ids=(5, 6), image=Image.new("RGB", (32, 32), (40 * n, 90, 0)), temperature=1.0, seed=n, max_tokens=6
        )
        for n in range(4)
    ]
    alone = [(await driver.generate(ask)).ids for ask in asks]
    together = [reply.ids for reply in await asyncio.gather(*map(driver.generate, asks))]
    assert together == alone
    assert len(set(alone)) > 1
    with pytest.raises(Internal):
        await driver.generate(replace(asks[0], adapter="story"))
    with pytest.raises(Internal):
        await driver.generate(replace(asks[0], image=None))
    assert (await driver.generate(asks[0])).ids == alone[0], "a bad request harms nobody"
    call = asyncio.create_task(driver.generate(replace(asks[0], max_tokens=400, stop_ids=())))
    while not driver.unfinished_count:  # noqa: ASYNC110 - the thread tells nobody
        await asyncio.sleep(0.001)
    call.cancel()
    while driver.unfinished_count:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    driver.check_health()
    await driver.stop()


async def test_a_folder_that_cannot_be_loaded_says_so(blip: Path) -> None:
    with pytest.raises(RuntimeError, match="the captioner cannot start"):
        await PlainDriver(settings(blip), CAUSAL_LM).start()
    with pytest.raises(PackUnsupported, match="not served by transformers alone"):
        load_writer("llava", blip, dtype=torch.float32, device="cpu")


def test_names_are_told_apart_by_commas() -> None:
    assert CaptionSettings.load(also_for=" storygen, sd15,,").other_names == ("storygen", "sd15")
    assert CaptionSettings.load().other_names == ()
