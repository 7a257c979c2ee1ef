"""The page on a job: that it is complete and stands alone, and that nothing from outside is taken for markup."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from services.customization.checks import Finding
from services.customization.report import (
    ExamplePicture,
    JobReport,
    ReportCheckpoint,
    ReportProbe,
    report_page,
)
from services.customization.suggestion import Measured, suggestion

VOID = {"meta", "img"}


def png(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def figures(recognised: float, look_alike: float, kept: float) -> dict[str, float]:
    return {"recognised": recognised, "look_alike": look_alike, "kept": kept}


JOB = JobReport(
    job_id="job-1",
    state="succeeded",
    name="Otto",
    phrase="a black penguin with orange earmuffs",
    pack="toon",
    method="epicevo",
    steps=200,
    step_count=200,
    attempt=2,
    create_time=datetime(2026, 11, 22, 8, 0, tzinfo=UTC),
    elapsed_s=754.0,
    error="The loss was no number.",
    example=[ExamplePicture(image=png("red"), caption="Otto waved.")],
    findings=[Finding(code="FRAME_BLURRED", severity="warning", message="Frame 1 is blurred.", mend="Sharpen it.")],
    losses={"total": [(step, 1.0 / step) for step in range(1, 201)], "mine": [(1, 0.25), (2, 0.125)]},
    probes=[
        ReportProbe(step=step, name=name, description=f"{name} waves.", image=png(colour))
        for step, colour in ((0, "white"), (100, "grey"), (200, "black"))
        for name in ("alone", "with:Pip", "old:Pip")
    ],
    checkpoints=[
        ReportCheckpoint(step=100, weights_sha256="a" * 64, size_bytes=3 << 20, figures=figures(0.9, 0.0, 0.93)),
        ReportCheckpoint(step=200, weights_sha256="b" * 64, size_bytes=3 << 20, figures=figures(0.91, 0.0, 0.8)),
    ],
    baseline=figures(0.2, 0.3, 0.95),
    recipe={"method": {"name": "epicevo", "rank": 16}, "steps": 200, "shares": [0.5, 0.5]},
)


class Reader(HTMLParser):
    """Reads a page as a browser would: tags that fit together, texts, attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_a_page_tells_all_of_a_job() -> None:
    text = Reader(report_page(JOB)).text
    for told in (
        "Otto",
        "a black penguin with orange earmuffs",
        "succeeded",
        "The loss was no number.",
        "12 min 34 s",
        "2026-11-22 08:00 UTC",
        "Publish step 100",
        "Later ones forget more: 15% at step 200.",
        "Otto alone",
        "Otto with Pip",
        "Pip alone",
        "with:Pip waves.",
        "before step 100 step 200",
        "what is minimised",
        "FRAME_BLURRED",
        "Sharpen it.",
        "Otto waved.",
        "method.rank",
        "[0.5, 0.5]",
        "3.0 MiB",
    ):
        assert told in text, told


def test_a_page_stands_alone() -> None:
    page = report_page(JOB)
    read = Reader(page)
    for tag, attributes in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "base", "form")
        assert not any(name.startswith("on") for name in attributes)
        assert "href" not in attributes
        assert str(attributes.get("src", "data:image/")).startswith("data:image/")
    assert "url(" not in page
    assert "http://" not in page
    assert "https://" not in page
    policy = next(attributes for tag, attributes in read.tags if "http-equiv" in attributes)
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_every_picture_is_in_its_place() -> None:
    images = [attributes for tag, attributes in Reader(report_page(JOB)).tags if tag == "img"]
    assert len(images) == 9 + 1
    for attributes in images:
        assert base64.b64decode(str(attributes["src"]).partition(",")[2]).startswith(b"\x89PNG")
    row = [str(one["src"]) for one in images if str(one["alt"]).startswith("alone at")]
    assert row == [
        f"data:image/png;base64,{base64.b64encode(png(colour)).decode()}" for colour in ("white", "grey", "black")
    ]


