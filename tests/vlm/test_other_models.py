"""Models that differ in one thing from those around which `split` was made: taken apart all the same, or refused with the
reason."""

import functools

import numpy
import pytest
import torch

import tokcompile
from tests.conftest import error, run
from tests.llm.by_hand import dropped, hidden
from tests.models import shake
from tests.models.family import noise, seeded, tokens
from tests.models.hf_base import DECODER, VIT, class_of
from tokcompile import InputError
from tokcompile.vlm import Generator, export, load, split

SIGLIP = dict(model_type="siglip_vision_model", vision_use_head=False, **VIT)
VQ = dict(
    embed_dim=16, num_embeddings=16, latent_channels=16, resolution=32, base_channels=32, num_res_blocks=1,
    channel_multiplier=[1, 1, 1],
)  # fmt: skip
WORDS = {"<image>": 60} | {f"IMGIMG{''.join(chr(65 + int(d)) for d in str(i))}Z": 20 + i for i in range(16)}
SAM = dict(
    model_type="sam_vision_model", hidden_size=48, output_channels=16, num_hidden_layers=4, num_attention_heads=4, mlp_dim=96,
    image_size=64, patch_size=8, window_size=4, global_attn_indexes=[1, 3],
)  # fmt: skip
GEMMA = dict(**DECODER, head_dim=16)
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=32, beta_fast=32.0,
            beta_slow=1.0, attention_factor=1.0)  # fmt: skip
SPARSE = DECODER | dict(
    num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, kv_lora_rank=16, v_head_dim=12,
    qk_rope_head_dim=8, qk_nope_head_dim=8, index_topk=60, index_head_dim=16, index_n_heads=2, rope_parameters=YARN,
)  # fmt: skip


def prompt(count, pixels, **more):
    """Five tokens of text, the image, seven of text."""
    text = tokens(1, 12, 54)
    ids = torch.cat([text[:, :5], torch.full((1, count), 60), text[:, 5:]], 1)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, use_cache=False) | more


def chameleon():
    """Places the features in the module that holds the layers; words for images have the smallest number as logits."""
    config = class_of("ChameleonConfig")(**DECODER, vocabulary_map=WORDS, vq_config=VQ)
    return class_of("ChameleonForConditionalGeneration")(config), prompt(64, noise(1, 3, 32, 32))


def mistral_large():
    """A sparse attention that may choose more keys than there are."""
    config = class_of("MistralLarge4Config")(
        vision_config=dict(model_type="pixtral", **VIT | dict(image_size=64)), text_config=SPARSE, image_token_index=60
    )
    inputs = prompt(16, noise(1, 3, 64, 64), image_sizes=torch.tensor([[64, 64]]))
    return class_of("MistralLarge4ForConditionalGeneration")(config), inputs


def hybrid():
    """Two forms of each image."""
    config = class_of("DeepseekVLHybridConfig")(
        vision_config=SIGLIP, high_res_vision_config=SAM, text_config=dict(model_type="llama", **DECODER), image_token_id=60
    )
    inputs = prompt(49, noise(1, 3, 56, 56), high_res_pixel_values=noise(1, 3, 64, 64))
    return class_of("DeepseekVLHybridForConditionalGeneration")(config), inputs


def colpali():
    """Embeddings for search, and no logits."""
    inner = dict(
        model_type="paligemma", vision_config=SIGLIP, text_config=dict(model_type="gemma", **GEMMA), image_token_index=60,
        projection_dim=48,
    )  # fmt: skip
    config = class_of("ColPaliConfig")(vlm_config=inner, embedding_dim=32)
    inputs = prompt(49, noise(1, 3, 56, 56))
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    return class_of("ColPaliForRetrieval")(config), inputs


