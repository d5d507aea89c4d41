"""What is found in folders and NumPy files, and the refusals that say what to change."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ood_engine.errors import DataError, OodEngineError, OodEngineWarning
from ood_engine.images.dataset import Preprocess, open_dataset

GRAY = Preprocess(None, 1)


def save_image(path, value=100, size=(4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)


def values(dataset):
    return [round(float(sample.image[0, 0, 0]) * 255) for sample in dataset]


def test_a_flat_folder_has_no_labels_and_ignores_other_files(tmp_path):
    for name, value in [("b.png", 2), ("a.JPG", 1), ("c.d.bmp", 3)]:
        save_image(tmp_path / name, value)
    for name in [".DS_Store", "notes.txt", ".hidden.png", "png"]:
        (tmp_path / name).write_text("no image")
    (tmp_path / "notes").mkdir()
    with pytest.warns(OodEngineWarning, match=r"files left out, .*: 1 \.txt, 1 without an ending$"):
        dataset = open_dataset(str(tmp_path), GRAY)
    assert dataset.left_out == {".txt": 1, "without an ending": 1}
    assert dataset.names == ["a.JPG", "b.png", "c.d.bmp"]
    assert values(dataset) == [1, 2, 3]
    assert dataset.labels is None
    assert dataset.class_names is None


def test_class_folders_are_labels_in_sorted_order(tmp_path):
    files = {"cat/z.png": 5, "cat/deep/er/a.png": 4, "cat-b/x.png": 6, "ant/1.png": 1, "ant.png/2.png": 3}
    for name, value in files.items():
        save_image(tmp_path / name, value)
    (tmp_path / "cat" / "readme.txt").write_text("no image")
    (tmp_path / "cat" / ".cache").mkdir()
    save_image(tmp_path / "cat" / ".cache" / "thumbnail.png")
    save_image(tmp_path / ".cache" / "thumbnail.png")
    with pytest.warns(OodEngineWarning, match=r": 1 \.txt$"):
        dataset = open_dataset(tmp_path, GRAY)
    assert dataset.class_names == ["ant", "ant.png", "cat", "cat-b"]
    assert dataset.names == ["ant/1.png", "ant.png/2.png", "cat/deep/er/a.png", "cat/z.png", "cat-b/x.png"]
    assert values(dataset) == [1, 3, 4, 5, 6]
    assert dataset.labels.tolist() == [0, 1, 2, 2, 3]
    assert dataset.labels.dtype == torch.int64
    assert [sample.label for sample in dataset] == [0, 1, 2, 2, 3]


def test_every_format_is_read(tmp_path):
    endings = ("png", "jpg", "jpeg", "bmp", "gif", "tif", "tiff", "webp", "ppm", "pgm")
    for ending in endings:
        save_image(tmp_path / f"image.{ending}", 128)
    dataset = open_dataset(tmp_path, GRAY)
    assert len(dataset) == len(endings)
    for sample in dataset:
        assert sample.error is None, sample.name
        assert abs(float(sample.image.mean()) * 255 - 128) < 2, sample.name


def test_16_bits_keep_their_depth(tmp_path):
    pixels = np.array([[0, 300], [40001, 65535]], dtype=np.uint16)
    (tmp_path / "folder").mkdir()
    Image.fromarray(pixels).save(tmp_path / "folder" / "deep.png")
    np.save(tmp_path / "deep.npy", pixels[None])
    np.savez(tmp_path / "deep.npz", pixels[None].astype(">u2"))
    for name in ("folder", "deep.npy", "deep.npz"):
        (sample,) = open_dataset(tmp_path / name, GRAY)
        assert torch.equal(sample.image[0], torch.from_numpy(pixels.astype(np.float32) / 65535))


@pytest.mark.skipif(os.name != "posix", reason="needs symbolic links")
def test_links_are_followed_once_and_loops_end(tmp_path):
    save_image(tmp_path / "elsewhere" / "b" / "1.png", 7)
    root = tmp_path / "root"
    save_image(root / "a" / "1.png", 1)
    (root / "a" / "loop").symlink_to(root)
    (root / "a" / "itself.png").symlink_to(root / "a" / "itself.png")
    (root / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "c").symlink_to(root)
    (root / "d").symlink_to(tmp_path)
    (root / "e").symlink_to(root / "e")
    (root / "a" / "2.png").symlink_to(root / "a" / "1.png")
    (root / "a" / "gone.png").symlink_to(root / "nothing.png")
    with pytest.warns(OodEngineWarning, match=": 1 without an ending$"):
        dataset = open_dataset(root, GRAY)
    assert dataset.names == ["a/1.png", "a/2.png", "a/gone.png", "a/itself.png", "b/1.png"]
    assert [sample.error is None for sample in dataset] == [True, True, False, False, True]
    assert "the file does not exist" in dataset[2].error
    os.symlink(root, tmp_path / "link")
    with pytest.warns(OodEngineWarning):
        assert open_dataset(tmp_path / "link", GRAY).names == dataset.names


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in open_dataset(tmp_path, GRAY)[0].error


@pytest.mark.skipif(sys.platform != "linux", reason="needs names of any bytes")
def test_a_name_that_is_no_text_can_be_written_down(tmp_path):
    save_image(tmp_path / "good.png", 3)
    os.rename(tmp_path / "good.png", os.fsencode(tmp_path) + b"/\xff\n.png")
    (sample,) = open_dataset(tmp_path, GRAY)
    assert sample.name.encode("utf-8") == b"\\xff\n.png"
    assert sample.image is not None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no image; expected files ending in .png .jpg"),
        (["notes.txt", "scan.DCM"], r"holds no image; .*; it holds 1 \.dcm, 1 \.txt$"),
        (["sub/notes.txt"], "holds no image"),
        (["a.png", "cats/b.png"], "image files .such as a.png. beside class folders .such as cats.; keep only"),
        (["cats/a.png", "dogs/notes.txt"], "dogs: the class folder holds no image; add images to it, or remove it"),
    ],
)
def test_an_unclear_folder_is_refused(tmp_path, files, message):
    for name in files:
        if name.endswith(".png"):
            save_image(tmp_path / name)
        else:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("no image")
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(tmp_path, GRAY)
    assert "\n" not in str(caught.value)


def test_a_folder_without_access_is_refused(tmp_path, monkeypatch):
    save_image(tmp_path / "cats" / "deep" / "a.png")
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        open_dataset(tmp_path, GRAY)


def test_a_path_to_nothing_or_to_another_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"does not exist; give a folder of images, a \.npy or a \.npz file"):
        open_dataset(tmp_path / "missing", GRAY)
    (tmp_path / "data.zip").write_text("zip")
    with pytest.raises(DataError, match=r"ending in '.zip'; give a folder"):
        open_dataset(tmp_path / "data.zip", GRAY)


def test_a_folder_needs_pillow_and_says_how_to_get_it(tmp_path, monkeypatch):
    save_image(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((1, 4, 4)))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(OodEngineError, match=r"pip install 'ood-engine\[cli\]'"):
        open_dataset(tmp_path, GRAY)
    with pytest.raises(OodEngineError, match=r"pip install 'ood-engine\[cli\]'"):
        open_dataset(tmp_path / "a.npy", Preprocess((2, 2), 1))
    assert open_dataset(tmp_path / "a.npy", GRAY)[0].error is None


BYTES = np.arange(2 * 5 * 4 * 3, dtype=np.uint8).reshape(2, 5, 4, 3)


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", ">f4", "float64"])
def test_every_layout_and_dtype_gives_the_same_images(tmp_path, dtype):
    images = BYTES if dtype == "uint8" else (BYTES / 255).astype(dtype)
    expected = torch.from_numpy(BYTES.astype(np.float32) / 255).permute(0, 3, 1, 2)
    tolerance = 1e-3 if dtype == "float16" else 1e-6
    for layout in (images, images.transpose(0, 3, 1, 2), np.asfortranarray(images)):
        np.save(tmp_path / "data.npy", layout)
        dataset = open_dataset(tmp_path / "data.npy", Preprocess())
        assert dataset.names == ["data.npy[0]", "data.npy[1]"]
        torch.testing.assert_close(torch.stack([s.image for s in dataset]), expected, atol=tolerance, rtol=0)
        assert dataset.labels is None


def test_gray_arrays_have_one_channel_or_none(tmp_path):
    for shape in ((2, 5, 4), (2, 5, 4, 1), (2, 1, 5, 4)):
        np.save(tmp_path / "data.npy", BYTES[..., 0].reshape(shape))
        images = torch.stack([sample.image for sample in open_dataset(tmp_path / "data.npy", GRAY)])
        assert torch.equal(images, torch.from_numpy(BYTES[..., 0].astype(np.float32) / 255)[:, None])
        assert open_dataset(tmp_path / "data.npy", Preprocess((3, 3), 3))[1].image.shape == (3, 3, 3)


def test_npy_is_mapped_and_not_read(tmp_path):
    np.save(tmp_path / "data.npy", BYTES)
    assert isinstance(open_dataset(tmp_path / "data.npy", GRAY)._read.args[0], np.memmap)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_finds_images_and_labels(tmp_path, save):
    path = tmp_path / "DATA.NPZ"
    with open(path, "wb") as file:
        save(file, images=BYTES, more=np.zeros((9, 9, 9)), labels=np.array([3, 0], dtype=np.uint8))
    dataset = open_dataset(path, Preprocess())
    assert dataset.names == ["DATA.NPZ[0]", "DATA.NPZ[1]"]
    assert dataset.labels.tolist() == [3, 0]
    assert dataset.labels.dtype == torch.int64
    assert dataset[0].label == 3
    assert torch.equal(dataset[1].image, torch.from_numpy(BYTES[1].astype(np.float32) / 255).permute(2, 0, 1))


def test_npz_takes_the_only_array_that_fits(tmp_path):
    other = {"names": np.array(["a", "b"]), "masks": BYTES > 3, "ids": np.arange(8).reshape(2, 2, 2)}
    np.savez(tmp_path / "data.npz", x=BYTES, objects=np.array([{}, None]), **other)
    assert len(open_dataset(tmp_path / "data.npz", GRAY)) == 2
    for arrays, count in [({"x": BYTES, "y": BYTES}, 2), (other, 0)]:
        np.savez(tmp_path / "data.npz", **arrays)
        with pytest.raises(
            DataError, match=rf"holds the arrays .*, {count} of which could be the images; .* as 'images'"
        ):
            open_dataset(tmp_path / "data.npz", GRAY)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 4, 4), dtype=np.uint8), r"shape \[0, 4, 4\] are empty"),
        (np.zeros((2, 0, 4)), "are empty"),
        (np.zeros((4, 4)), r"shape \[4, 4\]; save \[N, H, W\]"),
        (np.zeros((1, 1, 4, 4, 1)), r"shape \[1, 1, 4, 4, 1\]; save"),
        (np.float32(3), r"shape \[\]; save"),
        (
            np.zeros((2, 4, 4), dtype=np.int64),
            r"dtype int64, whose range is not known \(Hounsfield units, .*\); save them as uint8, uint16, or as float",
        ),
        (np.zeros((2, 4, 4), dtype=bool), "dtype bool"),
        (np.zeros((2, 4, 4), dtype=complex), "dtype complex128"),
        (np.zeros((2, 4, 4, 4)), r"\[2, 4, 4, 4\] have neither 1 nor 3 channels"),
        (np.zeros((2, 3, 4, 3)), r"\[2, 3, 4, 3\] are ambiguous"),
        (np.array([[[None]]]), "without pickles"),
    ],
)
def test_what_is_no_stack_of_images_is_refused(tmp_path, images, message):
    np.save(tmp_path / "data.npy", images)
    np.savez(tmp_path / "data.npz", images=images)
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError, match=message) as caught:
            open_dataset(path, GRAY)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, 2, 3]), r"labels of dtype int64 and shape \[3\]; save integers of shape \[2\]"),
        (np.array([[1], [2]]), r"shape \[2, 1\]"),
        (np.array([0.0, 1.0]), "dtype float64"),
        (np.array(["a", "b"]), "dtype <U1"),
        (np.array([0, -1]), "the smallest label is -1"),
        (np.array([0, 2**63], dtype=np.uint64), "the smallest label is"),
        (np.array([{}, None]), "without pickles"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, message):
    np.savez(tmp_path / "data.npz", images=BYTES, labels=labels)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path / "data.npz", GRAY)


def test_an_archive_of_other_files_is_refused(tmp_path):
    for member in ("images", "labels"):
        np.savez(tmp_path / "data.npz", x=BYTES)
        with zipfile.ZipFile(tmp_path / "data.npz", "a") as archive:
            archive.writestr(member, b"text")
        with pytest.raises(DataError, match=f"'{member}' is not an array"):
            open_dataset(tmp_path / "data.npz", GRAY)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("name", ["data.npy", "data.npz"])
@pytest.mark.parametrize("kind", ["empty", "text", "pickle", "truncated", "swapped"])
def test_a_damaged_numpy_file_is_refused(tmp_path, name, kind):
    path = tmp_path / name
    np.save(path, BYTES) if (name == "data.npy") != (kind == "swapped") else np.savez_compressed(path, images=BYTES)
    if kind == "swapped":
        os.replace(next(file for file in tmp_path.iterdir()), path)
    else:
        whole = path.read_bytes()
        path.write_bytes({"empty": b"", "text": b"text", "pickle": pickle.dumps(Trap())}.get(kind, whole[:-9]))
    with pytest.raises(DataError, match=f"{name}: cannot be read as a NumPy file without pickles") as caught:
        open_dataset(path, GRAY)
    assert "\n" not in str(caught.value)
