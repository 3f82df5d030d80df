"""`qnext plan --all` and `qnext run` without MODEL: what is proposed for a machine, and in which order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from threading import Barrier, BrokenBarrierError
from typing import Any

import pytest

from qnext.config import find_paths
from qnext.models.catalogue import catalogue_names, load_catalogue
from qnext.models.synth import synthesise
from qnext.models.synth.imagined import imagined_header
from qnext.pipeline import ranking
from qnext.pipeline.planning import plan_model
from qnext.pipeline.ranking import READING_TPS, TIERS, Ranked, rank_models
from qnext.pipeline.request import Request
from qnext.units import GIB
from tests.cli.conftest import CTRL_D, Terminal
from tests.conftest import Qnext
from tests.hub_server import Asked, HubServer, Reply, hub  # noqa: F401 - the fixture

Open = Callable[..., Terminal]
PROFILES = ("rtx4070-64gb", "container-16gb", "strix-halo-128gb")


def rank(**wishes: Any) -> tuple[Ranked, ...]:
    return rank_models(Request(model="", **wishes), find_paths(), lambda _: None).entries


@pytest.mark.thorough
@pytest.mark.parametrize("hardware", PROFILES)
def test_every_planned_entry_is_what_plan_says_of_that_model_and_quant(hardware: str, tmp_path: Path) -> None:
    planned = {
        (one.model.shape, one.candidate.quant): one.candidate
        for one in rank(hardware=hardware)
        if one.basis == "shape" and one.candidate.fits
    }
    for (shape, quant), candidate in planned.items():
        assert shape is not None
        path = tmp_path / f"{shape}-{quant}.gguf"
        synthesise(shape, path, quant=quant, header_only=True)
        plan = plan_model(Request(model=str(path), hardware=hardware), find_paths(), lambda _: None).plan
        assert plan.fits and plan.prediction == candidate.prediction


@pytest.mark.parametrize("hardware", PROFILES)
def test_every_model_is_there_once_in_the_stated_order(hardware: str) -> None:
    entries = rank(hardware=hardware)
    assert sorted(one.model.name for one in entries) == list(catalogue_names())
    tiers = [TIERS.index(one.tier) for one in entries]
    assert tiers == sorted(tiers)
    for before, after in pairwise(entries):
        if before.tier == after.tier != "too large":
            assert before.model.total_params >= after.model.total_params
    for one in entries:
        candidate = one.candidate
        assert candidate.fits is (not candidate.missing) is (one.tier != "too large")
        if one.tier == "good":
            assert candidate.prediction and candidate.prediction.decode_tps and not candidate.poor
            assert candidate.prediction.decode_tps.mid >= READING_TPS
        if one.basis == "size":
            assert candidate.prediction is None and "an estimate" in one.because


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("hardware", "rams"), [("container-16gb", (10, 22, 34, 46, 58)), ("rtx4070-64gb", (5, 20, 34, 48))]
)
def test_what_fits_by_size_fits_when_planned_too(
    hardware: str, rams: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On models whose dimensions are known: the allowance for context and compute is not too small."""
    models = [
        replace(model, quants=(("Q4_K_M", imagined_header(model.shape, "Q4_K_M").file_bytes),))
        for model in {one.shape: one for one in load_catalogue()}.values()
        if model.shape
    ]
    counts = []
    for ram in rams:
        fitting = []
        for known in (True, False):
            given = models if known else [replace(model, shape=None) for model in models]
            monkeypatch.setattr(ranking, "load_catalogue", lambda given=given: given)
            entries = rank(hardware=hardware, ram=ram * GIB)
            fitting.append(
                {one.model.name for one in entries if one.candidate.fits and (one.basis == "shape") is known}
            )
        planned, by_size = fitting
        assert by_size <= planned, f"{ram} GiB of RAM"
        counts.append(len(by_size))
    assert counts[0] < len(models) == counts[-1]


def test_more_memory_never_loses_a_model() -> None:
    before: set[str] = set()
    for ram in (8, 24, 64, 512):
        fitting = {
            one.model.name
            for one in rank(hardware="container-16gb", ram=ram * GIB)
            if one.tier != "too large"
        }
        assert before <= fitting
        before = fitting
    assert before == set(catalogue_names())


@pytest.mark.thorough
def test_preferences_reach_every_model() -> None:
    sizes = {}
    for prefer in ("speed", "balanced", "quality"):
        entries = rank(hardware="dual-3090-128gb", prefer=prefer)
        sizes[prefer] = {one.model.name: one.candidate.quality for one in entries if one.candidate.fits}
    for name in sizes["speed"]:
        assert sizes["speed"][name] <= sizes["balanced"][name] <= sizes["quality"][name]
    assert sizes["speed"] != sizes["quality"]
    fast = rank(hardware="dual-3090-128gb", min_tps=100)
    for one in fast:
        if one.tier == "good":
            assert one.candidate.prediction and one.candidate.prediction.decode_tps
            assert one.candidate.prediction.decode_tps.mid >= 100


