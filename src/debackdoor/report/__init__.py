"""Results in the forms that people and programs read."""

from debackdoor.report.records import evaluate_record, header, repair_record, to_json

__all__ = ["evaluate_record", "header", "repair_record", "to_json"]