def shieldgemma():
    """Two numbers for a prompt."""
    config = class_of("ShieldGemma2Config")(
        vision_config=SIGLIP | dict(image_size=64), text_config=dict(model_type="gemma3_text", sliding_window=16, **GEMMA),
        mm_tokens_per_image=16, image_token_index=60, boi_token_index=61, eoi_token_index=62,
    )  # fmt: skip
    config.yes_token_index, config.no_token_index = 5, 9
    inputs = prompt(16, noise(1, 3, 64, 64))
    return class_of("ShieldGemma2ForImageClassification")(config), inputs | {
        "token_type_ids": (inputs["input_ids"] == 60).long()
    }


def inkling():
    """A bias by distance, which its cache counts, and short convolutions of what attention reads."""
    config = class_of("Inkling2Config")(
        vision_config=dict(hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, patch_size=8,
                           posemb_grid_size=8, projection_hidden_dim=64, text_hidden_size=48),
        text_config=dict(vocab_size=64, unpadded_vocab_size=64, hidden_size=48, num_hidden_layers=4, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=12, swa_num_attention_heads=4, swa_num_key_value_heads=2,
                         swa_head_dim=12, sliding_window_size=16, d_rel=4, rel_extent=32, n_layers_per_attn_res_block=2,
                         layer_types=["hybrid_sliding", "hybrid"] * 2, conv_kernel_size=3, moe_intermediate_size=32,
                         n_routed_experts=4, num_experts_per_tok=2, bos_token_id=0, eos_token_id=63, pad_token_id=0),
        image_token_id=60,
    )  # fmt: skip
    inputs = prompt(12, noise(12, 16, 16, 3), image_grid_thw=torch.tensor([[1, 4, 3]]))
    return class_of("Inkling2ForConditionalGeneration")(config), inputs


def t5gemma():
    """An encoder sees the image."""
    half = DECODER | dict(
        head_dim=12, sliding_window=16, query_pre_attn_scalar=12, layer_types=["sliding_attention", "full_attention"] * 2
    )
    encoder = dict(
        vision_config=SIGLIP | dict(image_size=64), text_config=half, mm_tokens_per_image=16, boi_token_index=61,
        eoi_token_index=62, image_token_index=60,
    )  # fmt: skip
    config = class_of("T5Gemma2Config")(encoder=encoder, decoder=half, image_token_index=60)
    inputs = prompt(16, noise(1, 3, 64, 64), decoder_input_ids=tokens(1, 6, 55))
    inputs["input_ids"][:, 21] = 61  # whose embedding is written at a mask
    return class_of("T5Gemma2ForConditionalGeneration")(config), inputs


def phi():
    """Pixels under another name, no function for features, and a decoder that places them itself: four columns of a tile, of
    which one is padding, with a newline token a row; a separator; the whole image."""
    audio = dict(
        hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2, ext_pw_out_channel=16, input_size=16,
        depthwise_separable_out_channel=16, nemo_conv_channels=16, audio_token_id=59,
    )  # fmt: skip
    vision = VIT | dict(image_size=64, num_hidden_layers=2, crop_size=64, image_token_id=60)
    rope = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 6, long_factor=[4.0] * 6, factor=3.2)
    config = class_of("Phi4MultimodalConfig")(
        **DECODER, vision_config=vision, audio_config=audio, original_max_position_embeddings=40,
        rope_parameters=rope | dict(original_max_position_embeddings=40),
    )  # fmt: skip
    inputs = prompt(4 * (3 + 1) + 1 + 4 * (4 + 1), None)
    there = torch.ones(1, 2, 8, 8)
    there[:, 1, :, 6:] = 0
    seen = dict(image_pixel_values=noise(1, 2, 3, 64, 64), image_sizes=torch.tensor([[64, 64]]), image_attention_mask=there)
    return class_of("Phi4MultimodalForCausalLM")(config), {n: v for n, v in inputs.items() if n != "pixel_values"} | seen


