"""Repositories are listed and files read through the real client; every refusal has a message of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.errors import DownloadError, ModelError, QnextError, UsageError
from qnext.models import hub as hub_module
from qnext.models.hub import list_address, list_repo, open_remote
from qnext.models.hub_ref import HubRef, parse_ref
from qnext.models.published import QuantFile
from qnext.models.ranged import Deadline
from tests.hub_server import TOKEN, Asked, HubServer, Reply, hub

__all__ = ["hub"]

FILE = bytes(range(256)) * 40_000  # 10 MB
REF = HubRef("user/repo")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, noted instead of slept."""
    waits: list[float] = []

    def wait(deadline: Deadline, seconds: float) -> bool:
        waits.append(seconds)
        return deadline.left_s > 0

    monkeypatch.setattr(Deadline, "wait", wait)
    monkeypatch.setattr(hub_module.time, "sleep", waits.append)
    return waits


def refused(ref: HubRef, cache: Path) -> QnextError:
    with pytest.raises(QnextError) as caught:
        list_repo(ref, cache)
    assert caught.value.hint
    assert TOKEN not in caught.value.message + caught.value.hint
    return caught.value


def only(server: HubServer, cache: Path) -> QuantFile:
    server.add_repo("user/repo", {"m-Q4_0.gguf": FILE})
    [quant] = list_repo(REF, cache).quants
    return quant


@pytest.mark.parametrize(
    ("text", "ref"),
    [
        ("user/repo", HubRef("user/repo")),
        ("user/Repo-GGUF:UD-Q4_K_XL", HubRef("user/Repo-GGUF", quant="UD-Q4_K_XL")),
        ("hf:user/repo:Q4_K_M", HubRef("user/repo", quant="Q4_K_M")),
        ("hf://user/repo", HubRef("user/repo")),
        ("hf.co/user/repo:Q4_K_M", HubRef("user/repo", quant="Q4_K_M")),
        ("hf.co/user/repo:latest", HubRef("user/repo")),
        ("user/repo@v1.0:Q8_0", HubRef("user/repo", "v1.0", "Q8_0")),
        ("user/repo@refs/pr/3", HubRef("user/repo", "refs/pr/3")),
        ("user/repo/Q8_0/m-00001-of-00002.gguf", HubRef("user/repo", path="Q8_0/m-00001-of-00002.gguf")),
        ("https://huggingface.co/user/repo", HubRef("user/repo")),
        ("https://hf.co/user/repo:Q4_0", HubRef("user/repo", quant="Q4_0")),
        ("https://huggingface.co/user/repo/tree/main", HubRef("user/repo", "main")),
        ("https://huggingface.co/user/repo/tree/main/UD-Q2_K_XL", HubRef("user/repo", "main", "UD-Q2_K_XL")),
        (
            "https://huggingface.co/user/repo/blob/main/a%20b/m.gguf?download=true",
            HubRef("user/repo", "main", path="a b/m.gguf"),
        ),
        ("https://huggingface.co/user/repo/resolve/abc/m.gguf", HubRef("user/repo", "abc", path="m.gguf")),
        ("models/m.gguf", None),
        ("./user/repo", None),
        ("/user/repo", None),
        ("~/user/repo", None),
        ("m.gguf", None),
        ("demo", None),
        ("a/b/c", None),
        (r"C:\models\m.gguf", None),
        ("https://example.org/m.gguf", None),
    ],
)
def test_a_reference_is_understood_as_people_copy_it(text: str, ref: HubRef | None) -> None:
    assert parse_ref(text) == ref


@pytest.mark.parametrize(
    "text", ["hf:repo", "hf.co/", "https://huggingface.co/datasets/a/b", "https://hf.co/a"]
)
def test_an_address_of_the_hub_that_is_no_model_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        parse_ref(text)


def test_an_address_of_the_mirror_in_use_is_one_of_the_hub(hub: HubServer) -> None:
    assert parse_ref(f"{hub.endpoint}/user/repo") == REF


def test_a_list_has_sizes_digests_and_the_commit(hub: HubServer, tmp_path: Path) -> None:
    repo = hub.add_repo(
        "user/repo", {"m-Q4_0.gguf": b"GGUF", "Q8_0/m-Q8_0.gguf": b"GGUF larger", "a.md": b""}
    )
    found = list_repo(REF, tmp_path)
    assert (found.repo, found.revision, found.age_s) == ("user/repo", repo.head, None)
    assert [(quant.quant, quant.size_bytes) for quant in found.quants] == [("Q8_0", 11), ("Q4_0", 4)]
    assert found.quants[1].files[0].digest == repo.commits[repo.head]["m-Q4_0.gguf"].digest


def test_an_earlier_commit_can_be_listed(hub: HubServer, tmp_path: Path) -> None:
    first = hub.add_repo("user/repo", {"m-Q4_0.gguf": b"GGUF"}).head
    hub.add_repo("user/repo", {"m-Q8_0.gguf": b"GGUF"})
    assert list_repo(HubRef("user/repo", first), tmp_path).quants[0].quant == "Q4_0"
    assert list_repo(REF, tmp_path).quants[0].quant == "Q8_0"
    error = refused(HubRef("user/repo", "gone"), tmp_path)
    assert "no revision 'gone'" in error.message


