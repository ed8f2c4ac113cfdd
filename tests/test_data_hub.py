"""Texts by domain, data sets of the Hugging Face hub, and the partitioners of flwr-datasets.

The hub is not reached: data sets with the columns of the real ones are written to disk here, and
so is a tiny sentence model.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedmerge.data import describe, load_hub, load_text, make_federation
from fedmerge.data.quiet import quiet
from fedmerge.data.text import embedded, hashed_words
from fedmerge.errors import ConfigError, DataError

# --- texts


def domains(path: Path, n: int = 20) -> Path:
    path.mkdir()
    for domain in ("films", "tweets"):
        rows = [
            f'{i}_1\t{(-1) ** i * 1.5}\t{"bad" if i % 2 else "good"} "{domain}" no {i}'
            for i in range(n)
        ]
        rows += [f"{n}_1\t0.49\tneither", f"{n}_2\t-0.5\tjust bad"]
        (path / f"{domain}.txt").write_text("\n".join(rows) + "\n")
    (path / "LICENSE.txt").write_text("A licence\nof two lines\n")
    (path / "_README_.txt").write_text("a\tb\tc\n")
    return path


def test_texts_by_domain(tmp_path: Path) -> None:
    data = load_text(str(domains(tmp_path / "reviews")), features=64)
    assert (data.name, data.owners, data.n_outputs) == ("reviews", ("films", "tweets"), 2)
    # The text rated 0.49 is left out, the one rated -0.5 is not.
    assert len(data) == 42
    assert data.y[:21].tolist() == [1, 0] * 10 + [0]
    assert tuple(data.x.shape) == (42, 64)
    fed = make_federation(f"text:{tmp_path / 'reviews'}:features=64", "natural", seed=0)
    assert [row.label_counts.tolist() for row in describe(fed)] == [[11, 10]] * 2
    many = make_federation(f"text:{tmp_path / 'reviews'}", "natural:parts=4", seed=0)
    assert [client.kind for client in many.clients] == ["films"] * 4 + ["tweets"] * 4


def test_words_are_hashed() -> None:
    a, b, c, none = hashed_words(["Good film", "good film", "bad film", ""], 256)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)
    assert not none.any()
    # Two words in a vector of length 10.
    assert np.sort(np.abs(a))[-3:] == pytest.approx([0, 50**0.5, 50**0.5])
    assert np.square(c).sum() == pytest.approx(100)
    with pytest.raises(ConfigError, match="features: 1"):
        hashed_words(["a"], 1)


def test_texts_with_a_header(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    rows = [
        f"{('x', 'y')[i % 2]}\tsome text {i}\t{('red', 'blue', 'green')[i % 3]}" for i in range(24)
    ]
    path.write_text("\n".join(["client\ttext\tlabel", *rows]) + "\n")
    data = load_text(str(path))
    assert (data.owners, data.n_outputs) == (("x", "y"), 3)
    assert data.y[:3].tolist() == [2, 0, 1]
    path.write_text("text\trating\nfine\t2\nso so\t0.1\npoor\t-3\n")
    data = load_text(str(path))
    assert (data.owner, data.y.tolist()) == (None, [1, 0])


def test_the_clients_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    rows = [f"text {i}\t{i // 2 % 2}\t{('x', 'y')[i % 2]}" for i in range(24)]

    def write(*header: str) -> str:
        path.write_text("\n".join(["\t".join(header), *rows]) + "\n")
        return str(path)

    for column in ("client", "domain"):
        assert load_text(write("text", "label", column)).owners == ("x", "y")
    write("text", "label", "shop")
    assert load_text(str(path), client="shop").owners == ("x", "y")
    fed = make_federation(f"text:{path}:client=shop", "natural", seed=0)
    assert [client.id for client in fed.clients] == ["x", "y"]
    # Without a word about the column, one file would be one client.
    with pytest.raises(DataError, match=r'no clients of its own; .* say so by "client=COLUMN"'):
        make_federation(f"text:{path}", "natural", seed=0)
    with pytest.raises(DataError, match='no column "shops"; did you mean "shop"'):
        load_text(str(path), client="shops")
    path.write_text("1\tfine\n")
    with pytest.raises(DataError, match='no header, wanted one with the column "shop"'):
        load_text(str(path), client="shop")


def test_untidy_texts(tmp_path: Path) -> None:
    """Spaces around names, a mark of the encoding, blank lines, and one text that is a book."""
    path = tmp_path / "t.tsv"
    lines = ["\ufefftext \t label", "fine\t1", "", "x " * 100_000 + "\t0", ' "a\t1', "", "\t"]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    assert load_text(str(path)).y.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("text\tlable\na\tb\n", 'no column "rating" or "label"; did you mean "lable"'),
        ("text\tlabel\na\n", "row 2: 1 cells, wanted 2"),
        ("text\tlabel\n\na\tb\tc\n", "row 3: 3 cells, wanted 2"),
        ("text\tlabel\na\t \n", "row 2: no label or client"),
        ("review\tlabel\na\tb\n", 'no column "text"; choose from label, review'),
        ("Text\tLabel\na\tb\n", 'no column "text"; did you mean "Text"'),
        ("text\tlabel\ncaf\xe9\tb\n", "not readable as UTF-8 text .* save it so"),
        ("1\tmuch\tfine\n", 'row 1: rating "much", wanted a finite number'),
        ("just a line\n", "no texts with a tab"),
        ("1\t0.2\tfine\n", "all ratings are nearer to 0 than 0.5"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "t.tsv"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        load_text(str(path))
    with pytest.raises(DataError, match=r"cannot be read: No such file or directory; give"):
        load_text(str(tmp_path / "gone.tsv"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no .tsv or .txt files"):
        load_text(str(tmp_path / "empty"))


def tiny_model(path: Path) -> str:
    """Write a sentence model of one layer, of random weights, with a vocabulary of letters."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    path.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "no"]
    (path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), intermediate_size=16, **sizes)
    BertModel(config).save_pretrained(path)
    BertTokenizerFast(vocab_file=str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


@pytest.mark.filterwarnings("ignore")  # The library's own deprecations.
def test_frozen_embeddings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModel, AutoTokenizer

    path = tiny_model(tmp_path / "model")
    texts = ["good film", "bad", "no good bad film film"]
    capfd.readouterr()
    found = embedded(texts, path, batch=2)
    assert capfd.readouterr() == ("", "")  # No bar of theirs.
    assert found.shape == (3, 8)
    # One by one, without any filling up, by hand: the mean over all tokens of a text.
    tokenizer, network = AutoTokenizer.from_pretrained(path), AutoModel.from_pretrained(path).eval()
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = network(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
        wanted = (mean / mean.square().mean().sqrt()).numpy()
        assert row == pytest.approx(wanted, abs=1e-5)
    fed = make_federation(f"text:{domains(tmp_path / 'reviews')}:model={path}", "natural", seed=0)
    assert fed.input_shape == (8,)
    with pytest.raises(DataError, match=r'model ".*gone": cannot be loaded; give the folder'):
        embedded(texts, str(tmp_path / "gone"))


def test_remarks_of_the_libraries_are_kept_off_the_screen() -> None:
    import datasets  # noqa: F401  # Importing one sets its level.
    import transformers  # noqa: F401

    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "datasets", "transformers")]
    before = [logger.level for logger in loggers]
    for library in ("datasets", "transformers"):
        with quiet(library):
            assert not any(logger.isEnabledFor(logging.WARNING) for logger in loggers)
        assert [logger.level for logger in loggers] == before


