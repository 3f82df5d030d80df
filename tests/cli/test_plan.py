"""`qnext plan` and `qnext synth` as a person and a program see them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.conftest import Qnext


def test_the_json_has_the_keys_that_programs_rely_on(qnext: Qnext) -> None:
    done = qnext("plan", "demo", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["schema"] == "qnext.plan/1"
    assert plan["fits"] is True
    assert {"ref", "arch", "quant", "file_bytes", "layers", "experts", "experts_used"} <= plan["model"].keys()
    parts = {
        f"{part}_bytes" for part in ("budget", "weights", "kv", "recurrent", "compute", "other", "total")
    }
    assert {"name", "kind"} | parts == plan["devices"][0].keys()
    assert {
        *("n_gpu_layers", "cpu_expert_layers", "overrides", "tensor_split", "context", "batch", "ubatch"),
        *("kv_type_k", "kv_type_v", "flash_attention", "threads", "threads_batch", "load_mode", "parallel"),
    } <= plan["placement"].keys()
    assert plan["llama_server_argv"][:2] == ["llama-server", "-m"]
    assert {"decode_tps", "prefill_tps", "source"} == plan["prediction"].keys()
    assert {"candidates", "reasons", "warnings"} <= plan.keys()


@pytest.mark.parametrize("hardware", ["rtx4070-64gb", "epyc-12ch-cpu"])
def test_the_view_stays_in_80_columns_and_its_command_can_be_pasted(
    qnext: Qnext, demo_model: Path, hardware: str
) -> None:
    arguments = ("plan", str(demo_model), "--hardware", hardware)
    text = qnext(*arguments, env={"COLUMNS": "80"}).stdout
    above, command = text.split("The same with llama-server\n")
    assert max(map(len, above.splitlines())) <= 80
    lines = command.rstrip("\n").split("\n")
    pasted = shlex.split(" ".join(line.removesuffix(" \\") for line in lines))
    assert pasted == json.loads(qnext(*arguments, "--json").stdout)["llama_server_argv"]


def test_what_does_not_fit_says_what_is_missing_and_what_would(qnext: Qnext) -> None:
    done = qnext("plan", "demo", "--ram", "20M")
    assert done.returncode == 4
    assert "does not fit" in done.stdout and "missing" in done.stdout
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: demo does not fit: ") and "on CPU missing" in error
    assert "would fit" in hint
    as_json = qnext("plan", "demo", "--ram", "20M", "--json")
    assert as_json.returncode == 4
    assert json.loads(as_json.stdout)["fits"] is False


def test_synth_says_what_it_wrote_and_never_overwrites(qnext: Qnext, tmp_path: Path) -> None:
    target = tmp_path / "demo.gguf"
    first = qnext("synth", "demo", "-o", str(target), "--json")
    report = json.loads(first.stdout)
    assert report["schema"] == "qnext.synth/1" and report["file_bytes"] == target.stat().st_size
    again = qnext("synth", "demo", "-o", str(target))
    assert again.returncode == 5 and "exists already" in again.stderr
    sparse = tmp_path / "80b.gguf"
    done = qnext("synth", "qwen3-next-80b-a3b", "--header-only", "-o", str(sparse))
    assert done.returncode == 0 and "GiB" in done.stderr
    assert sparse.stat().st_blocks * 512 < 10 << 20
