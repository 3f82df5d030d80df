"""Headers read from a server are those that are read from the files, in few bytes, and once per digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import DownloadError, ModelError
from qnext.models import vocabulary_twin
from qnext.models.gguf_parse import ShardHeader, read_shard
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader, SkippedArray
from qnext.models.hub import list_address, list_repo
from qnext.models.hub_ref import HubRef
from qnext.models.published import Listing, QuantFile
from qnext.models.ranged import Deadline
from qnext.models.remote_header import read_remote_headers
from qnext.models.vocabulary_twin import RecordedSource, TwinSource, find_vocabulary
from tests.gguf_writing import (
    I32,
    STR,
    U64,
    MemorySource,
    Value,
    array,
    build,
    sample_metadata,
    sample_shards,
    sample_tensors,
    string,
)
from tests.hub_server import Asked, HubServer, Reply, hub

__all__ = ["hub"]

REPO = "user/repo"
TOKENS = [f"token number {n}" for n in range(50_000)]


def model(
    file_type: int, tokens: list[str] = TOKENS, *, named: str = "Sample", token_types: int = 20_000
) -> bytes:
    """A file whose header is mostly its vocabulary of 1 MB, which follows some 300 bytes."""
    metadata = {key: value for key, value in sample_metadata().items() if "tokenizer" not in key}
    metadata |= {
        "general.name": string(named),
        "general.file_type": Value(U64, file_type),
        "tokenizer.ggml.tokens": array(STR, tokens),
        "tokenizer.ggml.token_type": array(I32, [1] * token_types),
        "tokenizer.chat_template": string("{{ messages }} ünïcode"),
    }
    return bytes(build(metadata, sample_tensors()).data)


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """Three quants with one vocabulary, after names of different lengths, and a split one with its own."""
    shards = {f"Q8_0/m-Q8_0-{n:05d}-of-00003.gguf": bytes(s.data) for n, s in enumerate(sample_shards(), 1)}
    return {
        "m-Q2_K.gguf": model(10),
        "m-Q4_0.gguf": model(2, named="Sample of another length"),
        "m-Q5_K_M.gguf": model(17, [*TOKENS[:-1], "one token is another"]),
        **shards,
    }


def listed(server: HubServer, files: dict[str, bytes], cache: Path) -> Listing:
    server.add_repo(REPO, dict(files))
    return list_repo(HubRef(REPO), cache)


def test_all_quants_are_read_as_from_the_disk(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    progress: list[tuple[int, int]] = []
    quants = listed(hub, files, tmp_path).quants
    headers = read_remote_headers(quants, tmp_path, on_progress=lambda *seen: progress.append(seen))
    assert list(headers) == list(quants)
    assert progress == [(n, 6) for n in range(1, 7)]
    for quant, header in headers.items():
        assert header.paths == tuple(Path(file.path) for file in quant.files)
        local = read_header(tmp_path / "hub" / REPO / "0" / header.paths[0])
        assert replace(local, paths=header.paths) == header


def test_the_vocabulary_is_fetched_once_where_it_is_the_same(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    read_remote_headers(listed(hub, files, tmp_path).quants, tmp_path)
    digests = {path: file.digest for path, file in hub.repos[REPO].commits[hub.repos[REPO].head].items()}
    sent = sorted(hub.sent(digests[path]) for path in ("m-Q2_K.gguf", "m-Q4_0.gguf", "m-Q5_K_M.gguf"))
    assert sent[0] < 400_000  # the beginning and the end
    assert sent[2] > len(files["m-Q2_K.gguf"]) * 0.9  # the first, whole


def test_a_header_is_handed_over_while_others_are_fetched(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    handed_over = Event()
    in_time: list[bool] = []

    class Waiting(HubServer):
        """Answers for one file only after the header of another has been handed over."""

        late = "?"

        def reply(self, asked: Asked) -> Reply:
            if self.late in asked.path:
                in_time.append(handed_over.wait(10))
            return super().reply(asked)

    taken: list[str] = []

    def take(quant: QuantFile, header: ModelHeader) -> None:
        assert header.tensors
        taken.append(quant.quant)
        handed_over.set()

    with Waiting(tmp_path / "waiting") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        quants = listed(server, files, tmp_path).quants
        server.late = quants[1].files[0].path
        headers = read_remote_headers(quants, tmp_path, on_header=take)
    assert in_time and all(in_time)
    assert list(headers) == list(quants)
    assert sorted(taken) == sorted(quant.quant for quant in quants)


def test_another_thread_ends_the_reading(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = Deadline()
    quants = listed(hub, files, tmp_path).quants
    read_remote_headers(quants[:1], tmp_path, within=deadline)
    assert deadline.left_s > 0  # what was read in time leaves the time to others
    deadline.cancel()
    with pytest.raises(DownloadError, match="time allowed"):
        read_remote_headers(quants[1:], tmp_path, within=deadline)


def test_a_header_is_fetched_once_for_good(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    quants = listed(hub, files, tmp_path).quants
    first = read_remote_headers(quants, tmp_path)
    asked = len(hub.log)
    assert read_remote_headers(quants, tmp_path) == first
    assert len(hub.log) == asked
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert read_remote_headers(list_repo(HubRef(REPO), tmp_path).quants, tmp_path) == first


@pytest.mark.parametrize("spoilt", [b"", b"not compressed", None])
def test_a_damaged_cache_is_read_anew(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], spoilt: bytes | None
) -> None:
    [quant] = listed(hub, {"m-Q2_K.gguf": files["m-Q2_K.gguf"]}, tmp_path).quants
    first = read_remote_headers([quant], tmp_path)
    [place] = tmp_path.glob("*.header")
    place.write_bytes(place.read_bytes()[:-5] if spoilt is None else spoilt)
    assert read_remote_headers([quant], tmp_path) == first


def test_a_cache_that_cannot_be_written_costs_only_time(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    [quant] = listed(hub, {"m-Q2_K.gguf": files["m-Q2_K.gguf"]}, tmp_path).quants
    blocked = tmp_path / "a file"
    blocked.write_text("")
    assert read_remote_headers([quant], blocked)


def test_a_file_in_the_hugging_face_cache_is_read_there(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    from huggingface_hub import hf_hub_download

    [quant] = listed(hub, {"m-Q2_K.gguf": files["m-Q2_K.gguf"]}, tmp_path).quants
    cache = tmp_path / "hf-home" / "hub"
    hf_hub_download(REPO, "m-Q2_K.gguf", cache_dir=cache, endpoint=hub.endpoint)
    asked = len(hub.log)
    assert read_remote_headers([quant], tmp_path)[quant].tensors
    assert len(hub.log) == asked


def test_a_broken_quant_is_told_and_the_others_are_read(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    whole = files["m-Q2_K.gguf"]
    broken = {"m-Q8_0.gguf": b"<html>" + whole, "m-Q4_0.gguf": whole[:-100], "m-Q2_K.gguf": whole}
    quants = listed(hub, broken, tmp_path).quants
    failed: dict[str, str] = {}

    def note(quant: QuantFile, error: ModelError) -> None:
        failed[quant.quant] = error.message

    headers = read_remote_headers(quants, tmp_path, on_failure=note)
    assert [quant.quant for quant in headers] == ["Q2_K"]
    assert "a web page" in failed["Q8_0"]
    assert "are missing" in failed["Q4_0"]
    with pytest.raises(ModelError, match=r"user/repo/m-Q8_0\.gguf"):
        read_remote_headers(quants, tmp_path)


def test_offline_a_header_that_is_not_kept_is_named(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    [quant] = listed(hub, {"m-Q2_K.gguf": files["m-Q2_K.gguf"]}, tmp_path).quants
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"user/repo/m-Q2_K\.gguf: offline"):
        read_remote_headers([quant], tmp_path)


def test_a_dead_storage_ends_the_whole_reading(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(HubServer):
        def reply(self, asked: Asked) -> Reply:
            return Reply(503) if asked.at == "cdn" else super().reply(asked)

    monkeypatch.setattr(Deadline, "wait", lambda deadline, seconds: True)
    with Dead(tmp_path / "dead") as dead:
        monkeypatch.setenv("HF_ENDPOINT", dead.endpoint)
        quants = listed(dead, files, tmp_path).quants
        with pytest.raises(DownloadError, match="answered 503"):
            read_remote_headers(quants, tmp_path, on_failure=lambda *failure: None)


def test_a_plain_address_is_read_like_a_repository(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes]
) -> None:
    hub.add_repo(REPO, dict(files))
    [quant] = list_address(f"{hub.endpoint}/{REPO}/resolve/main/m-Q4_0.gguf?key=1").quants
    header = read_remote_headers([quant], tmp_path)[quant]
    assert header.paths == (Path("m-Q4_0.gguf"),)
    assert header.metadata["general.name"] == "Sample of another length"
    assert not list(tmp_path.glob("*.header"))  # nothing says that it stays the same file


SMALL = ["a", "bb", "token", "ünïcode", "x" * 70]


@pytest.mark.thorough
@settings(deadline=None, max_examples=100)
@given(
    st.integers(0, 1000).map(Random),
    st.lists(st.tuples(st.integers(0, 199), st.sampled_from(SMALL)), max_size=4),
    st.sampled_from([0, 1, 10]),
    st.sampled_from(["Sample", "Sample of another length"]),
)
def test_a_header_read_beside_another_is_the_one_in_the_file(
    random: Random, changes: list[tuple[int, str]], fewer: int, name: str
) -> None:
    """Whatever differs between two files, borrowing the vocabulary changes nothing that is planned with.

    Two differences that make up for each other in length may hide in the count of a later array.
    """
    tokens = random.choices(SMALL, k=200)
    other = list(tokens)
    for place, token in changes:
        other[place] = token
    with pytest.MonkeyPatch.context() as patch:  # so that 200 tokens are a large vocabulary
        for limit, value in (
            ("HEAD_BYTES", 700),
            ("_SAME_HEAD", 64),
            ("_SAME_TAIL", 64),
            ("_LARGE_ARRAY", 200),
        ):
            patch.setattr(vocabulary_twin, limit, value)
        recorded = RecordedSource(MemorySource(model(1, tokens, token_types=1100)))
        known = find_vocabulary(recorded, read_shard(recorded).metadata)
        assert known is not None
        source = MemorySource(model(2, other, named=name, token_types=1100 - fewer))
        twin = TwinSource(source, known)
        if tokens == other and not fewer:
            assert twin.borrowed
        assert without_counts(read_shard(twin)) == without_counts(read_shard(source))


def without_counts(header: ShardHeader) -> ShardHeader:
    kinds = {
        key: value.element_type if isinstance(value, SkippedArray) and not key.endswith(".tokens") else value
        for key, value in header.metadata.items()
    }
    return replace(header, metadata=kinds)
