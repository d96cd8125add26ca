"""Location tokens: half a bin at most, never an empty box, any tokens a model writes."""

from hypothesis import given
from hypothesis import strategies as st

from dsvlm.data.boxes import decode_boxes, decode_side, encode_box, encode_side, iou, match_boxes

SHARE = st.floats(0, 1, allow_nan=False)
BINS = st.sampled_from([2, 3, 16, 32, 40, 1000])


@given(SHARE, SHARE, BINS)
def test_round_trip_is_off_by_half_a_bin_at_most(a, b, bins):
    low, high = sorted((a, b))
    if high - low < 1e-9:
        return
    found_low, found_high = decode_side(*encode_side(low, high, bins), bins)
    assert abs(found_low - low) <= 0.5 / bins + 1e-9
    assert abs(found_high - high) <= 0.5 / bins + 1e-9


@given(st.floats(0, 0.999), st.floats(1e-6, 1.2), BINS)
def test_short_sides_too(low, width, bins):
    low, high = low, min(1.0, low + width / bins)
    found_low, found_high = decode_side(*encode_side(low, high, bins), bins)
    assert max(abs(found_low - low), abs(found_high - high)) <= 0.5 / bins + 1e-9


def test_every_pair_of_tokens_has_an_area():
    for bins in (2, 3, 7, 32):
        for i in range(bins):
            for j in range(bins):
                low, high = decode_side(i, j, bins)
                assert 0 <= low < high <= 1, (bins, i, j)


def test_codes_are_kept_by_a_second_round_trip():
    for bins in (2, 5, 16):
        for i in range(bins):
            for j in range(i, bins):
                assert encode_side(*decode_side(i, j, bins), bins) == (i, j)


def test_text_form():
    text = encode_box((0.1, 0.2, 0.5, 0.9), 16)
    assert text == "<loc_1><loc_3><loc_8><loc_14>"
    (box,) = decode_boxes(f"a circle {text} and <loc_3>", 16)
    assert iou(box, (0.1, 0.2, 0.5, 0.9)) > 0.8
    assert decode_boxes("<loc_99><loc_0><loc_99><loc_99>", 16)[0][2] <= 1


def test_bad_boxes_are_refused():
    for box in ((0.5, 0, 0.5, 1), (0, 0, 1.1, 1), (0.9, 0, 0.1, 1), (float("nan"), 0, 1, 1)):
        try:
            encode_box(box, 16)
        except ValueError as error:
            assert "box" in str(error)
        else:
            raise AssertionError(box)


def test_iou_and_matching():
    a, b, far = (0, 0, 0.5, 0.5), (0.25, 0, 0.75, 0.5), (0.8, 0.8, 1, 1)
    assert iou(a, a) == 1 and iou(a, far) == 0 and abs(iou(a, b) - 1 / 3) < 1e-12
    assert match_boxes([a, far], [far, a]) == 1
    assert match_boxes([a], [a, far]) == 0.5 and match_boxes([a, far, b], [a, far]) == 2 / 3
    assert match_boxes([], [a]) == 0
