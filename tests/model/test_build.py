"""build_model, freezing and LoRA: what a recipe says happens, and what it cannot mean is an error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from dsvlm.config import DecoderConfig, ModelConfig, VisionConfig
from dsvlm.model.backbone import check_decoder, kind_of
from dsvlm.model.build import build_model, sinusoids
from dsvlm.model.git import GitVlm
from dsvlm.model.lora import merge_lora

PT = {"format": "pt"}


def trainable(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_seed_decides_the_weights_and_the_callers_random_state_is_kept(tools, kind):
    before = torch.get_rng_state()
    a, b, c = (tools.build(tools.recipe(kind), seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a[n], b[n]) for n in a)
    assert any(not torch.equal(a[n], c[n]) for n in a)


def test_embedding_std_and_sinusoidal_positions(tools):
    model = tools.build(tools.recipe("opt", embedding_std=0.7, positions="sinusoidal"))
    assert abs(model.get_input_embeddings().weight.std() - 0.7) < 0.05
    patches = model.vision.tower.embeddings.position_embedding.weight
    assert (patches[0] == 0).all() and len(set(map(tuple, patches.tolist()))) == len(patches)
    torch.testing.assert_close(patches[1, :8], patches[2, :8])  # one row: the same first half
    torch.testing.assert_close(patches[1, 8:], patches[3, 8:])  # one column: the same second half
    table = model.decoder.model.decoder.embed_positions.weight
    assert abs(table.square().mean() - 1) < 1e-5
    assert sinusoids(5, 7).shape == (5, 7)
    tools.build(tools.recipe("llama", positions="sinusoidal"))


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"vision": {"image_size": 9}}, "image_size 9 is not a multiple of patch_size 4"),
        ({"vision": {"num_attention_heads": 3}}, "model.vision.config: .*not a multiple of"),
        ({"vision": {"hidden_size": "wide"}}, "model.vision.config: .*hidden_size"),
        ({"decoder": {"num_attention_heads": 5}}, "hidden_size 24 is not a multiple of num_attention_heads 5"),
        ({"decoder": {"layerdrop": 0.1}}, "layerdrop"),
        ({"decoder": {"hiden_size": 8}}, "hiden_size.*did you mean 'hidden_size'"),
        ({"vision": {"patchsize": 8}}, "patchsize.*did you mean 'patch_size'"),
        ({"vision": {"num_channels": 1}}, "num_channels 1, but images have 3"),
        ({"vision": {"return_dict": False}}, "vision: return_dict false"),
        ({"decoder": {"return_dict": False}}, "decoder: return_dict false"),
        ({"freeze": ("visoin",)}, "freeze: pattern 'visoin' matches no parameter; nearest: "),
        ({"train": ("decoder.nothing",)}, "train: pattern 'decoder.nothing' matches no parameter"),
        ({"freeze": ("(",)}, "not a regular expression"),
    ],
)
def test_impossible_recipes(tools, settings, message):
    with pytest.raises(ValueError, match=message):
        tools.build(tools.recipe("opt", **settings))


def test_other_impossible_recipes(tools):
    with pytest.raises(ValueError, match="num_key_value_heads 3"):
        tools.build(tools.recipe("llama", decoder={"num_key_value_heads": 3}))
    with pytest.raises(ValueError, match="'gpt' is unknown; choose one of opt, llama, mpt, t5"):
        tools.build(ModelConfig(vision=VisionConfig(), decoder=DecoderConfig(kind="gpt")))
    with pytest.raises(ValueError, match="lora: pattern 'query_key_value' matches no linear layer; nearest: decoder"):
        tools.build(tools.recipe("opt", lora=tools.lora(targets=("query_key_value",))))


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_positions_that_depend_on_the_batch_are_refused(key, name):
    sizes, theta = {"hidden_size": 16, "num_attention_heads": 2}, {"rope_theta": 1e4}
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    for rope in ({name: "dynamic", "factor": 4.0}, {name: "longrope", **factors}):
        with pytest.raises(ValueError, match=f"rope_type '{rope[name]}' chooses its frequencies by the longest row"):
            check_decoder(LlamaConfig(**sizes, **{key: {**theta, **rope}}))
    check_decoder(LlamaConfig(**sizes, **{key: {**theta, name: "linear", "factor": 4.0}}))


def test_a_pretrained_t5_starts_answers_as_training_does(tools, tmp_path):
    T5ForConditionalGeneration(
        T5Config(**tools.recipe("t5").decoder.config, vocab_size=tools.vocab, decoder_start_token_id=5)
    ).save_pretrained(tmp_path)
    config = ModelConfig(vision=tools.recipe().vision, decoder=DecoderConfig(kind="t5", pretrained=str(tmp_path)))
    assert tools.build(config).decoder.config.decoder_start_token_id == tools.pad


def test_a_padding_token_that_begins_or_ends_texts_has_a_row_like_the_others(tools, kind, tmp_path):
    def build(pad, bos, eos):
        return build_model(
            tools.recipe(kind), vocab_size=tools.vocab, pad_id=pad, bos_id=bos, eos_id=eos, heads={}, seed=0
        )

    for pad, bos, eos in ((2, 2, 2), (2, 1, 2), (2, 2, 1)):
        model = build(pad, bos, eos)
        model.save_pretrained(tmp_path)
        for each in (model, type(model).from_pretrained(tmp_path).train(), build(pad, bos, eos)):
            table = each.get_input_embeddings()
            assert 0.5 < table.weight[2].std() / table.weight[3:].std() < 2
            torch.testing.assert_close(table.weight, model.get_input_embeddings().weight, rtol=0, atol=0)
            used = table(torch.tensor([2, 3]))
            assert torch.autograd.grad(used.sum(), table.weight)[0][2].abs().sum() > 0
    own = build(2, 0, 1).get_input_embeddings()
    assert own.padding_idx == (2 if kind in ("opt", "llama") else None)


def test_freeze_then_train(tools):
    model = tools.build(tools.recipe("llama", freeze=("^vision", "^decoder"), train=("norm",)))
    names = trainable(model)
    assert "connector.linear.weight" in names and "decoder.model.norm.weight" in names
    assert "vision.tower.pre_layrnorm.weight" in names  # the pattern is searched, in every part
    assert not any(".q_proj" in n for n in names)


def test_lora_trains_adapters_and_what_is_named(tools, kind):
    lora = tools.lora(targets=(r"\.(q_proj|v_proj|q|v|Wqkv)$",), r=2, alpha=4)
    model = tools.build(tools.recipe(kind, lora=lora, freeze=("^vision",), train=(r"decoder\..*(norm)",)))
    names = trainable(model)
    decoder = {n for n in names if n.startswith("decoder.")}
    assert decoder and all("lora_" in n or "norm" in n for n in decoder)
    assert any("lora_A" in n for n in decoder) and any("norm" in n for n in decoder)
    assert not any("lora_" in n for n in names if not n.startswith("decoder."))
    assert not any(n.startswith("vision") for n in names) and "connector.linear.weight" in names


def test_merged_lora_computes_the_same_with_plain_names(tools, kind, tmp_path):
    plain = tools.build(tools.recipe(kind))
    model = tools.build(tools.recipe(kind, lora=tools.lora(targets=("q_proj|v_proj|[.]q$|Wqkv",)))).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    batch = tools.collate(tools.mixed, kind)
    expected = model(batch)["loss_sum"]
    assert abs(expected - plain(batch)["loss_sum"]) > 1e-4
    merge_lora(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(batch)["loss_sum"], expected, rtol=1e-5, atol=0)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(batch)["loss_sum"], expected, rtol=1e-5, atol=0)


@pytest.fixture(scope="module")
def checkpoints(tools, tmp_path_factory):
    """A whole CLIP, its vision tower alone, and a LLaMA, with a smaller vocabulary than the tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    config = tools.recipe("llama")
    vision = CLIPVisionConfig(**config.vision.config)
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(11)
    CLIPVisionModel(vision).save_pretrained(root / "tower")
    CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text)).save_pretrained(root / "clip")
    LlamaForCausalLM(LlamaConfig(**config.decoder.config, vocab_size=30)).save_pretrained(root / "llama")
    return root


