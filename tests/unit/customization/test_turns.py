"""Who may move files now: many who put or one alone, and nobody is kept waiting for ever."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.customization.turns import Turn, Turns

ROUNDS = 200  # of waiting for what is not to come


async def passed(task: asyncio.Task[Turn], rounds: int = 20) -> bool:
    """Whether somebody who waits for a turn gets it before they have asked for it often."""
    done, _ = await asyncio.wait((task,), timeout=rounds * 0.02)
    return bool(done)


async def test_those_who_put_share_and_one_who_removes_is_alone(tmp_path: Path) -> None:
    ours, theirs = Turns(tmp_path), Turns(tmp_path)
    first, second = await ours.sharing(), await theirs.sharing()
    assert ours.alone_now() is None
    alone = asyncio.create_task(ours.alone())
    assert not await passed(alone)
    first.end()
    assert not await passed(alone)
    second.end()
    second.end()
    turn = await alone
    assert theirs.alone_now() is None
    waiting = asyncio.create_task(theirs.sharing())
    assert not await passed(waiting)
    turn.end()
    with await waiting:
        assert ours.alone_now() is None
    only = ours.alone_now()
    assert only is not None
    only.end()


async def stream(turns: Turns, until: asyncio.Task[Turn]) -> int:
    """Those who put come one after the other, the next before the one before is done. Says how many there were."""
    before = await turns.sharing()
    for number in range(ROUNDS):
        coming = asyncio.create_task(turns.sharing())
        await asyncio.wait((coming,), timeout=0.03)
        before.end()
        await asyncio.sleep(0.03)
        if until.done():
            (await until).end()
            (await coming).end()
            return number
        before = await coming
    before.end()
    return ROUNDS


async def test_ever_more_who_put_do_not_keep_one_from_being_alone(tmp_path: Path) -> None:
    turns = Turns(tmp_path, patience_s=0.0)
    alone = asyncio.create_task(Turns(tmp_path, patience_s=0.0).alone())
    try:
        assert await stream(turns, alone) < ROUNDS
    finally:
        alone.cancel()


async def test_one_who_has_not_waited_long_lets_others_put(tmp_path: Path) -> None:
    ours, theirs = Turns(tmp_path, patience_s=3600.0), Turns(tmp_path)
    with await theirs.sharing():
        alone = asyncio.create_task(ours.alone())
        assert not await passed(alone)
        with await theirs.sharing():
            assert not alone.done()
    (await alone).end()


async def test_one_who_waits_no_more_leaves_the_gate_open(tmp_path: Path) -> None:
    ours, theirs = Turns(tmp_path, patience_s=0.0), Turns(tmp_path)
    with await theirs.sharing():
        alone = asyncio.create_task(ours.alone())
        assert not await passed(alone)
        shut_out = asyncio.create_task(theirs.sharing())
        assert not await passed(shut_out), "the gate is shut"
        alone.cancel()
        (await shut_out).end()
