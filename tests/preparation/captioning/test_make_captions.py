"""Captioning: original BLIP weights against transformers, draws that belong to images, and what goes wrong."""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from transformers import BlipForConditionalGeneration, GitForCausalLM

from library.errors import UserError
from library.options.captioning import CaptionOptions, GitCaptionOptions
from library.options.parsing import parse_options
from library.options.validation import problems, warnings
from library.preparation.captioning import captioners, pretrained
from library.preparation.captioning.blip_weights import blip_config, build_blip, read_original_blip
from library.preparation.captioning.captioners import Search, load_blip, load_git, load_image_text_model
from library.preparation.captioning.make_captions import GROUPS, caption_folder, make_captions
from library.preparation.captioning.nucleus_sampling import NucleusSampling, nucleus
from library.runtime.logs import LOGGER
from tests.builders.captioners import (
    WORDS,
    original_blip,
    tiny_blip,
    write_blip_folder,
    write_git_folder,
    write_original_blip,
    write_qwen_folder,
    write_vocabulary,
)

SEARCHES = {
    "nucleus": Search(20, 5, top_p=0.9, seed=42),
    "greedy": Search(20, 5),
    "beams": Search(20, 5, num_beams=3),
}
NAMES = ["a.png", "b.png", "sub/c.png", "d.png"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folder of tiny models; `model` is the BLIP that two of them hold."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_blip()
    write_blip_folder(model, folder / "blip")
    write_original_blip(model, folder / "original" / "model.pth")
    write_git_folder(folder / "git")
    write_qwen_folder(folder / "qwen")
    return folder


@pytest.fixture(scope="module")
def blip(models):
    return load_blip(str(models / "blip"), SEARCHES["greedy"], None)


@pytest.fixture(scope="module")
def original(models):
    return load_blip(str(models / "original" / "model.pth"), SEARCHES["greedy"], None)


@pytest.fixture(scope="module")
def git(models):
    return load_git(str(models / "git"), Search(20))


@pytest.fixture(scope="module")
def qwen(models):
    return load_image_text_model(str(models / "qwen"), SEARCHES["greedy"], None)


@pytest.fixture(scope="module")
def images():
    draw = np.random.default_rng(0)
    sizes = ((40, 60), (90, 30), (64, 64), (3, 50))
    return [(draw.integers(0, 100, (*size, 3)) + draw.integers(0, 156, 3)).astype(np.uint8) for size in sizes]


def words_of(ids):
    """What BERT's tokenizer makes of rows of ids."""
    texts = [" ".join(WORDS[i] for i in row.tolist() if i > 4) for row in ids]
    return [text.replace(" ,", ",").replace(" .", ".") for text in texts]


def captions_of(captioner, images, names=NAMES):
    return captioner.caption([captioner.prepare(image) for image in images], names)


# ---- original weights


@pytest.mark.rows("R12")
def test_original_weights_give_the_logits_of_transformers(models):
    expected = tiny_blip()
    special = {"bos_token_id": len(WORDS), "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    ours = build_blip(read_original_blip(models / "original" / "model.pth"), special, "file")
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=draw)
    ids = torch.tensor([[len(WORDS), 5, 6, 7, 9], [len(WORDS), 5, 6, 7, 20]])
    logits = [model(pixel_values=pixels, input_ids=ids).logits for model in (ours, expected)]
    assert logits[1].abs().max() > 1
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-5)


@pytest.mark.rows("R12", "R67")
@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_original_file_and_folder_give_the_same_captions(blip, original, images, search):
    found = captions_of(replace(blip, search=search), images)
    assert captions_of(replace(original, search=search), images) == found
    assert len(set(found)) > 1


@pytest.mark.rows("R67")
def test_beams_are_those_of_transformers_itself(models, blip, images):
    model = BlipForConditionalGeneration.from_pretrained(models / "blip").eval()
    pixels = torch.stack([blip.prepare(image) for image in images])
    start = torch.tensor([[2, 5, 6, 7, 3]] * 4)  # "a picture of" between BERT's marks
    ids = model.generate(
        pixel_values=pixels, input_ids=start, num_beams=3, max_length=20, min_length=5, do_sample=False
    )
    assert captions_of(replace(blip, search=SEARCHES["beams"]), images) == words_of(ids[:, 4:])


