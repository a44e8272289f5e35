"""Frames in, frames out: folders, videos and cameras, what is seen of each, and how a run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import onnx_lrp
from exporters import small_vgg
from onnx_lrp import frames, show
from onnx_lrp.cli import main
from onnx_lrp.cli.screen import Screen
from onnx_lrp.errors import InputError
from onnx_lrp.frames import Captured, Folder, VideoSink, open_frames, open_sink
from onnx_lrp.live import Live
from onnx_lrp.preprocess import PRESETS, from_options

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "vgg" / "small_vgg.onnx"
BOOK = ("-m", "zplus_wplus", "--start", "softmax", "--threads", "1")


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test writes where it may."""
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> Any:
    capsys.readouterr()
    found = main(["live", *map(str, argv)])
    printed = capsys.readouterr()
    assert found == code, printed.err
    return printed


def filmed(count: int, folder: str = "film") -> Path:
    """A folder of frames whose names sort by number only."""
    Path(folder).mkdir()
    for k, pixels in enumerate(small_vgg.film(count)):
        Image.fromarray(pixels).save(Path(folder, f"frame{k}.png"), compress_level=1)
    return Path(folder)


def plain(count: int, size: tuple[int, int] = (64, 48)) -> list[Image.Image]:
    """Frames of one colour each, which a codec keeps."""
    return [Image.new("RGB", size, (20 * k % 256, 90, 200)) for k in range(count)]


def explainer() -> onnx_lrp.Explainer:
    return onnx_lrp.Explainer(MODEL, "zplus_wplus", start="softmax", device="cpu", threads=1)


def preprocess() -> Any:
    return from_options("caffe", size=small_vgg.SIZE, input_shape=(None, 3, 32, 32))


# ---- frames ----------------------------------------------------------------------------------------------------------


def test_frames_of_a_folder_come_by_number() -> None:
    film = filmed(12)
    (film / "notes.txt").write_text("no frame")
    found = [np.asarray(image) for image in open_frames(str(film))]
    assert len(found) == 12
    for image, pixels in zip(found, small_vgg.film(12), strict=True):
        np.testing.assert_array_equal(image, pixels)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_a_video_is_written_and_read_again(suffix: str) -> None:
    path = Path(f"film{suffix}")
    with open_sink(str(path), 12.0) as sink:
        for image in plain(10):
            sink.add(image)
    source = open_frames(str(path))
    assert source.rate == pytest.approx(12)
    found = [np.asarray(image, float) for image in source]
    source.close()
    assert [a.shape for a in found] == [(48, 64, 3)] * 10
    for a, image in zip(found, plain(10), strict=True):
        assert np.abs(a - np.asarray(image, float)).mean() < 12, "colours in their order"
    assert [p.name for p in Path().iterdir()] == [path.name]


def test_a_video_of_a_camera_has_the_rate_of_its_frames() -> None:
    with VideoSink(Path("film.avi"), None) as sink:
        for image in plain(20):
            time.sleep(0.02)
            sink.add(image)
    source = open_frames("film.avi")
    assert source.rate is not None
    assert 15 < source.rate < 50
    assert len(list(source)) == 20


def test_videos_want_frames_of_one_size() -> None:
    with open_sink("film.avi", 10.0) as sink:
        sink.add(plain(1)[0])
        with pytest.raises(InputError, match="64x48 pixels do not fit in one video"):
            sink.add(plain(1, (32, 32))[0])


