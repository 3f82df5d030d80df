"""Every export is read back as the program it is for reads it: the same words, whatever a path holds."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.cli.plan import FORMATS
from qnext.errors import UsageError
from qnext.plan.export import TEXT_FORMATS, TextFormat, export_plan, systemd_word
from qnext.plan.export_apps import MODELFILE_PREFIX
from qnext.plan.export_docker import IMAGE
from qnext.plan.plan import Plan, make_plan
from qnext.units import MIB
from tests.planning import SPEEDS, problem

PATHS = (
    "/models/plain.gguf",
    '/home/Jürgen Müller/模型/it\'s "the" $model ${HOME} `x` 100%_%h #1.gguf',
    "/a/#b/back\\slash, comma:colon;semi & | > <tab.gguf",
    "/-dash/~/$$/%%/*?[x]/!bang.gguf",
)
ANY_PATH = st.lists(
    st.text(
        st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="/\0\ufffe\uffff"),
        min_size=1,
    ),
    min_size=1,
    max_size=4,
).map(lambda parts: "/" + "/".join(part for part in parts if part not in (".", "..")) + "/m.gguf")


@cache
def plan(*devices: str, room: int = 22, **wishes: object) -> Plan:
    """A plan of a tiny mixture of experts whose tail stays in RAM on `room` MiB per device."""
    options = {"context": 2048, "ubatch": 256, **wishes}
    return make_plan("tiny.gguf", problem(gpus=dict.fromkeys(devices, room * MIB), **options), SPEEDS)


def argv(one: Plan, model: str) -> list[str]:
    words = list(one.argv)
    words[words.index("-m") + 1] = model
    return words


def text(one: Plan, to: TextFormat, model: str = PATHS[0], program: str = "/usr/bin/qnext") -> str:
    return export_plan(one, to, model=model, serve=serve_words(model, program)).text


def serve_words(model: str, program: str = "/usr/bin/qnext") -> list[str]:
    return [program, "serve", model, "--ctx-size", "2048", "--override-tensor", "blk.(1|2).*exps=CPU"]


def read_shell(line: str) -> list[str]:
    """As a POSIX shell splits it; shlex knows no continued lines."""
    return shlex.split(line.replace("\\\n", ""))


def read_systemd(unit: str) -> list[str]:
    """The words of ExecStart= after systemd.syntax(7) and systemd.service(5): quotes, escapes, `%%`, `$$`."""
    lines = iter(unit.splitlines())
    command = next(line for line in lines if line.startswith("ExecStart=")).removeprefix("ExecStart=")
    while command.endswith("\\"):
        command = command[:-1] + " " + next(lines)
    words, position = [], 0
    for match in re.finditer(r'\s*(?:"((?:[^"\\]|\\.)*)"|([^\s"]+))(?=\s|$)', command):
        assert match.start() == position, command[position:]
        position = match.end()
        word = match[2] if match[1] is None else re.sub(r"\\(.)", r"\1", match[1])
        assert not re.search(r"(?<!%)%(?:%%)*(?!%)", word), "a specifier"
        if words:
            assert not re.search(r"(?<!\$)\$(?:\$\$)*(?!\$)", word), "a variable"
            word = word.replace("$$", "$")
        words.append(word.replace("%%", "%"))
    assert not command[position:].strip()
    return words


def read_llama_swap(document: str) -> list[str]:
    (entry,) = yaml.safe_load(document)["models"].values()
    lines = [line for line in entry["cmd"].splitlines() if not line.lstrip().startswith("#")]
    assert re.findall(r"\$\{([^{}]*)\}", "\n".join(lines)) == ["PORT"]
    words = shlex.split("\n".join(lines).replace("${PORT}", "5800"))
    assert words[-2:] == ["--port", "5800"]
    return words[:-2]


def read_docker(line: str) -> tuple[list[str], list[str]]:
    """The words for docker, and those for llama-server with the model's path as it is outside."""
    words = read_shell(line)
    split = next(position for position, word in enumerate(words) if word.startswith(IMAGE))
    mount = next(csv.reader([words[words.index("--mount") + 1]]))
    options = dict(part.split("=", 1) for part in mount if "=" in part)
    assert options["type"] == "bind" and "readonly" in mount
    inside = words[split + 1 :]
    model = inside.index("-m") + 1
    inside[model] = options["src"].rstrip("/") + inside[model].removeprefix(options["dst"])
    return words[: split + 1], ["llama-server", *inside]


