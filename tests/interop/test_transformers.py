"""Models of `transformers` and `peft`, small and with random weights: read, moved, written back."""

import pytest
import torch
from readings import assert_read, outputs
from torch import nn

import scalegmn
from scalegmn.symmetry.groups import GroupElement

WORDS, IMAGE = 50, (2, 3, 32, 32)
TEXT = {"vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "max_position_embeddings": 16}
VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
VISION |= {"image_size": 32, "patch_size": 8}
GPT2 = {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16, "use_cache": False}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
T5 = {"vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "use_cache": False}
WHISPER = {"vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "decoder_layers": 1}
WHISPER |= {"encoder_ffn_dim": 48, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "num_mel_bins": 8}
WHISPER |= {"max_source_positions": 10, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
WHISPER |= {"decoder_start_token_id": 1}
GROUPED = {**TEXT, "num_key_value_heads": 2, "use_cache": False}

MODELS = {
    "BERT": ("BertForSequenceClassification", "BertConfig", TEXT, 0.9),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", GPT2, 0.9),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, 0.6),
    "T5": ("T5EncoderModel", "T5Config", T5, 0.4),
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION, 0.9),
    "Swin": ("SwinForImageClassification", "SwinConfig", SWIN, 0.75),
    "CLIP": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**VISION, "projection_dim": 16}, 0.8),
    "Whisper": ("WhisperModel", "WhisperConfig", WHISPER, 0.4),
}
"""Name -> class, configuration, its options, and the least share of the hidden neurons that moves in double precision,
in which norms that round to 32 bits are pinned."""


class OneTensor(nn.Module):
    """A model with a single output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        result = self.model(x)
        return next(result[key] for key in ("logits", "image_embeds", "last_hidden_state") if key in result)


def drawn(model):
    """In double precision, with norms and biases that are not the ones and zeros they start with."""
    module = OneTensor(model).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_model(name, generator):
    transformers = pytest.importorskip("transformers")
    kind, config, options, least = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**options))
    x = torch.randint(2, WORDS, (2, 7))
    if "image_size" in options:
        x = torch.randn(IMAGE, dtype=torch.float64)
    if name == "Whisper":
        model, x = model.encoder, torch.randn(2, 8, 20, dtype=torch.float64)
    module = drawn(model)
    assert_read(module, x, generator)
    assert scalegmn.read(module, x).neurons_moved >= least


@pytest.mark.slow
def test_llama_in_single_precision():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    module = OneTensor(transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))).eval()
    reading = scalegmn.read(module, torch.randint(2, WORDS, (2, 7)))
    assert reading.neurons_moved == 1
    assert reading.params.spec.heads[0].rotary == (0, 1, 2, 3, 0, 1, 2, 3)


@pytest.mark.slow
def test_adapters(generator):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    module = drawn(peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)))
    assert_read(module, torch.randint(2, WORDS, (2, 7)), generator)


@pytest.mark.slow
def test_mixtral(generator):
    """In single precision: its grouped product does not have double precision."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=3, num_experts_per_tok=2)
    module, x = OneTensor(transformers.MixtralForCausalLM(config)).eval(), torch.randint(2, WORDS, (2, 7))
    reading = scalegmn.read(module, x)
    assert reading.neurons_moved >= 0.95
    expected = outputs(module, x)
    assert torch.equal(outputs(scalegmn.to_module(reading.params, module, x), x), expected)
    moved = GroupElement.sample(reading.params, generator).act(reading.params)
    written = scalegmn.to_module(moved, module, x)
    assert not all(torch.equal(p, q) for p, q in zip(written.parameters(), module.parameters(), strict=True))
    torch.testing.assert_close(outputs(written, x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
