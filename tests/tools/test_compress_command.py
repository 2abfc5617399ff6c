"""`prefixkv compress` and `prefixkv generate --cache`: what a question is put behind, and answers as they are made."""

import json
import random
import types

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import tiny_vlm
from prefixkv_cache import PrefixKVCache, SavedCacheError
from prefixkv_cache.tools.answer import Pieces, answer
from prefixkv_cache.tools.loading import LoadError, load_model, open_image, prepare
from prefixkv_cache.tools.questions import Questions, context_inputs, tokens

QUESTION = "what is red ?"
TEXT = (
    'The price of the soup is 4.50.\n\nThe price of the bread: 1.20. Ask for the menu!\nWhat is it? "This (or that)" '
    "costs  twice as much... So the café says, in its menu of été.\n\n1 + 1 = 2.\n- a list\n- of things\n"
)
QUESTIONS = (
    "What is it?",
    "a",
    "1 + 1",
    "(so)",
    "été ?",
    "- why",
    ".",
    '"Is it?"',
    "price",
    "the soup?",
    "  hm  ",
    "4.50",
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    tiny_vlm.save_model(folder / "model")
    tiny_vlm.save_pictures(folder / "images", 2)
    return folder


def context(home, prefix="", pictures=1):
    model, processor = load_model(str(home / "model"), device="cpu")
    images = [open_image(home / "images" / f"picture-{index}.png") for index in range(pictures)]
    return model, processor, images, context_inputs(processor, prefix, images)


# Tokens.


def trained(kind):
    """A tokenizer that joins characters and words as those of real models do."""
    if kind == "bytes":  # words with the blank before them, signs with line breaks behind them
        made = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(
            tokenizers.Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+(?!\S)|\s+"), "isolated"
        )
        made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        made.decoder, alphabet = decoders.ByteLevel(), pre_tokenizers.ByteLevel.alphabet()
    else:  # a blank before all; words may be joined with what stands before them
        made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=kind == "words")
        made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        alphabet = []
    special = ["<unk>", "<bos>", "<eos>", "<user>", "<assistant>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([TEXT * 3, TEXT.replace(". ", ".\n\n")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


PLAIN = "<bos>{% for m in messages %}<user>{{ m['content'] }}{% endfor %}<assistant>"
TRIMMED = PLAIN.replace("m['content']", "'USER: ' + m['content'] | trim + '\n'")


@pytest.mark.parametrize("template", [PLAIN, TRIMMED, None], ids=["plain", "trimmed", "no template"])
@pytest.mark.parametrize("kind", ["bytes", "words", "characters"])
def test_the_tokens_of_a_context_begin_those_of_every_prompt(kind, template):
    tokenizer = trained(kind)
    tokenizer.chat_template = template
    checked = 0
    for prefix in (TEXT, TEXT.strip(), "The price.", "menu", "It costs 1", "soup \n", "a"):
        inputs, questions = context_inputs(tokenizer, prefix, [])
        ids = inputs["input_ids"]
        assert ids.shape == inputs["attention_mask"].shape and ids.shape[1] > 0
        between = "" if prefix[-1].isspace() else "\n\n"
        for question in QUESTIONS:
            whole = prepare(tokenizer, [(prefix + between + question.strip(), [])])["input_ids"]
            found = questions.behind(ids, question)
            assert torch.equal(found["input_ids"], whole) and found["attention_mask"].all()
            checked += 1
        assert len(questions.before) <= 200 or len(prefix) > 200
    assert checked == 84


@pytest.mark.parametrize("pictures", [0, 1, 2])
@pytest.mark.parametrize("prefix", ["", "there is a picture .", "there is"])
def test_with_pictures(home, prefix, pictures):
    if not prefix and not pictures:
        return
    _, processor, images, (inputs, questions) = context(home, prefix, pictures)
    whole = prepare(processor, [(f"{prefix}\n\n{QUESTION}" if prefix else QUESTION, images)])["input_ids"]
    assert torch.equal(questions.behind(inputs["input_ids"], QUESTION)["input_ids"], whole)
    n = inputs["input_ids"].shape[1]
    assert torch.equal(inputs["input_ids"], whole[:, :n]) and n >= 64 * pictures
    assert inputs["attention_mask"].shape == (1, n) and ("pixel_values" in inputs) == bool(pictures)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0]['content'] | upper }} and {{ messages[0]['content'] }}", "rewrites what the user says"),
        ("{{ messages[0]['content'] | replace('X', '') }}", "rewrites what the user says"),
        ("{{ messages[0]['content'] | length }} {{ messages[0]['content'] }}", "looks at the question"),
        ("{{ messages[1]['content'] }}", "chat template failed"),
        ("{{ messages[0]['content'] }}", None),
    ],
)
def test_a_template_that_does_not_put_the_question_last_is_refused(template, words):
    tokenizer = trained("bytes")
    tokenizer.chat_template = template
    if words is None:
        context_inputs(tokenizer, "menu", [])
        return
    with pytest.raises(LoadError, match=words):
        context_inputs(tokenizer, "menu", [])


