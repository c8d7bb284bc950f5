"""Image folders: captions, squares, and whatever is wrong with them."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_pipelines import save_images

from loralab.errors import DataError
from loralab.imaging.latent import frame, read_pictures


def png(path: Path, size: tuple[int, int] = (16, 16), colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_captions_come_from_metadata(tmp_path: Path) -> None:
    save_images(tmp_path, 3)
    pictures = read_pictures(tmp_path)
    assert [(p.name, p.caption) for p in pictures] == [
        ("0.png", "a red field"),
        ("1.png", "a green field"),
        ("2.png", "a blue field"),
    ]
    assert len({p.digest for p in pictures}) == 3


def test_captions_come_from_texts_beside_images(tmp_path: Path) -> None:
    for name in ("b/two.JPG", "a.png"):
        png(tmp_path / name)
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b" / "two.txt").write_text("second")
    (tmp_path / ".hidden").mkdir()
    png(tmp_path / ".hidden" / "c.png")
    assert [(p.name, p.caption) for p in read_pictures(tmp_path)] == [
        ("a.png", "first"),
        ("b/two.JPG", "second"),
    ]


def test_one_prompt_is_for_images_without_a_caption(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        png(tmp_path / name)
    (tmp_path / "a.txt").write_text("its own")
    captions = [p.caption for p in read_pictures(tmp_path, prompt="sks dog")]
    assert captions == ["its own", "sks dog"]


def test_a_folder_without_captions_is_one_clear_error(tmp_path: Path) -> None:
    save_images(tmp_path, 3, caption=None)
    with pytest.raises(DataError, match="no image has a caption") as raised:
        read_pictures(tmp_path)
    assert "give one for all as images.prompt" in raised.value.next_step
    (tmp_path / "1.txt").write_text("green")
    with pytest.raises(DataError, match=r"2 of 3 images have no caption: 0\.png; 2\.png"):
        read_pictures(tmp_path)


def test_every_fault_of_a_folder_is_said_at_once(tmp_path: Path) -> None:
    folder, outside = tmp_path / "images", tmp_path / "secret.png"
    png(outside)
    for name in ("a.png", "b.png", "c.png"):
        png(folder / name)
    (folder / "link.png").symlink_to(outside)
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "folder.png").mkdir()
    (folder / "b.txt").write_text("twice")
    (folder / "c.txt").write_text(" ")
    lines = [
        json.dumps({"file_name": "../secret.png", "text": "x"}),
        json.dumps({"file_name": str(outside), "text": "x"}),
        json.dumps({"file_name": "nowhere.png", "text": "x"}),
        json.dumps({"file_name": "a.png", "text": ""}),
        json.dumps({"file_name": "b.png", "text": "x"}),
        json.dumps({"file_name": "b.png", "text": "y"}),
        json.dumps({"image": "a.png"}),
        "{",
    ]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as raised:
        read_pictures(folder)
    for said in (
        "link.png is a link to a place outside the folder",
        "gone.png is a link to nothing",
        "line 1: '../secret.png' is outside the folder",
        f"line 2: '{outside}' is outside the folder",
        "line 3: there is no image 'nowhere.png'",
        "line 4: the text of 'a.png' is empty",
        "line 6: 'b.png' has a caption already",
        "line 7: no table with file_name and text",
        "line 8: no table with file_name and text",
        "b.png has a caption in metadata.jsonl and another in b.txt",
        "c.txt is empty",
    ):
        assert said in raised.value.cause


def test_no_folder_and_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no image folder"):
        read_pictures(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no image \(\.png"):
        read_pictures(tmp_path)


def test_a_square_is_the_middle_of_the_upright_image(tmp_path: Path) -> None:
    """Three stripes, stored lying on the side with EXIF's orientation 6."""
    upright = Image.new("RGB", (20, 60))
    for row, colour in enumerate(("red", "lime", "blue")):
        upright.paste(colour, (0, 20 * row, 20, 20 * row + 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    framed = frame(tmp_path / "a.png", 20)
    assert (framed.original, framed.corner) == ((60, 20), (20, 0))
    lime = torch.tensor([-1.0, 1.0, -1.0])[:, None, None].expand(3, 20, 20)
    torch.testing.assert_close(framed.pixels, lime)
    assert frame(tmp_path / "a.png", 8).pixels.shape == (3, 8, 8)


def test_transparent_places_are_white_and_greys_have_three_channels(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "grey.png")
    clear = Image.new("P", (8, 8))
    clear.save(tmp_path / "palette.png", transparency=0)
    for name in ("clear", "grey", "palette"):
        assert torch.equal(frame(tmp_path / f"{name}.png", 8).pixels, torch.ones(3, 8, 8))


def test_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    Image.new("I;16", (8, 8)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: more than 8 bits a colour"):
        frame(tmp_path / "deep.png", 8)