@pytest.mark.parametrize("tower", ["tower", "clip"])
def test_pretrained_parts_keep_their_weights(tools, checkpoints, tower):
    vision = CLIPVisionModel.from_pretrained(checkpoints / tower)
    language = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    model = tools.build(
        ModelConfig(
            vision=VisionConfig(pretrained=str(checkpoints / tower)),
            decoder=DecoderConfig(kind="llama", pretrained=str(checkpoints / "llama")),
        )
    )
    ours = model.vision.tower.state_dict()
    for name, value in vision.state_dict().items():
        assert "post_layernorm" in name or torch.equal(ours[name], value), name
    ours = model.decoder.state_dict()
    for name, value in language.state_dict().items():
        assert torch.equal(ours[name][: len(value)], value), name
    assert model.get_input_embeddings().weight.shape[0] == tools.vocab
    assert model.get_output_embeddings().weight.shape[0] == tools.vocab
    assert torch.isfinite(model(tools.collate(tools.mixed))["loss_sum"])


INPUT = {"opt": "decoder.model.decoder.embed_tokens.weight", "llama": "decoder.model.embed_tokens.weight",
         "mpt": "decoder.transformer.wte.weight", "t5": "decoder.shared.weight"}  # fmt: skip


def test_rows_added_for_boxes_must_train(tools, kind, tmp_path):
    """LoRA and freezing leave them as they were made, all alike."""
    settings = kind_of(kind).config(
        **tools.recipe(kind).decoder.config, vocab_size=30, tie_word_embeddings=kind != "llama"
    )
    kind_of(kind).model(settings).save_pretrained(tmp_path)
    names = [INPUT[kind]] + ["decoder.lm_head.weight"] * (kind == "llama")

    def build(boxes=("where",), vocab_size=tools.vocab, **more):
        config = ModelConfig(
            vision=tools.recipe().vision, decoder=DecoderConfig(kind=kind, pretrained=str(tmp_path)), **more
        )
        ids = {"pad_id": tools.pad, "bos_id": tools.bos, "eos_id": tools.eos}
        return build_model(config, vocab_size=vocab_size, **ids, heads={}, seed=0, boxes=boxes)

    lora = tools.lora(targets=(r"\.(q_proj|q|Wqkv)$",))
    for frozen in ({"lora": lora}, {"freeze": ("^decoder",)}):
        with pytest.raises(ValueError, match="task where could not tell") as error:
            build(**frozen)
        assert str(error.value).endswith(f"add {', '.join(map(repr, names))} to model.train")
        assert set(names) <= trainable(build(**frozen, train=tuple(names)))
        build(boxes=(), **frozen)
        build(vocab_size=30, **frozen)
    build()