def test_a_question_that_changes_the_context_is_refused():
    tokenizer = trained("characters")
    questions = Questions(tokenizer, "so the men", "", len(tokens(tokenizer, "so the men")))
    assert tokens(tokenizer, "so the menu")[: questions.skip] != tokens(tokenizer, "so the men")
    with pytest.raises(ValueError, match="the tokens of the context change when 'u of' stands behind it"):
        questions.behind(torch.zeros(1, 9, dtype=torch.int64), "u of")
    with pytest.raises(ValueError, match="question is empty"):
        questions.behind(torch.zeros(1, 9, dtype=torch.int64), " \n")


# Pieces of an answer.


@pytest.mark.parametrize("kind", ["bytes", "words", "characters"])
def test_the_pieces_of_an_answer_are_the_answer(kind):
    tokenizer, rng = trained(kind), random.Random(0)
    texts = [tokens(tokenizer, text) for text in (TEXT, " \n a\n\n  b ", "été ☃ \U0001f600 x", "")]
    noise = [[rng.randrange(len(tokenizer)) for _ in range(40)] for _ in range(50)]
    for ids in [*texts, *noise]:
        said = []
        pieces = Pieces(tokenizer, said.append)
        pieces.put(torch.tensor([[5, 6, 7]]))  # the prompt
        for token in ids:
            pieces.put(torch.tensor([token]))
        pieces.end()
        assert "".join(said) == tokenizer.decode(ids, skip_special_tokens=True).strip()
    assert len(said) > 3 or kind != "bytes"


def test_an_answer_is_said_while_it_is_made(home):
    model, processor, images, _ = context(home)
    inputs, said, at = prepare(processor, [(QUESTION, images)]), [], []
    cache = PrefixKVCache.for_model(model, 0.5)

    def say(piece):
        said.append(piece)
        at.append(int(cache.get_seq_length()))

    result = answer(model, processor, inputs, cache, 8, say=say)
    assert " ".join(said).split() == result.text.split() and "".join(said) == result.text
    assert len(set(at)) > 3


# The commands.


@pytest.mark.parametrize("prefix", [None, "there is a picture ."])
def test_what_is_compressed_is_answered(home, run, tmp_path, prefix):
    words = ["--model", home / "model", "--image", home / "images" / "picture-0.png"]
    path = tmp_path / "new folder" / "menu.safetensors"
    more = [] if prefix is None else ["--prompt-prefix", prefix]
    status, out, err = run("compress", *words, *more, "--budget", "0.4", "--out", path)
    assert (status, out) == (0, f"{path}\n")
    assert "budget 40 % of" in err and "MiB (40% of full)" in err and "pairs a head" in err
    asked = ["generate", "--model", home / "model", "--cache", path, "--prompt", QUESTION, "--max-new-tokens", "6"]
    status, out, err = run(*asked)
    assert status == 0 and len(out.splitlines()) == 1
    assert f"{path} (budget 40 % of" in err and err.count("of full") == 2
    model, processor, _, (inputs, questions) = context(home, prefix or "")
    cache = PrefixKVCache.compress(model, inputs, 0.4)
    turn = questions.behind(cache.context_ids, QUESTION)
    assert out == answer(model, processor, turn, cache, 6).text + "\n"
    assert run(*asked)[1] == out  # the file is as it was


