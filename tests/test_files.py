"""Files: whole or not at all, strict JSON, and names that are taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaptive_lora.errors import InputError
from adaptive_lora.files import (
    check_new,
    check_new_file,
    finite,
    set_key,
    to_json,
    whole,
    write_json,
    write_text,
)

NAN, INF = float("nan"), float("inf")


def test_finite_replaces_every_float_that_strict_json_has_no_word_for() -> None:
    value = {"loss": NAN, "rows": [1, INF, (-INF, 2.5)], "name": "nan", "ok": True, "none": None}
    replaced = {
        "loss": None,
        "rows": [1, None, [None, 2.5]],
        "name": "nan",
        "ok": True,
        "none": None,
    }
    assert finite(value) == replaced
    assert json.loads(to_json(value)) == replaced


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    write_json(file, {"a": NAN})
    assert file.read_text() == '{\n "a": null\n}\n'
    write_text(file, "ü\n")
    assert file.read_bytes() == "ü\n".encode()
    assert names(tmp_path) == ["file.json"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_error_in_mid_write_leaves_the_old_file_and_nothing_else(
    error: BaseException, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def write() -> None:
        with whole(file) as staging:
            staging.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert file.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_all_of_it_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bool] = []
    monkeypatch.setattr("os.fsync", lambda _: synced.append((tmp_path / "folder").exists()))
    with whole(tmp_path / "folder") as staging:
        (staging / "below").mkdir(parents=True)
        for name in ("one", "below/two"):
            (staging / name).write_text(name)
    assert synced == [False, False]
    assert (tmp_path / "folder" / "below" / "two").read_text() == "below/two"
    assert names(tmp_path) == ["folder"]


def test_a_folder_that_came_into_being_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """An empty one, which a rename would replace without a word."""

    def write() -> None:
        with whole(tmp_path / "a") as staging:
            staging.mkdir()
            (staging / "new").touch()
            (tmp_path / "a").mkdir()

    with pytest.raises(InputError, match="exists; give another name"):
        write()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == []


def test_what_is_there_is_never_a_new_name(tmp_path: Path) -> None:
    (tmp_path / "file.csv").touch()
    (tmp_path / "link.csv").symlink_to(tmp_path / "nowhere")
    for name in ("file.csv", "link.csv"):
        for check in (check_new, check_new_file):
            with pytest.raises(InputError, match=f"output .*{name} exists; give another name"):
                check(tmp_path / name)
    with pytest.raises(InputError, match=r"has the ending '.txt'; expected one of .csv, .png"):
        check_new_file(tmp_path / "new.txt", endings=(".csv", ".png"))
    with pytest.raises(InputError, match=r"the folder of figure .* does not exist"):
        check_new_file(tmp_path / "absent" / "new.png", "figure", (".png",))
    assert check_new_file(tmp_path / "new.PNG", endings=(".png",)) == tmp_path / "new.PNG"
    assert check_new(tmp_path / "absent" / "new") == tmp_path / "absent" / "new"


def test_a_key_below_what_is_no_mapping_is_refused() -> None:
    with pytest.raises(InputError, match=r"--set 'data.text=a': data is 3; expected a mapping"):
        set_key({"data": 3}, "data.text=a")
