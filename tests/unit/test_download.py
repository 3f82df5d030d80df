"""Downloads end whole and verified, or as a clear error; what has a final name has the right contents."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.errors import DownloadError, ModelError, QnextError
from qnext.models import download as downloading
from qnext.models import fetch as fetching
from qnext.models.download import Progress, check_space, download, verify
from qnext.models.held import find_places
from qnext.models.published import QuantFile, RepoFile
from tests.hub_faults import (
    QUICK,
    REPO,
    Fault,
    FaultyHub,
    all_faults,
    answer,
    corrupt_files,
    cut,
    fill_disk,
    kill_at,
    make_quant,
    mount_small_disk,
    run_fault,
    serve_faults,
    slow,
    start_download,
    try_download,
    unmount,
)
from tests.hub_server import TOKEN

SIZE = 700_000
FAULTS = {fault.name: fault for fault in all_faults(SIZE)}
SOME = (
    "cut at 3/10",
    "cut after every tenth",
    "cut before the headers, always",
    "truncated, no length stated, once",
    "wrong bytes, always",
    "one bit wrong",
    "other bytes after a cut",
    "longer than listed",
    "a login page",
    "compressed",
    "another range, once",
    "ranges ignored and cut on the way",
    "digest changed on the server",
    "gated",
    "link expired, once",
    "416, once",
    "429, always",
    "429 for an hour",
    "503, three times",
    "500 of the Hub, always",
    "redirect loop",
    "redirect to a dead host, always",
    "a byte at a time, once",
    "silent, once",
    "part of an earlier run, wrong",
    "part longer than the file",
)


hub = pytest.fixture(serve_faults)


@pytest.mark.parametrize("name", SOME)
def test_a_fault_ends_verified_or_as_a_clear_error_and_the_next_run_succeeds(
    name: str, tmp_path: Path
) -> None:
    outcome = run_fault(FAULTS[name], tmp_path, [SIZE])
    assert outcome.holds, outcome
    assert FAULTS[name].says in outcome.first


def test_what_is_here_is_not_fetched_again(hub: FaultyHub, tmp_path: Path) -> None:
    quant, _ = make_quant(hub, [SIZE, SIZE])
    hub.fault = Fault("", "error", cut(SIZE // 2), times=1)
    progress: list[Progress] = []
    download(quant, tmp_path / "cache", patience=QUICK, on_progress=progress.append)
    assert hub.sent(quant.files[0].digest or "") == SIZE
    before = len(hub.log)
    download(quant, tmp_path / "cache", patience=QUICK)
    assert len(hub.log) == before
    assert all(one.total_bytes == 2 * SIZE and 0 <= one.done_bytes <= 2 * SIZE for one in progress)


def test_a_kept_part_is_hashed_and_only_the_rest_is_fetched(hub: FaultyHub, tmp_path: Path) -> None:
    quant, contents = make_quant(hub, [SIZE])
    (place,) = find_places(quant, tmp_path)
    place.part.parent.mkdir(parents=True)
    place.part.write_bytes(contents[place.file.path][: SIZE - 1000])
    assert (place.state(), place.bytes_here()) == ("part", SIZE - 1000)
    download(quant, tmp_path)
    assert hub.sent(place.digest) == 1000
    assert not place.part.exists()


def test_the_end_of_a_part_from_before_the_machine_started_is_fetched_again(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power the last bytes can be zeros although the size is right."""
    monkeypatch.setattr(fetching, "SYNC_BYTES", 10_000)
    quant, contents = make_quant(hub, [SIZE])
    (place,) = find_places(quant, tmp_path)
    place.part.parent.mkdir(parents=True)
    place.part.write_bytes(contents[place.file.path][: SIZE - 15_000] + bytes(10_000))
    os.utime(place.part, (0, 0))
    download(quant, tmp_path)
    assert hub.sent(place.digest) == 25_000
    assert corrupt_files(tmp_path) == []


