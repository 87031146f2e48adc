"""Who keeps a run waiting, from what its processes reported."""

import sys

from mmfm_jax.train.clock import Clock
from mmfm_jax.train.watchdog import Report, Watchdog, blamed


def reports(*beats_and_steps: tuple[int, int]) -> dict[int, Report]:
    return {p: Report(beat, step, step - 1, "train") for p, (beat, step) in enumerate(beats_and_steps)}


def test_a_process_whose_beat_stands_still_is_named():
    assert blamed(reports((5, 8), (4, 7)), reports((9, 8), (4, 7)), 2) == (
        "process 1 (after step 6, in train) has no sign of life"
    )


def test_a_process_that_never_reported_is_named():
    assert "process 2 (never heard of)" in blamed(reports((5, 8), (5, 8)), reports((9, 8), (9, 8)), 3)


def test_a_process_that_has_not_begun_the_step_of_the_others_is_named():
    held = blamed(reports((5, 8), (5, 7), (5, 8)), reports((9, 8), (9, 7), (9, 8)), 3)
    assert held == "process 1 (after step 6, in train) has not begun step 8"


def test_many_are_counted_and_not_all_named():
    earlier, now = reports(*[(1, 3)] * 512), reports((2, 3), *[(1, 3)] * 511)
    told = blamed(earlier, now, 512)
    assert told.endswith("8 (after step 2, in train) and 503 more have no sign of life") and told.count("after") == 8


def test_nobody_is_blamed_when_all_wait_in_the_same_step():
    assert blamed(reports((1, 3), (1, 3)), reports((2, 3), (2, 3)), 2) == "all 2 processes wait in step 3"
    assert blamed({}, {}, 1) == ""


def test_a_report_survives_the_key_value_store():
    report = Report(3, 8, 7, "data")
    assert Report.decode(report.encode()) == report


def test_a_stall_is_told_once_and_its_stacks_name_no_folder(tmp_path):
    told: list[str] = []
    watchdog = Watchdog(tmp_path, 0.5 / 60, 3, Clock(), told.append)
    try:
        watchdog._thread.join(0.8)  # half a second without a step, and not yet a whole one
        assert len(told) == 1 and told[0].startswith("No step ended for ") and "(after step 3, in other)" in told[0]
        watchdog.ended(4)
        watchdog._thread.join(0.3)
        assert len(told) == 1
    finally:
        watchdog.close()
    stacks = (tmp_path / "stalls" / "process-0.txt").read_text()
    assert "test_watchdog.py" in stacks and "watchdog.py" in stacks
    assert not any(f'"{root}/' in stacks for root in [*sys.path, "/"] if root)
