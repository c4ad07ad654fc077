"""Values of foreign configurations, looked at one by one before anything is made of them."""

from typing import Any, NoReturn

from tprt.errors import CheckpointError

# Layers and heads are looped over, so a file must not choose them freely.
MAX_COUNTS = {"num_hidden_layers": 4096, "num_attention_heads": 65536}
MAX_COUNT = 2**31 - 1  # of any other size
CONFIG_HINT = "the configuration as it came with the weights"


def shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def need(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise CheckpointError(f"the model's configuration has no {name!r}", hint=CONFIG_HINT)
    return raw[name]


def count(name: str, value: object) -> int:
    limit = MAX_COUNTS.get(name, MAX_COUNT)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(
            f"{name} must be a positive whole number, not {shown(value)}", hint=CONFIG_HINT
        )
    if value > limit:
        raise CheckpointError(f"{name} is {shown(value)}; the limit is {limit}", hint=CONFIG_HINT)
    return value


def positive(name: str, value: object) -> float:
    # The bound keeps infinities out, and whole numbers that no float can hold; NaN compares false.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1e300:
        raise CheckpointError(
            f"{name} must be a positive number, not {shown(value)}", hint=CONFIG_HINT
        )
    return float(value)


def one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        names = " or ".join(str(k) for k in known if k is not None)
        raise CheckpointError(f"{name} is {shown(value)}", hint=names)


def flag(raw: dict[str, Any], name: str, default: bool) -> bool:
    """None means what a missing key means."""
    value = raw.get(name)
    if value is None:
        return default
    return value if isinstance(value, bool) else refuse_flag(name, value)


def refuse_flag(name: str, value: object) -> NoReturn:
    raise CheckpointError(f"{name} is {shown(value)}", hint="true or false")


def mapping(raw: dict[str, Any], name: str) -> dict[str, Any]:
    value = raw.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{name} must be a mapping, not {shown(value)}", hint="{} or null")
    return value


def single_id(value: object) -> int | None:
    if isinstance(value, list):
        value = value[0] if value else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def check_rotary(head_dim: int, factor: float) -> None:
    """Raises CheckpointError unless that share of a head is an even number of dimensions."""
    width = int(head_dim * factor)
    if factor > 1 or width < 2 or width % 2:
        raise CheckpointError(
            f"the rotary width, partial_rotary_factor {factor:g} of head width {head_dim}, is not an "
            f"even number from 2 to {head_dim}",
            hint=CONFIG_HINT,
        )


def refuse_unsupported(raw: dict[str, Any], rope: dict[str, Any]) -> None:
    """Of Hugging Face's configs: what no architecture here has.

    Raises:
        CheckpointError: the rotary embedding is scaled, or the weights are quantized.
    """
    # Both spellings may stand in both mappings; one left unseen would be run unscaled.
    scaling = mapping(raw, "rope_scaling")
    for name, values in (("rope_parameters", rope), ("rope_scaling", scaling)):
        for key in ("rope_type", "type"):
            kind = values.get(key)
            if kind is not None and kind != "default":
                raise CheckpointError(
                    f"rope scaling of kind {shown(kind)} ({name}.{key}) is not implemented",
                    hint="a checkpoint trained without rope scaling",
                )
    quantization = raw.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise CheckpointError(
            f"weights quantized by {shown(method or quantization)} are not implemented",
            hint="the unquantized checkpoint",
        )
