"""BLIP-2's stage 2 with its language model: transformers' classes and LAVIS's files, both ways, and refusals."""

import json
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer as Engine
from typer.testing import CliRunner

import vlm
from tests.models.small_llm import END, START, WORDS, llm_folder, stage
from tests.weights.blip2_reference import FINAL_EPS, IMAGE_TOKEN, SIZES, lavis_speaker, speaker_folder
from vlm.apps.cli import app
from vlm.data.transforms import ImageTransform
from vlm.errors import ConfigError, WeightsError
from vlm.generate import GenerationConfig
from vlm.models.lora import LoraConfig
from vlm.weights.export import export_hf
from vlm.weights.files import check_target, read_tensors
from vlm.weights.hf_tokenizer import llm_fast, take_image_token
from vlm.weights.llm import load_llm_tokenizer
from vlm.weights.loaded import VisionLanguageModel
from vlm.weights.official import export_official

TEXTS = ["what colour is it ?", "a red box", "Question : the number ?"]
KINDS = ["opt", "llama", "t5"]


@pytest.fixture(scope="module", params=KINDS)
def speaker(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, speaker_folder(request.param, folder), folder


@pytest.fixture(scope="module")
def instructed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("instructed")
    return speaker_folder("llama", folder, instructed=True), folder


def pixels(count=3):
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def given(model, text, *, seq2seq):
    """What transformers reads for a text: image tokens, then the text as ours begins it, or ends it for a T5."""
    ids = model.tokens([text]).input_ids[0, 1:-1].tolist()
    words = [*ids, END] if seq2seq else [START, *ids]
    return torch.tensor([[IMAGE_TOKEN] * SIZES["queries"] + words])


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


@torch.no_grad()
def check_logits(model, theirs, *, asked=None):
    """Logits of each token of some texts, one by one; a T5's of what its decoder says after a question."""
    seq2seq = theirs.language_model.config.is_encoder_decoder
    for row, text in enumerate(TEXTS):
        tokens, ids = model.tokens([text]), given(model, text, seq2seq=seq2seq)
        more = {} if asked is None else {f"qformer_{key}": value for key, value in asked([text]).items()}
        picture = pixels()[row : row + 1]
        own = {} if asked is None else {"asked": model_words(asked([text]))}
        if seq2seq:
            said = torch.tensor([[START, 7, 9]])
            wanted = theirs(pixel_values=picture, input_ids=ids, decoder_input_ids=said, **more).logits
            joined = torch.cat([tokens.input_ids[:, :-1], said[:, 1:]], dim=1)
            read = torch.tensor([tokens.input_ids.shape[1] - 1])
            text_tokens = {"input_ids": joined, "attention_mask": torch.ones_like(joined)}
            found = model.network.lm_logits(picture, text_tokens, read, **own)[:, -3:]
        else:
            wanted = theirs(pixel_values=picture, input_ids=ids, **more).logits[:, SIZES["queries"] :]
            text_tokens = {key: value[:, :-1] for key, value in tokens.items()}
            found = model.network.lm_logits(picture, text_tokens, **own)
        close(found, wanted)
        assert wanted.std() > 0.1


def model_words(tokens):
    return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


@torch.no_grad()
def check_texts(model, theirs, processor=None):
    """The same tokens are said, greedily and with beams."""
    seq2seq = theirs.language_model.config.is_encoder_decoder
    for strategy, beams in (("greedy", 1), ("beam", 3)):
        config = GenerationConfig(strategy, beams=beams, max_new_tokens=7, min_new_tokens=1)
        found = model.generate(pixels(), model.tokens(TEXTS), config)
        for row, text in enumerate(TEXTS):
            inputs = {"input_ids": given(model, text, seq2seq=seq2seq)}
            if processor is not None:
                inputs = {k: v for k, v in processor(text=[text], images=white(), return_tensors="pt").items()}
                inputs.pop("pixel_values")
            said = theirs.generate(
                pixels()[row : row + 1], **inputs, max_new_tokens=7, min_new_tokens=1, num_beams=beams, do_sample=False,
            )  # fmt: skip
            start = 1 if seq2seq else inputs["input_ids"].shape[1]
            own = found.ids[row, 0, : found.lengths[row, 0]].tolist()
            wanted = [token for token in said[0, start:].tolist() if token not in (END, 0)]
            assert [token for token in own if token not in (END, 0)] == wanted, (strategy, text)
            assert len(wanted) > 2


def white():
    from PIL import Image

    return Image.new("RGB", (24, 24), "white")


def test_the_same_numbers_and_texts(speaker):
    _, theirs, folder = speaker
    model = vlm.load(folder, device="cpu")
    config = model.network.config
    assert (model.family, config.llm.name, config.llm.width) == ("blip2-llm", str(folder.resolve()), 32)
    assert not config.qformer.text.vocab_size and not config.qformer.instructed
    check_logits(model, theirs)
    check_texts(model, theirs)


def test_the_folder_comes_back(speaker, tmp_path):
    import transformers

    _, theirs, folder = speaker
    model = vlm.load(folder, device="cpu")
    export_hf(model, tmp_path / "out")
    again, report = transformers.Blip2ForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    before, after = theirs.state_dict(), again.state_dict()
    # No word is spare here, so that a row was added for the image; every other number is the same.
    assert set(before) == set(after)
    assert all(torch.equal(after[name][: len(value)], value) for name, value in before.items() if value.ndim)
    grown = [name for name, value in before.items() if after[name].shape != value.shape]
    assert grown and all("embed" in name or "shared" in name or "lm_head" in name for name in grown)
    processor = transformers.Blip2Processor.from_pretrained(tmp_path / "out")
    assert again.config.image_token_index == WORDS and processor.num_query_tokens == SIZES["queries"]
    check_texts(model, again.eval(), processor)
    read = vlm.load(tmp_path / "out", device="cpu")
    with torch.no_grad():
        close(read.network.visual_prompt(pixels()), model.network.visual_prompt(pixels()))
    model.save(tmp_path / "own")  # the language model stays where it is, known by its hash
    assert not any("llm" in name or "language" in name for name in read_tensors(tmp_path / "own" / "model.safetensors"))
    check_texts(vlm.load(tmp_path / "own", device="cpu"), theirs)


@torch.no_grad()
def test_instructblip_reads_the_image_for_a_text(instructed, tmp_path):
    import transformers

    theirs, folder = instructed
    model = vlm.load(folder, device="cpu")
    assert model.network.config.qformer.instructed and model.network.config.qformer.text.vocab_size == 30523
    asked = vlm.data.tokenizers.wordpiece(max_length=20)
    check_logits(model, theirs, asked=lambda texts: {k: v.long() for k, v in asked(texts).items()})
    states = model.network.look(pixels(1))
    assert (model.visual_prompt(states, TEXTS[:1]) - model.visual_prompt(states, TEXTS[1:2])).abs().max() > 1e-2
    config = GenerationConfig("greedy", max_new_tokens=6)
    found = model.generate(pixels(), model.tokens(TEXTS), config)
    export_hf(model, tmp_path / "out")
    check_target(tmp_path / "out")  # of all that is written, nothing is taken for somebody's own
    again = transformers.InstructBlipForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = transformers.InstructBlipProcessor.from_pretrained(tmp_path / "out")
    for row, text in enumerate(TEXTS):
        inputs = processor(text=[text], images=white(), return_tensors="pt")
        inputs["pixel_values"] = pixels()[row : row + 1]
        said = again.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()[-int(found.lengths[row, 0]) :]
        assert said == found.ids[row, 0, : found.lengths[row, 0]].tolist()
    with pytest.raises(ConfigError, match="an instructed Q-Former is used, not trained"):
        model.network(None)
    with pytest.raises(ValueError, match="needs input_ids of an instruction"):
        model.network.visual_prompt(pixels())


@pytest.mark.parametrize("gone", ["language_projection.bias", "qformer.encoder.layer.1.output_query.dense.weight"])
def test_a_missing_tensor_is_named(tmp_path, gone):
    theirs = speaker_folder("opt", tmp_path)
    theirs.save_pretrained(tmp_path, state_dict={k: v for k, v in theirs.state_dict().items() if k != gone})
    with pytest.raises(WeightsError, match=f"1 missing: {gone}"):
        vlm.load(tmp_path)


def test_a_language_model_with_a_hole_is_refused(tmp_path):
    theirs = speaker_folder("opt", tmp_path)
    gone = "language_model.model.decoder.layers.1.fc1.weight"
    theirs.save_pretrained(tmp_path, state_dict={k: v for k, v in theirs.state_dict().items() if k != gone})
    with pytest.raises(WeightsError, match=r"1 tensors are missing, .*layers\.1\.fc1\.weight"):
        vlm.load(tmp_path)


def wrapped(network, tmp_path, kind="llama", name="small"):
    tokenizer = load_llm_tokenizer(str(llm_folder(tmp_path / "llm", kind)))
    return VisionLanguageModel(network, tokenizer, ImageTransform(32), name=name, family="blip2-llm")


def test_lora_is_merged_into_what_is_written(tmp_path):
    import transformers

    (tmp_path / "llm").mkdir()
    network = stage(lora=LoraConfig(rank=2, targets={"llm": ("q_proj",), "image": ("qkv",)}))
    network.adapt()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model = wrapped(network.eval(), tmp_path)
    export_hf(model, tmp_path / "out")
    assert any("lora_" in name for name, _ in network.named_parameters())  # ours is as it was
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    tokens = {"input_ids": torch.tensor([[START, 7, 9]]), "attention_mask": torch.ones(1, 3)}
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.full((1, 3), again.config.image_token_index), tokens["input_ids"]], dim=1)
    with torch.no_grad():
        found = network.lm_logits(picture, tokens)
        close(found, again(picture, ids).logits[:, 3:, :WORDS])


