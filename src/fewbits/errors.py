"""One tree of errors.

Every message says the name of the thing, its value, what was required, and what to do about it.
The command line turns each class into an exit code (`fewbits.cli`), so that a script can tell a bad file from a
failed proof.
"""

from __future__ import annotations


class FewbitsError(Exception):
    """Base of everything that fewbits raises on purpose."""


class FormatError(FewbitsError):
    """A tensor cannot be held in the format asked for (shape, NaN, unknown name)."""


class CheckpointError(FewbitsError):
    """A file is missing, cut short, malformed or unsafe to read."""


class UnsupportedError(FewbitsError):
    """The request is well formed, but this architecture, file type or method cannot serve it."""


class OutputError(FewbitsError):
    """The output cannot be written: it exists already, or there is no room for it."""


class LedgerError(FewbitsError):
    """A parameter of the source is unaccounted for in the output."""


class VerificationError(FewbitsError):
    """What stands in the files is not what was meant."""


class QualityError(FewbitsError):
    """The quantized model is further from the original than the stated limit."""


class ElsewhereError(FewbitsError):
    """Another process of the same run has failed, and says why."""


class RequestError(FewbitsError):
    """A running model cannot serve this: a setting out of its range, or a prompt longer than the context."""
