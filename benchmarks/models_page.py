"""Make docs/models.md out of the tests' own figures: which families run where, and the largest error seen.

    python benchmarks/models_page.py [--write]

Runs the tests that compare each family with transformers, on the CPU and with a GPU's kernels in Triton's interpreter,
which takes some minutes, and prints the page; `--write` puts it into docs.
"""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from importlib.metadata import version
from pathlib import Path

from conditions import conditions

from batchinfer.models.config import FAMILIES
from batchinfer.models.gguf_architectures import ARCHITECTURES
from batchinfer.models.wrappers import WRAPPERS

ROOT = Path(__file__).parent.parent
TESTS = ("tests/batchinfer/models/test_config_families.py", "tests/batchinfer/models/test_wrappers.py")
HEAD = """\
# Models

A family is a `model_type` of `config.json`. Each has a small random model whose every switch does something, and the
tests compare its logits with those of transformers in float32, for prompts of 1 to 400 tokens. The error is the largest
difference as a share of the largest logit; the tests allow 1e-4. Every family runs in floating point, `w8a8-int8` and
4 bits, and `batchinfer quantize` takes it; methods that scale channels need a norm or a matrix that takes up the
scales, which arcee, exaone4, flex_olmo, gemma4, gpt_neox, gpt_oss, jais2, nemotron, olmo, olmo2, olmo3, phi, starcoder2
and layers that keep a state lack. Experts are written by modules of their own, whether a checkpoint has them so or all
in one tensor, in MXFP4 too (gpt_oss). transformers reads such experts but for those of gpt_oss and granitemoe, and but
for `w8a8-int8`; the others it would leave at random, and batchinfer reads all. Of a wrapper the language model is
written alone, for text, and transformers reads it as such.
A GPU's kernels ran in Triton's interpreter, not on a device; layers that keep a state (lfm2, qwen3_5, qwen3_next) have
none, and a GPU refuses them by name, as it does experts in 4 bits. The families that llama.cpp has are read from its
GGUF files too.

What is not listed is refused by name.
"""


def errors() -> dict[tuple[str, str], float]:
    """Run the tests; return the largest error by (test, family)."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            Path(sys.executable).with_name("pytest"),
            "-q",
            "-n",
            "auto",
            *TESTS,
            "-k",
            "logits_are or gpus_kernels",
        ]
        subprocess.run([*command, f"--junitxml={report}"], cwd=ROOT, check=True, stdout=sys.stderr)
        found: dict[tuple[str, str], float] = {}
        for case in ET.parse(report).getroot().iter("testcase"):
            test, _, parameters = case.attrib["name"].partition("[")
            family = parameters.removesuffix("]").split(",")[0].split("-")[-1]
            for entry in case.iter("property"):
                key = test, family
                found[key] = max(found.get(key, 0.0), float(entry.attrib["value"]))
    return found


def page() -> str:
    """Return the page."""
    found = errors()
    in_gguf = set[str]().union(*(architecture.families for architecture in ARCHITECTURES.values()))
    ran = conditions()
    by = f"Printed by `python benchmarks/models_page.py`. {ran['machine']}; {ran['versions']}, transformers "
    by += f"{version('transformers')}; {ran['commit']}; {ran['date']}.\n"
    lines = [HEAD, by, "| family | CPU | Triton, interpreted | GGUF |", "|---|---:|---:|---|"]
    for family in sorted(FAMILIES):
        on_cpu = found["test_logits_are_those_of_transformers", family]
        in_triton = found.get(("test_a_gpus_kernels_compute_the_same", family))
        gguf = "yes" if family in in_gguf else "-"
        lines.append(f"| {family} | {on_cpu:.1e} | {'refused' if in_triton is None else f'{in_triton:.1e}'} | {gguf} |")
    lines += ["", "Wrappers, of which the language model is run, for text:", ""]
    lines += ["| wrapper | language models in it | CPU |", "|---|---|---:|"]
    for name, wrapper in sorted(WRAPPERS.items()):
        inside = ", ".join(dict.fromkeys(family for _, family in wrapper.families))
        lines.append(f"| {name} | {inside} | {found['test_logits_are_those_of_transformers', name]:.1e} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    made = page()
    print(made)
    if parser.parse_args().write:
        (ROOT / "docs" / "models.md").write_text(made)
