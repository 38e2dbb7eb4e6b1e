"""Contenders measured in turn: what takes part, what it is given, the rounds, and what is made of the times."""

from benchmarks.harness.turns.arguments import add_arguments, chosen, opened
from benchmarks.harness.turns.contender import Contender, Measured, Run, Timed, Workload
from benchmarks.harness.turns.report import compare, draw, limits_of, number
from benchmarks.harness.turns.rounds import LIMITS, measure_in_turn

__all__ = ["LIMITS", "Contender", "Measured", "Run", "Timed", "Workload", "add_arguments", "chosen", "compare", "draw",
           "limits_of", "measure_in_turn", "number", "opened"]