def check_all(one: Plan, model: str) -> None:
    words = argv(one, model)
    assert text(one, "argv", model).split("\n") == [*words, ""]
    assert read_shell(text(one, "llama-server", model)) == words
    assert read_llama_swap(text(one, "llama-swap", model)) == words
    assert read_systemd(text(one, "systemd", model)) == serve_words(model)
    assert read_docker(text(one, "docker", model))[1] == words


@pytest.mark.parametrize("model", PATHS)
def test_commands_are_read_back_word_for_word(model: str) -> None:
    check_all(plan("CUDA0"), model)


@settings(max_examples=150, deadline=None)
@given(ANY_PATH)
def test_commands_are_read_back_for_any_path(model: str) -> None:
    check_all(plan("CUDA0", "CUDA1", room=14), model)


@pytest.mark.skipif(shutil.which("sh") is None, reason="no POSIX shell here")
@pytest.mark.parametrize("model", PATHS)
def test_a_shell_takes_the_pasted_lines_as_one_command(model: str) -> None:
    line = text(plan("CUDA0"), "llama-server", model)
    script = 'llama_server() { printf "%s\\n" "$@"; }\n' + line.replace("llama-server", "llama_server", 1)
    ran = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines() == argv(plan("CUDA0"), model)[1:]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here to check a unit with")
@pytest.mark.parametrize("load_mode", ["none", "mlock"])
def test_systemd_finds_no_fault_in_the_unit(tmp_path: Path, load_mode: str) -> None:
    program = tmp_path / "a server"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "qnext.service"
    unit.write_text(text(plan("CUDA0", load_mode=load_mode), "systemd", PATHS[1], str(program)))
    argv = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    ran = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=30)
    assert "qnext" not in ran.stderr and ran.returncode == 0, ran.stderr
    unit.write_text(unit.read_text().replace("Restart=on-failure", "Restart=perhaps"))
    assert "perhaps" in subprocess.run(argv, capture_output=True, text=True, check=False).stderr


def test_the_started_program_knows_no_variables() -> None:
    assert systemd_word("/opt/$x 5%/llama-server", program=True) == '"/opt/$x 5%%/llama-server"'
    assert systemd_word("/opt/$x") == '"/opt/$$x"'


def test_memory_locks_are_lifted_only_where_they_are_taken() -> None:
    assert "LimitMEMLOCK=infinity\n" in text(plan("CUDA0", load_mode="mlock"), "systemd")
    assert "LimitMEMLOCK=" not in text(plan("CUDA0"), "systemd")
    assert "--ulimit memlock=-1" in text(plan("CUDA0", load_mode="mlock"), "docker")
    for load_mode in ("none", "mlock"):
        assert not re.search(
            r"^MemoryMax=", text(plan("CUDA0", load_mode=load_mode), "systemd"), re.MULTILINE
        )


@pytest.mark.parametrize(
    ("devices", "tag", "flags"),
    [
        ((), "server", []),
        (("CUDA0", "CUDA1"), "server-cuda", ["--gpus", "all"]),
        (("ROCm0",), "server-rocm", ["--device", "/dev/kfd", "--device", "/dev/dri"]),
        (("Vulkan0",), "server-vulkan", ["--device", "/dev/dri"]),
        (("SYCL0",), "server-intel", ["--device", "/dev/dri"]),
    ],
)
def test_docker_takes_the_image_and_flags_of_the_devices(
    devices: tuple[str, ...], tag: str, flags: list[str]
) -> None:
    words, _ = read_docker(text(plan(*devices, room=14), "docker"))
    assert words[-1] == f"{IMAGE}:{tag}"
    assert words[3 : 3 + len(flags)] == flags
    assert "127.0.0.1:8080:8080" in words


