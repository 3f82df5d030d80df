"""`qnext bench report`: the page says what the store says, whatever names hold, on any screen."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import statistics
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qnext.pipeline.request import Request
from qnext.pipeline.sweep_values import Cell, RungSize, SweepSettings, cell_to_dict, settings_to_dict
from qnext.plan.values import Placement, Prediction, SpeedRange, Workload
from qnext.report.html_report import html_report, run_words
from qnext.store.sweeps import Measurement, StoredCell, StoredSweep, SweepStore
from tests.browser import Browser, contrasts
from tests.conftest import Qnext

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&{{ 7*7 }}"
VERDICT = {
    "ratio": 0.8712,
    "low": 0.8434,
    "high": 0.8991,
    "confidence": 0.9531,
    "p_value": 0.004,
    "pairs": 12,
}
PROMPT = 512


def cell(name: str, *roles: str, ubatch: int = 512, experts: int = 40, context: int = 8192) -> Cell:
    return Cell(
        name=name,
        placement=Placement(ubatch=ubatch, context=context, threads=2, threads_batch=2),
        knobs={"cpu experts": experts, "ubatch": ubatch, "kv": "f16"},
        demands={},
        order=0,
        predicted_s=(3.0, 4.5, 6.0),
        prediction=Prediction(SpeedRange(20.0, 30.0, 40.0), SpeedRange(300.0, 400.0, 500.0), "roofline"),
        roles=roles,  # type: ignore[arg-type]
    )


def settings() -> SweepSettings:
    request = Request(model="model", workload=Workload(1024, 512, 0))
    size = RungSize(PROMPT, 24, 0)
    return SweepSettings(request, "turn", 600.0, None, 10, size, size)


class Made:
    """A store with one sweep; `take` adds a measurement of a cell, in ms."""

    def __init__(self, path: Path, *cells: Cell, model: str = "a model") -> None:
        self.store = SweepStore(path)
        self.cells = cells
        self.number = 0
        self.id = self.store.create(
            model=model,
            model_digest="sha256:aa",
            machine="machine-digest",
            engine_build="build-digest",
            seed=0,
            settings=settings_to_dict(settings()),
            cells=[
                StoredCell(one.name, cell_to_dict(one), one.status or "waiting", one.because) for one in cells
            ],
        )

    def take(
        self, place: int, prefill_ms: float, *token_ms: float, status: str = "ok", because: str = ""
    ) -> None:
        good = status == "ok"
        prefill_ns, tokens = round(prefill_ms * 1e6), tuple(round(ms * 1e6) for ms in token_ms)
        turn = 1024 * prefill_ns / PROMPT + 512 * statistics.median(tokens) if good else None
        done = Measurement(
            self.number,
            place,
            "short",
            "2026-11-21T10:00:00+00:00",
            status=status,
            because=because,
            prompt=PROMPT if good else None,
            depth=0,
            prefill_ns=prefill_ns if good else None,
            token_ns=tokens if good else (),
            turn_ns=None if turn is None else round(turn),
            seconds=1.0,
            rss_bytes=3 << 30 if good else None,
        )
        self.store.end(self.id, done, status, because)
        self.number += 1

    def finish(self, result: Mapping[str, Any]) -> None:
        self.store.finish(self.id, "ok", result=result)

    @property
    def sweep(self) -> StoredSweep:
        return self.store.get(self.id)


def whole_sweep(path: Path) -> Made:
    """A finished sweep with a proven winner, two contexts, and cells of every kind of failure."""
    made = Made(
        path,
        cell("plan", "plan"),
        cell("llama.cpp fit", "fit", "defaults", experts=44),
        cell("ub 1024", ubatch=1024),
        cell("ub 2048, kv 8192", ubatch=2048, context=16384),
        cell("cpu experts 36", experts=36),
        cell("crashing", ubatch=64),
        cell(HOSTILE, experts=0),
        model=HOSTILE,
    )
    for shift in (0.0, 0.7, 0.2):
        made.take(0, 1310 + shift, 31 + shift, 32.5, 30.25, 36)
        made.take(1, 1500 - shift, 35 + shift, 36, 33.125)
        made.take(2, 1001.5 + shift, 30 + shift, 31, 29.5, 44)
    made.take(3, 900, 40, 41.5, 39)
    made.take(4, 1290, 29, 30, 31)
    made.take(5, 0, status="crashed", because=f"the engine died: {HOSTILE}")
    made.take(6, 0, status="out-of-memory", because="no room")
    made.finish(
        {
            "winner": "ub 1024",
            "profile": "a-profile",
            "verdict": "faster",
            "against": {
                "plan": {"cell": "plan", "word": "faster", **VERDICT},
                "fit": {"cell": "llama.cpp fit", "word": "no difference shown", **VERDICT, "high": 1.02},
                "defaults": {"cell": "llama.cpp fit", "word": None},
            },
            "llama_server_argv": [
                "llama-server",
                "-m",
                str(Path.home() / "my models" / "x.gguf"),
                "-ub",
                "1024",
            ],
        }
    )
    return made


class Parsed(HTMLParser):
    """Elements as (name, attributes), text by the id of the innermost element with one, rows of the table."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.rows: list[dict[str, str]] = []
        self._in_cells = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        told = dict(attrs)
        self.elements.append((tag, told))
        if tag == "table":
            self._in_cells = told.get("id") == "cells"
        if self._in_cells and tag == "tr" and "data-status" in told:
            self.rows.append({"status": told["data-status"] or "", "text": told["data-text"] or ""})
        if self._in_cells and tag == "td" and "data-value" in told:
            self.rows[-1][told["data-label"] or ""] = told["data-value"] or ""

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(made: Made) -> Parsed:
    return Parsed(html_report(made.sweep, None))