def granite():
    """Zeros in the place of the placeholders, and features that are added before layers 0, 2 and 3."""
    queries = dict(
        model_type="blip_2_qformer", num_hidden_layers=1, intermediate_size=64, cross_attention_frequency=1,
        max_position_embeddings=64, use_qformer_text_input=False,
    )  # fmt: skip
    config = class_of("Granite4VisionConfig")(
        vision_config=SIGLIP | dict(hidden_size=64, image_size=64, num_hidden_layers=2),
        text_config=DECODER | dict(embedding_multiplier=2.0, residual_multiplier=0.5, logits_scaling=2.0),
        qformer_config=queries, image_token_index=60, vision_feature_select_strategy="full", downsample_rate="2/4",
        image_grid_pinpoints=[[64, 64]], deepstack_layer_map=[[-2, 0], [2, 2]], spatial_target_layers=[3],
    )  # fmt: skip
    inputs = prompt(16 + 4 * 5, noise(1, 2, 3, 64, 64), image_sizes=torch.tensor([[64, 64]]))
    return class_of("Granite4VisionForConditionalGeneration")(config), inputs


def fuyu():
    """Patches go into the decoder without a tower, under a name of their own."""
    text = dict(DECODER, model_type="persimmon", qk_layernorm=True)
    config = class_of("FuyuConfig")(text_config=text, hidden_size=48, patch_size=8, image_token_id=60)
    inputs = prompt(16, None, image_patches=noise(1, 16, 192))
    return class_of("FuyuForCausalLM")(config), {n: v for n, v in inputs.items() if n != "pixel_values"}


def kosmos():
    """Embeds segments and positions beside the tokens, before its first layer."""
    vision = dict(
        hidden_size=48, patch_embed_hidden_size=192, intermediate_size=96, head_dim=12, num_hidden_layers=4,
        num_attention_heads=4, max_num_patches=64,
    )  # fmt: skip
    text = dict(
        vocab_size=64, max_position_embeddings=128, embed_dim=48, layers=4, ffn_dim=96, attention_heads=4, pad_token_id=1,
        bos_token_id=0, eos_token_id=2, dropout=0.0,
    )  # fmt: skip
    config = class_of("Kosmos2_5Config")(vision_config=vision, text_config=text, latent_query_num=16)
    places = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(6.0), indexing="ij"), -1).reshape(1, 48, 2) + 1
    inputs = prompt(16, None, flattened_patches=torch.cat([places, noise(1, 48, 192)], -1))
    inputs |= dict(image_embeds_position_mask=(inputs["input_ids"] == 60).long())
    model = class_of("Kosmos2_5ForConditionalGeneration")(config)
    return model, {n: v for n, v in inputs.items() if n != "pixel_values"}


@functools.cache
def made(make):
    with seeded():
        model, inputs = make()
    return shake(model.eval()), inputs


def test_a_decoder_that_places_the_features_itself():
    model, inputs = made(chameleon)
    parts, pixels, ids = split(model, inputs), inputs["pixel_values"], inputs["input_ids"]
    want = run(model, **inputs).logits[:, -1]
    said = want > -1e30  # the others are never said
    assert 0 < int(said.sum()) < said.numel()
    assert error(parts(pixels, ids)["logits"][:, -1][said], want[said]) < 1e-5
    options = dict(method="random", budget=tokcompile.Tokens(4), where=[2], spans=parts.spans, outputs="reduced")
    prefill = tokcompile.optimize(*parts.language, **options)
    gone = dropped(run(prefill, **parts.language.kwargs).kept["s0_index"][0], *parts.spans[0])
    generator = Generator(parts, prefill, max_new_tokens=4)
    with hidden(gone, {2, 3}):
        want = run(parts.language.module, **parts.language.kwargs)["logits"][:, -1]
    assert error(generator(pixels, ids, eos=(), keep_logits=True).logits[0][said], want[said]) < 1e-5
    whole = tokcompile.optimize(model, kwargs=inputs, method="tome", budget=0.5, outputs="reduced")
    assert run(whole, **inputs).output.logits.shape[1] == 44  # its tower cannot be reduced, its decoder can
    assert not whole.report.recoveries