def test_the_real_architecture_is_read_from_shapes():
    def weights(*shape):
        return torch.zeros(()).expand(shape)

    tensors = {
        "visual_encoder.cls_token": weights(1, 1, 1024),
        "visual_encoder.pos_embed": weights(1, 577, 1024),
        "visual_encoder.patch_embed.proj.weight": weights(1024, 3, 16, 16),
        "visual_encoder.blocks.0.mlp.fc1.weight": weights(4096, 1024),
        "visual_encoder.blocks.23.mlp.fc1.weight": weights(4096, 1024),
        "text_decoder.bert.embeddings.word_embeddings.weight": weights(30524, 768),
        "text_decoder.bert.embeddings.position_embeddings.weight": weights(512, 768),
        "text_decoder.bert.encoder.layer.0.intermediate.dense.weight": weights(3072, 768),
        "text_decoder.bert.encoder.layer.11.intermediate.dense.weight": weights(3072, 768),
        "text_decoder.cls.predictions.decoder.weight": weights(30524, 768),
    }
    config = blip_config(tensors, {"bos_token_id": 30522})
    vision, text = config.vision_config, config.text_config
    assert (vision.image_size, vision.patch_size, vision.num_hidden_layers, vision.num_attention_heads) == (
        384,
        16,
        24,
        16,
    )
    assert (vision.hidden_size, vision.intermediate_size, vision.layer_norm_eps) == (1024, 4096, 1e-6)
    assert (text.vocab_size, text.hidden_size, text.encoder_hidden_size, text.bos_token_id) == (30524, 768, 1024, 30522)
    assert (text.num_hidden_layers, text.num_attention_heads, text.max_position_embeddings) == (12, 12, 512)


def test_images_become_384_px_bicubic_with_clips_mean_and_deviation():
    image = np.random.default_rng(1).integers(0, 256, (300, 500, 3), np.uint8)
    processor = captioners._blip_image_processor(384)
    found = captioners.Blip(torch.nn.Identity(), None, processor, Search(30), "").prepare(image)
    resized = np.asarray(Image.fromarray(image).resize((384, 384), Image.Resampling.BICUBIC), np.float64) / 255
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    expected = ((resized - mean) / deviation).transpose(2, 0, 1)
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    write_vocabulary(tmp_path)
    torch.save({"model": original_blip(tiny_blip()), "more": Evil()}, tmp_path / "evil.pth", pickle_module=pickle)
    load_blip(str(tmp_path / "evil.pth"), SEARCHES["greedy"], None)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("visual_encoder.cls_token"), r"no BLIP captioning weights"),
        (
            lambda tensors: tensors.pop("visual_encoder.blocks.1.attn.qkv.bias"),
            r"lacks 1 tensors: .*layers\.1\.self_attn",
        ),
        (lambda tensors: tensors.update({"visual_encoder.norm.bias": torch.zeros(3)}), r"has shape \(3,\)"),
        (
            lambda tensors: tensors.update({"visual_encoder.more": torch.zeros(3)}),
            r"unknown names: visual_encoder\.more",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, change, message):
    tensors = original_blip(tiny_blip())
    change(tensors)
    write_vocabulary(tmp_path)
    torch.save({"model": tensors}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=message):
        load_blip(str(tmp_path / "model.pth"), SEARCHES["greedy"], None)


def test_pretraining_files_caption_too(blip, tmp_path, images):
    tensors = original_blip(tiny_blip()) | {"text_encoder.x": torch.zeros(2), "temp": torch.zeros(())}
    write_vocabulary(tmp_path)
    torch.save({"model": tensors}, tmp_path / "model.pth")
    found = captions_of(load_blip(str(tmp_path / "model.pth"), SEARCHES["greedy"], None), images)
    assert found == captions_of(blip, images)


def test_a_vocabulary_of_another_model_is_refused(tmp_path):
    path = write_original_blip(tiny_blip(), tmp_path / "model.pth")
    with open(tmp_path / "vocab.txt", "a", encoding="utf-8") as file:
        file.write("another\n")
    with pytest.raises(UserError, match="know 42 tokens, but the vocabulary has 43"):
        load_blip(str(path), SEARCHES["greedy"], None)


