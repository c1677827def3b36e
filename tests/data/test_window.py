from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from zoo.data.decode import BadImage, decode
from zoo.data.window import Windowing, parse_rescale, parse_window, windowing_of, windowing_of_facts
from zoo.errors import ZooError
from zoo.runs import Preprocessing


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_a_window_maps_its_ends_to_black_and_white():
    grey = Windowing(parse_window("lung")).grey(np.array([[-5000, -1350, -600, 149, 150, 3000]]))
    assert grey[0, :, 0].tolist() == [0, 0, 128, 255, 255, 255]
    assert grey.shape == (1, 6, 3)


def test_three_windows_are_three_channels():
    grey = Windowing(parse_window("lung,mediastinum,400/1800")).grey(np.array([[-600, 40, 400]]))
    assert [grey[0, place, place] for place in range(3)] == [128, 128, 128]
    assert grey[0, 0].tolist() == [128, 0, 0]


def test_what_is_no_number_is_black():
    grey = Windowing(parse_window("0/2")).grey(np.array([[np.nan, np.inf, -np.inf]]))
    assert grey[0, :, 0].tolist() == [0, 255, 0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lungs", "did you mean 'lung'"),
        ("1/0", "WIDTH above 0"),
        ("lung,bone", "one, or three for three channels. Got 2"),
        ("", "CENTRE/WIDTH"),
    ],
)
def test_wrong_windows_are_refused(text, said):
    with pytest.raises(ZooError, match=said):
        parse_window(text)


@pytest.mark.parametrize("text", ["1", "0,1", "a,b", "nan,1", "1,inf"])
def test_wrong_rescales_are_refused(text):
    with pytest.raises(ZooError, match="SLOPE,INTERCEPT"):
        parse_rescale(text)


def test_16_bit_png_is_windowed_like_a_ct():
    hounsfield = np.array([[-1350, -600, 150, 40]])
    stored = (hounsfield + 32768).astype(np.uint16)  # as DeepLesion stores its slices
    data = encoded(Image.fromarray(stored), "PNG")
    seen = decode(data, Windowing(parse_window("lung"), 1.0, -32768.0))
    assert (seen == Windowing(parse_window("lung")).grey(hounsfield)).all()
    assert decode(data)[0, :, 0].tolist() == [122, 125, 128, 128]  # without a window: the whole range of 16 bits


def test_32_bit_and_float_tiff_are_windowed_and_refused_without_a_window():
    values = np.array([[-1350, 150], [-600, 99_999]])
    window = Windowing(parse_window("lung"))
    for kind in (np.int32, np.float32):
        data = encoded(Image.fromarray(values.astype(kind)), "TIFF")
        assert (decode(data, window) == window.grey(values)).all()
        with pytest.raises(BadImage, match=r"32-bit values|floating-point pixels"):
            decode(data)


def test_a_window_leaves_8_bits_alone():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    data = encoded(Image.fromarray(pixels), "PNG")
    assert (decode(data, Windowing(parse_window("lung"))) == pixels).all()


def test_a_window_is_part_of_the_preprocessing_and_of_a_run_only_where_there_is_one():
    plain = Preprocessing(image_size=32, crop_pct=1.0, interpolation="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
    assert set(plain.identity) == {"image_size", "crop_pct", "interpolation", "mean", "std"}
    lung = plain.model_copy(update={"window": "lung", "rescale_intercept": -1024.0})
    assert lung.identity["window"] == "lung"
    assert lung.identity["rescale_intercept"] == -1024.0
    assert windowing_of(lung) == Windowing(parse_window("lung"), 1.0, -1024.0)
    assert windowing_of_facts({"window": "lung", "rescale": "1,-1024"}) == windowing_of(lung)
