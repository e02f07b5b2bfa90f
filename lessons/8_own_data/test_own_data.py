"""The check of exercise 8. Clips are empty files here: the index is checked, not what they show."""
import json

import pytest

from prepare import custom


@pytest.fixture
def folder(tmp_path):
    for kind in ("tap", "door"):
        (tmp_path / kind).mkdir()
        for i in range(10):
            (tmp_path / kind / f"{i}{'.MOV' if i % 2 else '.mp4'}").touch()
        (tmp_path / kind / "notes.txt").touch()
    (tmp_path / "readme.txt").touch()
    return tmp_path


def all_rows(answer, folder):
    found = answer.rows(folder)
    assert len(found) == 20, (
        f"there are 20 clips in two folders (.mp4, and .MOV in capitals, from a telephone), beside"
        f" some .txt files; yours gives {len(found)} rows.")
    return found


def test_every_clip_is_a_row(answer, folder):
    for row in all_rows(answer, folder):
        for key in ("id", "split", "label", "visual", "audio"):
            assert key in row, f"the row {row} has no {key}."
        assert row["visual"] == row["audio"], "sound and picture are in the same file."
        there = (folder / row["visual"]).exists() and not row["visual"].startswith("/")
        assert there, f"{row['visual']} is no path relative to the folder of the index."
        assert row["visual"].startswith(row["label"]), "the label is the name of the clip's folder."


def test_ids_are_unique(answer, folder):
    found = all_rows(answer, folder)
    ids = [row["id"] for row in found]
    assert len(set(ids)) == 20, (
        f"of 20 ids only {len(set(ids))} differ. Both classes may have a clip 1: put the class into"
        " the id.")


def test_the_last_fifth_of_each_class_is_test(answer, folder):
    found = all_rows(answer, folder)
    tests = sorted(row["visual"] for row in found if row["split"] == "test")
    wanted = ["door/8.mp4", "door/9.MOV", "tap/8.mp4", "tap/9.MOV"]
    assert tests == wanted, (
        f"test has {tests}, asked for were the last two of ten of EACH class, in the order of their"
        " names. A class that test lacks is never measured.")


def test_prepare_can_read_the_index(answer, folder):
    all_rows(answer, folder)
    file = answer.write_index(folder)
    assert file.exists(), f"{file} was not written."
    lines = file.read_text().splitlines()
    assert len(lines) == 20 and all(isinstance(json.loads(line), dict) for line in lines), (
        f"the index must have 20 lines, one JSON object each; yours has {len(lines)} lines.")
    splits, kinds = custom.read_index(file)           # what prepare.custom does first
    counts = {name: len(items) for name, items in splits.items()}
    assert counts == dict(train=16, val=0, test=4) and kinds["visual"] == "frames", (
        f"prepare.custom reads {counts} of it, not 16 to train on and 4 to test.")
