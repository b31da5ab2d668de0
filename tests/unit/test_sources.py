"""Sources: every kind is read alike, and what cannot be read says where and why."""

import gzip
import json
import re
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_jax.data.arrow import ArrowRecords
from rlhf_jax.data.sources import local_path, open_source, open_sources

TEXTS = [{"text": f"story {i}"} for i in range(5)]


def write_lines(path: Path, records=TEXTS) -> Path:
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def make_source(kind: str, folder: Path) -> str:
    if kind in ("jsonl", "json", "jsonl.gz"):
        return str(write_lines(folder / f"stories.{kind}"))
    dataset = datasets.Dataset.from_list(TEXTS)
    path = folder / ("stories.parquet" if kind == "parquet" else "stories")
    if kind == "parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    return str(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "jsonl.gz", "parquet", "directory"])
def test_every_kind_of_source_reads_the_same(kind, tmp_path):
    spec = make_source(kind, tmp_path)
    assert list(open_source(spec)) == TEXTS
    assert open_source(spec)[3] == TEXTS[3]
    assert list(open_source(spec + "[1:3]")) == TEXTS[1:3]


@pytest.mark.parametrize(
    "part, expected",
    [
        ("[:2]", TEXTS[:2]),
        ("[-2:]", TEXTS[3:]),
        ("[1:-1]", TEXTS[1:4]),
        ("[:]", TEXTS),
        ("[ 2 : 99 ]", TEXTS[2:]),
    ],
)
def test_slice_counts_as_pythons(part, expected, tmp_path):
    assert list(open_source(f"{write_lines(tmp_path / 'a.jsonl')}{part}")) == expected


def test_blank_lines_and_a_byte_order_mark_are_no_records(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"text": "é"}\n\n{"text": "b\u2028c"}'.encode())
    assert list(open_source(str(path))) == [{"text": "é"}, {"text": "b\u2028c"}]


def test_escaped_pair_is_one_character_and_an_escaped_backslash_begins_none(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "\ud83d\ude00"}' + "\n" + r'{"text": "\\ud83d"}')
    assert list(open_source(str(path))) == [{"text": "😀"}, {"text": r"\ud83d"}]