def _hostile(value: Any, text: str) -> Any:
    """The same with every text of it replaced."""
    if isinstance(value, str):
        return text
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _hostile(getattr(value, one.name), text) for one in fields(value)})
    if isinstance(value, dict):
        # Figures and parts of the loss have a number's place in the page; their names come from a run.
        return {f"{text}{number}": _hostile(each, text) for number, each in enumerate(value.values())}
    if isinstance(value, tuple | list):
        return type(value)(_hostile(each, text) for each in value)
    return value


@pytest.mark.parametrize(
    "text", ["</style></title><script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "&lt;b&gt;<b>"]
)
def test_nothing_from_outside_is_markup(text: str) -> None:
    wanted = [tag for tag, _ in Reader(report_page(_hostile(JOB, "plain"))).tags]
    read = Reader(report_page(_hostile(JOB, text)))
    assert [tag for tag, _ in read.tags] == wanted
    assert text in " ".join(read.texts)
    assert not any("onerror" in attributes or attributes.get("src") == "x" for _, attributes in read.tags)


def test_what_is_no_picture_is_not_shown_as_one() -> None:
    job = replace(JOB, probes=[replace(JOB.probes[0], image=b"<svg onload=alert(1)>")], example=())
    assert not [1 for tag, _ in Reader(report_page(job)).tags if tag == "img"]


def test_a_curve_shows_every_part_and_leaves_out_what_is_no_number() -> None:
    broken = [(1, 1.0), (2, float("nan")), (3, float("inf")), (4, 0.5)]
    page = report_page(replace(JOB, losses={"total": broken, "adversarial": [(5, 0.25)], "mse": []}))
    assert page.count("<figcaption><b>") == 2
    assert "nan" not in page
    assert "inf" not in re.sub(r"[a-z]{4,}", "", page)
    assert "step 4" in Reader(page).text


def test_a_long_curve_stays_small() -> None:
    long = {"total": [(step, float(step)) for step in range(100_000)]}
    assert len(report_page(replace(JOB, losses=long, probes=(), example=()))) < 40_000


def test_a_job_that_has_learned_nothing_says_so() -> None:
    bare = JobReport(
        job_id="j", state="failed", name="Otto", phrase="a penguin", pack="toon", method="lora", steps=0, step_count=9
    )
    text = Reader(report_page(bare)).text
    assert "Nothing to publish yet" in text
    assert "0 of 9" in text


def measured(*rows: tuple[int, float, float, float]) -> Sequence[Measured]:
    return [Measured(step=step, figures=figures(*values)) for step, *values in rows]


@pytest.mark.parametrize(
    ("checkpoints", "step", "why"),
    [
        (measured((100, 0.5, 0.1, 0.9), (200, 0.9, 0.0, 0.88)), 200, "lost 2%"),
        (measured((200, 0.9, 0.0, 0.7)), 200, "lost 20% of theirs. It is the last one."),
        (measured((100, 0.8, 0.0, 0.9), (200, 0.95, 0.0, 0.7)), 100, "forget more: 20%"),
        (measured((100, 0.9, 0.0, 0.9), (200, 0.91, 0.0, 0.9)), 100, "no better"),
        (measured((100, 0.8, 0.0, 0.9), (200, 0.9, 0.5, 0.9)), 100, "taken for somebody"),
        ([Measured(step=50), Measured(step=100)], 100, "nothing was measured"),
    ],
)
def test_the_suggestion_weighs_what_is_learned_against_what_is_forgotten(
    checkpoints: Sequence[Measured], step: int, why: str
) -> None:
    for given in (checkpoints, list(reversed(checkpoints))):
        chosen = suggestion(given, figures(0.2, 0.4, 0.9))
        assert chosen is not None
        assert chosen.step == step
        assert why in chosen.why


def test_there_is_no_suggestion_before_anything_was_learned() -> None:
    assert suggestion([], figures(0.2, 0.4, 0.9)) is None


def test_what_was_forgotten_before_anything_was_measured_nobody_claims_to_know() -> None:
    """Jobs of an earlier release, whose first probes were not kept."""
    one = suggestion(measured((200, 0.9, 0.0, 0.7)), {})
    assert one is not None
    assert "not measured" in one.why
    assert "nothing" not in one.why
    both = suggestion(measured((100, 0.5, 0.0, 0.8), (200, 0.9, 0.0, 0.7)), {})
    assert both is not None
    assert "has lost 10% of theirs since step 100" in both.why
