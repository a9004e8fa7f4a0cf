"""The phantom's tissues: T1, T2, proton density and texture of each, and the signal that a T2-weighted scan gives them.

The spin-echo equation gives the signal. phantom.py paints with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TR, TE = 4000.0, 100.0  # ms, usual for T2-weighted imaging of the prostate


def spin_echo(pd: float, t1: float, t2: float, tr: float = TR, te: float = TE) -> float:
    """Return the signal of a spin echo, S = PD (1 - exp(-TR/T1)) exp(-TE/T2), for TE much shorter than TR.

    Haacke et al., Magnetic Resonance Imaging: Physical Principles and Sequence Design, 1999.

    Args:
        pd: Proton density, 0 to 1.
        t1: Longitudinal relaxation time, ms.
        t2: Transverse relaxation time, ms.
        tr: Repetition time, ms.
        te: Echo time, ms.

    Returns:
        The signal, 0 to 1.
    """
    return float(pd * (1 - np.exp(-tr / t1)) * np.exp(-te / t2))


@dataclass(frozen=True)
class Tissue:
    """The magnetic properties and the texture of a tissue."""

    pd: float  # proton density relative to water, 0 to 1
    t1: float  # ms
    t2: float  # ms
    mottle: float = 0.0  # texture of about 20 mm: standard deviation relative to the signal
    grain: float = 0.0  # texture of about 4 mm, likewise
    strands: float = 0.0  # added to the signal along thin curved sheets: dark septa in fat, bright fat in muscle


# T1 and T2 at 3 T, ms.
# [B] de Bazelaire et al. 2004, Radiology 230:652: subcutaneous fat 382/68, marrow 586/49, muscle 898/29,
#     prostate 1597/74. It is drawn by zones here: peripheral, transition, stroma and nodules.
# [S] Stanisz et al. 2005, Magn Reson Med 54:507: muscle 1412/50, blood 1932/275, cartilage 1168/27.
# [K] Simpkin et al. 2013, Br J Radiol 86:20120469, T2 at 1.5 T: peripheral zone 149, transition zone 125.
# Where sources differ, a value lies between them. Fat and marrow are brighter in a fast spin echo than [B] predicts,
# since closely spaced refocusing pulses suppress the decay by J-coupling of lipids (Henkelman et al. 1992, J Magn
# Reson Imaging 2:533): their T2 is an effective one, chosen for the contrast that scans show. All proton densities,
# textures and the values marked ~ are our approximations.
TISSUES = {
    "air": Tissue(0.0, 1000, 100),
    "skin": Tissue(0.75, 900, 50),  # ~
    "fat": Tissue(0.95, 382, 145, 0.04, 0.025, -0.13),  # [B], effective T2
    "pelvic_fat": Tissue(0.95, 382, 135, 0.09, 0.08, -0.20),  # fat with vessels
    "fascia": Tissue(0.9, 382, 70, 0.6, 0.3),  # ~ fat planes thinner than a voxel
    "muscle": Tissue(0.85, 1300, 36, 0.16, 0.12, 0.14),  # [B], [S]
    "gluteus": Tissue(0.85, 1300, 37, 0.16, 0.12, 0.34),  # coarse bundles, more fat between them
    "levator": Tissue(0.85, 1300, 42, 0.15, 0.12),
    "perineum": Tissue(0.85, 1300, 58, 0.35, 0.3),  # ~ smooth muscle, fibrous tissue and fat
    "tendon": Tissue(0.4, 900, 22),  # ~
    "cortex": Tissue(0.2, 500, 15),  # ~
    "marrow": Tissue(0.85, 586, 102, 0.17, 0.13, -0.08),  # [B], effective T2
    "head": Tissue(0.88, 500, 130, 0.08, 0.07, -0.05),  # fatty marrow, ~
    "cartilage": Tissue(0.8, 1168, 60, 0.1, 0.15),  # [S] with joint fluid
    "disc": Tissue(0.7, 1168, 45, 0.1, 0.1),  # fibrocartilage, ~
    "urine": Tissue(1.0, 3500, 900, 0.01),  # ~ near water
    "bladder_wall": Tissue(0.85, 1400, 52, 0.1, 0.1),  # ~ smooth muscle
    "stroma": Tissue(0.85, 1500, 55, 0.12, 0.1),  # anterior fibromuscular stroma, capsule, ~
    "transition": Tissue(0.88, 1597, 86, 0.16, 0.14),  # [B], [K]
    "nodule_bright": Tissue(0.9, 1597, 125, 0.1, 0.15),  # [K]
    "nodule_dark": Tissue(0.88, 1500, 66, 0.1, 0.1),  # ~
    "peripheral": Tissue(0.92, 1597, 149, 0.10, 0.10, -0.08),  # [B], [K]
    "urethra": Tissue(0.9, 1600, 150),  # ~
    "plexus": Tissue(0.9, 1500, 105, 0.35, 0.4, -0.15),  # ~ veins and bands around the prostate
    "vesicle": Tissue(0.92, 1700, 150, 0.15, 0.25, -0.35),  # ~ fluid between folded walls
    "rectal_wall": Tissue(0.85, 1400, 58, 0.12, 0.12),  # ~
    "mucosa": Tissue(0.9, 1400, 90, 0.15, 0.2),  # ~
    "gas": Tissue(0.02, 1000, 100),
    "stool": Tissue(0.6, 900, 62, 0.3, 0.4),  # ~
    "penis": Tissue(0.92, 1600, 115, 0.10, 0.10, -0.08),  # ~ slow venous blood
    "cord": Tissue(0.9, 500, 95, 0.2, 0.3, -0.2),  # ~ fat, veins and duct
    "vein": Tissue(0.9, 1932, 150, 0.1),  # [S], less for flow
    "artery": Tissue(0.1, 1932, 275),  # flow void
    "nerve": Tissue(0.85, 1100, 75, 0.1, 0.25),  # ~
}
STRANDED_ALONG = ("muscle", "gluteus", "fat")  # strands follow the fibres; elsewhere they wander
SIGNAL = {name: spin_echo(t.pd, t.t1, t.t2) for name, t in TISSUES.items()}
