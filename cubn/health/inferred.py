"""What the batches between two readings of running statistics were: it follows from the update's own formula."""

from __future__ import annotations

import numpy as np

from cubn.health.reading import Floats, Int64, Reading


def batches_between(before: Reading | None, now: Reading) -> Floats:
    """Mean and variance of the batches between two readings, averaged with the weights that the updates gave them.

    batch = (new - (1 - W) * old) / W

    Of k updates of weight w, W = 1 - (1 - w)**k: of a single one that is w, and the result exactly its batch. An older
    batch weighs less, by 1 - w for each that came after it. Of a cumulative average of n updates W = k / n.

    Returns
    -------
    array of shape (2, channels)
        NaN where there was no update, no reading before, or one that was not finite.

    Notes
    -----
    Computed in float64 from what is stored. Each stored value was rounded to the state's type, which the division by W
    enlarges: an error of up to 2**-24 * max|running| / w for float32 as cubn rounds it, once in each update, however
    many they were; three times that for torch's own update, which rounds each product. It matters where |mean| is far
    larger than the standard deviation: at 10 000 of them, with w = 0.1, the batch's mean is good to 0.006 of them.
    """
    if before is None:
        return np.full_like(now.values[1:], np.nan)
    counted = now.counts[0] - now.counts[1]
    made = counted - (before.counts[0] - before.counts[1])
    with np.errstate(all="ignore"):
        left = _left(now.momentum, made, counted)
        found: Floats = (now.values[1:] - left * before.values[1:]) / (1 - left)
    found[np.isinf(found)] = np.nan
    return found


def _left(momentum: Floats, made: Int64, counted: Int64) -> Floats:
    """What running statistics weigh after so many updates, of so many in all; NaN after none."""
    left = (1 - momentum) ** made
    if made.min() <= 0:
        left[made <= 0] = np.nan
    is_average = momentum != momentum
    return np.where(is_average, 1 - made / counted, left) if is_average.any() else left


def rms_in_evaluation(now: Reading, batches: Floats, eps: Floats) -> Floats:
    """Root mean square that batches would have if they were normalised by the running statistics.

    s = sqrt((var_b + (mean_b - mean)**2) / (var + eps))

    By their own statistics it is 1, less where eps matters. Of running statistics that are young, what the initial 0
    and 1 still weigh, r = (1 - w)**updates, is taken out first: mean = running_mean / (1 - r), var =
    (running_var - r) / (1 - r). So s tells whether the batches move, and not that training has only begun.

    Parameters
    ----------
    now : Reading
    batches : array of shape (2, channels)
        As from `batches_between`.
    eps : array of shape (channels,)

    Returns
    -------
    array of shape (channels,)
        NaN where the batches are not known.
    """
    _, mean, var = now.values
    batch_mean, batch_var = batches
    with np.errstate(all="ignore"):
        updates = now.counts[0] - now.counts[1]
        initial = np.where(np.isnan(now.momentum), 0, (1 - now.momentum) ** updates)
        seen = 1 - initial
        squares = np.maximum(batch_var, 0) + (batch_mean - mean / seen) ** 2
        rms: Floats = np.sqrt(squares / (np.maximum((var - initial) / seen, 0) + eps))
    return rms
