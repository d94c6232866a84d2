"""OpenVINO GenAI: continuous batching over int8 weights, exported by optimum-intel as its documentation says."""

import json
from functools import partial
from pathlib import Path

from contender import Contender
from environment import Environment, run
from workload import Rates, Workload

ENVIRONMENT = Environment(
    "openvino",
    (
        "openvino-genai==2026.4.1.0",
        "openvino==2026.4.1",
        "nncf==3.4.0",
        "torch==2.13.0",
        "transformers==5.5.4",
        "huggingface-hub<1.22",
        "requests>=2.33",
    ),
    # optimum-intel asks for torchvision, which text models do not need and whose build has to match that of torch.
    without_dependencies=("optimum==2.3.0", "optimum-intel==2.2.0"),
)
MODEL = ENVIRONMENT.folder / "models" / "int8"

SETTINGS = {
    "group size 2048": ("256", "DYNAMIC_QUANTIZATION_GROUP_SIZE=2048"),
    "group size 2048, 4096 tokens a step": ("4096", "DYNAMIC_QUANTIZATION_GROUP_SIZE=2048"),
    "group size 64": ("256", "DYNAMIC_QUANTIZATION_GROUP_SIZE=64"),
    "default group size": ("256",),
}
BEST = "group size 2048, 4096 tokens a step"


def prepare() -> str:
    """Install and export what is missing; return the versions used."""
    ENVIRONMENT.install()
    if not (MODEL / "openvino_model.xml").exists():
        MODEL.parent.mkdir(exist_ok=True)
        run([str(ENVIRONMENT.python), str(_script("openvino_export.py")), str(MODEL)])
    return ", ".join(ENVIRONMENT.requirements[:2])


def contenders() -> list[Contender]:
    return [
        Contender("OpenVINO GenAI int8", setting, partial(_measure, arguments), best=setting == BEST)
        for setting, arguments in SETTINGS.items()
    ]


def seconds_of_rows(rows: Path) -> float:
    """Of a JSONL file of token ids, in the setting that is the fastest with many rows, with equal prefixes shared."""
    arguments = SETTINGS[BEST]
    output = run([str(ENVIRONMENT.python), str(_script("openvino_rows.py")), str(MODEL), str(rows), *arguments])
    return float(output.splitlines()[-1])


def _script(name: str) -> Path:
    return Path(__file__).with_name(name)


def _measure(arguments: tuple[str, ...], workload: Workload) -> Rates:
    script = str(_script("openvino_generate.py"))
    output = run([str(ENVIRONMENT.python), script, str(MODEL), str(workload), *arguments])
    return Rates(**json.loads(output.splitlines()[-1]))
