"""`view`."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from ..check.completeness import check_completeness
from ..check.explorer import to_explorer_graph, to_node_data
from ..extras import require
from .checking import Asked, found_of, show_report
from .making import Chosen, create, inputs_of
from .options import Unknown
from .page import judging


def view(
    chosen: Chosen,
    policy: str | None,
    numeric: bool,
    unknown: Unknown,
    port: int,
    traceback: bool,
    asked: Asked,
) -> None:
    """Check, and start Model Explorer with the graph and the verdicts; returns when it ends."""
    with judging(traceback=traceback):
        explorer = require("model_explorer", "view")  # before there is work to be lost
        model = create(chosen)
        judged = partial(check_completeness, numeric=numeric, unknown=unknown)
        found = found_of(judged, model, inputs_of(model, chosen), policy, 0, asked)
        show_report(found.report)
        with TemporaryDirectory() as folder:
            graph, data = Path(folder, "graph.json"), Path(folder, "completeness.json")
            graph.write_text(to_explorer_graph(found.report, found.drawn()), encoding="utf-8")
            data.write_text(to_node_data(found.report), encoding="utf-8")
            config = explorer.config()
            config.add_model_from_path(str(graph)).add_node_data_from_path(str(data))
            with suppress(KeyboardInterrupt):  # the way out
                explorer.visualize_from_config(config, port=port)