def test_hub_name_is_taken_apart(monkeypatch):
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return datasets.Dataset.from_list(TEXTS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(open_source("hub:owner/name:train[:2]")) == TEXTS[:2]
    assert list(open_source("hub:owner/name/config:test")) == TEXTS
    assert calls == [
        (("owner/name", None), {"split": "train"}),
        (("owner/name", "config"), {"split": "test"}),
    ]


def test_hub_failure_is_one_line(monkeypatch):
    def load_dataset(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        ValueError, match=r"^data.eval: hub:a/b:test cannot be loaded from the hub: no route to host$"
    ):
        open_source("hub:a/b:test", where="data.eval")


@pytest.fixture
def kept(tmp_path, monkeypatch) -> Path:
    """Returns an empty directory in which Arrow files are kept."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "rlhf_jax"


def test_parquet_stays_on_disk_and_is_converted_once(kept, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(TEXTS).to_parquet(path)
    records = open_source(str(path))
    (file,) = kept.iterdir()
    assert records._dataset.cache_files == [{"filename": str(file)}]  # mapped, not held
    written = file.stat().st_mtime_ns
    assert list(open_source(str(path))) == TEXTS
    assert file.stat().st_mtime_ns == written
    datasets.Dataset.from_list(TEXTS[1:]).to_parquet(path)
    assert list(open_source(str(path))) == TEXTS[1:]


def test_conversion_that_fails_leaves_nothing(kept, tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_list(TEXTS).to_parquet(path)

    def full(*paths):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf_jax.data.arrow.os.replace", full)
    fails(path, "a.parquet cannot be read as Parquet: [Errno 28] No space left on device")
    assert list(kept.iterdir()) == []


@pytest.fixture(params=["jsonl", "parquet"])
def hub_directory(request, tmp_path) -> Path:
    """Returns a directory that is laid out like a data set of the hub."""
    home = tmp_path / "stories"
    home.mkdir()
    if request.param == "jsonl":
        write_lines(home / "train.jsonl")
    else:
        datasets.Dataset.from_list(TEXTS).to_parquet(home / "train-00000-of-00001.parquet")
    return home


@pytest.mark.parametrize(
    "part, expected",
    [("[:3]", TEXTS[:3]), ("[2:4]", TEXTS[2:4]), ("[0:99]", TEXTS)],
)
def test_stream_reads_its_beginning(part, expected, hub_directory, kept):
    spec = f"stream:{hub_directory}:train{part}"
    records = open_source(spec)
    assert list(records) == expected
    assert records[-1] == expected[-1] and list(records[1:]) == expected[1:]


def test_stream_is_read_again_where_it_is_not_kept_and_says_so(hub_directory, kept, capsys):
    spec = f"stream:{hub_directory}:train[:2]"
    open_source(spec)
    (file,) = kept.iterdir()
    said = (
        f"[data.train] {spec.replace('[:', '[0:')} is read from its beginning and kept in {file}; a run that "
    )
    assert capsys.readouterr().err.startswith(said)
    open_source(spec)
    assert capsys.readouterr().err == ""
    file.unlink()
    assert list(open_source(spec)) == TEXTS[:2]
    assert capsys.readouterr().err.startswith(said)


def test_stream_does_not_go_by_what_was_there_before(tmp_path, kept):
    home = tmp_path / "stories"
    home.mkdir()
    write_lines(home / "train.jsonl")
    spec = f"stream:{home}:train[:2]"
    assert list(open_source(spec)) == TEXTS[:2]
    write_lines(home / "train.jsonl", TEXTS[2:])
    assert list(open_source(spec)) == TEXTS[2:4]


def test_stream_reads_no_further_than_asked(tmp_path, kept, monkeypatch):
    """What comes after is never read, or else a large set would be downloaded whole."""
    home = tmp_path / "stories"
    home.mkdir()
    for shard in range(3):
        write_lines(home / f"train-{shard}-of-3.jsonl", [{"text": f"{shard} {i}"} for i in range(2)])
    (home / "train-2-of-3.jsonl").write_text("broken")
    assert [record["text"] for record in open_source(f"stream:{home}:train[:4]")] == [
        "0 0",
        "0 1",
        "1 0",
        "1 1",
    ]
    fails(f"stream:{home}:train[:5]", "cannot be read as a stream: ")
    assert len(list(kept.iterdir())) == 1


def test_what_a_stream_needs(tmp_path, kept):
    home = tmp_path / "stories"
    home.mkdir()
    write_lines(home / "train.jsonl")
    for part in ("", "[1:]", "[-2:]", "[:-1]", "[-3:2]", "[2:2]", "[:0]"):
        fails(
            f"stream:{home}:train{part}",
            f"stream:{home}:train: a stream needs a slice that says which records are read, counted from the "
            f"beginning, such as stream:{home}:train[:10000]",
        )
    fails(
        f"stream:{home}:test[:5]", "cannot be read as a stream: Bad split: test. Available splits: ['train']"
    )
    fails(f"stream:{home}:train[7:9]", f"stream:{home}:train[7:9] holds no records")
    fails(
        "stream:name[:5]",
        "stream:name: must read stream:NAME[/CONFIG]:SPLIT, such as stream:owner/name:train",
    )
    fails(f"stream:{tmp_path}/nowhere:train[:5]", "cannot be read as a stream: Couldn't find any data file")


def test_directory_that_is_laid_out_like_the_hub(hub_directory, kept):
    assert list(open_source(f"hub:{hub_directory}:train[1:]")) == TEXTS[1:]


def test_several_sources_tell_all_their_problems(tmp_path):
    whole = write_lines(tmp_path / "a.jsonl")
    assert [len(records) for records in open_sources([f"{whole}", f"{whole}[:2]"])] == [5, 2]
    with pytest.raises(ValueError) as caught:
        open_sources([f"{tmp_path}/b.jsonl", str(whole), f"{whole}[9:]"])
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"data.train: no such file: {tmp_path}/b.jsonl")
    assert second.startswith(f"data.train: {whole}[9:] takes no records")


@pytest.mark.parametrize(
    "spec, path",
    [
        ("a/b.jsonl[:5]", "a/b.jsonl"),
        ("sets/x", "sets/x"),
        ("hub:owner/name:train[:5]", None),
        ("hub:./name:train", "name"),
        ("stream:/sets/x:train[:5]", "/sets/x"),
        ("tfds:imdb/plain:1.0.0:train", None),
        ("tfds:/sets/x/1.0.0:train", "/sets/x/1.0.0"),
    ],
)
def test_local_path(spec, path):
    assert local_path(spec) == (path and Path(path))


def fails(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        open_source(str(spec), where="data.eval")
    assert str(caught.value).startswith("data.eval: ")
    assert "\n" not in str(caught.value)


def test_missing_file_names_the_nearest(tmp_path):
    write_lines(tmp_path / "stories_train.jsonl")
    fails(
        tmp_path / "storys_train.jsonl",
        f"no such file: {tmp_path}/storys_train.jsonl; did you mean 'stories_train.jsonl'?",
    )
    fails(tmp_path / "nowhere" / "a.jsonl", f"there is no directory {tmp_path}/nowhere either")


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a"', "a.jsonl:3: broken JSON: Expecting ',' delimiter"),
        (b'["a"]', 'a.jsonl:3: a line must be an object such as {"text": "..."}, is a list'),
        (b'{"text": "\xff"}', "a.jsonl:3: broken JSON: 'utf-8' codec can't decode byte 0xff"),
        (b"[", "a JSON array must be rewritten as one object per line"),
        (b'{"text": "a\\ud83d!"}', "a.jsonl:3: broken JSON: '\\ud83d' is half of a pair"),
        (b'{"n": [{"\\uDE00": 1}]}', "a.jsonl:3: broken JSON: '\\ude00' is half of a pair"),
        (b'{"text": ' + b"[" * 200_000, "a.jsonl:3: broken JSON: brackets are nested too deeply"),
        (
            b'{"n": ' + b"1" * 5000 + b"}",
            "a.jsonl:3: broken JSON: Exceeds the limit (4300 digits) for integer",
        ),
    ],
)
def test_broken_line_is_named(line, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    fails(path, message)


def test_empty_and_emptied_sources_are_errors(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    fails(path, f"{path} holds no records; a stage needs at least one")
    write_lines(path)
    fails(f"{path}[5:]", f"{path}[5:] takes no records: there are 5; widen the slice")


def test_unknown_kinds_are_errors(tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    fails(tmp_path / "a.csv", "a.csv is of no known kind; known extensions: .jsonl .json .jsonl.gz")
    fails(tmp_path, f"{tmp_path} is not a directory that datasets.save_to_disk wrote")
    fails("hub:name", "must read hub:NAME[/CONFIG]:SPLIT")
    fails("a.jsonl[1]", "slice [1] of a.jsonl: must be [A:B]")


def test_damaged_files_are_errors(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-12])
    (tmp_path / "plain.jsonl.gz").write_text("{}")
    middle = len(whole) // 2
    (tmp_path / "bits.jsonl.gz").write_bytes(
        whole[:12] + bytes(b ^ 0xFF for b in whole[12:middle]) + whole[middle:]
    )
    (tmp_path / "a.parquet").write_text("{}")
    fails(tmp_path / "cut.jsonl.gz", "is not a whole gzip file")
    fails(tmp_path / "plain.jsonl.gz", "is not a whole gzip file")
    fails(tmp_path / "bits.jsonl.gz", "is not a whole gzip file")
    fails(tmp_path / "a.parquet", "cannot be read as Parquet")


def test_damaged_page_of_parquet_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    texts = pyarrow.table({"text": [f"story {i}" for i in range(1000)]})
    pyarrow.parquet.write_table(texts, path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[100:140] = bytes(40)
    path.write_bytes(content)
    fails(path, f"{path} cannot be read as Parquet: Corrupt snappy compressed data")


def test_column_that_cannot_be_had_is_an_error(tmp_path):
    pairs = pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64()))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "pairs": pairs}), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", f"{tmp_path}/a.parquet cannot be read as Parquet: Arrow type map<string")


def test_bytes_that_are_no_text_are_an_error(tmp_path):
    latin = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"caf\xe9"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": latin}), tmp_path / "a.parquet")
    fails(tmp_path / "a.parquet", f"{tmp_path}/a.parquet cannot be read: Column 0: In chunk 0: Invalid")


@pytest.mark.parametrize(
    "file, content, reason",
    [
        ("state.json", [], "TypeError: list indices must be integers"),
        ("state.json", {}, "KeyError: '_data_files'"),
        ("state.json", {"_data_files": []}, "IndexError: list index out of range"),
        ("dataset_info.json", [], "AttributeError: 'list' object has no attribute 'items'"),
        ("dataset_info.json", {"features": 5}, "TypeError: argument of type 'int' is not iterable"),
        (
            "dataset_info.json",
            {"features": {"story": {"dtype": "string", "_type": "Value"}}},
            "Keys mismatch",
        ),
    ],
)
def test_damaged_directory_is_an_error(file, content, reason, tmp_path):
    path = Path(make_source("directory", tmp_path))
    whole = json.loads((path / file).read_text())
    (path / file).write_text(json.dumps(whole | content if content else content))
    fails(path, f"{path} is not a directory that datasets.save_to_disk wrote: {reason}")


def test_damaged_arrow_file_is_an_error_before_a_row_is_read(tmp_path):
    """To read a row of such a file may end the process: its offsets point anywhere in memory."""
    path = Path(make_source("directory", tmp_path))
    (arrow,) = path.glob("*.arrow")
    content = arrow.read_bytes()
    offsets = b"".join(end.to_bytes(4, "little") for end in range(0, 48, 7)[: len(TEXTS) + 1])
    assert content.count(offsets) == 1
    arrow.write_bytes(content.replace(offsets, b"\xff" * len(offsets)))
    fails(path, f"{path} cannot be read: Column 0: In chunk 0: Invalid")


def test_row_that_cannot_be_read_names_the_source(tmp_path):
    table = datasets.Dataset.from_list(TEXTS)
    table.set_transform(lambda rows: 1 / 0)
    records = ArrowRecords(table, "data.eval: stories")
    for read in (list, lambda source: source[0]):
        with pytest.raises(ValueError, match=r"^data.eval: stories cannot be read: division by zero$"):
            read(records)
    with pytest.raises(IndexError):
        records[len(TEXTS)]


def test_directory_of_several_splits_names_them(tmp_path):
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(TEXTS)})
    splits.save_to_disk(tmp_path / "all")
    fails(tmp_path / "all", f"holds several data sets; name one of them: {tmp_path}/all/train")
    assert len(open_source(str(tmp_path / "all" / "train"))) == 5
