"""llama.cpp's own fit on loopback devices: its answer is understood, counted, and keeps to the budgets.

The program is one that is here already (PATH, or built by scripts/peers); without it those tests skip.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.config import find_paths
from qnext.engine.fit import FitAnswer, find_fit_program, read_fit, run_fit
from qnext.engine.rpc import RpcWorker
from qnext.errors import EngineError, UsageError
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.synth import synthesise
from qnext.plan.placement import ALL_LAYERS
from qnext.plan.values import HOST, Budget, Override, Placement
from qnext.units import GIB, MIB
from tests.conftest import Qnext

pytestmark = pytest.mark.engine

BASE = Placement(context=2048, ubatch=256, extra_buffers=True)


@pytest.fixture(scope="module")
def program() -> Path:
    try:
        return find_fit_program(find_paths({}).cache_dir)
    except EngineError as error:
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ModelHeader:
    path = tmp_path_factory.mktemp("models") / "tiny model.gguf"
    synthesise("tiny-qwen3next", path, quant="Q4_K_M", header_only=True)
    return read_header(path)


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[str, str]]:
    with RpcWorker() as one, RpcWorker() as two:
        yield one.endpoint, two.endpoint


def test_its_flags_become_a_placement(mixture: ModelHeader) -> None:
    line = (
        "-c 2048 -ngl 9 -ts 3,6 -ot "
        r'"blk\.5\.ffn_down.*=CPU,blk\.6\.ffn_(up|down|gate_up|gate)_(ch|)exps=RPC0[h:1],blk\.7\.ffn_.*exps=CPU"'
    )
    placement = read_fit(FitAnswer(tuple(line.split(" ")), 0.1), BASE, mixture, ("RPC0", "RPC1", "RPC2"))
    assert placement.tensor_split == (3.0, 6.0, 0.0)
    assert placement.overrides[1] == Override(r"blk\.6\.ffn_(up|down|gate_up|gate)_(ch|)exps", "RPC0[h:1]")
    assert placement.cpu_expert_layers == (5, 7)
    assert (placement.n_gpu_layers, placement.ubatch, placement.extra_buffers) == (9, 256, True)


def test_all_layers_and_none(mixture: ModelHeader) -> None:
    everything = read_fit(FitAnswer(("-c", "2048", "-ngl", "-1"), 0.1), BASE, mixture, ("RPC0",))
    assert (everything.n_gpu_layers, everything.devices) == (ALL_LAYERS, ("RPC0",))
    nothing = read_fit(FitAnswer(("-c", "2048", "-ngl", "0"), 0.1), BASE, mixture, ("RPC0",))
    assert (nothing.n_gpu_layers, nothing.devices) == (0, ())


@pytest.mark.parametrize("flags", [("-c", "many"), ("-sm", "row"), ("-ot", "exps")])
def test_a_flag_it_never_printed_is_an_error(mixture: ModelHeader, flags: tuple[str, ...]) -> None:
    with pytest.raises(EngineError):
        read_fit(FitAnswer(flags, 0.1), BASE, mixture, ("RPC0",))


def test_without_the_program_the_way_to_get_it_is_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError) as caught:
        find_fit_program(tmp_path, {"PATH": str(tmp_path)})
    assert "scripts/peers" in caught.value.hint


def test_the_newest_peer_is_taken(tmp_path: Path) -> None:
    import os

    for number, key in enumerate(("new", "old")):
        folder = tmp_path / "peers" / key / "build" / "bin"
        folder.mkdir(parents=True)
        (folder / "llama-fit-params").write_text("")
        os.utime(folder / "llama-fit-params", (1000 - number, 1000 - number))
    assert "new" in str(find_fit_program(tmp_path, {"PATH": ""}))


def test_a_device_it_does_not_see_or_cannot_fill_is_refused(
    program: Path, mixture: ModelHeader, workers: tuple[str, str]
) -> None:
    imagined = (Budget(HOST, "host", GIB, HOST), Budget("CUDA9", "gpu", GIB, "CUDA9"))
    with pytest.raises(UsageError) as caught:
        run_fit(program, str(mixture.paths[0]), BASE, imagined)
    assert "CUDA9" in caught.value.message
    from dataclasses import replace

    larger = (imagined[0], Budget("RPC0", "rpc", 1 << 50, f"RPC0[{workers[0]}]"))
    with pytest.raises(UsageError) as caught:
        run_fit(program, str(mixture.paths[0]), replace(BASE, rpc_servers=workers[:1]), larger)
    assert "RPC0" in caught.value.hint


def test_a_broken_program_is_told_from_a_model_that_does_not_fit(
    tmp_path: Path, mixture: ModelHeader
) -> None:
    broken = tmp_path / "llama-fit-params"
    broken.write_text("#!/bin/sh\necho 'error: invalid argument: -np' >&2\nexit 1\n")
    broken.chmod(0o755)
    host = (Budget(HOST, "host", GIB, HOST),)
    with pytest.raises(EngineError) as caught:
        run_fit(broken, str(mixture.paths[0]), BASE, host)
    assert "invalid argument" in caught.value.message
    broken.write_text(
        "#!/bin/sh\necho 'failed to fit CLI arguments to free memory, exiting...' >&2\nexit 1\n"
    )
    assert run_fit(broken, str(mixture.paths[0]), BASE, host).error
    with pytest.raises(EngineError):
        run_fit(tmp_path, str(mixture.paths[0]), BASE, host)


@pytest.mark.parametrize("sizes", [(20,), (64,), (2,), (11, 10)])
def test_both_are_counted_inside_the_same_budgets(
    sizes: tuple[int, ...],
    program: Path,
    mixture: ModelHeader,
    workers: tuple[str, str],
    qnext: Qnext,
) -> None:
    asked = [f"--device-memory=RPC{number}={size}M" for number, size in enumerate(sizes)]
    ran = qnext(
        *("plan", str(mixture.paths[0]), "--rpc", ",".join(workers[: len(sizes)]), *asked),
        *("-c", "2048", "-ub", "256", "--repack", "off", "--compare-fit", "--json"),
        env={"PATH": str(program.parent)},
    )
    assert ran.returncode == 0, ran.stderr
    document = json.loads(ran.stdout)
    ours, fit = document, document["fit"]["plan"]
    assert document["fit"]["flags"][0] == "-c" and document["fit"]["error"] is None
    weights = {}
    for name, plan in (("qnext", ours), ("fit", fit)):
        assert plan["placement"]["context"] == 2048 and plan["compute_source"] == "dry run"
        weights[name] = sum(device["weights_bytes"] for device in plan["devices"])
        for device in plan["devices"]:
            assert device["total_bytes"] <= device["budget_bytes"], (name, device)
    assert abs(weights["qnext"] - weights["fit"]) < MIB // 4  # every tensor once, but for padding
    assert ours["devices"][0]["name"] == fit["devices"][0]["name"] == HOST


@pytest.mark.parametrize("budget", [20 * MIB, 20 * MIB + MIB // 2])
def test_memory_printed_cut_to_whole_mib_gives_it_no_more_than_the_budget(
    tmp_path: Path, mixture: ModelHeader, budget: int
) -> None:
    program = tmp_path / "llama-fit-params"
    program.write_text(
        f"#!/bin/sh\necho \"$@\" >> '{tmp_path}/asked'\n"
        "echo '  RPC0: a device (100 MiB, 100 MiB free)'\necho '-c 2048'\n"
    )
    program.chmod(0o755)
    run_fit(program, str(mixture.paths[0]), BASE, (Budget("RPC0", "rpc", budget, "RPC0[127.0.0.1:1]"),))
    words = (tmp_path / "asked").read_text().splitlines()[-1].split()
    almost = 101 * MIB - 1  # what is printed as 100 MiB may be
    assert almost - int(words[words.index("--fit-target") + 1]) * MIB <= budget
