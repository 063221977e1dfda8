"""Evaluation: the only place where triggers and defended models meet."""

from debackdoor.evaluation.metrics import Evaluation, accuracy, defence_effectiveness, evaluate

__all__ = ["Evaluation", "accuracy", "defence_effectiveness", "evaluate"]