# --- data sets of the hub, from disk


def image(value: int, size: int = 8, mode: str = "RGB") -> object:
    from PIL import Image

    return Image.new(mode, (size, size), value if mode == "L" else (value, 0, 255 - value))


def save(path: Path, columns: dict[str, list[object]], features: dict[str, object]) -> str:
    from datasets import Dataset, Features

    Dataset.from_dict(columns, features=Features(features)).save_to_disk(str(path))
    return str(path)


def cifar(path: Path, n: int = 1600, classes: int = 20) -> str:
    """Two splits, with the columns of uoft-cs/cifar100; example i has label i % classes."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    features = Features(
        {
            "img": Image(),
            "fine_label": ClassLabel(num_classes=classes),
            "coarse_label": ClassLabel(num_classes=2),
        }
    )

    def part(first: int, n: int) -> Dataset:
        i = range(first, first + n)
        columns = {
            "img": [image(j % 256) for j in i],
            "fine_label": [j % classes for j in i],
            "coarse_label": [j % 2 for j in i],
        }
        return Dataset.from_dict(columns, features=features)

    DatasetDict({"train": part(0, n), "test": part(n, n // 4)}).save_to_disk(str(path))
    return str(path)


def test_cifar100_as_in_the_paper(tmp_path: Path) -> None:
    path = cifar(tmp_path / "cifar")
    data = f"cifar100:{path}"
    fed = make_federation(data, "cluster:groups=5:classes=6", 10, seed=0)
    assert (fed.input_shape, fed.n_outputs) == ((3, 8, 8), 20)
    groups: dict[str | None, set[int]] = {}
    for client, row in zip(fed.clients, describe(fed), strict=True):
        groups.setdefault(client.kind, set()).update(np.flatnonzero(row.label_counts).tolist())
        # A pixel is (i % 256, 0, 255 - i % 256) and the label i % 20, in both splits.
        for _, split in client.splits():
            red = (split.x[:, 0, 0, 0] * 255).round().long()
            assert split.source is not None
            assert torch.equal(red, split.source % 256)
            assert torch.equal(split.y, split.source % 20)
            assert torch.allclose(split.x[:, 2], 1 - split.x[:, 0], atol=1e-6)
    assert len(groups) == 5
    assert all(len(held) <= 6 for held in groups.values())
    by_client = make_federation(data, "dirichlet:alpha=0.1", 10, seed=0)
    assert sum(row.label_counts.sum() for row in describe(by_client)) == 2000
    assert len(make_federation(f"{data}:split=test", "concept", 4, seed=0).clients[0].train) == 50
    for wrong, message in (
        ("split=tset", 'no split "tset"; did you mean "test"'),
        ("x=image", 'no column "image"; did you mean "img"'),
        ("y=fine", 'no column "fine"; choose from .*fine_label'),
        ("client=user", 'no column "user"; '),
        ("clients=3", "clients = 3 needs the column of clients"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            make_federation(f"{data}:{wrong}", "concept", 4, seed=0)


def test_pacs_by_domain(tmp_path: Path) -> None:
    from datasets import ClassLabel, Image, Value

    names = ("art_painting", "cartoon", "photo", "sketch")
    n = 80
    path = save(
        tmp_path / "pacs",
        {
            "image": [image(i, size=12 if i % 2 else 16) for i in range(n)],
            "domain": [names[i % 4] for i in range(n)],
            "label": [i // 4 % 7 for i in range(n)],
        },
        {"image": Image(), "domain": Value("string"), "label": ClassLabel(num_classes=7)},
    )
    fed = make_federation(f"pacs:{path}", "natural", seed=0)
    assert [client.id for client in fed.clients] == list(names)
    assert (fed.input_shape, fed.n_outputs) == ((3, 64, 64), 7)
    assert make_federation(f"pacs:{path}:size=10", "natural", seed=0).input_shape == (3, 10, 10)
    with pytest.raises(DataError, match=r"images of \(16, 16\) and of \(12, 12\) pixels.*size=32"):
        load_hub(path, client="domain")


def test_femnist_by_writer(tmp_path: Path) -> None:
    from datasets import ClassLabel, Image, Value

    n = 120
    path = save(
        tmp_path / "femnist",
        {
            "image": [image(i, size=28, mode="L") for i in range(n)],
            "writer_id": [f"f{i % 12:04d}_07" for i in range(n)],
            "hsf_id": [i % 2 for i in range(n)],
            "character": [i // 12 % 5 for i in range(n)],
        },
        {
            "image": Image(),
            "writer_id": Value("string"),
            "hsf_id": Value("int64"),
            "character": ClassLabel(num_classes=62),
        },
    )
    fed = make_federation(f"femnist:{path}:clients=5", "natural", seed=0)
    assert [client.id for client in fed.clients] == [f"f{i:04d}_07" for i in range(5)]
    assert (fed.input_shape, fed.n_outputs) == ((1, 28, 28), 62)
    source = fed.clients[3].train
    value = (source.x[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(value % 12, torch.full_like(value, 3))
    assert torch.equal(value // 12 % 5, source.y)
    with pytest.raises(ConfigError, match="clients = 100, wanted 1 to 12"):
        make_federation(f"femnist:{path}", "natural", seed=0)


def test_texts_numbers_and_values_of_the_hub(tmp_path: Path) -> None:
    from datasets import Sequence, Value

    n = 40
    path = save(
        tmp_path / "d",
        {
            "text": [f"text {i}" for i in range(n)],
            "row": [[float(i), 2.0 * i, -1.0] for i in range(n)],
            "a": list(range(n)),
            "b": [i / 2 for i in range(n)],
            "site": [i % 2 for i in range(n)],
            "cost": [i * 1.5 for i in range(n)],
            "kind": ["odd" if i % 2 else "even" for i in range(n)],
            "bad": [None if i == 3 else float(i) for i in range(n)],
            "gap": [None if i == 3 else i for i in range(n)],
        },
        {
            "text": Value("string"),
            "row": Sequence(Value("float32")),
            "a": Value("int64"),
            "b": Value("float64"),
            "site": Value("int64"),
            "cost": Value("float32"),
            "kind": Value("string"),
            "bad": Value("float32"),
            "gap": Value("int64"),
        },
    )
    texts = load_hub(path, x="text", y="kind", features=32)
    assert (tuple(texts.x.shape), texts.y[:3].tolist()) == ((40, 32), [0, 1, 0])
    rows = load_hub(path, x="row", y="cost", client="site")
    assert rows.x[7].tolist() == [7, 14, -1]
    assert (rows.task, rows.y[7].item(), rows.owners) == ("regression", 10.5, ("0", "1"))
    columns = load_hub(path, x="a+b", y="kind")
    assert columns.x[7].tolist() == [7, 3.5]
    fed = make_federation(
        f"hub:{path}:x=a+b:y=cost:client=site:standardise=true", "natural", seed=0
    )
    assert (fed.task, len(fed.clients)) == ("regression", 2)
    with pytest.raises(DataError, match="NaN or infinite values in its inputs"):
        make_federation(f"hub:{path}:x=bad:y=kind:client=site", "natural", seed=0)
    with pytest.raises(DataError, match=r'column "text[+]a": .* no numbers; wanted images'):
        load_hub(path, x="text+a", y="kind")
    with pytest.raises(DataError, match='column "gap": wanted labels, names or numbers, all of'):
        load_hub(path, x="a", y="gap")


def images_on_disk(path: Path, images: list[object]) -> str:
    from datasets import Image, Value

    labels: list[object] = [i // 4 % 2 for i in range(len(images))]
    features = {"image": Image(), "label": Value("int64")}
    return save(path, {"image": images, "label": labels}, features)


def grey16(value: int) -> object:
    from PIL import Image

    return Image.fromarray(np.full((8, 8), value, np.uint16))


def test_images_of_16_bits_keep_their_shades(tmp_path: Path) -> None:
    path = images_on_disk(tmp_path / "x", [grey16(5000 * i) for i in range(8)])
    found = load_hub(path).x
    assert found.shape == (8, 1, 8, 8)
    assert found[:, 0, 3, 5].tolist() == pytest.approx([5000 * i / 65535 for i in range(8)])
    assert load_hub(path, size=4).x.mean(dim=(1, 2, 3)).tolist() == pytest.approx(
        [5000 * i / 65535 for i in range(8)]
    )


def floats() -> object:
    """An image of floats, whose range no reader can know."""
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("F", (8, 8), 0.5).save(file, "tiff")
    return {"bytes": file.getvalue(), "path": None}


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (lambda: grey16(3000), "mode L and, in example 5, I;16, wanted all of 8 bits or all of"),
        (floats, "images of mode L and, in example 5, F, wanted"),
        (lambda: {"bytes": b"none", "path": None}, "image of example 5 cannot be read; mend it"),
    ],
)
def test_images_that_cannot_be_used(tmp_path: Path, odd: Any, message: str) -> None:
    images = [image(i, mode="L") for i in range(8)]
    images[5] = odd()
    path = images_on_disk(tmp_path / "x", images)
    with pytest.raises(DataError, match=f'data ".*x", column "image": .*{message}'):
        load_hub(path)


FLOATS, GAP = [[1.0, 2.0]] * 8, [None, *[[1.0, 2.0]] * 7]


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"x": GAP}, {}, 'column "x": example 0 has none, wanted one in each'),
        ({"x": ["a", None, *"cdefgh"]}, {}, 'column "x": example 1 has none'),
        ({"x": FLOATS, "u": [None, *"abababa"]}, {"client": "u"}, 'column "u": example 0 has none'),
        ({"x": FLOATS, "label": [*range(7), 2_000_000]}, {}, "label 2000000: wanted less than"),
        ({"x": [], "label": []}, {}, "no examples, wanted some"),
    ],
)
def test_columns_that_cannot_be_used(
    tmp_path: Path, columns: dict[str, list[object]], options: dict[str, str], message: str
) -> None:
    from datasets import Dataset

    Dataset.from_dict({"label": [0, 1] * 4, **columns}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match=message):
        load_hub(str(tmp_path / "d"), x="x", **options)  # type: ignore[arg-type]


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    path = images_on_disk(tmp_path / "x", [image(1), None, image(2)])
    with pytest.raises(DataError, match='column "image": example 1 has none'):
        load_hub(path)


def test_classes_may_have_no_example_where_they_have_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Value

    columns: dict[str, list[object]] = {"x": [0.5] * 4, "label": [0, 1, 0, 1]}
    features = {"x": Value("float32"), "label": ClassLabel(num_classes=62)}
    assert load_hub(save(tmp_path / "d", columns, features), x="x").n_outputs == 62


def test_splits_that_do_not_fit_each_other(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    parts = {
        name: Dataset.from_dict({"x": [0.5] * 4, "label": labels})
        for name, labels in (("train", [0, 1, 0, 1]), ("test", list("abab")))
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="columns of different types; choose one of train, test"):
        load_hub(str(tmp_path / "d"), x="x")
    assert len(load_hub(str(tmp_path / "d"), x="x", split="test")) == 4


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be loaded .*folder written by save_to_disk"):
        load_hub(str(tmp_path))


def test_a_folder_of_parquet_files_as_the_hub_has_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    repository = tmp_path / "small"
    for part, n in (("train", 12), ("test", 4)):
        columns = {"x": [float(i) for i in range(n)], "label": [0, 1] * (n // 2)}
        table = datasets.Dataset.from_dict(columns)
        table.to_parquet(repository / "data" / f"{part}-00000-of-00001.parquet")
    assert len(load_hub(str(repository), x="x")) == 16
    assert load_hub(str(repository), x="x", split="test").x.flatten().tolist() == [0, 1, 2, 3]


def test_a_format_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    Dataset.from_dict({"x": [0.5] * 4, "label": [0, 1, 0, 1]}).to_parquet("mine.parquet")
    with pytest.raises(DataError, match='data "parquet": a format, no data set; give the folder'):
        load_hub("parquet", x="x")


def test_a_saved_set_has_one_configuration(tmp_path: Path) -> None:
    path = images_on_disk(tmp_path / "x", [image(1)])
    with pytest.raises(ConfigError, match='config "en", but a saved set has one; leave it out'):
        load_hub(path, config="en")


def test_without_network_there_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    """In a process of its own: whether there is a network is read when the library is imported."""
    source = Path(__file__).parents[1] / "src"
    found = subprocess.run(
        [sys.executable, "-m", "fedmerge", "data", "natural", "--data", "femnist:config=half"],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": str(source),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    (line,) = found.stderr.splitlines()
    assert "no such folder, and the Hugging Face hub cannot be reached" in line
    assert "load_dataset('flwrlabs/femnist', 'half')" in line
    assert "save_to_disk" in line


# --- partitioners of flwr-datasets


def counts(setting: str, n: int | None = 10, data: str = "digits", seed: int = 0) -> np.ndarray:
    return np.stack(
        [r.label_counts for r in describe(make_federation(data, setting, n, seed=seed))]
    )


def test_borrowed_partitioners() -> None:
    even = counts("flwr:IidPartitioner")
    assert even.sum() == 1797
    assert np.ptp(even.sum(axis=1)) <= 1
    assert even.min() > 5  # All classes at every client, as far as chance allows.
    two = counts("flwr:Pathological:num_classes_per_partition=2")
    assert (two > 0).sum(axis=1).tolist() == [2] * 10
    skewed = counts("flwr:DirichletPartitioner:alpha=0.1")
    even_more = counts("flwr:DirichletPartitioner:alpha=100")
    assert (skewed > 0).sum(axis=1).mean() + 2 < (even_more > 0).sum(axis=1).mean()
    assert np.array_equal(skewed, counts("flwr:DirichletPartitioner:alpha=0.1"))
    assert not np.array_equal(skewed, counts("flwr:DirichletPartitioner:alpha=0.1", seed=1))
    # The seed is the run's unless the partitioner is given one.
    fixed = counts("flwr:DirichletPartitioner:alpha=0.1:seed=5")
    assert not np.array_equal(skewed, fixed)
    sizes = counts("flwr:SizePartitioner:partition_sizes=[40,30,20]", 3).sum(axis=1)
    assert sizes.tolist() == [40, 30, 20]


def test_partitioners_by_natural_client() -> None:
    from_flwr = counts("flwr:NaturalIdPartitioner", None, data="watch")
    own = counts("natural", None, data="watch")
    assert sorted(map(tuple, from_flwr)) == sorted(map(tuple, own))
    with pytest.raises(DataError, match='data "digits" has no clients of its own'):
        counts("flwr:NaturalIdPartitioner", None)
    with pytest.raises(DataError, match=r"clients: 3, but the setting makes 10 .*say 10 or none"):
        counts("flwr:NaturalIdPartitioner", 3, data="watch")


def test_values_are_partitioned_too() -> None:
    fed = make_federation("diabetes", "flwr:ContinuousPartitioner:strictness=1.0", 4, seed=0)
    means = [torch.cat([s.y for _, s in client.splits()]).mean().item() for client in fed.clients]
    with pytest.raises(DataError, match='"flwr:Dirichlet": needs class labels, but data set "diab'):
        make_federation("diabetes", "flwr:Dirichlet:alpha=1", 4, seed=0)
    assert np.ptp(means) > 1.5  # In standard deviations: clients hold low or high values.


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("flwr", 'wanted a partitioner, for example "flwr:IidPartitioner"'),
        ("flwr:DirichletPartitionr:alpha=1", 'no such partitioner; did you mean "Dirichlet"'),
        ("flwr:Drichlet:alpha=1", 'no such partitioner; did you mean "Dirichlet"'),
        ("flwr:Partitioner", "no such partitioner; choose from Continuous, Dirichlet, "),
        ("flwr:IdToSizeFnc", "no such partitioner"),
        ("flwr:Iid:num_partitions=abc", 'num_partitions = "abc", wanted a whole number'),
        ("flwr:Dirichlet:alpha=1:seed=x", 'seed = "x", wanted a whole number'),
        ("flwr:Iid:num_partitions=2000", "clients: 2000 are too many .* use at most 449"),
        ("flwr:VerticalEvenPartitioner", "no such partitioner"),
        ("flwr:Dirichlet:alfa=1", 'unknown option "alfa"; did you mean "alpha"'),
        ("flwr:Iid:train_fraction=0.5", 'unknown option "train_fraction"'),
        ("flwr:Iid:dataset=digits", 'unknown option "dataset"'),
        ("flwr:Dirichlet", 'needs alpha; say "flwr:Dirichlet:alpha=..."'),
        ("flwr:Dirichlet:alpha=-1", "flwr:Dirichlet"),
        ("flwr:Dirichlet:alpha=1:partition_by=labl", "flwr:Dirichlet"),
        ("flwr:Pathological:num_classes_per_partition=99", "flwr:Pathological"),
    ],
)
def test_borrowed_partitioners_that_cannot_be_used(setting: str, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as error:
        counts(setting)
    assert "\n" not in str(error.value)
