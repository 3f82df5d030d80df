"""Faults injected into downloads: how each ends."""

from __future__ import annotations

from claims import Figure, claim, run_script


@claim(
    "pull-faults",
    "faults injected into pull: every one resumed-and-verified or a clear error; 0 corrupt accepted",
    bar="0 corrupt files, 0 faults that end otherwise",
    minutes=2,
)
def measure_pull_faults() -> Figure:
    found = run_script("bench_pull_faults.py", check=True)
    wrong = len(found["not_as_they_have_to"])
    skipped = f"; not possible here: {', '.join(found['skipped'])}" if found["skipped"] else ""
    detail = (
        f"{found['faults']} faults: {found['verified']} resumed and verified, {found['clear_errors']} clear "
        f"errors, {found['killed']} killed, {wrong} otherwise; by the next run "
        f"{found['verified_by_the_next_run']} verified{skipped}"
    )
    corrupt = found["corrupt_accepted"]
    return Figure(corrupt, "corrupt files", corrupt == 0 and wrong == 0, detail)
