"""`qnext forecast` on the real engine: slices of a small model, the forecast, what is kept and deleted."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qnext.engine.llama.quantize import quantise_rows
from qnext.models.gguf_reader import read_header
from qnext.models.shape import read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.models.synth.slices import FAMILIES, choose_slices, write_slices
from tests.browser import Browser, contrasts
from tests.conftest import Qnext

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def model(qnext: Qnext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "twelve.gguf"
    made = qnext("synth", "tiny-qwen3next", "--quant", "Q8_0", "--layers", "12", "-o", str(path))
    assert made.returncode == 0, made.stderr
    return path


@pytest.mark.thorough
def test_a_forecast_tells_speeds_with_ranges_and_its_slices_are_kept_until_cleaned(
    qnext: Qnext, model: Path, qnext_home: Path, tmp_path: Path, browser: Browser
) -> None:
    page = tmp_path / "forecast.html"
    done = qnext("forecast", str(model), "-c", "8192", "-o", str(page), "--json", timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "qnext.forecast/1" and found["slices"]["sizes"] == [4, 8]
    assert [one["depth"] for one in found["decode_tps"]] == [0, 4096]
    for one in (*found["decode_tps"], found["prefill_tps"]):
        assert 0 < one["low"] < one["mid"] < one["high"] < 1.5 * one["low"]
    assert found["decode_tps"][1]["mid"] <= found["decode_tps"][0]["mid"]
    assert len(found["samples"]["ns_per_token"]["prefill"]) == found["rounds"] >= 5
    assert "processor's cache" in found["warnings"][0]
    assert found["experts_ns"] > 0 and found["samples"]["fewer_experts_ns"]
    (waits,) = found["waits_ns"].values()
    assert 0 < waits < 2 * sum(found["layers_ns"].values()), "a tiny model hardly does anything else"
    assert sorted(found["prefill_by_ubatch_tps"]) and found["memory_bytes"] > found["slice_bytes"]
    check_page(page, found, browser)

    slices = list((qnext_home / "cache" / "slices").rglob("data-*.gguf"))
    assert len(slices) == 2
    cleaned = qnext("forecast", "--clean")
    assert cleaned.returncode == 0 and "deleted" in cleaned.stderr
    assert not (qnext_home / "cache" / "slices").exists()


@pytest.mark.parametrize("arch", sorted(FAMILIES))
def test_every_family_has_slices_and_one_that_shows_what_waiting_takes(arch: str, tmp_path: Path) -> None:
    header = imagined_header(f"tiny-{arch}", "Q4_K_M", 8)
    shape = read_shape(header)
    slices = choose_slices(shape, (4, 8))
    written = write_slices(header, shape, slices, tmp_path, quantizer=quantise_rows)
    bare = read_shape(read_header(written.bare_path))
    assert (bare.arch, bare.n_layer) == (arch, 4)
    assert {read_shape(read_header(path)).arch for path in written.paths.values()} == {arch}


def check_page(page: Path, found: dict[str, Any], browser: Browser) -> None:
    """The page's numbers are those of the JSON; it fits a phone and asks for nothing else."""
    for width, scheme in ((360, "dark"), (1200, "light")):
        browser.open(page, width, scheme)
        shown = browser.evaluate(
            "[...document.querySelectorAll('#speeds [data-label=Forecast]')].map((one) => +one.dataset.value)"
        )
        assert shown == [found["prefill_tps"]["mid"], *(one["mid"] for one in found["decode_tps"])]
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert min(browser.evaluate(contrasts("main *, header *, footer *")))[0] >= 4.5
        charts = browser.evaluate("document.querySelectorAll('figure svg.wide .series path').length")
        assert charts >= 2
    asked = [event for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert {event["params"]["request"]["url"] for event in asked} == {page.as_uri()}


@pytest.mark.thorough
def test_a_forecast_killed_at_any_time_leaves_nothing_that_is_believed(
    qnext: Qnext, model: Path, qnext_home: Path
) -> None:
    slices, chance = qnext_home / "cache" / "slices", random.Random(7)
    argv = [sys.executable, "-m", "qnext", "forecast", str(model), "-c", "4096"]
    for _ in range(6):
        running = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(chance.uniform(0.4, 9))
        running.kill()
        running.wait()
    before = json.loads(qnext("bench", "history", "--accuracy", "--json").stdout)
    done = qnext("forecast", str(model), "-c", "4096", "--json", timeout=110)
    assert done.returncode == 0, done.stderr
    assert len(list(slices.iterdir())) == 1 and not list(slices.glob("*.part"))
    assert json.loads(qnext("bench", "history", "--accuracy", "--json").stdout) == before
    qnext("forecast", "--clean")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("{model}", "--hardware", "rtx4070-64gb"), "qnext plan"),
        (("demo",), "bench run demo"),
        ((), "Name one"),
    ],
)
def test_what_cannot_be_forecast_is_refused_with_what_to_do(
    qnext: Qnext, model: Path, arguments: tuple[str, ...], said: str
) -> None:
    done = qnext("forecast", *(word.format(model=model) for word in arguments))
    assert done.returncode != 0 and said in " ".join(done.stderr.split()), done.stderr
