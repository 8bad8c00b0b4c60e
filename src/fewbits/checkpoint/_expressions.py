"""Regular expressions of configurations, matched for a bounded time.

Expressions come with checkpoints, from anybody, and going back where an alternative fails can take 2^n steps: `(a+)+$`
on n letters that are no match. Python's `re` cannot be stopped; the library `regex`, which takes the same expressions,
can.
"""

from __future__ import annotations

import regex

SECONDS = 2.0
"""Those that tell modules apart take microseconds."""


def matches(expression: str, name: str) -> bool:
    """Whether `re.match(expression, name)` finds something.

    Raises ValueError for what is no expression, or takes longer than SECONDS.
    """
    try:
        return regex.match(expression, name, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"{expression[:200]!r} takes more than {SECONDS:g} seconds to match '{name[:200]}'; write it "
            "without repeats beside or inside repeats"
        ) from error
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{expression[:200]!r} is no valid expression ({error})") from error