def test_the_image_s_token_is_a_spare_one_where_there_is_one(tmp_path):
    from tokenizers import AddedToken

    tokenizer = load_llm_tokenizer(str(llm_folder(tmp_path)))

    def token(change, rows):
        engine = Engine.from_str(tokenizer.files["tokenizer.json"].decode())
        change(engine)
        changed = replace(tokenizer, files=tokenizer.files | {"tokenizer.json": engine.to_str().encode()})
        number = take_image_token(changed, rows=rows)
        fast = llm_fast(changed, seq2seq=False, image_token=number)
        assert fast("<image> red <image>")["input_ids"] == [START, number, 5, number]
        assert fast.convert_ids_to_tokens([number]) == ["<image>"]
        return number

    added = [AddedToken(word, special=True) for word in ("<|im_start|>", "<empty_output>", "<|im_end|>")]
    assert token(lambda engine: None, WORDS) == WORDS  # a new row
    assert token(lambda engine: None, WORDS + 4) == WORDS  # a spare one
    assert token(lambda engine: engine.add_special_tokens(added), WORDS + 3) == WORDS + 1  # renamed
    assert token(lambda engine: engine.add_tokens(["<image>"]), WORDS + 1) == WORDS


# LAVIS


@pytest.mark.parametrize(("kind", "name"), [("opt", "opt_proj"), ("t5", "t5_proj"), ("llama", "llm_proj")])
def test_lavis_s_file_speaks_with_the_language_model_that_is_named(kind, name, tmp_path):
    (tmp_path / "theirs").mkdir()
    theirs = speaker_folder(kind, tmp_path / "theirs", seed=3, final_eps=FINAL_EPS)
    llm = llm_folder(tmp_path / "llm", kind, seed=3) if (tmp_path / "llm").mkdir() is None else None
    before = lavis_speaker(theirs, name=name)
    torch.save({"model": before}, tmp_path / "stage2.pth")
    with pytest.raises(WeightsError, match=rf"projection \({name}\) for a language model 32 wide, but not that model"):
        vlm.load(tmp_path / "stage2.pth")
    model = vlm.load(tmp_path / "stage2.pth", llm=str(llm), device="cpu")
    assert model.network.config.image.final_norm_eps == FINAL_EPS and model.network.config.llm.name == str(llm)
    check_logits(model, theirs)
    after = read_tensors(export_official(model, tmp_path / "again.pth"))
    assert set(after) == set(before) and all(torch.equal(after[key], value) for key, value in before.items())
    with pytest.raises(WeightsError, match=r"last norm has an eps of 1e-05"):
        export_hf(model, tmp_path / "out")


