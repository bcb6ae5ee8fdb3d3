from __future__ import annotations

import zlib

import pytest

from parckpt.core.crc import combine, crc32, crc32_zeros

pytestmark = pytest.mark.fast


def test_published_check_value() -> None:
    assert crc32(b"123456789") == 0xCBF43926


def test_continues_from_an_earlier_value() -> None:
    assert crc32(b"6789", crc32(b"12345")) == 0xCBF43926


@pytest.mark.parametrize("cut", [0, 1, 4, 8, 9])
def test_combine_equals_the_crc_of_both_parts(cut: int) -> None:
    data = b"123456789"
    assert combine(crc32(data[:cut]), crc32(data[cut:]), len(data) - cut) == 0xCBF43926


@pytest.mark.parametrize("nbytes", [0, 1, 2, 7, 8, 255, 4096, 100_003])
def test_zeros_equal_real_zeros(nbytes: int) -> None:
    assert crc32_zeros(nbytes) == zlib.crc32(bytes(nbytes))


def test_more_zeros_than_a_signed_64_bit_length_can_say() -> None:
    half = 2**63
    assert crc32_zeros(2 * half) == combine(crc32_zeros(half), crc32_zeros(half), half)
    assert crc32_zeros(half) == combine(crc32_zeros(half - 1), crc32_zeros(1), 1)
    assert crc32_zeros(2 * half) != crc32_zeros(0)


def test_negative_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        combine(1, 2, -1)
    with pytest.raises(ValueError, match="must not be negative"):
        crc32_zeros(-1)
