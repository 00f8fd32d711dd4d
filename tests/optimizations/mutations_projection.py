"""Bugs to plant in the cached projection weight (chapter 08)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "device check keyed on data_ptr": Mutation(
        "kernels/projection.py",
        "        self._follow(weight, scale, dialect, force=False)\n",
        "        key = (weight.data_ptr(), scale.data_ptr())\n"
        "        if key != getattr(self, '_last', None):\n"
        "            self._last = key\n"
        "            self._follow(weight, scale, dialect, force=True)\n",
        cases=("cached_projection/tiny",),
    ),
    "fingerprint blind to scales": Mutation(
        "kernels/projection.py",
        "return lanes + (scale_byte.to(tl.int64) + 1) * 0x5851F42D4C957F2D",
        "return lanes",
        cases=("cached_projection/tiny", "cached_projection/tiny-fnuz"),
    ),
}