@pytest.mark.matrix
def test_a_sparse_attention_that_chooses_all_keys():
    model, inputs = made(mistral_large)
    parts, pixels, ids = split(model, inputs), inputs["pixel_values"], inputs["input_ids"]
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", budget=1.0)
    want = run(model.generate, **inputs | {"use_cache": True}, max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(Generator(parts, prefill, max_new_tokens=8)(pixels, ids, eos=()).tokens, want[:, -8:])
    options = dict(method="random", budget=tokcompile.Tokens(4), where=[2], spans=parts.spans, outputs="reduced")
    prefill = tokcompile.optimize(*parts.language, **options)
    gone = dropped(run(prefill, **parts.language.kwargs).kept["s0_index"][0], *parts.spans[0])
    with hidden(gone, {2, 3}):
        want = run(parts.language.module, **parts.language.kwargs)["logits"][:, -1]
    generator = Generator(parts, prefill, max_new_tokens=8)
    assert error(generator(pixels, ids, eos=(), keep_logits=True).logits[0], want) < 1e-5
    with pytest.raises(InputError, match="attends to the 60 keys that its indexer chooses"):
        Generator(parts, prefill, max_new_tokens=40)


@pytest.mark.every(3)
@pytest.mark.parametrize(("make", "name"), [
    (phi, "image_pixel_values"), (granite, "pixel_values"), (fuyu, "image_patches"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_32_tokens_of_the_model_itself_with_dropped_keys_hidden(make, name):
    model, inputs = made(make)
    parts, pixels, ids = split(model, inputs), inputs[name], inputs["input_ids"]
    assert error(parts(pixels, ids)["logits"][:, -1], run(model, **inputs).logits[:, -1]) < 1e-5
    for budget, first in ((1.0, 4), (tokcompile.Tokens(6), 2)):
        prefill = tokcompile.optimize(
            *parts.language, method="dart", budget=budget, where=[2], spans=parts.spans, outputs="reduced"
        )
        out = run(prefill, **parts.language.kwargs)
        gone = dropped(out.kept["s0_index"][0], *parts.spans[0]) if out.kept else set()
        if not gone:
            assert torch.equal(out.output["logits"], run(parts.language.module, **parts.language.kwargs)["logits"])
        result = Generator(parts, prefill, max_new_tokens=32)(pixels, ids, eos=(), keep_logits=True)
        tokens, logits = generated(model, inputs, gone, first)
        assert torch.equal(result.tokens, tokens)
        assert all(error(got, want) < 3e-5 for got, want in zip(result.logits, logits))
    assert tokcompile.check(*parts.language, spans=parts.spans, blocks=[0, 2]).ok


def generated(model, inputs, gone, first):
    """32 tokens and their logits, by the model's own `generate`; nobody sees keys that are gone from layer `first` of 4 on."""
    with hidden(set(), ()) as calls:
        run(model, **inputs)
    seeing = len(calls) - 4  # calls of the tower, which come first
    layers = {seeing + 4 * step + layer for step in range(32) for layer in range(first, 4)}
    options = dict(max_new_tokens=32, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    with hidden(gone, layers):
        made = run(model.generate, **inputs | {"use_cache": True}, **options)
    return made.sequences[:, -32:], made.logits


@pytest.mark.matrix
def test_a_folder_of_a_model_without_a_function_for_features(tmp_path):
    model, inputs = made(phi)
    parts, pixels = split(model, inputs, room=[6, 9]), inputs["image_pixel_values"]
    held = {type(module).__name__ for module in parts.vision.module.modules()}
    assert "Phi4MultimodalVisionEncoderLayer" in held
    assert not held & {"Phi4MultimodalMLP", "Phi4MultimodalAudioModel"}
    texts = parts.prompt.texts_of(inputs["input_ids"][0].tolist())
    prompt = parts.prompt.lay_out(texts, padded=True)  # though there is a convolution beside the layers, in another tower
    assert error(parts(pixels, *prompt)["logits"][:, -1], run(model, **inputs).logits[:, -1]) < 1e-5
    vision = tokcompile.optimize(*parts.vision, method="divprune", budget=0.5)  # tokens are given back for its map
    parts = parts.after(vision)
    options = dict(method="dart", budget=tokcompile.Tokens(6), where=[2], spans=parts.spans, outputs="reduced")
    prefill = tokcompile.optimize(*parts.language, **options)
    export(parts, prefill, tmp_path / "folder", max_new_tokens=8)
    folder = load(tmp_path / "folder")
    numpy.savez(tmp_path / "all.npz", **{n: v.numpy() for n, v in inputs.items() if isinstance(v, torch.Tensor)})
    assert torch.equal(folder.array(tmp_path / "all.npz"), pixels)
    assert set(folder.fixed) == {"image_sizes", "image_attention_mask"}
    want = Generator(parts, prefill, max_new_tokens=8)(pixels, *prompt, eos=()).tokens
    assert folder(pixels, *prompt, eos=()).tokens.tolist() == want.tolist()


@pytest.mark.parametrize(("placed", "why"), [
    (lambda features, embeds: features + embeds.mean(), "is given input_ids too: this model looks .* the question in mind"),
    (lambda features, embeds: features * 0, "no image_pixel_values are in what its decoder begins with"),
])  # fmt: skip
def test_what_stands_at_the_placeholders_comes_from_the_image_alone(placed, why, monkeypatch):
    model, inputs = made(phi)
    images = model.model.embed_tokens_extend.image_embed
    own = images.forward

    def forward(ids, embeds, **kwargs):
        return torch.where((ids == 60)[..., None], placed(own(ids, embeds, **kwargs), embeds), embeds)

    monkeypatch.setattr(images, "forward", forward)
    with pytest.raises(InputError, match=why):
        split(model, inputs)


def test_a_second_form_of_the_image_is_an_input_of_the_vision_part():
    model, inputs = made(hybrid)
    parts = split(model, inputs)
    inputs = inputs | {name: inputs[name].flip(-1) for name in ("pixel_values", "high_res_pixel_values")}
    got = parts(inputs["pixel_values"], inputs["input_ids"], high_res_pixel_values=inputs["high_res_pixel_values"])
    assert error(got["logits"][:, -1], run(model, **inputs).logits[:, -1]) < 1e-5


@pytest.mark.matrix
def test_an_encoder_that_sees_is_optimized_with_its_decoder(tmp_path):
    model, inputs = made(t5gemma)
    optimized = tokcompile.optimize(model, kwargs=inputs, method="dart", budget=0.5)
    assert run(optimized, **inputs).logits.shape == run(model, **inputs).logits.shape
    assert optimized.export_onnx(tmp_path / "model.onnx").nodes  # without NonZero, which the export would refuse


@pytest.mark.parametrize(("make", "why"), [
    (colpali, "does not run on embeddings alone, as a language model with a cache: AttributeError"),
    (t5gemma, "looks at what is seen with an encoder"),
    (kosmos, "does more between the two than replacing placeholders"),
], ids=lambda v: getattr(v, "__name__", ""))  # fmt: skip
def test_what_cannot_be_taken_apart_is_refused(make, why):
    with pytest.raises(InputError, match=why):
        split(*made(make), image_token=60)


def test_what_cannot_be_decoded_is_refused():
    parts = split(*made(shieldgemma))
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", budget=1.0)
    with pytest.raises(InputError, match=r"gives \(1, 2\) numbers for a token and no logits of a next one"):
        Generator(parts, prefill, max_new_tokens=8)


@pytest.mark.matrix
def test_a_bias_by_distance_that_its_cache_counts():
    model, inputs = made(inkling)
    try:
        parts = split(model, inputs)
    except InputError as why:  # other releases of transformers
        assert "as a language model with a cache" in str(why)  # noqa: PT017
        return
    prefill = tokcompile.optimize(*parts.language, spans=parts.spans, outputs="reduced", budget=1.0)
    want = run(model.generate, **inputs | {"use_cache": True}, max_new_tokens=24, do_sample=False, eos_token_id=None)
    made_here = Generator(parts, prefill, max_new_tokens=24)(inputs["pixel_values"], inputs["input_ids"], eos=())
    assert torch.equal(made_here.tokens, want[:, -24:])