def test_by_the_command(tmp_path):
    """A LAVIS file with the language model that is named, for transformers and back."""
    import transformers

    (tmp_path / "theirs").mkdir()
    theirs = speaker_folder("opt", tmp_path / "theirs", final_eps=FINAL_EPS)
    torch.save({"model": lavis_speaker(theirs)}, tmp_path / "stage2.pth")
    words = ["export", "--model", str(tmp_path / "stage2.pth"), "--llm", str(tmp_path / "theirs"), "--out"]
    run = CliRunner().invoke(app, [*words, str(tmp_path / "hf"), "--to", "hf", "--near"])
    assert run.exit_code == 0, run.output
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "hf").state_dict()
    assert all(
        torch.equal(again[name][: len(value)], value) for name, value in theirs.state_dict().items() if value.ndim
    )
    run = CliRunner().invoke(app, [*words, str(tmp_path / "again.pth"), "--to", "official"])
    assert run.exit_code == 0, run.output
    before, after = (read_tensors(tmp_path / name) for name in ("stage2.pth", "again.pth"))
    assert set(after) == set(before) and all(torch.equal(after[key], value) for key, value in before.items())
    run = CliRunner().invoke(app, [*words, str(tmp_path / "x"), "--to", "vlm", "--near"])
    assert isinstance(run.exception, ConfigError) and "only --to hf has such settings" in str(run.exception)