def expected(made: Made) -> dict[str, tuple[str, float, float, float]]:
    """(status, turn s, decode, prefill) of each measured cell, from the stored measurements alone."""
    found = {}
    for place, one in enumerate(made.sweep.cells):
        good = [told for told in made.sweep.measurements if told.cell == place and told.status == "ok"]
        if good:
            found[one.name] = (
                one.status,
                statistics.median((told.turn_ns or 0) / 1e9 for told in good),
                1e9 / statistics.median(ns for told in good for ns in told.token_ns),
                statistics.median(PROMPT * 1e9 / (told.prefill_ns or 1) for told in good),
            )
    return found


def check_rows(rows: list[dict[str, str]], made: Made) -> None:
    wanted = expected(made)
    assert len(rows) == len(made.cells)
    for name, (status, turn_s, decode, prefill) in wanted.items():
        row = next(row for row in rows if row["text"].startswith(f"{name} {status}"))
        assert float(row["Time per turn"]) == pytest.approx(turn_s, rel=1e-12)
        assert float(row["Decode, t/s"]) == pytest.approx(decode, rel=1e-12)
        assert float(row["Prefill, t/s"]) == pytest.approx(prefill, rel=1e-12)
    assert sum("Decode, t/s" in row for row in rows) == len(wanted)


def test_every_figure_of_the_table_is_the_stores(tmp_path: Path) -> None:
    made = whole_sweep(tmp_path / "results.db")
    page = page_of(made)
    check_rows(page.rows, made)
    times = [float(row["Time per turn"]) for row in page.rows if "Time per turn" in row]
    assert times == sorted(times)


def test_the_summary_gives_the_verdict_with_its_interval_against_plan_and_fit(tmp_path: Path) -> None:
    text = " ".join(page_of(whole_sweep(tmp_path / "results.db")).text.split())
    assert (
        "“ub 1024” against the plan: 12.9% less time per turn (95% interval -15.7% to -10.1%, 12 pairs). "
        "Against llama.cpp's own fit: no difference shown (95% interval -15.7% to +2.0%, 12 pairs)."
    ) in text
    assert "not tested, no time was left for it" in text  # the defaults