@pytest.mark.thorough
def test_the_table_stays_inside_80_columns_and_json_says_the_same(qnext: Qnext) -> None:
    shown = qnext("plan", "--all", "--hardware", "rtx4070-64gb", env={"COLUMNS": "80"})
    assert shown.returncode == 0, shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    document = json.loads(qnext("plan", "--all", "--hardware", "rtx4070-64gb", "--json").stdout)
    assert document["schema"] == "qnext.ranking/1"
    lines = [line.split() for line in shown.stdout.splitlines()]
    listed = [words[:2] for words in lines if words and words[0] in catalogue_names()]
    assert listed == [[one["name"], one["quant"]] for one in document["models"]]
    assert " ".join(document["order"].split()) in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "demo", "--all"),
        ("plan", "--all", "--compare-fit"),
        ("plan", "--all", "--explain"),
        ("plan", "--all", "--format", "argv"),
        ("plan", "demo", "--online"),
    ],
)
def test_what_makes_no_sense_together_is_refused(qnext: Qnext, arguments: tuple[str, ...]) -> None:
    done = qnext(*arguments)
    assert done.returncode == 2 and not done.stdout
    if "--all" not in arguments or "demo" in arguments:
        assert "--online" in arguments or ("qnext plan MODEL" in done.stderr and "--all" in done.stderr)


@pytest.mark.parametrize("arguments", [("run",), ("run", "--prompt", "Hello"), ("run", "--yes")])
def test_without_a_terminal_nothing_is_proposed(qnext: Qnext, arguments: tuple[str, ...]) -> None:
    done = qnext(*arguments)
    assert done.returncode == 2
    assert "qnext plan --all" in done.stderr and "qnext run MODEL" in done.stderr


@pytest.mark.thorough
def test_online_plans_the_others_from_published_headers(
    qnext: Qnext,
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = tmp_path / "tiny.gguf"
    synthesise("tiny-qwen3next", path, quant="Q4_K_M", header_only=True)
    hub.add_repo("unsloth/Qwen3.5-35B-A3B-GGUF", {"Qwen3.5-35B-A3B-Q4_K_M.gguf": path})
    done = qnext("plan", "--all", "--online", "--hardware", "rtx4070-64gb", "--json")
    models = {one["name"]: one for one in json.loads(done.stdout)["models"]}
    assert models["qwen3.5-35b-a3b"]["basis"] == "headers" and models["qwen3.5-35b-a3b"]["decode_tps"]
    assert models["minimax-m2"]["basis"] == "size" and "minimax-m2 is judged by size" in done.stderr
    assert models["gpt-oss-20b"]["basis"] == "shape"


@pytest.mark.thorough
def test_online_asks_for_several_models_at_once(
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = Barrier(4)
    met: list[bool] = []

    class Crowded(HubServer):
        """Answers the first requests only when four have come."""

        def reply(self, asked: Asked) -> Reply:
            with suppress(BrokenBarrierError):
                together.wait(10)
                met.append(True)
                together.abort()
            return super().reply(asked)

    progress: list[tuple[int, int]] = []
    notices: list[str] = []
    with Crowded(tmp_path / "crowded") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        request = Request(model="", hardware="rtx4070-64gb")
        rank_models(
            request,
            find_paths(),
            notices.append,
            online=True,
            on_progress=lambda *seen: progress.append(seen),
        )
    total = sum(model.shape is None for model in load_catalogue())
    assert met
    assert progress == [(done, total) for done in range(1, total + 1)]
    assert len([notice for notice in notices if "judged by size alone" in notice]) == total


@pytest.mark.thorough
@pytest.mark.engine
def test_run_alone_proposes_asks_fetches_and_the_next_time_offers_what_is_here(
    terminal: Open,
    hub: HubServer,  # noqa: F811
    demo_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The best here is one whose quants the catalogue does not list, so any quant stands for it."""
    monkeypatch.setenv("HOME", str(tmp_path))  # other programs' models are looked for there
    for name in ("XDG_CACHE_HOME", "LLAMA_CACHE"):
        monkeypatch.delenv(name, raising=False)
    ram = ("--ram", "13G", "--vram", "0", "--min-tps", "0.001", "-c", "4096")
    best = rank(ram=13 * GIB, vram=0, min_tps=0.001, context=4096)[0]
    assert not best.listed
    hub.add_repo(best.model.repo, {"demo-Q8_0.gguf": demo_model})
    first = terminal("run", *ram, columns=80)
    assert best.model.title in first.wait_for("to fetch")
    first.wait_for(f"Fetch {best.model.repo} Q8_0")
    first.type("n\n")
    first.wait_for("--yes")
    assert first.wait() == 5
    second = terminal("run", *ram, "--yes", columns=80)
    second.wait_for("> ")
    second.type(CTRL_D)
    assert second.wait() == 0
    third = terminal("run", *ram, columns=120)
    assert "Hugging Face" in third.wait_for("Run it?")
    third.type("y\n")
    third.wait_for("> ")
    third.type(CTRL_D)
    assert third.wait() == 0
    fourth = terminal("run", *ram, columns=120)
    fourth.wait_for("Run it?")
    fourth.type("n\n")
    assert best.model.title not in fourth.wait_for("to fetch"), "what was refused is not proposed again"
    assert fourth.wait() == 5