@pytest.mark.parametrize("vocab", [30, 80])
def test_the_head_of_a_t5_that_has_its_own_is_kept(tools, tmp_path, vocab):
    """T5 1.1, Flan-T5, mT5: their configurations call it tied, and added rows made it so."""
    sizes = tools.recipe("t5").decoder.config | {"feed_forward_proj": "gated-gelu", "vocab_size": vocab}
    language = T5ForConditionalGeneration(T5Config(**sizes, tie_word_embeddings=False))
    state = language.state_dict() | {"lm_head.weight": torch.randn(vocab, sizes["d_model"])}
    language.save_pretrained(tmp_path)
    save_file({k: v for k, v in state.items() if "embed_tokens" not in k}, tmp_path / "model.safetensors", PT)
    decoder = DecoderConfig(kind="t5", pretrained=str(tmp_path))
    model = tools.build(ModelConfig(vision=tools.recipe().vision, decoder=decoder))
    ends = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for end, name in zip(ends, ("shared.weight", "lm_head.weight"), strict=True):
        assert torch.equal(end.data[:vocab], state[name]) and len(end) == max(vocab, tools.vocab)
    model.save_pretrained(tmp_path / "out")
    assert torch.equal(GitVlm.from_pretrained(tmp_path / "out").get_output_embeddings().weight, ends[1])


