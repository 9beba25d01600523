import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
from PIL import Image

from jepa_world.data.images import COLOURS, SHAPES, TEXTURES, load_images, make_shapes, read_idx
from jepa_world.registry import UserError


def idx(array):
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


@pytest.fixture
def idx_folder(tmp_path):
    """Twelve and five pictures of 9 x 8 pixels; the test part is compressed."""
    random = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 12), ("t10k", 5)):
        arrays[split] = random.integers(0, 256, (count, 9, 8), np.uint8), np.arange(count) % 3
        for kind, array in zip(("images-idx3", "labels-idx1"), arrays[split], strict=True):
            content, name = idx(array.astype(np.uint8)), f"{split}-{kind}-ubyte"
            if split == "t10k":
                content, name = gzip.compress(content), name + ".gz"
            (tmp_path / name).write_bytes(content)
    return tmp_path, arrays


def png(colour, size=(20, 16), mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "png")
    return file.getvalue()


TREE = {f"{colour}/{i}.png": png(colour) for colour in ("blue", "red") for i in range(10)}


@pytest.fixture
def picture_folder(tmp_path):
    for name, content in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_idx_files_are_read_compressed_or_not(idx_folder):
    folder, arrays = idx_folder
    for images, (pixels, labels) in zip(load_images(folder), arrays.values(), strict=True):
        np.testing.assert_array_equal(images.pixels[..., 0], pixels)
        np.testing.assert_array_equal(images.classes["class"], labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG....", "begins with '89 50 4e 47': idx files begin with 00 00 08"),
        (b"", "begins with ''"),
        (idx(np.zeros((2, 3, 3), np.uint8))[:-1], r"announces 18 bytes \(2, 3, 3\) and holds 17"),
        (gzip.compress(idx(np.zeros(9, np.uint8)))[:-9], "cannot be read"),
    ],
    ids=["magic", "empty", "short", "gzip"],
)
def test_a_bad_idx_file_is_described(content, message, tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_idx(tmp_path / "train-images-idx3-ubyte")


def test_an_idx_file_that_is_missing_or_does_not_fit_is_named(idx_folder):
    folder, _ = idx_folder
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(3, np.uint8)))
    with pytest.raises(UserError, match=r"train has images \(12, 9, 8\) and labels \(3,\)"):
        load_images(folder)
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="no train-labels-idx1-ubyte or"):
        load_images(folder)


def test_class_folders_give_labels_and_every_fifth_picture_is_for_the_test(picture_folder):
    train, test = load_images(picture_folder, size=8)
    assert train.pixels.shape == (16, 8, 8, 3) and test.pixels.shape == (4, 8, 8, 3)
    assert train.classes["class"].tolist() == [0] * 8 + [1] * 8
    assert (train.pixels[:8] == (0, 0, 255)).all() and (test.pixels[2:] == (255, 0, 0)).all()


def test_folders_named_train_and_test_are_the_split(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "train/b/1.png", "test/b/0.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(TREE["red/0.png"])
    train, test = load_images(tmp_path, size=8)
    assert train.classes["class"].tolist() == [0, 1, 1]
    assert test.classes["class"].tolist() == [1]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_read_like_its_folder(picture_folder, mode, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "pictures.tar"
    with tarfile.open(path, mode) as archive:
        archive.add(picture_folder, ".")
    for images, other in zip(load_images(path), load_images(picture_folder), strict=True):
        np.testing.assert_array_equal(images.pixels, other.pixels)
        np.testing.assert_array_equal(images.classes["class"], other.classes["class"])


def test_a_wide_transparent_picture_is_cut_in_the_middle_and_lies_on_white(tmp_path):
    picture = np.zeros((8, 24, 4), np.uint8)
    picture[:, 8:16] = (0, 255, 0, 255)
    picture[:4] = (255, 0, 0, 0)
    for i in range(5):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    train, _ = load_images(tmp_path, size=8)
    assert (train.pixels[0, :4] == 255).all() and (train.pixels[0, 4:] == (0, 255, 0)).all()
    assert train.classes == {}


def test_few_damaged_pictures_are_skipped_and_named_and_many_are_refused(picture_folder):
    (picture_folder / "red" / "3.png").write_bytes(TREE["red/0.png"][:60])
    (picture_folder / "red" / "4.png").write_bytes(png("red", size=(4, 30)))
    train, test = load_images(picture_folder, bad_share=0.1)
    assert len(train) + len(test) == 18
    assert list(train.skipped.reasons) == ["red/3.png", "red/4.png"]
    assert "4 x 30 pixels, fewer than 8" in train.skipped.reasons["red/4.png"]
    (picture_folder / "red" / "5.png").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"3 of 20 pictures .* cannot be used, more than 1.*: red/3"
    ):
        load_images(picture_folder)


def test_a_place_without_pictures_is_refused(tmp_path):
    with pytest.raises(UserError, match="no pictures in"):
        load_images(tmp_path)
    with pytest.raises(UserError, match=r"no images at .*: give a folder, a tar, or `shapes`"):
        load_images(tmp_path / "nothing")
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(UserError, match="cannot be read as a tar"):
        load_images(tmp_path / "text.tar")


def test_shapes_are_the_same_under_the_same_seed_and_all_kinds_occur():
    images, again, other = (
        make_shapes(200, seed=0),
        make_shapes(200, seed=0),
        make_shapes(200, seed=1),
    )
    np.testing.assert_array_equal(images.pixels, again.pixels)
    assert (images.pixels != other.pixels).mean() > 0.9
    kinds = {name: len(np.unique(labels)) for name, labels in images.classes.items()}
    assert kinds == {"shape": len(SHAPES), "texture": len(TEXTURES), "colour": len(COLOURS)}


def test_a_shape_is_painted_in_its_colour_at_its_place_in_its_size():
    images = make_shapes(300, seed=0, size=64)
    paint = np.array(COLOURS)[images.classes["colour"]][:, None, None]
    inside = np.abs(images.pixels - paint).max(-1) < 45  # noise is 10, grounds are grey
    plain = (images.classes["texture"] == 0) & (images.classes["shape"] == 1)  # squares
    axis = (np.arange(64) + 0.5) / 64
    for i in np.flatnonzero(plain & (images.values["size"][:, 0] < 0.3)):  # whole in the picture
        found = inside[i]
        centre = (found.sum(1) @ axis / found.sum(), found.sum(0) @ axis / found.sum())
        np.testing.assert_allclose(centre, images.values["position"][i], atol=0.02)
        side = 1.5 * images.values["size"][i, 0]
        assert found.mean() == pytest.approx(side**2, rel=0.15)


def test_a_picture_of_too_many_pixels_is_skipped_and_named(tmp_path, monkeypatch):
    for number in range(2):
        size = (20 + 60 * number, 20)
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    training, _ = load_images(tmp_path, size=16, bad_share=0.9)
    assert len(training) == 1 and "bomb" in training.skipped.reasons["1.png"]
