"""tissues.py: the signal against values computed by hand, and the contrasts of a T2-weighted scan."""

import numpy as np
import pytest

from tissues import SIGNAL, spin_echo


def test_spin_echo_agrees_with_values_computed_by_hand():
    # After TR = T1 ln 2 half of the magnetisation has recovered. After TE = T2 ln 4 a quarter of that remains.
    assert spin_echo(0.8, 1000, 100, tr=1000 * np.log(2), te=100 * np.log(4)) == pytest.approx(0.1)
    # Prostate at 3 T, 1597/74 ms (de Bazelaire et al. 2004): (1 - e^-2.50470) e^-1.35135 = 0.918300 x 0.258890
    assert spin_echo(1.0, 1597, 74, tr=4000, te=100) == pytest.approx(0.237739, abs=1e-5)


def test_tissues_are_ordered_as_in_a_t2_weighted_scan():
    order = ["cortex", "gas", "muscle", "transition", "peripheral", "urine"]
    signals = [SIGNAL[name] for name in order]
    assert signals == sorted(signals)
    assert SIGNAL["fat"] > SIGNAL["marrow"] > SIGNAL["muscle"]
