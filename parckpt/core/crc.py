"""CRC-32 (IEEE, as zlib computes it): of bytes, of bytes glued together, of runs of zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zlib_ng import zlib_ng

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from numpy.typing import NDArray

__all__ = ["combine", "crc32", "crc32_zeros"]

_ONES = 0xFFFFFFFF
# zlib-ng takes the length as a signed 64-bit number and loops for ever on a negative one.
_MAX_COMBINE_NBYTES = 2**63 - 1


def crc32(data: ReadableBuffer | NDArray[Any], value: int = 0) -> int:
    """CRC-32 of `data`, or of earlier bytes with CRC `value` followed by `data`.

    `data` is any C-contiguous buffer; it is not kept. The GIL is released for long buffers.
    """
    return int(zlib_ng.crc32(data, value))


def combine(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of two byte strings one after the other, from the CRC-32 of each, in O(log second_nbytes).

    Parameters
    ----------
    first, second : int
        CRC-32 of the two parts.
    second_nbytes : int
        Length of the second part in bytes; any size, not negative.
    """
    if second_nbytes < 0:
        raise ValueError(f"length of the second part must not be negative, got {second_nbytes}")
    return _shift(first, second_nbytes) ^ second


def crc32_zeros(nbytes: int) -> int:
    """CRC-32 of `nbytes` zero bytes, in O(log nbytes)."""
    if nbytes < 0:
        raise ValueError(f"number of zero bytes must not be negative, got {nbytes}")
    return _shift(_ONES, nbytes) ^ _ONES


def _shift(value: int, nbytes: int) -> int:
    # What feeding `nbytes` zero bytes does to the register; combining with 0 is exactly that.
    while nbytes > 0:
        piece = min(nbytes, _MAX_COMBINE_NBYTES)
        value = int(zlib_ng.crc32_combine(value, 0, piece))
        nbytes -= piece
    return value