@pytest.mark.parametrize("image", [True, False])
def test_with_all_kept_the_answer_is_that_to_the_whole_prompt(home, run, tmp_path, image):
    words = ["--model", home / "model", *(["--image", home / "images" / "picture-1.png"] if image else [])]
    (tmp_path / "document.txt").write_text("there is a red circle .")
    asked = ["--prompt", QUESTION, "--max-new-tokens", "8"]
    path = tmp_path / "a.safetensors"
    document = ["--prompt-prefix-file", tmp_path / "document.txt"]
    assert run("compress", *words, *document, "--budget", "1.0", "--out", path)[0] == 0
    whole = ["--prompt", f"there is a red circle .\n\n{QUESTION}", "--max-new-tokens", "8", "--budget", "1.0"]
    found, wanted = run("generate", *words[:2], "--cache", path, *asked), run("generate", *words, *whole)
    assert (found[0], wanted[0]) == (0, 0) and found[1] == wanted[1] and len(found[1].split()) > 3


@pytest.mark.parametrize("options", [["--method", "snapkv:queries=8;recent=4"], ["--chunk", "16"]], ids=" ".join)
def test_methods_and_chunks(home, run, tmp_path, options):
    words = [
        "--model",
        home / "model",
        "--image",
        home / "images" / "picture-0.png",
        "--out",
        tmp_path / "a.safetensors",
    ]
    status, _, err = run("compress", *words, *options)
    assert status == 0 and err.count("read again:") == (5 if "--chunk" in options else 0)
    model, _ = load_model(str(home / "model"), device="cpu")
    cache = PrefixKVCache.load(tmp_path / "a.safetensors", model)
    assert cache.budget == 0.2 and cache._model_name == "model"
    assert cache.method.spell().startswith("snapkv" if "--method" in options else "default:lengths=pool")


