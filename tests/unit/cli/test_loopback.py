"""A server that would listen everywhere listens here."""

from __future__ import annotations

import pytest

from services.runtime.loopback import on_loopback


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        ("[::]:8472", "127.0.0.1:8472"),
        ("0.0.0.0:0", "127.0.0.1:0"),
        ("127.0.0.1:5", "127.0.0.1:5"),
        ("192.0.2.7:8472", "192.0.2.7:8472"),
        ("unix:/tmp/s", "unix:/tmp/s"),
    ],
)
def test_only_everywhere_becomes_loopback(asked: str, given: str) -> None:
    assert on_loopback(asked) == given
