"""``python -m debackdoor``: the same as the command ``debackdoor``."""

from __future__ import annotations

import sys

from debackdoor.cli import main

if __name__ == "__main__":
    sys.exit(main())