def test_names_and_messages_stay_text_whatever_they_hold(tmp_path: Path) -> None:
    page = page_of(whole_sweep(tmp_path / "results.db"))
    assert HOSTILE in page.text
    names = [name for name, _ in page.elements]
    assert names.count("script") == 1
    assert "img" not in names
    assert not [key for _, told in page.elements for key in told if key.startswith("on")]
    assert "49" not in page.text.split(HOSTILE)[0]  # no second round through the template


def test_the_page_fetches_nothing_and_runs_nothing_but_its_own(tmp_path: Path) -> None:
    source = html_report(whole_sweep(tmp_path / "results.db").sweep, None)
    page = Parsed(source)
    for _, told in page.elements:
        assert not {"src", "href", "xlink:href", "action", "style"} & told.keys(), told
    assert not re.search(r"url\(|@import", source)
    assert set(re.findall(r"https?://[^\s\"'<]+", source)) <= {"http://www.w3.org/2000/svg"}
    policy = next(told["content"] or "" for name, told in page.elements if "http-equiv" in told)
    assert "default-src 'none'" in policy
    for name in ("script", "style"):
        inside = re.search(rf"<{name}>(.*?)</{name}>", source, re.DOTALL)
        assert inside is not None
        digest = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
        assert f"{name}-src 'sha256-{digest}'" in policy


def test_what_was_refused_stands_there_with_its_reason(tmp_path: Path) -> None:
    text = " ".join(page_of(whole_sweep(tmp_path / "results.db")).text.split())
    assert "crashed: 1 cell (the engine's process ended) crashing: the engine died:" in text
    assert "no room" in text


def test_a_sweep_cut_short_has_no_verdict_and_says_how_to_go_on(tmp_path: Path) -> None:
    made = Made(tmp_path / "results.db", cell("plan", "plan"), cell("ub 256", ubatch=256), cell("ub 64"))
    made.take(0, 1000, 30, 31, 32)
    made.take(1, 900, 29, 30, 31)
    made.store.finish(made.id, "interrupted")
    page = page_of(made)
    check_rows(page.rows, made)
    text = " ".join(page.text.split())
    assert "The fastest so far is “ub 256” with" in text
    assert "nothing is proven yet" in text
    assert f"qnext bench sweep {made.id} --resume" in text
    assert "less time" not in text


@pytest.mark.parametrize("measured", [True, False])
def test_one_cell_makes_a_page_measured_or_not(tmp_path: Path, measured: bool) -> None:
    made = Made(tmp_path / "results.db", cell("plan", "plan"))
    if measured:
        made.take(0, 1000, 30)
        made.finish({"winner": "plan", "verdict": "the plan itself"})
    else:
        made.take(0, 0, status="crashed", because="no")
        made.store.finish(made.id, "failed")
    page = page_of(made)
    check_rows(page.rows, made)
    wanted = "The plan is the only configuration, and it runs." if measured else "nothing is known yet"
    assert wanted in page.text


def test_commands_are_whole_and_name_no_home_folder(tmp_path: Path) -> None:
    text = page_of(whole_sweep(tmp_path / "results.db")).text
    assert "-m \"$HOME\"/'my models/x.gguf' \\\n  -ub 1024" in text
    assert str(Path.home()) + "/" not in text


@pytest.mark.engine
def test_the_named_settings_make_the_same_plan(qnext: Qnext) -> None:
    asked = ("plan", "demo", "-c", "4096", "-ub", "256", "-ctk", "q8_0", "-ctv", "q8_0", "--repack", "off")
    first = json.loads(qnext(*asked, "--json").stdout)
    placement = first["placement"]
    from qnext.pipeline.sweep_values import placement_from_dict

    words = run_words("demo", Cell(**{**_fields(cell("x")), "placement": placement_from_dict(placement)}))
    words.remove("--no-tuned")
    again = json.loads(qnext("plan", *words[2:], "--json").stdout)
    assert again["placement"] == placement


def _fields(one: Cell) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Cell.__dataclass_fields__}


