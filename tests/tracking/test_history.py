from __future__ import annotations

from pathlib import Path

from vae_dist.tracking.history import find_pictures, picture_caption, read_rows


def test_whole_rows_of_a_log_that_is_being_written(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert list(read_rows(log)) == []
    log.write_text('{"step": 1, "a": 2}\n[3]\n{"a": 1}\n{"step": 2, "a": null}\n{"step": 3, "a"')
    assert list(read_rows(log)) == [(1, {"a": 2}), (2, {"a": None})]


def test_what_is_no_number_is_none(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "a": NaN, "b": [1.0, -Infinity]}\n')
    assert list(read_rows(tmp_path / "log.jsonl")) == [(1, {"a": None, "b": [1.0, None]})]


def test_pictures_by_name_and_step(tmp_path: Path) -> None:
    for name in ("by_class_00000020", "by_class_00000010", "other", "samples_00000010"):
        (tmp_path / f"{name}.png").touch()
    found = find_pictures(tmp_path)
    assert {name: list(paths) for name, paths in found.items()} == {
        "by_class": [10, 20],
        "samples": [10],
    }


def test_captions_say_what_is_known() -> None:
    metrics = {"eval/neg_elbo_nats": 94.12, "eval/bits_per_dim": 0.1732}
    assert picture_caption(1500, metrics) == "step 1500 | 94.12 nats | 0.1732 bits/dim"
    assert picture_caption(3, {"eval/bits_per_dim": None}) == "step 3"