def test_a_camera(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened by number, asked for its newest frame, blue and red in their order, let go of at the end."""

    class Capture:
        def __init__(self, source: object) -> None:
            self.source, self.left, self.settings, self.gone = source, 3, {}, False
            made.append(self)

        def isOpened(self) -> bool:  # noqa: N802
            return True

        def read(self) -> tuple[bool, np.ndarray | None]:
            self.left -= 1
            return self.left >= 0, np.full((4, 6, 3), (255, 0, 7), np.uint8) if self.left >= 0 else None

        def set(self, key: int, value: float) -> None:
            self.settings[key] = value

        def get(self, key: int) -> float:
            return 30.0

        def release(self) -> None:
            self.gone = True

    made: list[Capture] = []
    fake = types.SimpleNamespace(VideoCapture=Capture, CAP_PROP_BUFFERSIZE=38, CAP_PROP_FPS=5)
    monkeypatch.setattr(frames, "opencv", lambda: fake)
    camera = open_frames("2")
    found = list(camera)
    camera.close()
    assert isinstance(camera, Captured)
    assert camera.rate is None
    assert (made[0].source, made[0].settings, made[0].gone) == (2, {38: 1}, True)
    assert [image.getpixel((0, 0)) for image in found] == [(7, 0, 255)] * 3


def test_a_folder_is_named_before_a_camera() -> None:
    filmed(1, "0")
    assert isinstance(open_frames("0"), Folder)


# ---- what is seen ----------------------------------------------------------------------------------------------------


def test_every_frame_is_explained_as_a_picture_is() -> None:
    """The crop in the middle at the model's size, the relevance that explain gives, the class and its probability."""
    live, pre = Live(explainer(), preprocess(), labels=small_vgg.SHAPES), preprocess()
    for pixels in small_vgg.film(3):
        view = live(Image.fromarray(pixels))
        framed = np.asarray(Image.fromarray(pixels).resize((40, 32), Image.Resampling.BILINEAR))[:, 4:36]
        expected = explainer()(small_vgg.prepared(framed[None]))
        np.testing.assert_array_equal(view.explanation.relevance["input"], expected.relevance["input"])
        logits = expected.outputs["logits"][0].astype(float)
        chance = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        assert view.says == f"{small_vgg.SHAPES[logits.argmax()]} {100 * chance.max():.1f} %"
        assert view.rate > 0
        seen = np.asarray(view.image)
        np.testing.assert_array_equal(
            seen[:320, :320], np.asarray(pre.frame(Image.fromarray(pixels)).resize((320, 320), 0))
        )
        lit = seen[:320, -320:].sum(2).reshape(32, 10, 32, 10).mean((1, 3))
        y, x = np.unravel_index(expected.relevance["input"][0].sum(0).argmax(), (32, 32))
        assert lit[y, x] > 3 * np.median(lit), "bright where the relevance is"


def test_a_class_of_ones_own_choice() -> None:
    view = Live(explainer(), preprocess(), target=3)(plain(1)[0])
    assert view.explanation.target.tolist() == [3]
    assert view.says.startswith("class 3 ")


def test_colours_keep_their_scale_from_frame_to_frame() -> None:
    """A frame with ten times the relevance is brighter than the one before, not as bright: maps do not flicker."""
    live = Live(explainer(), preprocess())
    assert live._steady(np.ones((4, 4))) == pytest.approx(1)
    assert live._steady(np.full((4, 4), 10.0)) == pytest.approx(1.9)
    assert live._steady(np.zeros((4, 4))) == pytest.approx(1.71)
    assert Live(explainer(), preprocess())._steady(np.zeros((4, 4))) is None


def test_channels_in_their_colours() -> None:
    """`rgb` of a model that reads blue first shows blue relevance in blue."""
    relevance = np.zeros((3, 8, 8))
    relevance[0, :4], relevance[2, 4:] = 2, 5
    seen = np.asarray(show.render(relevance, "rgb"))
    assert seen[0, 0].tolist() == [255, 0, 0]
    assert seen[7, 0].tolist() == [0, 0, 255], "every channel has a scale of its own"
    np.testing.assert_array_equal(np.asarray(show.render(relevance, "bgr")), seen[..., ::-1])
    np.testing.assert_array_equal(np.asarray(show.render(relevance.transpose(1, 2, 0), "rgb")), seen)
    assert (np.asarray(show.render(-relevance, "rgb")) == 0).all(), "what speaks against is not shown"
    with pytest.raises(InputError, match="three channels, this has 1"):
        show.render(relevance[:1], "rgb")
    with pytest.raises(InputError, match="for the relevance of pictures"):
        show.series(np.ones(5), np.ones(5), colormap="rgb")
    live = Live(explainer(), preprocess(), colormap="rgb")
    view = live(Image.fromarray(small_vgg.film(1)[0]))
    blue_first = view.explanation.relevance["input"][0]
    lit = np.asarray(show.render(blue_first[::-1], "rgb", (320, 320)), float)
    seen = np.asarray(view.image, float)[:320, -320:]
    assert np.corrcoef(seen.ravel(), lit.ravel())[0, 1] > 0.9
    assert np.corrcoef(seen.ravel(), lit[..., ::-1].ravel())[0, 1] < np.corrcoef(seen.ravel(), lit.ravel())[0, 1]


def test_a_blend_is_heat_and_picture() -> None:
    picture = np.full((6, 6, 3), 100, np.uint8)
    relevance = np.zeros((6, 6))
    relevance[0, 0] = 1
    seen = np.asarray(show.blend(picture, relevance, "hot", 0.9), float)
    hot = np.asarray(show.render(relevance, "hot"), float)
    np.testing.assert_allclose(seen, 0.9 * hot + 10, atol=1)


def test_memory_stays() -> None:
    """Of five hundred frames nothing is kept: the process is as large after all of them as after the first hundred."""
    live, film = Live(explainer(), preprocess()), [Image.fromarray(pixels) for pixels in small_vgg.film(20)]
    for k in range(100):
        live(film[k % 20])
    before = resident()
    for k in range(400):
        live(film[k % 20])
    assert resident() - before < 4e6


def resident() -> float:
    """Memory of this process in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_folder_into_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    film = filmed(5)
    printed = call(capsys, MODEL, film, *BOOK, "-o", "seen/", "--frames", 4)
    assert [p.name for p in sorted(Path("seen").iterdir())] == [f"{k:06d}.jpg" for k in range(1, 5)]
    assert {Image.open(p).size for p in Path("seen").iterdir()} == {(644, 352)}
    assert "frame 1: disc " in printed.out
    assert "frames/s" in printed.out
    assert "4 frame(s) in " in printed.out
    assert "written seen/" in printed.out
    assert call(capsys, MODEL, film, "--threads", 1, "-q").out == ""


def test_a_video_into_a_video(capsys: pytest.CaptureFixture[str]) -> None:
    with open_sink("film.mp4", 10.0) as sink:
        for pixels in small_vgg.film(8):
            sink.add(Image.fromarray(pixels))
    printed = call(capsys, MODEL, "film.mp4", *BOOK, "-o", "seen.mp4", "--colormap", "rgb")
    assert "8 frame(s)" in printed.out
    source = open_frames("seen.mp4")
    assert (source.rate, len(list(source))) == (pytest.approx(10), 8)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (
            ["nowhere.mp4"],
            "nowhere.mp4: no such file or folder; give a video, a folder of frames, or a camera's number",
        ),
        (["97"], "camera 97 gives no picture; check that it is there"),
        (["rtsp://127.0.0.1:1/none"], "rtsp://127.0.0.1:1/none gives no picture; check that it is there"),
        (["notes.txt"], "notes.txt: not a video that OpenCV can read; give .mp4 or .avi"),
        (["empty"], "empty: no images in this folder"),
        (["film", "-o", "seen.gif"], "seen.gif: frames are written as .mp4, .avi, or into a folder/"),
        (["film", "-o", "film"], "film: this is an input, which stays as it is"),
        (["film", "-o", "no/seen.mp4"], "no/seen.mp4: the folder no is missing; make it first"),
        (["film", "--colormap", "jet"], "--colormap jet is unknown"),
        (["film", "--frames", "0"], "0 is below 1"),
        (["film", "-t", "dog"], "no class is called 'dog'"),
        (["film", "--serve", "99999"], "--serve 99999: "),
    ],
)
def test_what_is_wrong_is_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], says: str) -> None:
    filmed(1)
    Path("empty").mkdir()
    Path("notes.txt").write_text("no video")
    printed = call(capsys, MODEL, *argv, code=2)
    assert says in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not Path("seen.gif").exists()


def test_models_of_something_else(capsys: pytest.CaptureFixture[str]) -> None:
    filmed(1)
    lookup = ROOT / "examples" / "lookup" / "lookup.onnx"
    assert len(call(capsys, lookup, "film", code=2).err.splitlines()) == 1


def test_without_opencv(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders need none."""
    monkeypatch.setitem(sys.modules, "cv2", None)
    assert "pip install onnx-lrp[live]" in call(capsys, MODEL, "0", code=2).err
    call(capsys, MODEL, filmed(1), *BOOK, "-o", "seen/")


@pytest.mark.parametrize("out", ["seen.avi", "seen/"])
def test_an_interruption_leaves_what_is_complete(out: str) -> None:
    """Ctrl-C: exit code 130, one line, and every frame so far is there."""
    film = filmed(2)
    for k in range(2, 3000):
        os.link(film / f"frame{k % 2}.png", film / f"frame{k}.png")
    command = [sys.executable, "-u", "-m", "onnx_lrp", "live", MODEL, "film", *BOOK, "-o", out]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    run = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert run.stdout is not None
    while "frame 1:" not in run.stdout.readline():
        assert run.poll() is None
    time.sleep(1.0)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 130, errors
    assert "interrupted: " in errors
    assert f"{out} is complete" in errors
    done = int(errors.split("interrupted: ")[1].split()[0])
    if out.endswith("/"):
        for path in Path("seen").iterdir():
            Image.open(path).load()
        assert len(list(Path("seen").iterdir())) == done > 0
    else:
        assert len(list(open_frames(out))) == done > 0
    assert sorted(p.name for p in Path().iterdir()) == sorted(["film", out.rstrip("/")])


# ---- the page --------------------------------------------------------------------------------------------------------


def test_a_browser_sees_the_latest_frame() -> None:
    with Screen(0) as screen:
        page = urllib.request.urlopen(screen.address, timeout=10).read().decode()
        assert 'src="/frames"' in page
        screen.show(Image.new("RGB", (20, 10), "red"))
        stream = urllib.request.urlopen(f"{screen.address}/frames", timeout=10)
        assert stream.headers["Content-Type"] == "multipart/x-mixed-replace; boundary=frame"
        for colour in ("red", "blue"):
            while not (line := stream.readline().decode().strip()).startswith("Content-Length"):
                pass
            stream.readline()
            data = stream.read(int(line.split(":")[1]))
            Path("part.jpg").write_bytes(data)
            image = Image.open("part.jpg")
            assert image.size == (20, 10)
            assert (
                np.abs(np.subtract(image.getpixel((5, 5)), Image.new("RGB", (1, 1), colour).getpixel((0, 0)))).max() < 8
            )
            screen.show(Image.new("RGB", (20, 10), "blue"))
        with pytest.raises(InputError, match="give another port"):
            Screen(screen._server.server_port)
    assert screen.next(99) is None


def test_it_can_be_served_while_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    printed = call(capsys, MODEL, filmed(2), *BOOK, "--serve", 0)
    assert "seen at http://127.0.0.1:" in printed.out


def test_presets_are_those_of_the_published_network() -> None:
    assert preprocess().mean == PRESETS["caffe"].mean == small_vgg.MEAN
