"""FullGrad-completeness: trace a model, find what breaks it, derive the mend, prove and apply it.

report = check_completeness(model)                  # of the gradient as it is
report = check_completeness(model, policy="libra")  # with that policy's edits
balanced = balance(model)                           # same forward bit for bit, edited backward
parts = fullgrad(balanced, x, target=3)             # the logit, split into its contributions
found = explain(model, x, "fullgrad+", policy="libra")  # the same as a map over the image
"""

from .attribution import Explainer, Map, explain
from .balance import Balanced, balance
from .check import assert_complete, check_completeness
from .degrees import Degrees, degrees
from .derive import derive_rules
from .errors import FullgradError
from .fullgrad import FullGrad, fullgrad
from .operators import Algebra, register
from .plan import Plan
from .policies import Policy, policies, policy
from .report import EndToEnd, IncompleteError, NodeReport, Report, Verdict
from .rules import FreezeScale, Integrate, Prune, Scale, Secant
from .sublayer import integrate
from .trace import ComputationGraph, trace

__all__ = [
    "Algebra",
    "Balanced",
    "ComputationGraph",
    "Degrees",
    "EndToEnd",
    "Explainer",
    "FreezeScale",
    "FullGrad",
    "FullgradError",
    "IncompleteError",
    "Integrate",
    "Map",
    "NodeReport",
    "Plan",
    "Policy",
    "Prune",
    "Report",
    "Scale",
    "Secant",
    "Verdict",
    "assert_complete",
    "balance",
    "check_completeness",
    "degrees",
    "derive_rules",
    "explain",
    "fullgrad",
    "integrate",
    "policies",
    "policy",
    "register",
    "trace",
]
