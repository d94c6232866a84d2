"""Where things of this repository lie."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
STDLIB = ROOT / "examples" / "stdlib"
TARGET = STDLIB / "target"
SHAPE_852M = ROOT / "benchmarks" / "shapes" / "llama-852m" / "config.json"
