"""Bugs to plant in the ladder's report and rounds (chapter 17)."""

from __future__ import annotations

from mutation import Mutation

MUTATIONS = {
    "the noise floor is forgotten where a rung is slower": Mutation(
        "dsv4ref/optimizations/ladder_statistics.py",
        "int(self.ratio.high < 1 - self.floor)",
        "int(self.ratio.median < 1)",
        cases=("attribution_ladder/simulated-nothing",),
        unaffected=("attribution_ladder/simulated-faulty",),
    ),
    "a red rung is what the next one is held against": Mutation(
        "dsv4ref/optimizations/ladder_runner.py",
        "green = [subject for _, subject in rungs if gates[subject] is None]",
        "green = [subject for _, subject in rungs]\n    gates = dict.fromkeys(gates)",
        cases=("attribution_ladder/simulated-faulty",),
        unaffected=("attribution_ladder/simulated",),
    ),
    "a window is booked to the subject before it": Mutation(
        "dsv4ref/optimizations/ladder_runner.py",
        "subjects[name].window(steps)",
        "subjects[taking[taking.index(name) - 1]].window(steps)",
        cases=("attribution_ladder/simulated",),
        unaffected=("attribution_ladder/simulated-drift",),
    ),
}
