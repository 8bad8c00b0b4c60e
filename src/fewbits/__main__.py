"""`python -m fewbits` is `fewbits`."""

from __future__ import annotations

import sys

from fewbits.cli import main

if __name__ == "__main__":
    sys.exit(main())