@pytest.fixture
def menu(home, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = home / "images" / "picture-0.png"
    assert run("compress", "--model", home / "model", "--image", image, "--out", "menu.safetensors")[0] == 0
    return tmp_path / "menu.safetensors"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--image", "a.png"], "leave out --image, or --cache"),
        (["--budget", "0.5", "--method", "snapkv"], "leave out --budget, --method, or --cache"),
        (["--compare"], "leave out --compare"),
        (["--prompt", " "], "--prompt is empty"),
        (["--cache", "none.safetensors"], "none.safetensors: file: there is none"),
        (["--cache", "text.safetensors"], "text.safetensors: header: "),
        (
            ["--cache", "profile.safetensors"],
            "profile.safetensors: format: is 'prefixkv-profile'; expected 'prefixkv-cac",
        ),
    ],
    ids=str,
)
def test_bad_combinations_are_one_line_before_the_model_is_loaded(menu, run, options, words):
    from prefixkv_cache import PrefixProfile

    (menu.parent / "text.safetensors").write_text("What is it?" * 100)
    PrefixProfile([0.5], [[0.5] * 3]).save("profile.safetensors")
    status, out, err = run("generate", "--model", "no-model", "--cache", menu, "--prompt", QUESTION, *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("prefixkv generate: ") and words in err


def test_a_cache_of_another_model_is_refused(menu, run, tmp_path):
    tiny_vlm.save_model(tmp_path / "other", layers=4)
    (tmp_path / "same").mkdir()
    tiny_vlm.save_model(tmp_path / "yours")
    for name, words in (("other", "model: is 'model'; expected 'other'"), ("yours", "expected 'yours'")):
        status, out, err = run("generate", "--model", name, "--cache", menu, "--prompt", QUESTION)
        assert (status, out) == (2, "") and words in err.splitlines()[-1]


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"question": "nothing"},
        {"question": "[1]"},
        {"question": "[" * 9999},
        {"question": '{"before": "a", "after": "", "skip": 1e999}'},
        {"question": '{"before": "a", "after": "", "skip": -2}'},
        {"question": '{"before": "a"}'},
    ],
    ids=str,
)
def test_a_cache_without_the_way_to_ask_is_refused(home, menu, run, notes):
    model, _ = load_model(str(home / "model"), device="cpu")
    cache = PrefixKVCache.load(menu, model)
    cache.notes = notes
    cache.save("bare.safetensors")
    status, out, err = run("generate", "--model", home / "model", "--cache", "bare.safetensors", "--prompt", QUESTION)
    assert (status, out) == (2, "") and "does not say how a question is put" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "there is no context; give --image"),
        (["--prompt-prefix", " "], "there is no context"),
        (["--prompt-prefix", "a", "--prompt-prefix-file", "b"], "not allowed with argument"),
        (["--prompt-prefix-file", "none.txt"], "none.txt"),
        (["--prompt-prefix-file", "empty.txt"], "'empty.txt', which is empty"),
        (["--prompt-prefix-file", "bytes.txt"], "no text in UTF-8"),
        (["--image", "none.png"], "there is no image 'none.png'"),
        (["--prompt-prefix", "a", "--out", "a.txt"], "ends in .safetensors"),
        (["--prompt-prefix", "a", "--method", "nope"], "there is no method 'nope'"),
        (["--prompt-prefix", "a", "--profile", "no-such"], "no-such"),
        (["--prompt-prefix", "a", "--budget", "1"], "write 1.0 for everything"),
        (["--prompt-prefix", "a", "--chunk", "0"], "at least 1"),
    ],
    ids=str,
)
def test_bad_contexts_are_one_line_before_the_model_is_loaded(run, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n ")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    status, out, err = run("compress", "--model", "no-model", "--out", "a.safetensors", *options)
    assert (status, out, len(err.splitlines())) == (2, "", 1)
    assert err.startswith("prefixkv compress: ") and words in err and not (tmp_path / "a.safetensors").exists()


def test_a_context_without_room_for_a_second_pass(home, run, tmp_path):
    """512 positions in all."""
    words = [
        "compress",
        "--model",
        home / "model",
        "--prompt-prefix",
        "red " * 505,
        "--out",
        tmp_path / "a.safetensors",
    ]
    status, out, err = run(*words)
    assert (status, out) == (2, "") and "needs 16 positions behind them" in err.splitlines()[-1]
    assert not (tmp_path / "a.safetensors").exists()
    assert run(*words, "--method", "default")[0] == 0


def test_a_text_model_reads_text_alone(home, run, tmp_path):
    """A model of language alone, as a user has it: a folder with a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = trained("bytes")
    tokenizer.chat_template = PLAIN
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), max_position_embeddings=512,
    )  # fmt: skip
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(tmp_path / "words")
    words = ["--model", tmp_path / "words"]
    path = tmp_path / "a.safetensors"
    assert run("compress", *words, "--prompt-prefix", TEXT, "--out", path)[0] == 0
    assert run("generate", *words, "--cache", path, "--prompt", "What is it?", "--max-new-tokens", "3")[0] == 0
    assert run("generate", *words, "--prompt", "What is it?", "--max-new-tokens", "3")[0] == 0
    status, _, err = run("generate", *words, "--image", home / "images" / "picture-0.png", "--prompt", "What is it?")
    assert status == 2 and "reads text only" in err


def test_an_error_in_the_middle_of_an_answer_begins_a_line(home, run, monkeypatch):
    from prefixkv_cache.tools import answer as module

    def fails(*arguments, say, **options):
        say("a red")
        raise ValueError("no more")

    monkeypatch.setattr(module, "answer", fails)
    status, out, err = run("generate", "--model", home / "model", "--prompt", QUESTION)
    assert (status, out, err.splitlines()[-1]) == (2, "a red\n", "prefixkv generate: no more")


def test_notes_and_context_go_with_the_file(home, tmp_path):
    model, _, _, (inputs, questions) = context(home)
    cache = PrefixKVCache.compress(model, inputs, 0.4)
    questions.note(cache)
    cache.notes = {**cache.notes, "mine": "été"}
    cache.save(tmp_path / "a.safetensors")
    loaded = PrefixKVCache.load(tmp_path / "a.safetensors", model)
    assert loaded.notes == cache.notes and torch.equal(loaded.context_ids, inputs["input_ids"])
    copied = loaded.copy()
    assert copied.notes == cache.notes and torch.equal(copied.context_ids, inputs["input_ids"])
    copied.batch_repeat_interleave(3)
    assert copied.context_ids.shape[0] == 3 and loaded.context_ids.shape[0] == 1
    copied.reset()
    assert copied.context_ids is None and copied.notes == {}
    assert PrefixKVCache(None, 0.5).notes == {} and json.loads(loaded.notes["question"])["skip"] > 0
    for wrong in ({"a": 1}, {1: "a"}, "a", types.SimpleNamespace()):
        loaded.notes = wrong
        with pytest.raises(TypeError, match="notes must be a dict of strings"):
            loaded.save(tmp_path / "b.safetensors")
    other, _ = load_model(str(home / "model"), device="cpu")
    other.config.text_config.vocab_size = 5
    with pytest.raises(SavedCacheError, match="context_ids: expected token ids below 5"):
        PrefixKVCache.load(tmp_path / "a.safetensors", other)