def test_the_token_goes_to_the_hub_alone_and_into_no_message(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    quant, _ = make_quant(hub, [SIZE])
    hub.repos[REPO].access = "gated"
    monkeypatch.setenv("HF_TOKEN", "hf_not_accepted")
    refused = try_download(quant, tmp_path / "cache")
    assert "token" in refused and "hf_not_accepted" not in refused
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert try_download(quant, tmp_path / "cache") == "verified"
    assert {one.authorised for one in hub.log if one.at == "hub" and "resolve" in one.path} == {True}
    assert {one.authorised for one in hub.log if one.at == "cdn"} == {False}
    for broken in ("hf_tölken", "hf_to\x01ken"):
        monkeypatch.setenv("HF_TOKEN", broken)
        message = try_download(quant, tmp_path / "elsewhere")
        assert "token" in message and broken not in message
    ours = [one.getMessage() for one in caplog.records if one.name.startswith("qnext")]
    assert "hf_to" not in caplog.text and not any("signature" in message for message in ours)


def test_other_programs_find_what_was_fetched(hub: FaultyHub, tmp_path: Path) -> None:
    from huggingface_hub import hf_hub_download

    from qnext.models.hub_cache import find_cached

    cache = tmp_path / "hf" / "hub"
    quant, contents = make_quant(hub, [SIZE, 1000])
    first, second = download(quant, cache)
    found = hf_hub_download(REPO, second.file.path, cache_dir=cache, local_files_only=True)
    assert Path(found) == second.path
    assert Path(found).read_bytes() == contents[second.file.path]
    assert first.path.readlink() == Path(f"../../../blobs/{first.digest}")
    assert (cache / "models--user--repo-GGUF" / "refs" / "main").read_text() == quant.revision
    models = find_cached({"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}).models
    assert [(one.repo, one.shards, one.complete) for one in models] == [(REPO, 2, True)]


def test_a_file_that_another_revision_shares_is_linked_without_a_request(
    hub: FaultyHub, tmp_path: Path
) -> None:
    quant, _ = make_quant(hub, [SIZE])
    download(quant, tmp_path)
    before = len(hub.log)
    later = replace(quant, revision="f" * 40)
    (place,) = download(later, tmp_path)
    assert place.path.stat().st_size == SIZE and "f" * 40 in str(place.path)
    assert len(hub.log) == before


def test_a_file_gone_bad_is_named_and_replaced_only_by_a_good_one(hub: FaultyHub, tmp_path: Path) -> None:
    quant, _ = make_quant(hub, [SIZE, SIZE])
    places = download(quant, tmp_path)
    with places[1].blob.open("r+b") as file:
        file.write(b"oops")
    assert verify(places) == {places[0]: True, places[1]: False}
    hub.fault = Fault("", "error", answer(500))
    with pytest.raises(DownloadError, match="500"):
        download(quant, tmp_path, again=[places[1]], patience=QUICK)
    assert places[1].path.read_bytes()[:4] == b"oops"
    hub.fault = None
    download(quant, tmp_path, again=[places[1]])
    assert verify(places) == dict.fromkeys(places, True)
    places[0].blob.write_bytes(b"short")
    assert [place.state() for place in places] == ["wrong size", "here"]
    download(quant, tmp_path)
    assert corrupt_files(tmp_path) == []


def test_where_links_are_not_known_the_file_itself_stands_in_the_snapshot(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # what FAT answers

    monkeypatch.setattr(Path, "symlink_to", refuse)
    quant, contents = make_quant(hub, [SIZE])
    (place,) = download(quant, tmp_path)
    assert place.path.is_file() and not place.path.is_symlink() and not place.blob.exists()
    before = len(hub.log)
    download(quant, tmp_path)
    assert len(hub.log) == before
    place.path.write_bytes(bytes(SIZE))
    assert verify([place]) == {place: False}
    download(quant, tmp_path, again=[place])
    assert place.path.read_bytes() == contents[place.file.path]


def test_offline_a_complete_model_is_given_and_an_incomplete_one_says_why(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant, _ = make_quant(hub, [SIZE])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE"):
        download(quant, tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    download(quant, tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert download(quant, tmp_path)[0].state() == "here"


@pytest.mark.parametrize("path", ["../../evil.gguf", "/etc/evil.gguf", "a\\..\\evil.gguf", ""])
def test_names_that_leave_the_repository_are_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a file's name"):
        find_places(QuantFile(REPO, "a" * 40, "Q4", (RepoFile(path, 5, "b" * 64),)), tmp_path)


def test_names_of_blobs_and_snapshots_are_digests_and_commits(tmp_path: Path) -> None:
    for digest in (None, "../" + "b" * 61, "b" * 40):
        with pytest.raises(ModelError, match="SHA-256"):
            find_places(QuantFile(REPO, "a" * 40, "Q4", (RepoFile("m.gguf", 5, digest),)), tmp_path)
    with pytest.raises(ModelError, match="commit"):
        find_places(QuantFile(REPO, "../main", "Q4", (RepoFile("m.gguf", 5, "b" * 64),)), tmp_path)


def test_a_digest_that_the_list_lacks_is_asked_for(hub: FaultyHub, tmp_path: Path) -> None:
    quant, _ = make_quant(hub, [SIZE])
    unstated = replace(quant, files=tuple(replace(file, digest=None) for file in quant.files))
    (place,) = download(unstated, tmp_path)
    assert place.digest == quant.files[0].digest
    assert place.state() == "here"


def test_a_lack_of_space_is_said_before_anything_is_asked(hub: FaultyHub, tmp_path: Path) -> None:
    huge = QuantFile(REPO, "a" * 40, "Q4", (RepoFile("m.gguf", 1 << 60, "b" * 64),))
    with pytest.raises(DownloadError, match="free"):
        download(huge, tmp_path)
    assert not hub.log


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_filesystem_without_large_files_is_noticed_before_anything_is_asked(tmp_path: Path) -> None:
    import resource

    if downloading.shutil.disk_usage(tmp_path).free < 7 << 30:
        pytest.skip("needs 7 GiB free to get past the check of free space (nothing is written)")
    six = QuantFile(REPO, "a" * 40, "Q4", (RepoFile("m.gguf", 6 << 30, "b" * 64),))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5 << 30, hard))
    try:
        with pytest.raises(DownloadError, match="cannot hold a file that large"):
            check_space(find_places(six, tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_space(find_places(six, tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 48 MiB."""
    if not mount_small_disk(tmp_path / "disk", 48):
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield tmp_path / "disk"
    unmount(tmp_path / "disk")


def test_a_disk_that_fills_up_on_the_way_keeps_the_part(hub: FaultyHub, small_disk: Path) -> None:
    size = 8 << 20
    quant, _ = make_quant(hub, [size])
    hub.fault = Fault("", "error", fill_disk(small_disk, left=2 << 20), times=1)
    with pytest.raises(DownloadError, match=r"is full|filling up") as caught:
        download(quant, small_disk)
    assert "here and kept" in caught.value.message and "Free some space" in caught.value.hint
    (place,) = find_places(quant, small_disk)
    kept = place.bytes_here()
    assert 1 << 20 < kept < size
    (small_disk / "filler").unlink()
    sent = hub.sent()
    download(quant, small_disk)
    assert hub.sent() - sent == size - kept
    assert corrupt_files(small_disk) == []


def test_after_kill_9_the_next_process_goes_on(hub: FaultyHub, tmp_path: Path) -> None:
    quant, _ = make_quant(hub, [3 << 20])
    (place,) = find_places(quant, tmp_path)

    hub.fault = Fault("", "verified", slow(2e6), times=1)
    kept = kill_at(start_download(quant, tmp_path), place, 1 << 20)
    assert 1 << 20 <= kept < place.file.size_bytes
    assert place.state() == "part"
    before = hub.sent()
    assert start_download(quant, tmp_path).wait(timeout=20) == 0
    assert corrupt_files(tmp_path) == []
    assert place.path.stat().st_size == place.file.size_bytes
    assert place.file.size_bytes - kept <= hub.sent(place.digest) - before + (1 << 20)


def test_two_processes_fetch_one_file_once(hub: FaultyHub, tmp_path: Path) -> None:
    quant, _ = make_quant(hub, [1 << 20, 1 << 20])

    hub.fault = Fault("", "verified", slow(2e6))
    children = [start_download(quant, tmp_path) for _ in range(2)]
    assert [child.wait(timeout=30) for child in children] == [0, 0]
    assert sum(one.sent for one in hub.log if one.at == "cdn") == quant.size_bytes
    assert corrupt_files(tmp_path) == []


def test_the_lock_is_the_one_of_the_client(hub: FaultyHub, tmp_path: Path) -> None:
    """While hf_hub_download fetches a blob, we wait; it names its locks so."""
    from filelock import FileLock

    quant, _ = make_quant(hub, [SIZE])
    lock = tmp_path / ".locks" / "models--user--repo-GGUF" / f"{quant.files[0].digest}.lock"
    lock.parent.mkdir(parents=True)
    remarks: list[str] = []
    held = FileLock(lock, thread_local=False)  # released by another thread
    held.acquire()
    threading.Timer(0.5, held.release).start()
    download(quant, tmp_path, on_progress=lambda progress: remarks.append(progress.remark))
    assert "another process is fetching it" in remarks


def test_a_bug_in_a_thread_reaches_the_caller(
    hub: FaultyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    quant, _ = make_quant(hub, [SIZE])
    monkeypatch.setattr(fetching.Fetch, "_fetch", broken)
    with pytest.raises(ZeroDivisionError):
        download(quant, tmp_path)


def test_a_folder_that_cannot_be_written_is_named(hub: FaultyHub, tmp_path: Path) -> None:
    quant, _ = make_quant(hub, [SIZE])
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DownloadError) as caught:
        download(quant, tmp_path / "cache")
    assert str(tmp_path / "cache") in caught.value.message


def test_the_faults_prove_something(hub: FaultyHub, tmp_path: Path) -> None:
    """The client alone gives wrong bytes of the right length their final name."""
    from huggingface_hub import hf_hub_download

    quant, _ = make_quant(hub, [SIZE])
    hub.fault = FAULTS["wrong bytes, always"]
    found = hf_hub_download(
        REPO,
        quant.files[0].path,
        revision=quant.revision,
        cache_dir=tmp_path / "theirs",
        endpoint=hub.endpoint,
    )
    assert hashlib.sha256(Path(found).read_bytes()).hexdigest() != quant.files[0].digest
    with contextlib.suppress(QnextError):
        download(quant, tmp_path / "ours", patience=QUICK)
    assert corrupt_files(tmp_path / "ours") == []
