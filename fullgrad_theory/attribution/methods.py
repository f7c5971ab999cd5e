"""The methods by name: each a function of what one pass gathered, or one that runs the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .map import MethodResult
from .products import (
    embedding_x_gradient,
    fullgrad,
    fullgrad_plus,
    gradcam_plus,
    gradcam_plus_plus,
    hirescam,
    hirescam_plus,
    hirescam_plus_l1,
    hirescam_plus_l2,
    hirescam_plus_positive,
    input_x_gradient,
    signed_xgradcam_plus,
    xgradcam_plus,
)
from .relevance import (
    alti,
    attcat,
    attention_gradient,
    attention_x_gradient,
    genatt,
    globenc,
    gradsam,
    legrad,
    raw_attention,
    rollout,
    tokentm,
)
from .run import Need, Record
from .sampled import Sampling, integrated_gradients, random_normal, smoothgrad


@dataclass(frozen=True)
class Method:
    """A row of the table. Exactly one of two makes its maps: `function`, of the `Record` of one
    pass, for which `needs` says what is gathered; or `sampled`, which runs the model by itself.

    Raises ValueError where neither is given, or both.
    """

    name: str
    source: str
    needs: frozenset[Need] = frozenset()
    function: Callable[[Record], MethodResult] | None = None
    sampled: Callable[[Sampling], MethodResult] | None = None

    def __post_init__(self) -> None:
        if (self.function is None) == (self.sampled is None):
            given = "neither" if self.function is None else "both"
            raise ValueError(
                f"the method {self.name!r} has {given} of function= (of one pass) and sampled= (it "
                "runs the model by itself); give exactly one"
            )

    def result(self, record: Record | None, sampling: Sampling) -> MethodResult:
        """Its maps; `record` may be left out where it samples."""
        if self.sampled is not None:
            return self.sampled(sampling)
        assert self.function is not None and record is not None
        return self.function(record)


def _one_pass(
    name: str, source: str, function: Callable[[Record], MethodResult], *needs: Need
) -> Method:
    return Method(name, source, frozenset(needs), function=function)


_INPUT, _BLOCKS, _BIASES = Need.INPUT, Need.BLOCKS, Need.BIASES
_ATTENTION, _GRADIENT, _LAYERS = Need.ATTENTION, Need.ATTENTION_GRADIENT, Need.LAYERS
_STREAM, _STEADY, _VECTORS = Need.STREAM, Need.STEADY, Need.VECTORS
_ROWS = (
    _one_pass("input-x-gradient", "Shrikumar et al. 2016", input_x_gradient, _INPUT),
    _one_pass("embedding-x-gradient", "LibraGrad, CVPR 2025", embedding_x_gradient, _BLOCKS),
    _one_pass("fullgrad", "Srinivas & Fleuret, NeurIPS 2019", fullgrad, _INPUT, _BIASES),
    _one_pass("fullgrad+", "LibraGrad, CVPR 2025", fullgrad_plus, _BLOCKS, _BIASES),
    _one_pass("gradcam+", "Selvaraju et al. 2017; LibraGrad", gradcam_plus, _BLOCKS),
    _one_pass("gradcam++", "Chattopadhay et al. 2018", gradcam_plus_plus, _BLOCKS),
    _one_pass("hirescam", "Draelos & Carin 2020", hirescam, _BLOCKS),
    _one_pass("hirescam+", "LibraGrad, CVPR 2025", hirescam_plus, _BLOCKS),
    _one_pass("l1-hirescam+", "LibraGrad, CVPR 2025", hirescam_plus_l1, _BLOCKS),
    _one_pass("l2-hirescam+", "LibraGrad, CVPR 2025", hirescam_plus_l2, _BLOCKS),
    _one_pass("relu-hirescam+", "LibraGrad, CVPR 2025", hirescam_plus_positive, _BLOCKS),
    _one_pass("xgradcam+", "Fu et al. 2020; LibraGrad", xgradcam_plus, _BLOCKS),
    _one_pass("signed-xgradcam+", "Fu et al. 2020", signed_xgradcam_plus, _BLOCKS),
    _one_pass("attcat", "Qiang et al., NeurIPS 2022", attcat, _BLOCKS, _ATTENTION, _STREAM),
    _one_pass("genatt", "Chefer et al., ICCV 2021", genatt, _GRADIENT, _STREAM),
    _one_pass("tokentm", "Wu et al., CVPR 2024", tokentm, _BLOCKS, _GRADIENT, _STREAM, _STEADY),
    _one_pass("legrad", "Bousselham et al. 2024", legrad, _LAYERS),
    _one_pass("gradsam", "Barkan et al., CIKM 2021", gradsam, _GRADIENT),
    _one_pass("raw-attention", "", raw_attention, _ATTENTION),
    _one_pass("attention-gradient", "Serrano & Smith, ACL 2019", attention_gradient, _GRADIENT),
    _one_pass("attention-x-gradient", "Serrano & Smith, ACL 2019", attention_x_gradient, _GRADIENT),
    _one_pass("rollout", "Abnar & Zuidema 2020", rollout, _ATTENTION, _STREAM),
    _one_pass("globenc", "Modarressi et al., NAACL 2022", globenc, _BLOCKS, _VECTORS, _STREAM),
    _one_pass("alti", "Ferrando et al., EMNLP 2022", alti, _BLOCKS, _VECTORS, _STREAM),
    Method("random", "", sampled=random_normal),
    Method("integrated-gradients", "Sundararajan et al. 2017", sampled=integrated_gradients),
    Method("smoothgrad", "Smilkov et al. 2017", sampled=smoothgrad),
)
METHODS: Mapping[str, Method] = {method.name: method for method in _ROWS}