def test_lavis_s_instructblip_and_its_image_encoder_s_file(instructed, tmp_path):
    theirs, folder = instructed
    whole = lavis_speaker(theirs, name="llm_proj")
    torch.save({"model": lavis_speaker(theirs, name="llm_proj", image=False)}, tmp_path / "instruct.pth")
    torch.save({"model": {k: v for k, v in whole.items() if k.startswith("visual_")}}, tmp_path / "eva_vit_g.pth")
    model = vlm.load(tmp_path / "instruct.pth", llm=str(folder), device="cpu")
    assert model.network.config.qformer.instructed
    states = torch.randn(1, 10, 176, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        close(model.visual_prompt(states, TEXTS), vlm.load(folder, device="cpu").visual_prompt(states, TEXTS))


def test_opt_s_texts_end_with_a_line_break(tmp_path):
    from tokenizers import pre_tokenizers

    theirs = speaker_folder("opt", tmp_path, final_eps=FINAL_EPS)
    path = tmp_path / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["model"]["vocab"] = {"\n" if k == "green" else k: v for k, v in settings["model"]["vocab"].items()}
    engine = Engine.from_str(json.dumps(settings))
    engine.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    path.write_text(engine.to_str())
    torch.save({"model": lavis_speaker(theirs)}, tmp_path / "stage2.pth")
    model = vlm.load(tmp_path / "stage2.pth", llm=str(tmp_path), device="cpu")
    assert model.tokenizer.end_id == engine.token_to_id("\n") != END
    model.save(tmp_path / "own")
    assert vlm.load(tmp_path / "own", device="cpu").tokenizer.end_id == engine.token_to_id("\n")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"opt_proj.bias": None}, r"1 missing: opt_proj\.bias"),
        ({"Qformer.bert.encoder.layer.1.output_query.dense.bias": None}, r"1 missing: Qformer.*1\.output_query"),
        ({"Qformer.cls.predictions.bias": torch.ones(2)}, r"1 unexpected: Qformer\.cls"),
    ],
)
def test_what_doesn_t_fit_is_named(tmp_path, change, message):
    tensors = lavis_speaker(speaker_folder("opt", tmp_path)) | change
    torch.save({"model": {k: v for k, v in tensors.items() if v is not None}}, tmp_path / "stage2.pth")
    with pytest.raises(WeightsError, match=message):
        vlm.load(tmp_path / "stage2.pth", llm=str(tmp_path))


@pytest.mark.parametrize("write", [export_hf, export_official])
def test_texts_that_start_before_the_image_are_only_our_own(tmp_path, write):
    (tmp_path / "llm").mkdir()
    network = stage()
    network.config = replace(network.config, llm=replace(network.config.llm, start_first=True))
    with pytest.raises(WeightsError, match=r"its texts start before the visual prompt \(llm\.start_first\)"):
        write(wrapped(network, tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
