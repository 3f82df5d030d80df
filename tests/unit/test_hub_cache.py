"""GGUF files found in small trees laid out as Hugging Face, llama.cpp and LM Studio lay out theirs."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from qnext.models import hub_cache
from qnext.models.hub_cache import CachedModel, CachedModels, cache_folders, find_cached


class Hub:
    """A Hugging Face cache under a home folder of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.root = home / ".cache" / "huggingface" / "hub"

    def add(
        self, name: str, size: int, *, repo: str = "org/Model-GGUF", revision: str = "a" * 40, at: int = 1000
    ) -> Path:
        """A file of `size` bytes in a snapshot that was made at the time `at`."""
        folder = self.folder(repo)
        blob = folder / "blobs" / f"{revision[0]}{name.replace('/', '-')}"
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(b"GGUF".ljust(size, b"\0"))
        link = folder / "snapshots" / revision / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
        os.utime(folder / "snapshots" / revision, (at, at))
        return link

    def folder(self, repo: str) -> Path:
        return self.root / f"models--{repo.replace('/', '--')}"

    def find(self, most: int = 500, **environ: str) -> CachedModels:
        return find_cached({"HOME": str(self.home), **environ}, deadline_s=20, most=most)

    def models(self, **environ: str) -> dict[str | None, CachedModel]:
        return {model.file: model for model in self.find(**environ).models}


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path / "home")


def test_nothing_there_is_nothing_found(hub: Hub) -> None:
    assert hub.find() == CachedModels(())


def test_a_file_is_told_with_its_repository_quant_and_size(hub: Hub) -> None:
    link = hub.add("Qwen3-Next-80B-A3B-Instruct-UD-Q4_K_XL.gguf", 1000, repo="unsloth/Qwen3-Next-GGUF")
    assert hub.find() == CachedModels(
        (
            CachedModel(
                store="Hugging Face",
                path=link,
                repo="unsloth/Qwen3-Next-GGUF",
                file="Qwen3-Next-80B-A3B-Instruct-UD-Q4_K_XL.gguf",
                quant="UD-Q4_K_XL",
                size_bytes=1000,
            ),
        )
    )
    assert link.read_bytes()[:4] == b"GGUF"


def test_shards_are_one_model_and_a_missing_one_is_told(hub: Hub) -> None:
    for number in (1, 2, 3):
        hub.add(f"Q8_0/big-Q8_0-0000{number}-of-00003.gguf", 100)
    for number in (2, 4):
        hub.add(f"Q6_K/big-Q6_K-0000{number}-of-00004.gguf", 100)
    models = hub.models()
    assert set(models) == {"Q8_0/big-Q8_0-00001-of-00003.gguf", "Q6_K/big-Q6_K-00001-of-00004.gguf"}
    whole, torn = (models[name] for name in sorted(models, key=str, reverse=True))
    assert (whole.size_bytes, whole.shards, whole.quant, whole.complete) == (300, 3, "Q8_0", True)
    assert (torn.size_bytes, torn.shards, torn.shards_missing, torn.complete) == (200, 4, 2, False)


def test_of_several_revisions_the_newest_whole_file_is_given(hub: Hub) -> None:
    old = hub.add("m-Q4_K_M.gguf", 100, revision="a" * 40, at=1000)
    new = hub.add("m-Q4_K_M.gguf", 200, revision="b" * 40, at=2000)
    only_old = hub.add("m-Q2_K.gguf", 50, revision="a" * 40, at=1000)
    for number in (1, 2):
        hub.add(f"s-Q8_0-0000{number}-of-00002.gguf", 10, revision="a" * 40, at=1000)
    hub.add("s-Q8_0-00001-of-00002.gguf", 10, revision="b" * 40, at=2000)
    models = hub.models()
    assert len(models) == 3
    assert models["m-Q4_K_M.gguf"].path == new != old
    assert models["m-Q2_K.gguf"].path == only_old
    assert models["s-Q8_0-00001-of-00002.gguf"].complete


def test_broken_and_circular_links_projectors_and_other_files_are_left_out(hub: Hub) -> None:
    (hub.add("gone-Q4_0.gguf", 10)).resolve().unlink()
    snapshot = hub.folder("org/Model-GGUF") / "snapshots" / ("a" * 40)
    (snapshot / "loop-Q4_0.gguf").symlink_to("loop-Q4_0.gguf")
    (snapshot / "round").symlink_to("..")
    (snapshot / "folder.gguf").mkdir()
    (snapshot / "empty-Q4_0.gguf").touch()
    for name in ("mmproj-F16.gguf", "imatrix.gguf", "README.md", "x-00005-of-00004.gguf"):
        hub.add(name, 10)
    assert hub.find() == CachedModels(())


