"""Write the shape with random weights as OpenVINO IR with int8 weights. Runs in OpenVINO's environment."""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoConfig, LlamaForCausalLM
from workload import SHAPE_DIR


def main(exported: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(AutoConfig.from_pretrained(SHAPE_DIR)).bfloat16()
    with TemporaryDirectory(dir=exported.parent) as checkpoint:
        model.save_pretrained(checkpoint)
        quantization = OVWeightQuantizationConfig(bits=8)
        OVModelForCausalLM.from_pretrained(
            checkpoint, export=True, compile=False, quantization_config=quantization
        ).save_pretrained(exported)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
