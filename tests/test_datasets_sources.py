"""Tests of datasets/sources.py: sources are read correctly or refused by name, and nothing in them runs."""

import hashlib
import itertools
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import (
    CIFAR10_CLASSES,
    ROWS,
    Attack,
    change_set,
    expected_images,
    fill_with_rubbish,
    official_places,
    pack,
    python_file,
    shorten,
    silent,
    tiny_cifar10,
    write_binary,
    write_images,
    write_python,
)
from PIL import Image

import data
from datasets import sources, untrusted

pytestmark = pytest.mark.usefixtures("small_and_offline")


def test_every_official_layout_gives_the_same_pixels(tmp_path):
    batches = tiny_cifar10()
    python = write_python(tmp_path / "a" / "cifar-10-batches-py", batches)
    binary = write_binary(tmp_path / "b" / "cifar-10-batches-bin", batches)
    places = official_places(tmp_path, "cifar-10", python, binary)
    opened = [data.open_dataset("cifar10", place, say=silent) for place in places]
    for dataset in opened:
        assert dataset.fingerprint == opened[0].fingerprint
        assert dataset.classes == tuple(CIFAR10_CLASSES) and dataset.image_size == 32
        np.testing.assert_array_equal(dataset.train.images, expected_images(batches))
        np.testing.assert_array_equal(
            dataset.train.labels, np.concatenate([batches[f"data_batch_{i}"][1] for i in range(1, 6)])
        )
        np.testing.assert_array_equal(dataset.test.labels, batches["test_batch"][1])
        assert dataset.train.labels.dtype == np.int64 and dataset.train.images.dtype == np.uint8


