"""The theorems in Coq compile and rest on nothing new; it accepts certificates, and of changed ones
those that the kernel does. Left out, in one sentence, where Coq is not installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fullgrad_theory as fgt
from fullgrad_theory.check.certificate import Certificate, verify
from fullgrad_theory.check.coq import HEADER, definitions, to_coq
from fullgrad_theory.errors import CertificateError
from fullgrad_theory.testing.mutations import mutated

FOLDER = Path(__file__).parent / "coq"
pytestmark = [
    pytest.mark.skipif(
        shutil.which("coqc") is None, reason="Coq is not installed: apt install coq"
    ),
    pytest.mark.slow,
]


def check(folder: Path, source: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(source / "check.sh"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the proofs compiled."""
    folder = tmp_path_factory.mktemp("coq")
    done = check(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def coqc(built: Path, text: str) -> subprocess.CompletedProcess[str]:
    file = built / "Architecture.v"
    file.write_text(text)
    command = ["coqc", "-q", "-Q", str(built), "Fullgrad", str(file)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_proofs_compile_and_rest_on_the_reals_alone(built: Path) -> None:
    found = (built / "found.txt").read_text().split()
    assert found == (FOLDER / "axioms.txt").read_text().split()
    assert all(name.startswith(("Classical", "FunctionalExtensionality")) for name in found)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("Certificate.v", "rewrite Hval by discriminate. ring.\nQed.", "admit.\nAdmitted."),
        ("Certificate.v", "&& loose_from n 0 ds", ""),
        ("Composition.v", "deg k = rI", "deg k = rO"),
        ("Audit.v", "Print Assumptions check_sound.", "Axiom lie : False.\nPrint Assumptions lie."),
    ],
)
def test_a_hole_in_the_proofs_is_found(tmp_path: Path, file: str, old: str, new: str) -> None:
    copied = tmp_path / "coq"
    shutil.copytree(FOLDER, copied)
    text = (copied / file).read_text()
    assert old in text
    (copied / file).write_text(text.replace(old, new))
    assert check(tmp_path / "built", copied).returncode != 0


# --------------------------------------------------------------------------- architectures


def timm_model(name: str, device: str = "meta") -> tuple[nn.Module, Any]:
    timm = pytest.importorskip("timm")
    with torch.device(device):
        model = timm.create_model(name).eval()
        return model, torch.randn(2, *model.pretrained_cfg["input_size"])


def llama() -> tuple[nn.Module, Any]:
    tf = pytest.importorskip("transformers")
    config = tf.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config).eval()
    return model, {"input_ids": torch.tensor([[1, 2, 3, 4]])}


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


ARCHITECTURES: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ViT-B/16": lambda: timm_model("vit_base_patch16_224"),
    "Swin-T": lambda: timm_model("swin_tiny_patch4_window7_224"),
    "EVA-02": lambda: timm_model("eva02_tiny_patch14_224", "cpu"),
    "gMLP": lambda: timm_model("gmlp_s16_224"),
    "ConvNeXt": lambda: timm_model("convnext_atto"),
    "Llama": llama,
    "LSTM": lambda: (Lstm().eval(), torch.randn(2, 12, 4)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_architecture_is_accepted(built: Path, name: str) -> None:
    graph = fgt.trace(*ARCHITECTURES[name]())
    certificate = fgt.check_completeness(graph, policy="libra", numeric=False).certificate()
    verify(certificate, graph)
    done = coqc(built, to_coq(certificate))
    assert done.returncode == 0, done.stderr
    assert {*re.findall(r"^([A-Z]\w+\.\w+)$", done.stdout, re.M)} <= {
        *(FOLDER / "axioms.txt").read_text().split()
    }
    wrong = json.loads(certificate.to_json())
    wrong["steps"][-1]["degree"] = "2"
    assert coqc(built, to_coq(Certificate.from_json(json.dumps(wrong)))).returncode != 0


# --------------------------------------------------------------------------- changed certificates


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * value)


def test_the_kernel_and_coq_agree_on_a_thousand_changed_certificates(built: Path) -> None:
    """Coq sees the steps alone, and so does the kernel here: what is outside is not changed."""
    graph = fgt.trace(Small().eval(), torch.randn(2, 3, 4))
    certificate = fgt.check_completeness(graph, policy="libra", numeric=False).certificate()
    outside = ("supposing", "claimed_edit", "held")
    texts, kernel_says, kinds = list[str](), list[bool](), Counter[str]()
    for kind, data in mutated(certificate, 1300):
        if kind in outside or len(texts) == 1000:
            continue
        kinds[kind] += 1
        changed = Certificate.from_json(json.dumps(data))
        with pytest.raises(CertificateError):
            verify(changed, graph)
        try:
            verify(changed)
            kernel_says.append(True)
        except CertificateError:
            kernel_says.append(False)
        try:
            texts.append(definitions(changed, f"_{len(texts)}"))
        except CertificateError:  # a step reads what is not before it: no item can say so
            texts.append("")
    assert len(texts) == 1000
    asked = [i for i, text in enumerate(texts) if text]
    lines = [HEADER.format(model="", policy="", graph="", plan="")]
    lines += [texts[i] + f"Compute ({i}%nat, check this_{i} outputs_{i})." for i in asked]
    done = coqc(built, "\n".join(lines))
    assert done.returncode == 0, done.stderr
    answers = dict(re.findall(r"= \((\d+)%nat, (true|false)\)", done.stdout))
    assert len(answers) == len(asked)
    coq_says = [answers.get(str(i)) == "true" for i in range(1000)]
    assert coq_says == kernel_says
    assert sum(coq_says) > 10  # what changed nothing that matters to the steps alone
    assert len(kinds) >= 12, kinds