@pytest.mark.parametrize("suffix", [".incomplete", ".downloadInProgress"])
def test_an_unfinished_download_is_told_with_its_size(hub: Hub, suffix: str) -> None:
    for repo in ("org/Model-GGUF", "org/tensors"):
        blobs = hub.folder(repo) / "blobs"
        blobs.mkdir(parents=True)
        (blobs / f"abc{suffix}").write_bytes(b"\0" * 300)
    (hub.folder("org/tensors") / "blobs" / f"def{suffix}").write_bytes(b"GGUF" + b"\0" * 96)
    found = hub.find().models
    assert [(m.repo, m.size_bytes, m.file, m.partial, m.complete) for m in found] == [
        ("org/Model-GGUF", 300, None, True, False),
        ("org/tensors", 100, None, True, False),
    ]


@pytest.mark.parametrize(
    ("environ", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, "/home/x/.cache/huggingface/hub"),
        ({"HF_HUB_CACHE": ""}, "/home/x/.cache/huggingface/hub"),
    ],
)
def test_the_hub_cache_is_where_its_own_client_finds_it(environ: dict[str, str], folder: str) -> None:
    assert cache_folders({"HOME": "/home/x", **environ})[0] == ("Hugging Face", Path(folder))


def test_a_folder_two_variables_name_is_read_once(hub: Hub) -> None:
    hub.add("m-Q4_K_M.gguf", 100)
    (model,) = hub.find(LLAMA_CACHE=str(hub.root)).models
    assert model.store == "Hugging Face"


def test_folders_of_llama_cpp_and_lm_studio_are_looked_in(hub: Hub) -> None:
    flat = hub.home / ".cache" / "llama.cpp" / "ggml-org_m-GGUF_m-q8_0.gguf"
    deep = hub.home / ".lmstudio" / "models" / "org" / "name" / "m-Q5_K_M.gguf"
    for path in (flat, deep):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"GGUF")
    first, second = hub.find().models
    assert (first.store, first.path, first.repo, first.quant) == ("llama.cpp", flat, None, "Q8_0")
    assert (second.store, second.path, second.repo) == ("LM Studio", deep, "org/name")
    assert second.file == "org/name/m-Q5_K_M.gguf"


def test_no_more_than_asked_for_are_given_and_the_cut_is_told(hub: Hub) -> None:
    for number in range(7):
        hub.add(f"m{number}-Q4_0.gguf", 10)
    assert not hub.find(most=7).cut
    found = hub.find(most=5)
    assert len(found.models) == 5
    assert "more than 5" in found.cut


def test_ten_thousand_other_files_do_not_hide_a_model(hub: Hub) -> None:
    link = hub.add("z-Q4_0.gguf", 10)
    for number in range(10_000):
        (link.parent / f"{number}.json").touch()
    assert [model.path for model in hub.find().models] == [link]


def test_too_many_files_end_the_search(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_cache, "MOST_ENTRIES", 20)
    link = hub.add("z-Q4_0.gguf", 10)
    for number in range(30):
        (link.parent / f"{number}.json").touch()
    assert "more than 20 files" in hub.find().cut


def test_a_folder_that_does_not_answer_costs_one_deadline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("m-Q4_K_M.gguf", 100)
    (hub.home / ".lmstudio" / "models").mkdir(parents=True)
    answer, read = threading.Event(), os.scandir

    def scandir(folder: Path) -> object:
        if ".lmstudio" in str(folder):
            answer.wait(30)
        return read(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    found = find_cached({"HOME": str(hub.home)}, deadline_s=0.3)
    answer.set()
    assert [model.quant for model in found.models] == ["Q4_K_M"]
    assert "did not answer" in found.cut


def test_a_folder_that_may_not_be_read_is_passed_over(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is made by hand: root may read every folder."""
    hub.add("m-Q4_K_M.gguf", 100, repo="org/closed")
    hub.add("m-Q4_K_M.gguf", 100, repo="org/open")
    read = os.scandir

    def scandir(folder: Path) -> object:
        if "closed" in str(folder):
            raise PermissionError(13, "Permission denied")
        return read(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert [model.repo for model in hub.find().models] == ["org/open"]


def test_a_file_where_a_folder_should_be_is_passed_over(hub: Hub) -> None:
    hub.root.parent.mkdir(parents=True)
    hub.root.touch()
    assert hub.find() == CachedModels(())
