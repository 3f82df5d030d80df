"""`qnext forecast` on the real engine: slices of a small model, the forecast, what is kept and deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    qnext: Qnext, model: Path, qnext_home: Path
) -> None:
    done = qnext("forecast", str(model), "-c", "8192", "--json", timeout=110)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["schema"] == "qnext.forecast/1" and found["slices"]["sizes"] == [4, 8]
    assert [one["depth"] for one in found["decode_tps"]] == [0, 4096]
    for one in (*found["decode_tps"], found["prefill_tps"]):
        assert 0 < one["low"] < one["mid"] < one["high"] < 1.5 * one["low"]
    assert found["decode_tps"][1]["mid"] <= found["decode_tps"][0]["mid"]
    assert len(found["samples"]["ns_per_token"]["decode"]) == found["rounds"] >= 5
    assert "processor's cache" in found["warnings"][0]

    slices = list((qnext_home / "cache" / "slices").rglob("data-*.gguf"))
    assert len(slices) == 2
    cleaned = qnext("forecast", "--clean")
    assert cleaned.returncode == 0 and "deleted" in cleaned.stderr
    assert not (qnext_home / "cache" / "slices").exists()


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