def test_a_missing_vocabulary_says_what_to_put_where(tmp_path, monkeypatch):
    path = write_original_blip(tiny_blip(), tmp_path / "model.pth")
    (tmp_path / "vocab.txt").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(captioners, "BERT", "nobody/no-such-tokenizer")
    with pytest.raises(UserError, match=r"put vocab\.txt of nobody/no-such-tokenizer into") as caught:
        load_blip(str(path), SEARCHES["greedy"], None)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- draws


@pytest.mark.rows("R65", "R66")
def test_captions_belong_to_seed_and_image(blip, images):
    def captions(seed, order, size):
        captioner = replace(blip, search=Search(20, 5, top_p=0.9, seed=seed))
        found = {}
        for start in range(0, len(order), size):
            part = order[start : start + size]
            texts = captions_of(captioner, [images[i] for i in part], [NAMES[i] for i in part])
            found |= dict(zip(part, texts, strict=True))
        return found

    state = torch.get_rng_state()
    first = captions(42, [0, 1, 2, 3], 4)
    assert captions(42, [0, 1, 2, 3], 1) == first
    assert captions(42, [3, 1, 0, 2], 3) == first
    assert captions(7, [0, 1, 2, 3], 4) != first
    assert torch.equal(torch.get_rng_state(), state)


def test_words_are_drawn_from_the_nucleus_as_often_as_they_should_be():
    chances = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01])
    count = 4000
    draws = NucleusSampling(0.9, 1, [str(i) for i in range(count)])
    words = draws(torch.zeros(count, 1, dtype=torch.long), chances.log().expand(count, -1)).argmax(-1)
    shares = torch.bincount(words, minlength=5) / count
    # of the three likeliest, which have 0.95 together; three standard deviations
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.15, 0, 0]) / 0.95, atol=0.024, rtol=0)


@pytest.mark.parametrize(("top_p", "kept"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.9, 3), (1.0, 5)])
def test_the_nucleus_is_the_fewest_words_that_reach_top_p(top_p, kept):
    scores = torch.tensor([[0.01, 0.5, 0.3, 0.15, 0.04]], dtype=torch.float64).log()
    found = nucleus(scores, top_p)
    assert torch.isfinite(found).sum() == kept
    assert torch.equal(found[torch.isfinite(found)], scores[torch.isfinite(found)])


def test_a_forced_word_is_drawn():
    scores = torch.full((2, 60), -torch.inf)
    scores[:, 7] = 0
    found = NucleusSampling(1.0, 1, ["a", "b"])(torch.zeros(2, 1, dtype=torch.long), scores)
    assert found.argmax(-1).tolist() == [7, 7]


@pytest.mark.rows("R64")
def test_lengths_count_the_prompt(blip, images):
    def words(**lengths):
        captioner = replace(blip, search=Search(**lengths))
        return [
            len(caption.replace(",", " ,").replace(".", " .").split()) for caption in captions_of(captioner, images)
        ]

    assert max(words(max_length=9)) == 9 - 4  # the start and "a picture of" come first
    assert min(words(max_length=20, top_p=0.9)) < 14 - 4 <= min(words(max_length=20, min_length=14, top_p=0.9))


def test_another_prompt_is_gone_on_from(blip, images):
    found = [captions_of(replace(blip, prompt=prompt), images) for prompt in (blip.prompt, "two red")]
    assert blip.prompt.split() == ["a", "picture", "of"]
    assert found[0] != found[1]


def test_a_length_beyond_the_models_is_refused(models):
    with pytest.raises(UserError, match=r"--max_length 75: .* can count to 48 tokens"):
        load_blip(str(models / "blip"), Search(75), None)


# ---- GIT and other models


@pytest.mark.rows("R12")
def test_git_captions_as_transformers_does(models, git, images):
    model = GitForCausalLM.from_pretrained(models / "git").eval()
    pixels = torch.stack([git.prepare(image) for image in images])
    expected = words_of(model.generate(pixel_values=pixels, max_length=20))
    assert captions_of(git, images) == expected
    assert len(set(expected)) > 1


def test_git_images_are_cut_to_the_middle(git):
    image = np.zeros((32, 64, 3), np.uint8)
    image[:, 16:48] = 255
    pixels = git.prepare(image)
    assert pixels.shape == (3, 32, 32)
    assert (pixels > 0).all()


