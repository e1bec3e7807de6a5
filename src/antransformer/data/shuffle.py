"""Orders of the windows in an epoch: permutations of 0 ... count - 1 that are fixed by (seed, epoch)."""

import numpy as np
from numpy.typing import NDArray

ROUNDS = 8


class FeistelPermutation:
    """Permutation of 0 ... count - 1 in constant memory: a Feistel network whose outputs are restricted to the range.

    The network permutes the smallest power of two that is at least ``count``. An output outside the range is fed in
    again until it is inside (cycle walking), which takes fewer than two passes on average.
    """

    def __init__(self, count: int, seed: int, epoch: int) -> None:
        bits = max(2, (count - 1).bit_length())
        self._count = np.uint64(count)
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        # Raw bit streams stay the same across numpy versions (NEP 19).
        self._keys = np.random.PCG64([seed, epoch]).random_raw(ROUNDS)

    def __getitem__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the elements at these positions, int64 [len(positions)]."""
        values = self._permute(positions.astype(np.uint64))
        while (outside := values >= self._count).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = values & self._low_mask, values >> self._low_bits
        for number, key in enumerate(self._keys):
            # Each round changes one half by a function of the other, so that it can be undone.
            if number % 2:
                high = high ^ (_mix(low + key) & self._high_mask)
            else:
                low = low ^ (_mix(high + key) & self._low_mask)
        return (high << self._low_bits) | low


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash 64-bit integers with the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation(kind: str, count: int, seed: int, epoch: int) -> FeistelPermutation | NDArray[np.int64]:
    """Return the order of ``count`` windows in an epoch, to be indexed with an array of positions.

    Args:
        kind: "feistel" is evaluated at the requested positions, in constant memory. "argsort" is the order of older
            runs and takes 16 bytes for each window.
        count: number of windows.
        seed, epoch: integers of at least 0.
    """
    if kind != "argsort":
        return FeistelPermutation(count, seed, epoch)
    # Generator.permutation may change across numpy versions; raw bit streams and a stable sort do not.
    return np.argsort(np.random.PCG64([seed, epoch]).random_raw(count), kind="stable")
