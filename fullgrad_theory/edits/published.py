"""Policies: what each edit costs, and what may keep its true gradient although it is inconsistent.

A *complete* policy leaves nothing; a plan under it makes the model FullGrad-complete. A *partial*
one is a published method or an ablation: its edits are applied, the rest is left and reported.

`attnlrp` and `alilrp` are written as gradient edits from the papers (Achtibat et al. 2024, Ali et
al. 2022), not from anybody's code. The licence of LXT, AttnLRP's own implementation, claims a
patent on layer-wise relevance propagation: users judge for themselves whether that concerns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ..errors import unknown_name
from ..operators.algebra import Algebra, Role
from .policy import Policy

LAST_RESORT = 1000
"""what a partial policy pays for leaving a node it has an edit for"""

_COSTS: dict[str, Any] = {"prune": 30, "scale": 8, "secant": 6, "secant_origin": 60, "freeze": 6}

_ATTENTION: Mapping[str, int] = dict.fromkeys(
    (Algebra.ATTENTION, Algebra.SMOOTH, Algebra.SINGULAR), 1
)
_MATMULS: Mapping[str, int] = {Role.TOKEN_PRODUCT: 1}
_NORM: Mapping[str, int] = {Algebra.NORMALISER: 1}
_ACTIVATION: Mapping[str, int] = {Algebra.ZERO_ORIGIN: 1, Algebra.ELEMENTWISE: 1}
_PRODUCT: Mapping[str, int] = {Algebra.MULTILINEAR: 1, Algebra.HOMOGENEOUS: 1}
# a sigmoid that gates is rather pruned (30) than left
_ACTIVATION_NO_GATE: Mapping[str, int] = {Algebra.ZERO_ORIGIN: 1, Algebra.ELEMENTWISE: 40}

_HALVES: Mapping[str, Mapping[str, Fraction]] = {
    Algebra.ATTENTION: {
        "query": Fraction(1, 4),
        "key": Fraction(1, 4),
        "value": Fraction(1, 2),
    }
}

LIBRAGRAD = "LibraGrad, CVPR 2025, arXiv:2411.16760"


def _leave(*tables: Mapping[str, int]) -> dict[str, int]:
    """Everything may be left, as a last resort; what `tables` name is left first."""
    merged: dict[str, int] = dict.fromkeys((str(a) for a in Algebra), LAST_RESORT)
    for table in tables:
        merged |= {str(key): cost for key, cost in table.items()}
    return merged


def _without(*edits: str) -> dict[str, Any]:
    return {edit: cost for edit, cost in _COSTS.items() if edit not in edits}


_TABLE = (
    Policy("libra", "prune attention weights, freeze 1/sigma, secants, halved products; complete",
           LIBRAGRAD, **_COSTS, integrate=200),
    # a denominator has no integral: pruned, at a price that only the lack of any other way pays
    Policy("integrated", "as libra, but attention and softmax integrated from 0, nothing pruned",
           "this library, after Sundararajan et al. 2017, arXiv:1703.01365",
           **_COSTS | {"prune": 1000}, integrate=20),
    Policy("plain", "the gradient as it is, no edit", "Simonyan et al. 2014, arXiv:1312.6034",
           leave=_leave()),
    Policy("attnlrp", "as libra, but gradient through attention weights, q and k by 1/4, v by 1/2",
           "Achtibat et al. 2024, arXiv:2402.05602",
           **_COSTS | {"secant_origin": 6}, leave=_leave(_ATTENTION), edge_scales=_HALVES),
    Policy("alilrp", "prune attention weights, freeze 1/sigma; activations and products left",
           "Ali et al. 2022, arXiv:2202.07304",
           **_without("scale", "secant", "secant_origin"), leave=_leave(_ACTIVATION, _PRODUCT)),
    Policy("decompx", "prune attention weights, freeze 1/sigma, secants; products left",
           "after Modarressi et al. 2023, arXiv:2306.02873",
           **_without("scale"), leave=_leave(_PRODUCT)),
    Policy("scale-only", "q and k by 1/4, v by 1/2, halved products; norms and activations left",
           LIBRAGRAD, scale=8, leave=_leave(_ATTENTION, _NORM, _ACTIVATION), edge_scales=_HALVES),
    Policy("gate+scale", "as scale-only, with secants", LIBRAGRAD,
           scale=8, secant=6, secant_origin=6, leave=_leave(_ATTENTION, _NORM),
           edge_scales=_HALVES),
    Policy("only-attention", "ablation: prune attention weights, nothing else", LIBRAGRAD,
           prune=30, leave=_leave(_NORM, _ACTIVATION, _PRODUCT)),
    Policy("only-norm", "ablation: freeze 1/sigma, nothing else", LIBRAGRAD,
           prune=30, freeze=6, leave=_leave(_ATTENTION, _ACTIVATION, _PRODUCT)),
    Policy("only-activation", "ablation: secants, nothing else", LIBRAGRAD,
           secant=6, secant_origin=60, leave=_leave(_ATTENTION, _NORM, _PRODUCT)),
    Policy("only-gate", "ablation: halved gated products, nothing else", LIBRAGRAD,
           scale=8, leave=_leave(_ATTENTION, _MATMULS, _NORM, _ACTIVATION)),
    Policy("without-attention", "ablation: libra, attention keeps its true gradient", LIBRAGRAD,
           **_COSTS, leave=_leave(_ATTENTION, _MATMULS)),
    Policy("without-norm", "ablation: libra, norms keep their true gradient", LIBRAGRAD,
           **_without("freeze"), leave=_leave(_NORM)),
    Policy("without-activation", "ablation: libra, activations keep their true gradient", LIBRAGRAD,
           **_without("secant", "secant_origin"), leave=_leave(_ACTIVATION_NO_GATE)),
    Policy("without-gate", "ablation: libra, products keep their true gradient", LIBRAGRAD,
           **_without("scale"), leave=_leave(_PRODUCT)),
)  # fmt: skip
_POLICIES = {entry.name: entry for entry in _TABLE}


def policy(name: str | Policy) -> Policy:
    """The policy of that name (or the policy itself); raises `UnknownNameError` with near names."""
    if isinstance(name, Policy):
        return name
    if name not in _POLICIES:
        raise unknown_name("policy", name, _POLICIES)
    return _POLICIES[name]


def policies() -> tuple[Policy, ...]:
    """All policies known by name, each with its one-line `description` and its `source`."""
    return tuple(_POLICIES.values())