@pytest.mark.parametrize("search", SEARCHES.values(), ids=SEARCHES)
def test_a_chat_model_captions_images_of_different_sizes_together(qwen, images, search):
    captioner = replace(qwen, search=search)
    three = images[:3]
    together = captions_of(captioner, three, NAMES[:3])
    assert together == [captions_of(captioner, [one], [name])[0] for one, name in zip(three, NAMES, strict=False)]
    assert len(set(together)) > 1
    assert not any(caption.startswith("user") for caption in together)


def test_the_prompt_reaches_a_chat_model(qwen, images):
    def asked(prompt):
        inputs = replace(qwen, prompt=prompt)._inputs([Image.fromarray(images[0])])
        return qwen.processor.batch_decode(inputs["input_ids"])[0]

    assert "Describe this picture in one" in asked(None)
    assert "two red" in asked("two red")


@pytest.mark.parametrize(("name", "kind"), [("blip", captioners.Blip), ("git", captioners.Git)])
def test_other_models_by_folder_are_asked_in_their_own_way(models, name, kind):
    assert isinstance(load_image_text_model(str(models / name), SEARCHES["greedy"], None), kind)


@pytest.mark.parametrize(
    ("load", "name", "message"),
    [
        (load_blip, "git", r"a git model, not BLIP; make_captions\.py takes it as --model"),
        (load_git, "blip", r"a blip model, not GIT"),
        (load_blip, "nothing here", r"no such folder"),
        (load_git, "empty", r"cannot be read as a GIT model"),
    ],
)
def test_models_of_another_kind_are_named(models, load, name, message):
    (models / "empty").mkdir(exist_ok=True)
    with pytest.raises(UserError, match=message) as caught:
        load(str(models / name), SEARCHES["greedy"], None)
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_in_a_folder_are_not_made_up(models, tmp_path):
    model = tiny_blip()
    write_blip_folder(model, tmp_path)
    state = {key: tensor for key, tensor in model.state_dict().items() if "layers.1.mlp.fc1" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(UserError, match=r"lacks .*layers\.1\.mlp\.fc1"):
        load_blip(str(tmp_path), SEARCHES["greedy"], None)


# ---- folders


def options(folder, *arguments):
    return parse_options(GROUPS, [str(folder), *arguments])


def test_an_image_that_the_model_refuses_does_not_stop_its_batch(models, images, tmp_path):
    for name, image in zip(("a.png", "c.png"), images, strict=False):
        Image.fromarray(image).save(tmp_path / name)
    Image.new("RGB", (3000, 8)).save(tmp_path / "b.png")  # longer than Qwen takes
    found = options(tmp_path, "--batch_size=3", "--max_length=8", "--min_length=2", f"--model={models / 'qwen'}")
    outcome = make_captions(found)
    assert (outcome.done, list(outcome.failed)) == (2, [tmp_path / "b.png"])
    assert "aspect ratio" in outcome.failed[tmp_path / "b.png"]
    assert sorted(path.name for path in tmp_path.glob("*.caption")) == ["a.caption", "c.caption"]


def test_a_caption_that_cannot_be_written_is_named(models, images, tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(images[0]).save(tmp_path / name)
    (tmp_path / "a.caption").mkdir()
    outcome = make_captions(options(tmp_path, "--max_length=8", f"--caption_weights={models / 'blip'}"))
    assert outcome.done == 1
    assert "cannot be written" in outcome.failed[tmp_path / "a.png"]


def test_images_that_share_a_caption_file_are_reported(tmp_path, caplog):
    LOGGER.propagate = True
    for name in ("a.png", "a.jpg", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".caption").touch()
    caption_folder(options(tmp_path, "--skip_existing").caption, lambda: None)
    assert caplog.messages == [f"images of the same name share a caption file: {tmp_path / 'a'}"]


def test_nothing_to_do_loads_no_model(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.caption").write_text("kept\n", encoding="utf-8")

    def load():
        raise AssertionError("loaded")

    outcome = caption_folder(options(tmp_path, "--skip_existing").caption, load)
    assert (outcome.done, outcome.skipped, outcome.failed) == (0, 1, {})
    assert (tmp_path / "a.caption").read_text(encoding="utf-8") == "kept\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min_length=9", "--max_length=8"], "--min_length 9 is more than --max_length 8"),
        (["--caption_extension=."], "--caption_extension must be an ending"),
        (["--caption_extension=x/y"], "--caption_extension must be an ending"),
        (["--model=a/b", "--caption_weights=a/b"], "--model and --caption_weights"),
        (["--batch_size=0"], "--batch_size must be at least 1"),
        (["--top_p=0"], "--top_p must be above 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(tmp_path, arguments, message):
    assert any(message in line.replace(": must", " must") for line in problems(options(tmp_path, *arguments), None))


def test_an_ending_without_a_dot_is_reported(tmp_path):
    (told,) = warnings(options(tmp_path, "--caption_extension=txt"), None)
    assert "will be dogtxt" in told
    assert not list(warnings(options(tmp_path, "--caption_extension=_tags.txt"), None))


@pytest.mark.rows("R62", "R63", "R64")
def test_defaults():
    blip, git = CaptionOptions(), GitCaptionOptions()
    assert (blip.caption_extension, blip.max_length, blip.min_length, blip.top_p, blip.seed) == (
        ".caption",
        75,
        5,
        0.9,
        42,
    )
    assert blip.caption_weights.endswith("/model_large_caption.pth")
    assert (git.model_id, git.max_length) == ("microsoft/git-large-textcaps", 50)


# ---- addresses


@pytest.fixture
def server(monkeypatch, tmp_path):
    """An HTTP server for `files`; `asked` are the requests. The cache folder is a fresh one."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.asked.append(self.path)
            data = state.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(data) + state.missing))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    state = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.asked, state.files, state.missing = [], {}, 0
    state.address = f"http://127.0.0.1:{state.server_address[1]}"
    monkeypatch.setenv("TRAINSCRIPTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    thread = threading.Thread(target=state.serve_forever)
    thread.start()
    yield state
    state.shutdown()
    thread.join()
    state.server_close()


@pytest.mark.rows("R61")
def test_weights_behind_an_address_are_fetched_once(server, models, blip, images, tmp_path):
    server.files["/x/model.pth"] = (models / "original" / "model.pth").read_bytes()
    write_vocabulary(tmp_path / "cache" / "weights")
    address = f"{server.address}/x/model.pth"
    captions = [captions_of(load_blip(address, SEARCHES["greedy"], None), images) for _ in range(2)]
    expected = captions_of(blip, images)
    assert captions == [expected, expected]
    assert server.asked == ["/x/model.pth"]


def test_a_fetch_that_breaks_off_leaves_nothing_behind(server, tmp_path):
    server.files["/model.pth"] = b"PK" * 1000
    server.missing = 500
    with pytest.raises(UserError, match=r"cannot be downloaded \(.*\); get the file .* put it at .*model\.pth"):
        pretrained.fetched(f"{server.address}/model.pth")
    assert list((tmp_path / "cache" / "weights").iterdir()) == []


def test_without_a_network_one_line_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("TRAINSCRIPTS_CACHE", str(tmp_path))
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        load_blip(CaptionOptions().caption_weights, SEARCHES["greedy"], None)
    assert str(tmp_path / "weights" / "model_large_caption.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_out_of_reach_is_asked_once(monkeypatch):
    """transformers would ask for every file several times, and wait in between, before it says so."""
    asked = []

    def ask(self, name, **options):
        asked.append(name)
        raise ConnectionError("nobody there")

    def loader(name, *, local_files_only):
        assert local_files_only
        raise OSError("not in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
    with pytest.raises(UserError, match=r"the hub does not provide it as a model \(nobody there\)"):
        pretrained.load("a/b", loader, "a model")
    assert asked == ["a/b"]


def test_what_the_hub_answers_is_judged_by_the_loader(monkeypatch):
    def answer(self, name, **options):
        raise HfHubHTTPError("404", response=Mock())

    def loader(name, *, local_files_only):
        raise OSError("not in the cache" if local_files_only else f"{name} is no model")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answer)
    with pytest.raises(UserError, match=r"\(a/b is no model\)"):
        pretrained.load("a/b", loader, "a model")
