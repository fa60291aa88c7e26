"""Rounding to bfloat16 that misses nothing on average, the Kahan remainder, and random bits that repeat."""

import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.precision.compensation import Master, join, key_of, random_bits, round_stochastically, slices, split

BITS = torch.arange(65536, dtype=torch.int32)
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**126), max_value=2.0**126)


def neighbours(x: float) -> tuple[float, float]:
    """The two bfloat16 numbers around a float32, towards zero and away from it."""
    raw = struct.unpack("<I", struct.pack("<f", x))[0]
    low = raw & 0xFFFF0000
    high = low if raw == low else low + 0x10000
    return tuple(struct.unpack("<f", struct.pack("<I", number))[0] for number in (low, high))


@given(FINITE)
@settings(deadline=None, max_examples=60)
def test_every_result_is_a_neighbour_and_all_bits_together_are_exact(x):
    """Over all 65,536 values of the random bits the upper neighbour comes up exactly as often as makes the mean x."""
    low, high = neighbours(x)
    rounded = round_stochastically(torch.full((65536,), x), BITS).double()
    ups = int((rounded == high).sum()) if high != low else 0
    assert int((rounded == low).sum()) == 65536 - ups
    assert low + (high - low) * ups / 65536 == x


@given(FINITE)
@settings(deadline=None, max_examples=60)
def test_a_remainder_keeps_24_bits_and_their_mean_is_exact(x):
    near, low = split(torch.full((65536,), x), BITS)
    kept = join(near, low)
    # Of a tie, which has 256 neighbours in steps of the remainder, half may go either way, and one step more.
    assert int((kept.bfloat16() != near).sum()) <= len(near) // 2 + 256
    assert bool((kept.view(torch.int32) & 255 == 0).all()) and bool(
        ((kept - near.float()).abs() <= (kept - kept.bfloat16().float()).abs()).all()
    )
    assert float(kept.double().mean()) == x
    again, same = split(kept, BITS)
    assert torch.equal(again, near) and torch.equal(same, low)


def test_what_is_not_finite_stays():
    x = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    rounded = round_stochastically(x, torch.full((5,), 65535, dtype=torch.int32)).float()
    assert torch.equal(rounded[:2], x[:2]) and rounded[2].isnan() and torch.equal(rounded[3:], x[3:])
    kept = join(*split(x, torch.full((5,), 65535, dtype=torch.int32)))
    assert torch.equal(kept[:2], x[:2]) and kept[2].isnan() and torch.equal(kept[3:], x[3:])


def test_bits_are_a_function_of_seed_step_name_and_place():
    key = key_of(1, 2, "a")
    whole = random_bits(key, 0, 1000)
    assert torch.equal(whole[300:500], random_bits(key, 300, 200)) and int(whole.min()) >= 0 and int(whole.max()) < 65536
    for other in (key_of(2, 2, "a"), key_of(1, 3, "a"), key_of(1, 2, "b")):
        assert float((random_bits(other, 0, 1000) == whole).float().mean()) < 0.02


def test_bits_are_evenly_spread_and_unrelated_to_their_neighbours():
    bits = random_bits(key_of(0, 1, "w"), 0, 1 << 18).double()
    counts = torch.histc(bits, 64, 0, 65536)
    expected = (1 << 18) / 64
    assert float(((counts - expected) ** 2 / expected).sum()) < 120  # 63 degrees of freedom: beyond it once in 10^5
    x = bits - bits.mean()
    later = random_bits(key_of(0, 2, "w"), 0, 1 << 18).double() - 32767.5
    for other in (x.roll(1), x.roll(256), later):
        assert abs(float((x * other).mean() / x.square().mean())) < 0.01


@pytest.mark.parametrize("compensation, parts, tolerance", [("stochastic", 1000, 3e-4), ("kahan", 1024, 1e-5)])
def test_small_updates_add_up(compensation, parts, tolerance):
    """Updates of a thousandth of the last bit, which float32 can hold; to nearest they would all be lost."""
    weight = torch.nn.Parameter(torch.ones(64, 256, dtype=torch.bfloat16))
    master = Master("w", weight, compensation)
    update = 2.0**-8 / parts
    for step in range(parts):
        for rows in slices(64, 256):
            master.write(rows, master.read(rows) + update, 0, step)
    kept = master.read(slice(0, 64))
    assert float(kept.mean()) == pytest.approx(1 + parts * update, abs=tolerance)
    assert bool((torch.ones(1, dtype=torch.bfloat16) + update == 1).all())
    assert set(master.state()) == ({"remainder"} if compensation == "kahan" else set())


def test_a_float32_master_is_the_parameter_itself():
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    master = Master("w", weight, "stochastic")
    master.write(slice(1, 3), torch.full((2, 4), 0.1), 0, 1)
    assert torch.equal(weight.detach()[1:3], torch.full((2, 4), 0.1)) and float(weight.detach()[0].sum()) == 0
