"""Results in the forms that people and programs read."""

from debackdoor.report.records import (
    detect_record,
    evaluate_record,
    header,
    load_schema,
    repair_record,
    scan_record,
    to_json,
)

__all__ = [
    "detect_record",
    "evaluate_record",
    "header",
    "load_schema",
    "repair_record",
    "scan_record",
    "to_json",
]
