"""What a model's configuration may say, whoever wrote it; and that every refusal names a way out."""

import ast
from dataclasses import fields, replace
from pathlib import Path

import pytest
from folders import CONFIG

import tprt
from tprt.config import (
    PersimmonConfig,
    RecurrentGemmaConfig,
    config_from_hf,
    default_rotary_precision,
)
from tprt.errors import CheckpointError

RECURRENT = RecurrentGemmaConfig(
    vocab_size=97,
    hidden_size=160,
    intermediate_size=96,
    num_hidden_layers=5,
    num_attention_heads=10,
    head_dim=16,
    max_position_embeddings=8192,
    lru_width=160,
    layer_types=("recurrent", "recurrent", "attention", "recurrent", "recurrent"),
    attention_window_size=16,
)
CONFIGS = {"persimmon": CONFIG, "recurrent_gemma": RECURRENT}
HF = CONFIG.to_hf()
MEGATRON = CONFIG.to_megatron(2, "bfloat16")
ODD = [
    None, True, "", "wide", "8", 0, -1, 7, 1.5, 10**12, 10**400, float("nan"), float("inf"), 1e-300,
    [], [1], {}, {"a": 1}, {"type": "default"},
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key"),
    [
        (name, key)
        for name, config in CONFIGS.items()
        for key in (*config.to_hf(), "rope_scaling", "rope_parameters", *config.overrides)
    ],
)
def test_odd_values_in_config_json(name, key):
    """Guards against any other error than ours: these files are strangers', and `plan` reads one."""
    for value in ODD:
        try:
            config_from_hf(CONFIGS[name].to_hf() | {key: value})
        except CheckpointError as error:
            assert error.hint and len(str(error)) < 300, (value, error)


@pytest.mark.parametrize("key", [*MEGATRON, "rotary_precision"])
def test_odd_values_in_args(key):
    for value in ODD[:14]:  # the reader keeps scalars only
        try:
            PersimmonConfig.from_megatron(MEGATRON | {key: value})
        except CheckpointError as error:
            assert error.hint and len(str(error)) < 300, (value, error)


@pytest.mark.parametrize(
    ("model", "name"),
    [(model, field.name) for model, config in CONFIGS.items() for field in fields(config)],
)
def test_odd_values_in_the_constructor(model, name):
    refused = 0
    for value in ODD:
        try:
            replace(CONFIGS[model], **{name: value})
        except CheckpointError as error:
            assert error.hint, (value, error)
            refused += 1
    assert refused >= len(ODD) - 6


@pytest.mark.parametrize(
    ("field", "value", "word"),
    [
        ("qk_layernorm", "per_rank", "per_head"),
        ("rotary_precision", "fp16", "bf16 or fp32"),
        ("num_hidden_layers", 4097, "the limit is 4096"),
        ("num_attention_heads", 65537, "the limit is 65536"),
    ],
)
def test_constructor_names_value_and_limit(field, value, word):
    with pytest.raises(CheckpointError, match=word) as caught:
        replace(CONFIG, **{field: value})
    assert str(value) in caught.value.what


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 25000.0}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "linear"}},
        {"rope_parameters": {"rope_type": "default", "type": "linear"}},
        {"rope_scaling": {"rope_type": "default", "type": "linear"}},
        {"rope_scaling": {"type": ["linear"]}},
    ],
)
def test_scaled_rotary_embeddings_are_refused_wherever_they_stand(rope):
    """Guards against running a scaled model unscaled."""
    with pytest.raises(CheckpointError, match="linear"):
        PersimmonConfig.from_hf(HF | rope)
    plain = {"rope_parameters": {"rope_type": "default", "type": "default"}, "rope_scaling": None}
    assert PersimmonConfig.from_hf(HF | plain) == CONFIG


@pytest.mark.parametrize(("value", "tied"), [(None, False), (True, False), (False, True)])
def test_untie_embeddings_means_its_default_when_none(value, tied):
    config = PersimmonConfig.from_megatron(MEGATRON | {"untie_embeddings": value})
    assert config.tie_word_embeddings is tied


def test_default_rotary_precision():
    found = [default_rotary_precision(x) for x in ("megatron", "huggingface", "presharded")]
    assert found == ["bf16", "fp32", "fp32"]


def test_every_checkpoint_error_names_a_way_out():
    """Guards the rule by the source: a refusal without a hint leaves its reader alone."""
    package = Path(tprt.__file__).parent
    for path in [*(package / "config").glob("*.py"), *(package / "checkpoint").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "CheckpointError":
                keywords = {k.arg for k in node.keywords}
                assert "hint" in keywords, f"{path.name}:{node.lineno}"