def test_missing_and_private_are_both_named_because_the_hub_does_not_tell(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("user/secret", {"m-Q4_0.gguf": b"GGUF"}, access="private")
    for name in ("user/none", "user/secret"):
        error = refused(HubRef(name), tmp_path)
        assert isinstance(error, ModelError)
        assert "no repository" in error.message
        assert "private" in error.message
        assert "hf auth login" in error.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert list_repo(HubRef("user/secret"), tmp_path).quants


def test_a_token_that_is_not_accepted_is_said_and_not_shown(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    error = refused(REF, tmp_path)
    assert "does not accept the token" in error.message
    assert "hf_wrong" not in error.message + error.hint


def test_a_gated_repository_is_listed_and_its_files_name_the_page_to_accept(
    hub: HubServer, tmp_path: Path
) -> None:
    hub.add_repo("user/gated", {"m-Q4_0.gguf": FILE}, access="gated")
    [quant] = list_repo(HubRef("user/gated"), tmp_path).quants
    with pytest.raises(ModelError, match="gated") as caught:
        open_remote(quant, quant.files[0]).read(0, 4)
    assert f"{hub.endpoint}/user/gated" in caught.value.hint


def test_a_renamed_repository_is_followed_and_called_by_its_new_name(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("user/repo", {"m-Q4_0.gguf": b"GGUF"})
    hub.rename("user/repo", "user/new")
    assert list_repo(REF, tmp_path).repo == "user/new"


def test_original_weights_suggest_where_their_ggufs_are(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("user/repo", {"model.safetensors": b"x"})
    error = refused(REF, tmp_path)
    assert "no GGUF" in error.message
    assert "user/repo-GGUF" in error.hint


def test_a_repository_of_projectors_alone_says_so(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("user/repo", {"mmproj-F16.gguf": b"GGUF"})
    assert "mmproj-F16.gguf is an image projector" in refused(REF, tmp_path).message


class Failing(HubServer):
    """Answers the first `times` requests of the API with `status`."""

    status, times, headers = 503, 99, {"Retry-After": "2"}

    def reply(self, asked: Asked) -> Reply:
        if asked.path.startswith("/api") and asked.number < self.times:
            return Reply(self.status, dict(self.headers), b"<html>")
        return super().reply(asked)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again_and_then_is_an_error_worth_retrying(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting: list[float], status: int
) -> None:
    with Failing(tmp_path / "failing") as failing:
        monkeypatch.setenv("HF_ENDPOINT", failing.endpoint)
        failing.status = status
        failing.add_repo("user/repo", {"m-Q4_0.gguf": b"GGUF"})
        assert isinstance(refused(REF, tmp_path), DownloadError)
        assert no_waiting == [2.0, 2.0]
        failing.times = 4
        assert list_repo(REF, tmp_path).quants


def test_a_page_of_something_else_is_not_taken_for_the_hub(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Failing(tmp_path / "portal") as portal:
        monkeypatch.setenv("HF_ENDPOINT", portal.endpoint)
        portal.status = 200
        error = refused(REF, tmp_path)
    assert "does not answer as the Hub does" in error.message
    assert "HF_ENDPOINT" in error.hint


def test_without_a_network_the_kept_list_is_named_and_used_offline(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("user/repo", {"m-Q4_0.gguf": b"GGUF"})
    listed = list_repo(REF, tmp_path)
    hub.__exit__(None, None, None)
    error = refused(REF, tmp_path)
    assert isinstance(error, DownloadError)
    assert "HF_ENDPOINT" in error.hint
    assert "HF_HUB_OFFLINE=1" in error.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    kept = list_repo(REF, tmp_path)
    assert kept.quants == listed.quants
    assert kept.age_s is not None
    assert "offline" in refused(HubRef("user/other"), tmp_path).message
    [place] = tmp_path.glob("list-*.json")
    place.write_text(json.dumps({"repo": "user/repo", "files": 3}))  # damaged: as if there were none
    assert "offline" in refused(REF, tmp_path).message


def test_offline_what_other_programs_downloaded_is_listed(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    repo = hub.add_repo("user/repo", {"Q4_0/m-Q4_0.gguf": b"GGUF", "m-Q8_0.gguf": b"GGUF 2"})
    cache = tmp_path / "hf-home" / "hub"
    hf_hub_download("user/repo", "Q4_0/m-Q4_0.gguf", cache_dir=cache, endpoint=hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = list_repo(REF, tmp_path)
    assert found.revision == repo.head
    [quant] = found.quants
    assert quant.files[0].path == "Q4_0/m-Q4_0.gguf"
    assert quant.files[0].digest == repo.commits[repo.head]["Q4_0/m-Q4_0.gguf"].digest


# Ranges


def test_a_file_is_read_by_ranges_through_the_redirect_with_few_requests(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    quant = only(hub, tmp_path)
    source = open_remote(quant, quant.files[0])
    assert b"".join(source.read(at, 65_536) for at in range(0, 6 << 20, 65_536)) == FILE[: 6 << 20]
    assert source.read(len(FILE) - 10, 100) == FILE[-10:]
    assert source.requests == 4  # 1, 2 and 4 MiB, and the end
    assert source.fetched == (7 << 20) + 10
    resolved = [one for one in hub.log if "resolve" in one.path]
    sent = [one for one in hub.log if one.at == "cdn"]
    assert len(resolved) == 1
    assert len(sent) == 4
    assert resolved[0].authorised
    assert not any(one.authorised for one in sent)


def test_an_expired_address_is_asked_for_again(hub: HubServer, tmp_path: Path) -> None:
    quant = only(hub, tmp_path)
    source = open_remote(quant, quant.files[0], first=1000)
    assert source.read(0, 1000) == FILE[:1000]
    hub.expire_links()
    assert source.read(1000, 1000) == FILE[1000:2000]


class Faulty(HubServer):
    """Sends the first `times` answers of the storage spoilt by `spoil`."""

    times = 99
    fault = ""

    def reply(self, asked: Asked) -> Reply:
        reply = super().reply(asked)
        if asked.at != "cdn" or asked.number >= self.times:
            return reply
        match self.fault:
            case "cut":
                reply.cut_after = 700
            case "cut at once":
                reply.cut_after = 0
            case "ignores ranges":
                path = next(iter(self.repos["user/repo"].commits.values()))["m-Q4_0.gguf"].path
                return Reply(200, {}, file=path, length=len(FILE))
            case "elsewhere":
                reply.start += 7
                reply.headers["Content-Range"] = f"bytes 7-1006/{len(FILE)}"
            case "no place":
                del reply.headers["Content-Range"]
            case "other size":
                reply.headers["Content-Range"] = reply.headers["Content-Range"].replace(
                    str(len(FILE)), "5000"
                )
            case "not a number":
                reply.headers["Content-Range"] = "bytes 0-999/x"
            case "404":
                return Reply(404)
            case "416":
                return Reply(416)
            case "busy":
                return Reply(503, {"Retry-After": "3"})
        return reply


@pytest.mark.parametrize("fault", ["cut", "cut at once", "busy"])
def test_a_read_that_fails_is_taken_up_where_it_broke_off(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, no_waiting: list[float]
) -> None:
    with Faulty(tmp_path / "faulty") as faulty:
        monkeypatch.setenv("HF_ENDPOINT", faulty.endpoint)
        quant = only(faulty, tmp_path)
        faulty.fault, faulty.times = fault, 3
        source = open_remote(quant, quant.files[0], first=5000)
        assert source.read(0, 5000) == FILE[:5000]
        assert source.fetched == 5000  # nothing twice
        if fault == "busy":
            assert no_waiting == [3.0, 6.0, 12.0]
        faulty.fault, faulty.times = "cut at once", 99
        with pytest.raises(DownloadError, match="5 times"):
            source.read(5000, 5000)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("ignores ranges", "ignores ranges"),
        ("elsewhere", "was sent 'bytes 7-1006"),
        ("no place", "was sent 'no range'"),
        ("other size", "the server has 5000"),
        ("not a number", "was sent 'bytes 0-999/x'"),
        ("404", "answered 404"),
        ("416", "ends before byte 0"),
    ],
)
def test_an_answer_that_is_not_the_range_asked_for_is_refused(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, message: str
) -> None:
    with Faulty(tmp_path / "faulty") as faulty:
        monkeypatch.setenv("HF_ENDPOINT", faulty.endpoint)
        quant = only(faulty, tmp_path)
        faulty.fault = fault
        source = open_remote(quant, quant.files[0], first=1000)
        with pytest.raises(ModelError, match=message) as caught:
            source.read(0, 1000)
        assert caught.value.hint
        assert source.fetched == 0  # and a body that was not asked for is not drained


def test_reading_ends_at_the_deadline(hub: HubServer, tmp_path: Path) -> None:
    quant = only(hub, tmp_path)
    source = open_remote(quant, quant.files[0], deadline=Deadline(0.0))
    with pytest.raises(DownloadError, match="within the time"):
        source.read(0, 1000)


def test_a_plain_address_is_a_repository_of_one_quant(hub: HubServer) -> None:
    names = [f"m-Q4_0-{n:05d}-of-00002.gguf" for n in (1, 2)]
    hub.add_repo("user/files", dict.fromkeys(names, FILE[:5000]), digests=dict.fromkeys(names, "somewhere"))
    signed = f"{hub.endpoint}/user/files/resolve/main/{names[0]}?key=secret"
    [quant] = list_address(signed).quants
    assert quant.quant == "Q4_0"
    assert [file.size_bytes for file in quant.files] == [5000, 5000]
    source = open_remote(quant, quant.files[1])
    assert source.read(0, 10) == FILE[:10]
    assert "secret" not in source.name


def test_a_plain_address_that_is_no_model_is_refused(hub: HubServer) -> None:
    hub.add_repo("user/files", {"a.gguf": b"GGUF"})
    with pytest.raises(ModelError, match="answered 404"):
        list_address(f"{hub.endpoint}/user/files/resolve/main/b.gguf")
