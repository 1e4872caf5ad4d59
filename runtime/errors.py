"""The errors that llmc raises on purpose.

LlmcError
├── CheckpointError     the checkpoint cannot be read or contradicts itself
├── UnsupportedError    valid input that llmc does not support (yet)
├── BuildError          a step of the build failed
│   └── VerificationError   the built graph does not reproduce the checkpoint
│       └── ThresholdError      a bundle misses a threshold of the caller
├── BundleError         the bundle is damaged, too new, or not a bundle
├── RequestError        a generation request or an option that cannot be served
└── BackendError        an engine backend failed its self-test or its call
    └── RankError           a rank of a bundle with several ranks ended, or does not answer

Each has a message, which states the fact, and a hint, which says what to do. The command line prints them as
one `error:` and one `hint:` line. It exits with 1, with 2 if the error names an `argument`, and with 3 for a
ThresholdError.
"""

from __future__ import annotations


class LlmcError(Exception):
    """Base class. `message` states the fact in one line, `hint` says what to do about it.

    Line breaks, which names in a damaged file may contain, become spaces.

    argument: the Python name of the argument whose value is refused, or "". On the command line it is an
        option: `max_tokens` is --max-tokens.
    """

    def __init__(self, message: str, hint: str = "", argument: str = "") -> None:
        self.message, self.hint = (" ".join(text.splitlines()) for text in (message, hint))
        super().__init__(self.message)
        self.argument = argument


class CheckpointError(LlmcError):
    """The checkpoint cannot be read or contradicts itself."""


class UnsupportedError(LlmcError):
    """Valid input that llmc does not support."""


class BuildError(LlmcError):
    """A step of the build failed."""


class VerificationError(BuildError):
    """The built graph does not reproduce the checkpoint within its tolerance."""


class ThresholdError(VerificationError):
    """A bundle misses a threshold that the caller has set."""


class BundleError(LlmcError):
    """The bundle is damaged, written by a newer llmc, or not a bundle."""


class RequestError(LlmcError):
    """A request or an option that cannot be served."""


class BackendError(LlmcError):
    """A backend failed its self-test or its call."""


class RankError(BackendError):
    """A rank of a bundle with several ranks ended, did not answer in time, or is out of step."""
