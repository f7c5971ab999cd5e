"""Everything that can be wrong with what a user passes in, each with the way out in its message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FullgradError(Exception):
    """Base of every error this library raises on purpose."""


class InputError(FullgradError, ValueError):
    """The inputs (or the target) do not fit the model, or are missing."""


class TrainingModeError(FullgradError, ValueError):
    """The forward is random or batch-dependent: the model is in training mode, or draws numbers."""


class TraceError(FullgradError, RuntimeError):
    """torch.export cannot turn the model into one graph."""


class UnregisteredOperationError(FullgradError, LookupError):
    """Live operations that the registry does not know; all of them are listed."""


class UnknownNameError(FullgradError, LookupError):
    """No policy or model of that name; near matches are listed."""


class NonFiniteError(FullgradError, ValueError):
    """NaN or Inf in an input, a weight or an activation; the first place is named."""


class NoPlanError(FullgradError, ValueError):
    """No honest plan exists under the policy; the obstacle is named."""


class PolicyError(FullgradError, ValueError):
    """A table of costs that means nothing: a negative cost, an unknown operation or module."""


class PlanError(FullgradError, ValueError):
    """A plan does not fit the graph it is applied to."""


class CertificateError(FullgradError, ValueError):
    """A certificate proves nothing, or something else than it says; the step is named."""


class DerivativeError(FullgradError, RuntimeError):
    """A balanced model is differentiated twice, or forward, which its edits have no meaning for."""


class MissingExtraError(FullgradError, ImportError):
    """A package that only an extra installs is not there; the message says which to install."""


class NonConvergenceWarning(UserWarning):
    """The quadrature of an integrated Jacobian missed its tolerance: it is not complete."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UnknownNameError:
    """An error for a misspelt `name`, with the nearest of the `known` ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(sorted(known)[:12])}"
    return UnknownNameError(f"unknown {kind} {name!r}; {hint}")
