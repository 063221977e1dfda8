"""The bench: attacks x defences x seeds, one record a cell, on one machine or many; and what the records come to."""
