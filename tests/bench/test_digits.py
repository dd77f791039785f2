"""The data, the shipped base and what they promise."""

import torch

from lora_lite.bench import digits
from lora_lite.bench.pretrain import shifted


def test_the_splits_share_no_image_and_leave_none_out():
    rows = torch.cat([digits.source(split).rows for split in digits.SPLITS])
    assert sorted(rows.tolist()) == list(range(1797))


def test_the_split_is_fixed():
    assert digits.source("test").rows[:5].tolist() == [418, 1000, 1208, 186, 163]
    assert digits.source("test").labels.bincount().tolist() == [
        53,
        62,
        53,
        59,
        68,
        59,
        62,
        62,
        61,
        61,
    ]


def test_a_target_image_is_its_source_image_turned_by_a_quarter():
    upright, turned = digits.source("validation"), digits.target("validation")
    torch.testing.assert_close(turned.labels, upright.labels)
    # Counter-clockwise: what was the right edge is the top.
    torch.testing.assert_close(turned.images[:, 0], upright.images[:, :, 7])
    assert not torch.equal(turned.images, upright.images)


def test_the_shipped_base_reads_upright_digits_and_not_turned_ones():
    model = digits.base_model()
    assert sum(p.numel() for p in model.parameters()) == 226_858
    assert digits.BASE_PATH.stat().st_size < 2**20
    assert digits.score(model, digits.source("test"))[0] > 97
    assert digits.score(model, digits.target("test"))[0] < 20


def test_shifted_moves_by_at_most_a_pixel_and_keeps_what_stays_inside():
    image = torch.zeros(1, 8, 8)
    image[0, 3, 4] = 1
    places = {tuple(shifted(image)[0].nonzero()[0].tolist()) for _ in range(200)}
    assert places == {(y, x) for y in (2, 3, 4) for x in (3, 4, 5)}