def test_class_folders_of_cifar10_are_read_and_must_be_complete(tmp_path):
    write_images(tmp_path, ["train"], CIFAR10_CLASSES, each=ROWS // 2, size=(32, 32))
    write_images(tmp_path, ["test"], CIFAR10_CLASSES, each=ROWS // 10, size=(32, 32))
    dataset = data.open_dataset("cifar10", tmp_path, say=silent)
    assert dataset.title == "CIFAR-10 (not the official bytes)" and len(dataset.train.labels) == 5 * ROWS
    image = np.asarray(Image.open(tmp_path / "train" / "automobile" / "1.png"))
    np.testing.assert_array_equal(dataset.train.images[ROWS // 2 + 1], image)
    (tmp_path / "train" / "cat" / "0.png").unlink()
    with pytest.raises(data.DataError, match="incomplete"):
        data.open_dataset("cifar10", tmp_path, say=silent)


def test_title_and_note_tell_whether_the_bytes_are_official(tmp_path, monkeypatch):
    python = write_python(tmp_path / "cifar-10-batches-py", tiny_cifar10())
    notes = []
    assert (
        data.open_dataset("cifar10", tmp_path, say=notes.append).title == "CIFAR-10 (not the official bytes)"
    )
    assert len(notes) == 1 and "not the official bytes" in notes[0]
    official = {
        split: {name: hashlib.md5((python / name).read_bytes()).hexdigest() for name in files}
        for split, files in sources.SETS["cifar10"].files.items()
    }
    change_set(monkeypatch, "cifar10", files=official)
    notes.clear()
    assert (
        data.open_dataset("cifar10", pack(tmp_path / "whole.tar.gz", python), say=notes.append).title
        == "CIFAR-10"
    )
    assert notes == []


def title_of(place: Path) -> str:
    return sources.read(sources.locate("cifar10", [place], None, silent)).title


def test_unpacked_binary_files_are_judged_by_their_mean(tmp_path, monkeypatch):
    batches = tiny_cifar10()
    folder = write_binary(tmp_path / "cifar-10-batches-bin", batches)
    assert title_of(folder) == "CIFAR-10 (not the official bytes)"
    change_set(monkeypatch, "cifar10", mean=expected_images(batches).mean((0, 1, 2)))
    assert title_of(folder) == "CIFAR-10 (bytes not verified)"
    archive = pack(tmp_path / "cifar-10-binary.tar.gz", folder)
    change_set(monkeypatch, "cifar10", archives={archive.name: hashlib.md5(archive.read_bytes()).hexdigest()})
    assert title_of(archive) == "CIFAR-10"


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("function", [os.system, eval, exec, getattr, np.load, np.fromfile, pickle.loads])
def test_a_pickle_that_asks_for_another_function_runs_no_code(tmp_path, function, protocol):
    mark = tmp_path / "ran"
    argument = f"touch {mark}" if function is os.system else f"open({str(mark)!r}, 'w')"
    folder = write_python(tmp_path / "cifar-10-batches-py", tiny_cifar10())
    (folder / "data_batch_3").write_bytes(
        pickle.dumps({b"data": Attack(function, argument)}, protocol=protocol)
    )
    with pytest.raises(data.DataError, match=r"data_batch_3.*no CIFAR file does"):
        data.open_dataset("cifar10", tmp_path, say=silent)
    assert not mark.exists()


def test_a_pickle_can_use_only_the_admitted_names(tmp_path):
    for module, name in [
        ("numpy", "ndarray.tofile"),
        ("numpy.core.multiarray", "scalar"),
        ("_codecs", "lookup"),
    ]:
        head = (
            b"\x80\x04\x8c"
            + bytes([len(module)])
            + module.encode()
            + b"\x8c"
            + bytes([len(name)])
            + name.encode()
        )
        with pytest.raises(pickle.UnpicklingError, match=name):
            untrusted.unpickled(head + b"\x93.")
    with pytest.raises(pickle.UnpicklingError, match="rot13"):
        untrusted.unpickled(b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.")


def test_pickles_of_python_2_and_of_both_numpy_names_are_read():
    pixels = np.arange(ROWS * 3072, dtype=np.uint8).reshape(ROWS, 3072)
    new = pickle.dumps({b"data": pixels, b"labels": [1] * ROWS}, protocol=2)
    old = new.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    # As Python 2 wrote it: keys, dtype and raw pixels are byte strings of a kind that Python 3 cannot write.
    raw = b"T" + (ROWS * 3072).to_bytes(4, "little") + pixels.tobytes()
    two = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K" + bytes([ROWS]) + b"M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + raw + b"tb"
        b"U\x06labels](" + b"K\x01" * ROWS + b"eu."
    )
    assert old != new or b"numpy.core" in new
    for file in (new, old, two):
        read, labels = sources._rows(file, False, sources.SETS["cifar10"], ROWS)
        np.testing.assert_array_equal(read, pixels)
        assert labels.tolist() == [1] * ROWS


@pytest.mark.parametrize("harm", [shorten, fill_with_rubbish, Path.unlink])
@pytest.mark.parametrize("layout", [write_python, write_binary])
def test_a_truncated_wrong_or_missing_file_is_named(tmp_path, layout, harm):
    folder = layout(tmp_path / "cifar-10-batches-py", tiny_cifar10())
    broken = next(folder.glob("data_batch_4*"))
    harm(broken)
    with pytest.raises(data.DataError) as error:
        data.open_dataset("cifar10", tmp_path, say=silent)
    assert broken.name in str(error.value) and str(tmp_path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 2
    assert not list(tmp_path.rglob("*.beton*"))


@pytest.mark.parametrize("harm", [shorten, fill_with_rubbish])
def test_a_broken_archive_is_named(tmp_path, harm):
    folder = write_python(tmp_path / "x" / "cifar-10-batches-py", tiny_cifar10())
    harm(pack(tmp_path / "cifar-10-python.tar.gz", folder))
    with pytest.raises(data.DataError, match=r"cifar-10-python.tar.gz"):
        data.open_dataset("cifar10", tmp_path, say=silent)


def test_wrong_labels_and_shapes_are_refused():
    pixels, labels = tiny_cifar10()["test_batch"]
    for bad in (
        python_file(pixels[:, :-1], labels),
        python_file(pixels, labels + 1),
        python_file(pixels[1:], labels),
    ):
        with pytest.raises(ValueError, match=r"its (pixels|labels)"):
            sources._rows(bad, False, sources.SETS["cifar10"], ROWS)
    with pytest.raises(ValueError, match="label"):
        sources._rows(bytes([10]) * (ROWS * 3073), True, sources.SETS["cifar10"], ROWS)


def test_a_folder_takes_images_of_any_mode_and_size(tmp_path):
    write_images(tmp_path, ["val"], size=(50, 40))
    train = tmp_path / "train"
    for label in ("cat", "dog"):
        (train / label).mkdir(parents=True)
    colour = Image.new("RGB", (50, 40), (10, 200, 90))
    colour.save(train / "cat" / "a.png")
    colour.convert("RGBA").save(train / "cat" / "b.png")
    colour.quantize(4).save(train / "cat" / "c.png")
    colour.convert("CMYK").save(train / "cat" / "d.tif")
    Image.new("L", (20, 90), 77).save(train / "dog" / "e.png")
    Image.fromarray(np.full((40, 40), 0x8000, np.uint16)).save(train / "dog" / "f.png")
    (train / "dog" / ".hidden.png").write_bytes(b"")
    (train / "dog" / "notes.txt").write_text("x")
    notes = []
    dataset = data.open_dataset(str(tmp_path), tmp_path / "data", image_size=24, say=notes.append)
    assert dataset.train.images.shape == (6, 24, 24, 3) and dataset.test.images.shape == (6, 24, 24, 3)
    assert dataset.classes == ("cat", "dog") and dataset.train.labels.tolist() == [0, 0, 0, 0, 1, 1]
    for image in dataset.train.images[:4]:
        assert np.abs(image.astype(int) - (10, 200, 90)).max() <= 2
    assert (dataset.train.images[4] == 77).all() and (dataset.train.images[5] == 0x80).all()
    assert any("ignored 2" in note for note in notes)
    assert dataset.name == tmp_path.name
    assert data.open_dataset(str(tmp_path), tmp_path / "data", say=silent).image_size == 128


def test_a_folder_of_equal_squares_keeps_its_size_and_pixels(tmp_path):
    write_images(tmp_path)
    dataset = data.open_dataset(str(tmp_path), tmp_path / "data", say=silent)
    assert dataset.image_size == 40
    for index in range(3):
        image = np.asarray(Image.open(tmp_path / "train" / "dog" / f"{index}.png"))
        np.testing.assert_array_equal(dataset.train.images[3 + index], image)


def test_undecodable_bytes_in_the_name_of_a_class_are_replaced(tmp_path):
    for split, name in itertools.product((b"train", b"test"), (b"fr\xc3\xaane", b"\xff")):
        folder = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"images", split, name)))
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "1.png")
    for _ in range(2):  # first from the source, then from the prepared files
        dataset = data.open_dataset(str(tmp_path / "images"), tmp_path / "prepared", say=silent)
        assert dataset.classes == ("frêne", "\N{REPLACEMENT CHARACTER}")


def test_the_centre_square_is_kept():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 255
    assert (sources._fit(Image.fromarray(pixels), 10) == 255).all()
    assert (sources._fit(Image.fromarray(pixels.transpose(1, 0, 2)), 10) == 255).all()


def test_unusable_folders_are_refused_by_name(tmp_path):
    with pytest.raises(data.DataError, match="no such folder"):
        data.open_dataset(str(tmp_path / "nowhere"), tmp_path, say=silent)
    with pytest.raises(data.DataError, match="train/<class>"):
        data.open_dataset(str(tmp_path), tmp_path, say=silent)
    write_images(tmp_path)
    (tmp_path / "test" / "cat").rename(tmp_path / "test" / "cow")
    with pytest.raises(data.DataError, match="class cat"):
        data.open_dataset(str(tmp_path), tmp_path, say=silent)
    (tmp_path / "test" / "cow").rename(tmp_path / "test" / "cat")
    shorten(tmp_path / "test" / "cat" / "1.png")
    with pytest.raises(data.DataError, match=r"test/cat/1.png"):
        data.open_dataset(str(tmp_path), tmp_path, say=silent)


def test_imagenette_is_read_from_its_archive_and_from_its_folder(tmp_path, monkeypatch):
    change_set(monkeypatch, "imagenette", counts={"train": 20, "test": 10})
    classes = sources.SETS["imagenette"].classes
    folder = write_images(tmp_path / "imagenette2-160", ["train"], classes, each=2, size=(180, 160))
    write_images(folder, ["val"], classes, each=1, size=(160, 200))
    archive = pack(tmp_path / "packed" / "imagenette2-160.tgz", folder)
    unpacked = data.open_dataset("imagenette", tmp_path, say=silent)
    change_set(
        monkeypatch, "imagenette", archives={archive.name: hashlib.md5(archive.read_bytes()).hexdigest()}
    )
    packed = data.open_dataset("imagenette", archive.parent, say=silent)
    assert packed.image_size == 128 and packed.train.images.shape == (20, 128, 128, 3)
    assert (
        packed.fingerprint
        == unpacked.fingerprint
        == data.open_dataset("imagenette", folder, say=silent).fingerprint
    )
    assert (packed.title, unpacked.title) == ("Imagenette", "Imagenette (bytes not verified)")


GREY = {"too many bits": ("i4", 2**16), "below zero": ("i4", -1), "no whole numbers": ("f4", 0.5)}


@pytest.mark.parametrize("case", [*GREY, "too long and thin", "PostScript"])
def test_images_that_cannot_be_converted_or_are_too_large_are_refused(tmp_path, case):
    write_images(tmp_path, each=1, size=(16, 16))
    file = tmp_path / "train" / "cat" / "1.tif"
    if case == "PostScript":  # Pillow would pass it to Ghostscript
        file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n")
    elif case == "too long and thin":
        Image.new("1", (500_000, 1)).save(file)
    else:
        dtype, value = GREY[case]
        Image.fromarray(np.full((16, 16), value, dtype)).save(file)
    with pytest.raises(data.DataError, match=r"1\.tif is not a readable image") as refused:
        data.open_dataset(str(tmp_path), tmp_path / "data", image_size=16, say=silent)
    assert case != "PostScript" or "cannot identify" in str(refused.value)


def test_images_are_prepared_in_blocks_that_fit_in_memory():
    sizes = [sources.Source("x", size, [], {}, {}).block_size for size in (32, 224, 9000)]
    assert sizes == [1000, 1000, 1]
