"""Data files of the field, as they are written by others: two layouts, lines of them, and a folder of pictures."""

import json
from pathlib import Path

import pytest

from prefixkv_cache.tools.data import DataError, Record, read_records

LLAVA = [
    {
        "id": "000000033471",
        "image": "coco/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors of the bus?"},
            {"from": "gpt", "value": "The bus is white and red."},
            {"from": "human", "value": "What feature can be seen on the back?"},
            {"from": "gpt", "value": "An advertisement."},
        ],
    },
    {"id": "no-picture", "conversations": [{"from": "human", "value": "Hello."}]},
]
MM_VET = {
    "v1_0": {"imagename": "v1_0.png", "question": "What is x in the equation?", "answer": "-1<AND>-5"},
    "v1_1": {"image": "v1_1.png", "question": "What is d?", "answer": 1.25, "capability": ["ocr", "math"]},
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_llava_takes_the_first_question_and_the_first_answer(tmp_path):
    records = read_records(write(tmp_path / "llava.json", LLAVA), tmp_path)
    image = tmp_path / "coco/000000033471.jpg"
    assert records == [
        Record("000000033471", "What are the colors of the bus?", (image,), "The bus is white and red."),
        Record("no-picture", "Hello.", (), None),
    ]


def test_mm_vet_by_name_with_either_spelling_of_the_image(tmp_path):
    records = read_records(write(tmp_path / "mm-vet.json", MM_VET))
    assert records == [
        Record("v1_0", "What is x in the equation?", (tmp_path / "v1_0.png",), "-1<AND>-5"),
        Record("v1_1", "What is d?", (tmp_path / "v1_1.png",), "1.25"),
    ]


def test_mm_vet_as_a_list(tmp_path):
    records = read_records(write(tmp_path / "list.json", list(MM_VET.values())))
    assert [record.id for record in records] == ["0", "1"]


def test_lines_of_both_layouts(tmp_path):
    lines = [
        json.dumps(LLAVA[0]),
        "",
        json.dumps(MM_VET["v1_0"]),
        '{"question_id": 7, "image": "a.jpg", "text": "Say:\u2028more"}',
    ]
    records = read_records(write(tmp_path / "mixed.jsonl", "\n".join(lines) + "\n"))
    assert [record.id for record in records] == ["000000033471", "1", "7"]
    assert records[2].prompt == "Say:\u2028more"


def test_images_lie_beside_the_file_unless_a_folder_is_named(tmp_path):
    (tmp_path / "pictures").mkdir()
    file = write(tmp_path / "d.json", MM_VET)
    assert read_records(file)[0].images == (tmp_path / "v1_0.png",)
    assert read_records(file, tmp_path / "pictures")[0].images == (tmp_path / "pictures/v1_0.png",)


def test_several_images_and_placeholders_in_the_middle(tmp_path):
    entry = {"image": ["a.png", "b.png"], "question": "Compare <image> with\n<image>\nthis.", "answer": None}
    (record,) = read_records(write(tmp_path / "d.json", [entry]))
    assert record.images == (tmp_path / "a.png", tmp_path / "b.png")
    assert record.prompt == "Compare\nwith\nthis."


def test_a_prompt_takes_the_place_of_the_questions(tmp_path):
    records = read_records(write(tmp_path / "d.json", MM_VET), prompt="Describe.")
    assert {record.prompt for record in records} == {"Describe."}


def test_a_folder_of_pictures_with_one_prompt(tmp_path):
    for name in ("b.PNG", "a.jpg", "notes.txt", "c.webp"):
        (tmp_path / name).touch()
    records = read_records(images=tmp_path, prompt="Describe.")
    assert [record.id for record in records] == ["a.jpg", "b.PNG", "c.webp"]
    assert records[0] == Record("a.jpg", "Describe.", (tmp_path / "a.jpg",))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", "not json", "is not JSON"),
        ("d.jsonl", '{"question": "a"}\n{', "line 2 is not JSON"),
        ("d.json", "[" * 100_000, "is not JSON"),
        ("d.json", 5, "holds no list of records"),
        ("d.json", {"question": "What?"}, "holds no list of records"),
        ("d.json", [], "holds no records"),
        ("d.json", {}, "holds no records"),
        ("d.jsonl", "\n\n", "holds no records"),
        ("d.json", ["What?"], "record 0 is a str"),
        ("d.json", [{"question": "a"}, {"image": "a.png"}], "record 1 asks nothing"),
        ("d.json", [{"question": " "}], "record 0 asks nothing"),
        ("d.json", [{"question": 5}], "record 0 asks nothing"),
        ("d.json", [{"conversations": "What?"}], "record 0 asks nothing"),
        ("d.json", [{"conversations": [5, {"from": "gpt", "value": "x"}]}], "record 0 asks nothing"),
        ("d.json", [{"question": "a", "image": 5}], "record 0 has the image"),
        ("d.json", [{"question": "a", "image": [""]}], "record 0 has the image"),
        ("d.json", {"v1": {"image": "a.png"}}, "record v1 asks nothing"),
    ],
)
def test_what_is_no_data_is_refused_by_name(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=message) as caught:
        read_records(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no data file"):
        read_records(tmp_path / "none.json")
    with pytest.raises(DataError, match="cannot read"):
        read_records(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        read_records(write(tmp_path / "d.json", MM_VET), tmp_path / "none")
    with pytest.raises(DataError, match="nothing to read"):
        read_records()
    with pytest.raises(DataError, match="needs a prompt"):
        read_records(images=tmp_path)
    with pytest.raises(DataError, match="holds no records"):
        read_records(images=Path(tmp_path), prompt="Describe.")