@pytest.mark.parametrize("devices", [("RPC0",), ("MTL0",), ("CUDA0", "Vulkan0")])
def test_docker_refuses_devices_that_no_image_can_use(devices: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        export_plan(plan(*devices, room=14), "docker", model="/m.gguf")
    assert "llama-server" in caught.value.hint


def test_docker_mounts_the_whole_repository_of_the_hub_cache() -> None:
    model = "/c/hub/models--u--r/snapshots/0a1b/sub/m-00001-of-00002.gguf"
    words = read_shell(text(plan("CUDA0"), "docker", model))
    assert "type=bind,src=/c/hub/models--u--r,dst=/models,readonly" in words
    assert words[words.index("-m") + 1] == "/models/snapshots/0a1b/sub/m-00001-of-00002.gguf"


def read_ollama(document: str) -> tuple[dict[str, str], list[str]]:
    lines = document.splitlines()
    settings_ = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return settings_, [
        line.removeprefix(MODELFILE_PREFIX) for line in lines if line.startswith(MODELFILE_PREFIX)
    ]


def test_ollama_gets_the_context_of_one_slot_and_cache_settings() -> None:
    one = plan("CUDA0", room=400, parallel=2, kv_type_k="q8_0", kv_type_v="q8_0")
    env, modelfile = read_ollama(text(one, "ollama-env", "/a b/m.gguf"))
    assert env["OLLAMA_CONTEXT_LENGTH"] == "1024" and env["OLLAMA_NUM_PARALLEL"] == "2"
    assert env["OLLAMA_KV_CACHE_TYPE"] == "q8_0" and env["OLLAMA_FLASH_ATTENTION"] == "1"
    assert modelfile[0] == 'FROM "/a b/m.gguf"'
    assert "PARAMETER num_gpu 999" in modelfile and "PARAMETER num_ctx 1024" in modelfile


def test_ollama_is_not_told_to_load_layers_whose_experts_do_not_fit() -> None:
    one = plan("CUDA0")
    assert one.placement.cpu_expert_layers
    exported = export_plan(one, "ollama-env", model="/m.gguf")
    assert "num_gpu" not in "".join(read_ollama(exported.text)[1])
    assert any("experts" in note and "num_gpu" in note for note in exported.notes)


def test_ollama_without_gpu_stays_on_the_cpu() -> None:
    assert "PARAMETER num_gpu 0" in read_ollama(text(plan(), "ollama-env"))[1]


def test_ollama_says_which_cache_types_it_lacks() -> None:
    exported = export_plan(plan("CUDA0", kv_type_k="q8_0"), "ollama-env", model="/m.gguf")
    assert "OLLAMA_KV_CACHE_TYPE" not in exported.text
    assert any("q8_0/f16" in note for note in exported.notes)


def test_lm_studio_takes_as_many_expert_layers_from_the_other_end() -> None:
    one = plan("CUDA0")
    moved, layers = len(one.placement.cpu_expert_layers), one.shape.n_layer
    exported = export_plan(one, "lmstudio-notes", model="/m.gguf")
    assert f"{moved} of {layers} layers" in exported.text
    assert any("first layer" in note for note in exported.notes)
    head = export_plan(plan("CUDA0", room=64, cpu_experts=3), "lmstudio-notes", model="/m.gguf")
    assert not any("first layer" in note for note in head.notes)


def test_what_a_format_cannot_say_stands_in_its_comments_or_in_the_notes() -> None:
    one = plan(repack="experts")
    for to in (to for to in TEXT_FORMATS if to != "systemd"):  # what it starts lacks nothing
        exported = export_plan(one, to, model="/m.gguf")
        assert any("CPU_REPACK" in note for note in exported.notes), to
        assert exported.commented == exported.text.startswith("# ")
        if exported.commented:
            comments = " ".join(re.findall(r"^# +(.*)$", exported.text, re.MULTILINE))
            assert all(" ".join(note.split()) in comments for note in exported.notes)


@pytest.mark.parametrize("to", TEXT_FORMATS)
@pytest.mark.parametrize("bad", ["\n", "\r", "\x00", "\x85", "\u2028", "\udc80", "\uffff"])
def test_a_path_that_no_line_can_hold_is_refused(to: TextFormat, bad: str) -> None:
    with pytest.raises(UsageError) as caught:
        export_plan(plan("CUDA0"), to, model=f"/a{bad}b/m.gguf")
    assert "json" in caught.value.hint
    str(caught.value.message).encode()


def test_the_command_offers_the_formats_there_are() -> None:
    assert ("table", "json", "yaml", *TEXT_FORMATS) == FORMATS
