"""TFDS: a small set is built and read back; what cannot be read says why and what to do."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rlhf_jax.data.sources import open_source

RECORDS = [
    {
        "prompt": f"Où est {i} ?",
        "label": i % 2,
        "score": i / 4,
        "is_short": i > 1,
        "tags": ["a", "é"][:i],
        "grid": [[i, 1], [2, 3]],
        "messages": [{"role": "user", "content": f"n{i}"}, {"role": "assistant", "content": ""}][:i],
        "meta": {"source": {"name": "web"}, "years": list(range(i))},
    }
    for i in range(4)
]


class Demos(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="small"), tfds.core.BuilderConfig(name="large"))

    def _info(self):
        f = tfds.features
        message = {"role": f.Text(), "content": f.Text()}
        features = {
            "prompt": f.Text(),
            "label": f.ClassLabel(num_classes=2),
            "score": np.float32,
            "is_short": np.bool_,
            "tags": f.Sequence(f.Text()),
            "grid": f.Tensor(shape=(2, 2), dtype=np.int64),
            "messages": f.Sequence(message),
            "meta": {"source": {"name": f.Text()}, "years": f.Sequence(np.int32)},
        }
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        latin = {**RECORDS[0], "prompt": b"caf\xe9"}
        return {"train": enumerate(RECORDS), "test": enumerate(RECORDS[:1]), "latin": [(0, latin)]}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Returns a TFDS directory with demos/small/1.2.0."""
    root = tmp_path_factory.mktemp("tfds")
    Demos(config="small", data_dir=root, file_format="array_record").download_and_prepare()
    return root


@pytest.fixture
def root(prepared, tmp_path, monkeypatch) -> Path:
    """Returns a copy of the directory, the one that TFDS_DATA_DIR names."""
    shutil.copytree(prepared, tmp_path / "sets")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    return tmp_path / "sets"


@pytest.mark.parametrize(
    "name", ["demos/small", "demos/small:1.2.0", "{root}/demos/small/1.2.0", "{root}/demos/small/1.2.0/"]
)
def test_set_is_read_by_name_or_path_as_plain_values(name, root):
    records = open_source(f"tfds:{name.format(root=root)}:train")
    found = sorted(records, key=lambda record: record["prompt"])
    assert found == RECORDS  # TFDS has an order of its own
    assert json.loads(json.dumps(found)) == RECORDS  # no numpy type hides behind an equal number
    assert [records[i] for i in range(4)] == list(records)


def test_slice_takes_a_part_of_a_split(root):
    whole = list(open_source("tfds:demos/small:train"))
    part = open_source("tfds:demos/small:train[1:-1]")
    assert list(part) == whole[1:3] == list(part[:5])
    assert part[-1] == whole[2]
    assert list(part[1:]) == whole[2:3]
    with pytest.raises(IndexError):
        part[2]


def test_newest_version_is_read(root):
    shutil.copytree(root / "demos/small/1.2.0", root / "demos/small/1.10.0")
    (root / "demos/small/1.20.0").mkdir()  # was never finished
    newest = root / "demos/small/1.10.0/dataset_info.json"
    newest.write_text(newest.read_text().replace('"train"', '"newest"').replace("1.2.0", "1.10.0"))
    for shard in newest.parent.glob("demos-train*"):
        shard.rename(str(shard).replace("-train", "-newest"))
    assert len(open_source("tfds:demos/small:newest")) == 4
    assert len(open_source("tfds:demos/small:1.2.0:train")) == 4


def test_tensorflow_is_not_imported(root):
    program = (
        "import sys; from rlhf_jax.data.sources import open_source; "
        "print(len(list(open_source('tfds:demos/small:train'))), 'tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "False"]


def fails(spec: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        list(open_source(str(spec), where="data.eval"))
    assert str(caught.value).startswith("data.eval: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("demos/small", "must read tfds:NAME[/CONFIG][:VERSION]:SPLIT"),
        ("demos/small:", "must read tfds:NAME[/CONFIG][:VERSION]:SPLIT"),
        ("demos/small:train[:10%]", "slice [:10%] of tfds:demos/small:train: must be [A:B]"),
        ("demos/small:trian", "no split 'trian'; splits: train, test, latin; did you mean 'train'?"),
        ("demos/smal:train", "demos has no configuration 'smal': there are small; did you mean 'small'?"),
        ("demos:train", "demos has several configurations, name one: there are small"),
        ("demos/small:2.0.0:train", "demos/small has no version '2.0.0' in"),
        ("demo/small:train", "no TFDS set 'demo/small' is prepared in"),
        ("demo/small:train", "; did you mean 'demos'?; prepare it with python -c"),
        (
            "imdb_reviews:train",
            "tfds.builder('imdb_reviews', file_format='array_record').download_and_prepare()",
        ),
        ("{root}/demos/small/1.0:train", "{root}/demos/small/1.0 is no directory"),
        (
            "{root}/demos:train",
            "has no dataset_info.json, and so is no prepared TFDS set; did you mean {root}/",
        ),
    ],
)
def test_what_is_not_there_is_an_error(spec, message, root):
    fails("tfds:" + spec.format(root=root), message.replace("{root}", str(root)))


def test_nothing_prepared_at_all(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
    fails("tfds:demos:train", f"no TFDS set 'demos' is prepared in {tmp_path}/nowhere")


def test_tfrecord_set_says_how_it_is_converted(root):
    """A set that was prepared as tfrecord differs in its metadata and in its shards, which are not opened."""
    directory = root / "demos/small/1.2.0"
    info = directory / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for shard in directory.glob("*array_record*"):
        shard.rename(str(shard).replace("array_record", "tfrecord"))
    fails(
        "tfds:demos/small:train",
        f"{directory} is stored as tfrecord, which cannot be read in any order, nor without TensorFlow; "
        "convert it once, in a Python environment of its own: pip install tensorflow ",
    )
    fails(
        "tfds:demos/small:train",
        f"tfds convert_format --out_file_format=array_record --dataset_version_dir {directory}",
    )


def damage(path: Path, how: str) -> None:
    match how:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        case "empty":
            path.write_bytes(b"")
        case "bits":
            content = path.read_bytes()
            path.write_bytes(content[:200] + bytes(b ^ 0xFF for b in content[200:600]) + content[600:])


@pytest.mark.parametrize("how", ["gone", "cut", "empty", "bits"])
def test_damaged_shard_is_an_error(how, root):
    (shard,) = (root / "demos/small/1.2.0").glob("*train*")
    damage(shard, how)
    fails("tfds:demos/small:train", "tfds:demos/small:train cannot be read: ")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_metadata_are_an_error(file, root):
    (root / "demos/small/1.2.0" / file).write_text("{")
    fails("tfds:demos/small:train", "is no whole data set of TFDS: ")


def test_bytes_that_are_no_text_are_an_error(root):
    fails(
        "tfds:demos/small:latin",
        "tfds:demos/small:latin cannot be read: 'utf-8' codec can't decode byte 0xe9",
    )