@pytest.mark.thorough
def test_the_command_writes_the_newest_sweep(qnext: Qnext, tmp_path: Path) -> None:
    home = tmp_path / "home"
    environment = {"QNEXT_HOME": str(home)}
    none = qnext("bench", "report", "-o", str(tmp_path / "none.html"), env=environment)
    assert none.returncode == 2
    assert "qnext bench sweep" in none.stderr
    (home / "data").mkdir(parents=True)
    made = Made(home / "data" / "results.db", cell("plan", "plan"))
    made.take(0, 1000, 30)
    made.store.finish(made.id, "interrupted")
    done = qnext("bench", "report", "-o", str(tmp_path / "report.html"), env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    check_rows(Parsed((tmp_path / "report.html").read_text(encoding="utf-8")).rows, made)
    wrong = qnext("bench", "report", made.id[:4], "-o", str(tmp_path / "no" / "x.html"), env=environment)
    assert wrong.returncode == 2
    assert "cannot write" in wrong.stderr


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_chromium_shows_the_stores_figures_at_any_width_and_scheme(
    browser: Browser, tmp_path: Path, width: int, scheme: str
) -> None:
    made = whole_sweep(tmp_path / "results.db")
    page = tmp_path / "report.html"
    page.write_text(html_report(made.sweep, None), encoding="utf-8")
    browser.open(page, width, scheme)
    rows = browser.evaluate(
        """[...document.querySelectorAll("#cells tbody tr")].map((row) => ({
            status: row.dataset.status, text: row.dataset.text,
            ...Object.fromEntries([...row.querySelectorAll("td[data-value]")].map(
                (cell) => [cell.dataset.label, cell.dataset.value]))}))"""
    )
    check_rows(rows, made)
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(
        "getComputedStyle(document.documentElement).getPropertyValue('--page')"
    ).strip() == ("#10151b" if scheme == "dark" else "#f6f7f9")
    smallest = min(browser.evaluate(contrasts("main *, header *, footer *")))
    assert smallest[0] >= 4.5, smallest
    drawings = "[...document.querySelectorAll('figure svg')].filter((one) => one.getClientRects().length)"
    shown = browser.evaluate(f"{drawings}.map((one) => one.getAttribute('class'))")
    assert shown == ["drawing narrow" if width == 360 else "drawing wide"] * 7
    assert browser.evaluate(f"{drawings}.every((one) => one.querySelector('circle, .series path'))")
    size = browser.evaluate(
        f"Math.min(...{drawings}.map((one) => one.getBoundingClientRect().width / one.viewBox.baseVal.width))"
    )
    assert 12 * size >= 10, "the charts' text is too small to read"
    told = [event["params"] for event in browser.events if event.get("method") == "Log.entryAdded"]
    assert told == []
    asked = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert asked == [page.as_uri()]


def test_the_filters_leave_the_cells_that_were_asked_for(browser: Browser, tmp_path: Path) -> None:
    made = whole_sweep(tmp_path / "results.db")
    page = tmp_path / "report.html"
    page.write_text(html_report(made.sweep, None), encoding="utf-8")
    browser.open(page, 1200, "light")

    def filtered(name: str, value: str) -> tuple[list[str], str]:
        browser.evaluate(
            f"""(() => {{ const box = document.getElementById("filters").elements["{name}"];
                box.value = {json.dumps(value)};
                box.dispatchEvent(new Event("input", {{bubbles: true}})); }})()"""
        )
        rows = browser.evaluate(
            """[...document.querySelectorAll("#cells tbody tr")]
                .filter((row) => row.getClientRects().length).map((row) => row.dataset.status)"""
        )
        return rows, browser.evaluate("document.getElementById('count').textContent")

    assert filtered("status", "crashed") == (["crashed"], "1 of 7 cells shown")
    assert filtered("text", "no such thing") == ([], "0 of 7 cells shown")
    assert filtered("status", "")[0] == []
    assert filtered("text", "1024")[0] == ["ok"]
    assert len(filtered("text", "")[0]) == 7
