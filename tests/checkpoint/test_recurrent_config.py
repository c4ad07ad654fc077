"""RecurrentGemma's config.json as its two releases spell it, and as transformers 4.x and 5.x do."""

from math import prod

import pytest

from tprt.config import RecurrentGemmaConfig, config_from_hf
from tprt.errors import CheckpointError, ConfigError

COMMON = {
    "architectures": ["RecurrentGemmaForCausalLM"],
    "model_type": "recurrent_gemma",
    "attention_bias": False,
    "attention_window_size": 2048,
    "bos_token_id": 2,
    "conv1d_width": 4,
    "eos_token_id": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "logits_soft_cap": 30.0,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "torch_dtype": "bfloat16",
    "vocab_size": 256000,
}
SPELLING_4 = {"partial_rotary_factor": 0.5, "rope_theta": 10000.0}
SPELLING_5 = {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    }
}
CYCLE = ["recurrent", "recurrent", "attention"]
SIZES = {
    "2b": {
        "hidden_size": 2560, "intermediate_size": 15360, "lru_width": 2560, "num_attention_heads": 10,
        "num_hidden_layers": 26, "_block_types": CYCLE, "embeddings_scale_by_sqrt_dim": True,
    },
    "9b": {
        "hidden_size": 4096, "intermediate_size": 24576, "lru_width": None, "num_attention_heads": 16,
        "num_hidden_layers": 38, "block_types": CYCLE,
    },
}  # fmt: skip


def read(size: str, spelling: dict = SPELLING_4, **changed) -> RecurrentGemmaConfig:
    config = config_from_hf(COMMON | SIZES[size] | spelling | changed)
    assert isinstance(config, RecurrentGemmaConfig)
    return config


@pytest.mark.parametrize("spelling", [SPELLING_4, SPELLING_5])
@pytest.mark.parametrize(
    ("size", "parameters", "recurrent", "tp_sizes"),
    [
        ("2b", 2_682_862_080, 18, [1, 2, 4, 5, 8, 10]),
        ("9b", 8_579_977_216, 26, [1, 2, 4, 8, 16]),
    ],
)
def test_the_two_releases(size, parameters, recurrent, tp_sizes, spelling):
    config = read(size, spelling)
    assert sum(map(prod, config.tensor_shapes().values())) == parameters
    assert config.layer_types.count("recurrent") == recurrent
    assert config.layer_types[:3] == ("recurrent", "recurrent", "attention")
    assert config.layer_types[-2:] == ("recurrent", "recurrent")
    assert (config.window_keys, config.rotary_dim, config.block_width) == (2049, 128, 256)
    assert config.intermediate_size == 3 * config.hidden_size
    assert config.tp_sizes() == tp_sizes
    assert config.rope_theta == 10000 and config.eos_token_id == 1


def test_ranks_that_do_not_fit_are_refused_with_those_that_do():
    with pytest.raises(ConfigError, match="3 ranks cannot share 10 heads") as caught:
        read("2b").validate_parallel(3)
    assert "1, 2, 4, 5, 8, 10" in caught.value.hint
    assert [read("2b").padded_heads(n) for n in (1, 2, 4, 5, 8, 10)] == [10, 10, 12, 10, 16, 10]


@pytest.mark.parametrize("size", SIZES)
def test_written_and_read_again(size):
    config = read(size)
    assert config_from_hf(config.to_hf()) == config
    narrow = config.with_overrides({"window_keys": 2048})
    assert config_from_hf(narrow.to_hf()) == narrow != config


def test_window_keys_are_set_within_what_was_trained():
    config = read("2b")
    assert config.with_overrides({"window_keys": 2048}).window_keys == 2048
    for wrong in (2050, 1, "2048", True):
        with pytest.raises(ConfigError, match="window_keys is") as caught:
            config.with_overrides({"window_keys": wrong})
        assert "2049 as trained" in caught.value.hint
    with pytest.raises(ConfigError, match="has no setting 'rotary_precision'") as caught:
        config.with_overrides({"rotary_precision": "bf16"})
    assert "window_keys" in caught.value.hint


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_key_value_heads": 10}, "num_key_value_heads is 10"),
        ({"num_key_value_heads": 16}, "num_key_value_heads is 16"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"intermediate_size": 15361}, "not gate and up of one width"),
        ({"_block_types": ["mamba"]}, "block_types is"),
        ({"lru_width": 2561}, "not made up of 10 blocks"),
        ({"tie_word_embeddings": False}, "not tied"),
        ({"partial_rotary_factor": 2.0}, "rotary width"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"conv1d_width": 17}, "the limit is 16"),
    ],
)
def test_what_is_not_implemented_is_refused(changed, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        read("2b", **changed)
    assert caught.value.hint


def test_a_missing_number_of_key_heads_means_hugging_faces():
    """Whose class takes as many as there are queries, which no release has."""
    raw = COMMON | SIZES["2b"]
    del raw["num_key_value_heads"]
    with pytest.raises(CheckpointError, match="num_key_value_heads is 10"):
        config_from_hf(raw)
