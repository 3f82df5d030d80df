"""Settings: the nearest layer wins and says where it stood; a misspelt one is refused, not ignored."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.config import Paths, Settings, find_paths, load_settings
from qnext.errors import UsageError
from qnext.units import GIB


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    found = find_paths({"QNEXT_HOME": str(tmp_path)})
    found.config_dir.mkdir()
    return found


def test_qnext_home_moves_everything_and_nothing_is_created(tmp_path: Path) -> None:
    paths = find_paths({"QNEXT_HOME": str(tmp_path / "home")})
    for path in (paths.config_file, paths.results_db, paths.demo_dir, paths.headers_dir, paths.probes_dir):
        assert path.is_relative_to(tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_without_qnext_home_the_three_folders_differ() -> None:
    paths = find_paths({})
    assert paths.results_db.name == "results.db"
    assert len({paths.config_file.parent, paths.results_db, paths.cache_dir}) == 3


def test_flag_beats_environment_beats_file_beats_default(paths: Paths) -> None:
    paths.config_file.write_text('threads = 4\ncontext = 4096\nram = "24G"\nctk = "q8_0"\n')
    settings = load_settings(
        {"threads": 8, "vram": None},
        environ={"QNEXT_THREADS": "6", "QNEXT_CONTEXT": "8192", "QNEXT_UBATCH": ""},
        paths=paths,
    )
    assert (settings.threads, settings.context, settings.ram_bytes) == (8, 8192, 24 * GIB)
    assert settings.ctk == "q8_0"
    assert settings.vram_bytes is settings.ubatch is None
    assert settings.origins["threads"] == "flag"
    assert settings.origins["context"] == "environment QNEXT_CONTEXT"
    assert settings.origins["ram_bytes"] == f"file {paths.config_file}"
    assert settings.origins["ubatch"] == "default"


def test_every_setting_has_an_origin_and_no_file_is_fine(paths: Paths) -> None:
    settings = load_settings(environ={}, paths=paths)
    assert set(settings.origins) == set(Settings.__slots__) - {"origins"}
    assert set(settings.origins.values()) == {"default"}


def test_an_unknown_key_names_the_nearest(paths: Paths) -> None:
    paths.config_file.write_text("thread = 4\n")
    with pytest.raises(UsageError) as caught:
        load_settings(environ={}, paths=paths)
    assert str(paths.config_file) in caught.value.message
    assert "Did you mean 'threads'?" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    ["threads = 0", "threads = true", "threads = 1.5", 'ram = "much"', "ram = -1", 'ctk = "q3_k"', "ctv = 8",
     "hardware = 1", "threads = [4]", "threads ="],
)  # fmt: skip
def test_an_unusable_value_is_refused_and_its_place_named(paths: Paths, text: str) -> None:
    paths.config_file.write_text(text + "\n")
    with pytest.raises(UsageError) as caught:
        load_settings(environ={}, paths=paths)
    assert str(paths.config_file) in caught.value.message
    assert caught.value.hint


def test_a_config_file_that_is_no_text_is_refused(paths: Paths) -> None:
    paths.config_file.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError):
        load_settings(environ={}, paths=paths)
