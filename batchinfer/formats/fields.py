"""Reading and checking fields of a `quantization_config`, shared by the formats."""

import re
from typing import Any, NoReturn

WHERE = "config.json: quantization_config"

_OF_MAKING = """
    quant_method method provider meta autoround_version backend
    model_name_or_path model_file_base_name tokenizer dataset nsamples seqlen model_seqlen batch_size iters lr minmax_lr
    gradient_accumulate_steps amp low_gpu_mem_usage scale_dtype pad_token_id max_input_length
    enable_minmax_tuning enable_norm_bias_tuning enable_quanted_input supported_types quant_block_list
    static_kv_granularity static_attention_granularity
    damp_percent damp_auto_increment desc_act act_group_aware hyb_act mse static_groups true_sequential
    block_name_to_quantize to_quant_block_names module_name_preceding_first_block cache_block_outputs
    cache_examples_on_gpu parallel_packing use_cuda_fp16 use_exllama disable_exllama exllama_config
    do_fuse fuse_max_seq_len modules_to_fuse
"""
"""Fields that say how a checkpoint was made or which kernel shall run it, of all tools. They change nothing here."""


def refuse_unknown(config: dict[str, Any], known: set[str], where: str = WHERE) -> None:
    """Raise `ValueError` if a field is not `known`, unless it tells of the making, or is null, false or empty."""
    asked = {key for key, value in config.items() if value not in (None, False, {}, [])}
    if unknown := asked - known - set(_OF_MAKING.split()):
        raise ValueError(
            f"{where}: not supported: {', '.join(sorted(unknown))}; take another checkpoint of the model, or delete "
            "from config.json what changes neither how weights are stored nor how the model runs"
        )


def whole(config: dict[str, Any], key: str, where: str = WHERE) -> int:
    """Return the field `key`, an integer from -1 to 65,536. Raises `ValueError` for anything else."""
    value = config.get(key)
    if type(value) is not int or not -1 <= value <= 1 << 16:
        raise ValueError(f"{where}: {key} is {value!r}; it must be a whole number")
    return value


def flag(config: dict[str, Any], key: str, default: bool, where: str = WHERE) -> bool:
    """Return the field `key`, true or false. Raises `ValueError` for anything else."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{where}: {key} is {value!r}; it must be true or false")
    return value


def one_of(config: dict[str, Any], key: str, allowed: tuple[str, ...], remedy: str, where: str = WHERE) -> str:
    """Return the field `key`, one of `allowed`, of which the first is the default. Raises `ValueError` for others."""
    value = config.get(key) or allowed[0]
    if not isinstance(value, str) or value.lower() not in allowed:
        raise ValueError(f"{where}: {key} is {value!r}; supported: {', '.join(allowed)}: {remedy}")
    return value.lower()


def names(config: dict[str, Any], key: str) -> tuple[str, ...]:
    """Return the field `key`, a list of names; () if it is missing. Raises `ValueError` for anything else."""
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{WHERE}: {key} is {value!r}; expected a list of names")
    return tuple(value)


def settings_by_name(config: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    """Return the field `key`, settings by module names or patterns. Raises `ValueError` for anything else."""
    value = config.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(settings, dict) for settings in value.values()):
        raise ValueError(f"{WHERE}: {key} is {value!r}; expected an object of objects")
    return value


def pattern(text: str, name: str, key: str) -> re.Pattern[str]:
    """Compile a regular expression, which `name` in the field `key` became. Raises `ValueError` if it is none."""
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{WHERE}: {key}: {name!r} is not a regular expression: {error}") from None


def refuse_module(module: str, shape: tuple[int, int], packing: str) -> NoReturn:
    """Raise `ValueError` for a matrix whose shape cannot be packed as the config says."""
    raise ValueError(f"{module}: a matrix of {shape[0]} x {shape[1]} cannot be packed as {packing}")