def test_the_padding_row_of_a_checkpoint_trains_where_it_is_read(tools, checkpoints, tmp_path):
    """As torch.nn.Embedding's padding_idx it would not: of tokenizers whose padding also begins texts."""
    batch = tools.collate(tools.mixed)
    read = int(batch.tokens[0, 0])
    directory = shutil.copytree(checkpoints / "llama", tmp_path / "llama")
    settings = json.loads((directory / "config.json").read_text()) | {"pad_token_id": read}
    (directory / "config.json").write_text(json.dumps(settings))
    decoder = DecoderConfig(kind="llama", pretrained=str(directory))
    model = tools.build(ModelConfig(vision=tools.recipe().vision, decoder=decoder))
    model(batch)["loss_sum"].backward()
    assert model.get_input_embeddings().weight.grad[read].any()


def test_incomplete_and_foreign_checkpoints(tools, checkpoints, tmp_path):
    language = LlamaForCausalLM.from_pretrained(checkpoints / "llama")
    state = language.state_dict()
    del state["model.norm.weight"]
    language.save_pretrained(tmp_path / "part", state_dict=state)
    whole = tools.recipe("llama")

    def attempt(directory):
        tools.build(ModelConfig(vision=whole.vision, decoder=DecoderConfig(kind="llama", pretrained=str(directory))))

    with pytest.raises(ValueError, match="missing weights for LlamaForCausalLM: model.norm.weight"):
        attempt(tmp_path / "part")
    state = {**language.state_dict(), "adapter.weight": torch.ones(2)}
    language.save_pretrained(tmp_path / "more", state_dict=state)
    with pytest.raises(ValueError, match="unexpected weights for LlamaForCausalLM: adapter.weight"):
        attempt(tmp_path / "more")
    with pytest.raises(ValueError, match="model.decoder.pretrained: .* holds no config.json"):
        attempt(tmp_path / "none")
    config = json.loads((checkpoints / "llama" / "config.json").read_text())
    assert config["vocab_size"] == 30
    for name, text, message in (
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", "cannot be loaded: .*; download it again"),
        ("adapter_config.json", "{}", "holds an adapter .* merge the two"),
        ("config.json", json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}), "quantised weights"),
        ("config.json", json.dumps(config | {"vocab_size": 26}), "mismatched weights for Llama.*: lm_head.weight, "),
        ("config.json", '{"model_type": ', r"part/config.json is damaged \(.*\); download it again"),
    ):
        shutil.rmtree(tmp_path / "part")
        shutil.copytree(checkpoints / "llama", tmp_path / "part")
        (tmp_path / "part" / name).write_text(text)
        with pytest.raises(ValueError, match=f"model.decoder.pretrained: .*{message}"):
            attempt(tmp_path / "part")


@pytest.mark.parametrize("window", [None, 8])
def test_a_mistral_without_a_window_is_a_llama(tools, checkpoints, tmp_path, window):
    directory = shutil.copytree(checkpoints / "llama", tmp_path / "mistral")
    settings = json.loads((directory / "config.json").read_text()) | {"model_type": "mistral", "sliding_window": window}
    (directory / "config.json").write_text(json.dumps(settings))
    whole = tools.recipe("llama")
    recipe = ModelConfig(vision=whole.vision, decoder=DecoderConfig(kind="llama", pretrained=str(directory)))
    if window is None:
        assert torch.isfinite(tools.build(recipe)(tools.collate(tools.mixed))["loss_sum"])
    else:
        with pytest.raises(ValueError, match="decoder: sliding_window 8 is not supported"):
            tools.build(recipe)
