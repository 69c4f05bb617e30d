"""Which tokens are trained, shown as text: [trained] and not."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import tiny_models
from tiny_tokenizers import CHATML_PLAIN, ENDLESS, MISTRAL, THINKING, byte_level, metaspace
from tokenizers import Tokenizer, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tunesmith.cluster.errors import DataError
from tunesmith.trainers.builtin import builtin_folder
from tunesmith.trainers.data import templates
from tunesmith.trainers.data.encoding import Encoded, Encoder, encode
from tunesmith.trainers.data.formats import Completion, Conversation, Text
from tunesmith.trainers.data.turns import _start_by_prefix, _starts_by_placeholders

CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def chat(*contents: str, first: str = "user", first_trained: int = 0) -> Conversation:
    roles = ["user", "assistant"] if first == "user" else ["system", "user", "assistant"]
    turns = []
    for index, content in enumerate(contents):
        role = roles[index] if index < len(roles) else ("user", "assistant")[(index - len(roles)) % 2]
        turns.append({"role": role, "content": content})
    return Conversation(turns, first_trained=first_trained)


def trained_text(encoded: Encoded | str, tokenizer) -> list[str]:
    """The text of each run of trained tokens."""
    assert isinstance(encoded, Encoded), encoded
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.trained.astype(np.int8), [0]])))
    return [tokenizer.decode(encoded.tokens[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", templates.NAMES)
@pytest.mark.parametrize("kind", ["with markers", "without markers", "metaspace"])
def test_named_templates_train_the_answers_and_their_end_on_any_tokenizer(name, kind):
    specials = (*CHATML_TOKENS, "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    source = {"with markers": byte_level(specials), "without markers": byte_level(), "metaspace": metaspace()}[kind]
    tokenizer = copy.deepcopy(source)
    size = len(tokenizer)
    example = chat("What is two plus two?", "It is four.", "The fox?", "lazy dog")
    found = trained_text(encode(example, tokenizer, "assistant", name), tokenizer)
    marker = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(name)
    end = marker if kind == "with markers" and marker else tokenizer.eos_token
    assert [text.strip() for text in found] == [f"It is four.{end}", f"lazy dog{end}"]
    assert len(tokenizer) == size


def test_a_named_template_begins_with_the_first_token_that_the_tokenizer_puts_before_texts():
    tokenizer = copy.deepcopy(metaspace())
    encoded = encode(chat("What?", "four"), tokenizer, "assistant", "chatml")
    assert isinstance(encoded, Encoded)
    assert encoded.tokens[0] == tokenizer.bos_token_id
    assert encoded.tokens[1] != tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (byte_level(CHATML_TOKENS, CHATML_PLAIN), ["It is four.<|im_end|>", "dog<|im_end|>"]),
        (metaspace(MISTRAL), ["It is four.</s>", "dog</s>"]),
        (byte_level(CHATML_TOKENS, THINKING), ["It is four.<|im_end|>", "<think>\n\n</think>\n\ndog<|im_end|>"]),
    ],
    ids=["chatml", "mistral", "thinking"],
)
def test_the_tokenizers_own_template_without_marks_is_masked_by_prefixes(tokenizer, expected):
    example = chat("What is two plus two?", "It is four.", "The fox?", "dog")
    found = trained_text(encode(example, tokenizer, "assistant", "tokenizer"), tokenizer)
    assert [text.strip() for text in found] == expected


def test_earlier_thoughts_that_a_template_drops_are_not_trained_and_the_words_after_them_are():
    tokenizer = byte_level(CHATML_TOKENS, THINKING)
    example = chat("What?", "<think>\nhm\n</think>\n\nfour", "And?", "<think>\nhm\n</think>\n\ndog")
    found = trained_text(encode(example, tokenizer, "assistant", "tokenizer"), tokenizer)
    assert found == ["four<|im_end|>", "<think>\n\n</think>\n\ndog<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML_PLAIN, MISTRAL, THINKING], ids=["chatml", "mistral", "thinking"])
def test_placeholders_find_the_same_starts_as_prefixes_or_none(template):
    tokenizer = metaspace(template) if template == MISTRAL else byte_level(CHATML_TOKENS, template)
    renderer = templates.Renderer(tokenizer, template)
    example = chat(*[f"{word} {number} " for number in range(12) for word in ("ask", "answer")])
    turns = list(range(1, 24, 2))
    text = renderer.render(example.messages)
    by_prefix = [_start_by_prefix(example, turn, text, renderer) for turn in turns]
    by_placeholder = _starts_by_placeholders(example, turns, text, renderer)
    if template == THINKING:  # the last turn is written differently
        assert by_placeholder is None
    elif template == MISTRAL:  # the space before an answer is the answer's
        assert by_placeholder == by_prefix
        assert text[by_prefix[0]] == " "
    else:
        assert by_placeholder == by_prefix


def test_a_marked_template_and_its_unmarked_twin_train_the_same_tokens():
    marked = copy.deepcopy(byte_level(CHATML_TOKENS))
    plain = byte_level(CHATML_TOKENS, CHATML_PLAIN)
    for turns in (2, 4, 12):
        example = chat(*["The quick fox", "It is four.\nlazy "] * (turns // 2))
        by_mark = encode(example, marked, "assistant", "chatml")
        by_prefix = encode(example, plain, "assistant", "tokenizer")
        assert isinstance(by_mark, Encoded)
        assert isinstance(by_prefix, Encoded)
        np.testing.assert_array_equal(by_mark.tokens, by_prefix.tokens)
        np.testing.assert_array_equal(by_mark.trained, by_prefix.trained)


def test_a_marked_template_that_leaves_the_end_of_turn_out_has_it_trained_all_the_same():
    template = CHATML_PLAIN.replace(
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}{{ '<|im_end|>\\n' }}",
    )
    tokenizer = byte_level(CHATML_TOKENS, template)
    assert templates.Renderer(tokenizer, template).marks_generation
    found = trained_text(encode(chat("What?", "four"), tokenizer, "assistant", "tokenizer"), tokenizer)
    assert found == ["four<|im_end|>"]


def test_turns_of_the_prompt_are_not_trained():
    tokenizer = byte_level(CHATML_TOKENS, CHATML_PLAIN)
    example = chat("What?", "four", "And?", "dog", first_trained=3)
    assert trained_text(encode(example, tokenizer, "assistant", "tokenizer"), tokenizer) == ["dog<|im_end|>"]
    marked = copy.deepcopy(byte_level(CHATML_TOKENS))
    assert trained_text(encode(example, marked, "assistant", "chatml"), marked) == ["dog<|im_end|>"]


def test_loss_on_all_trains_every_token():
    encoded = encode(chat("What?", "four"), byte_level(CHATML_TOKENS, CHATML_PLAIN), "all", "tokenizer")
    assert isinstance(encoded, Encoded)
    assert encoded.trained.all()


def test_a_completion_is_trained_with_the_end_of_text_and_its_prompt_is_not():
    tokenizer = byte_level()
    encoded = encode(Completion("What is two plus two?", " It is four."), tokenizer, "assistant", None)
    assert trained_text(encoded, tokenizer) == [" It is four.<|endoftext|>"]


def test_a_document_ends_with_one_end_of_text_token():
    tokenizer = byte_level()
    for text in ("The fox", "The fox<|endoftext|>"):
        encoded = encode(Text(text), tokenizer, "all", None)
        assert isinstance(encoded, Encoded)
        assert list(encoded.tokens).count(tokenizer.eos_token_id) == 1
        assert encoded.tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (chat("What?"), "no assistant turn"),
        (chat("What?", "four<|im_end|>dog"), "holds the end-of-turn token"),
        (Conversation([{"role": "user", "content": "a"}], tools=[{"name": "f"}]), "no place for them"),
        (Completion("What is two plus two? ", "It is"), "begins inside a token"),
    ],
)
def test_what_has_no_exact_mask_has_a_reason_instead(example, reason):
    tokenizer = byte_level(CHATML_TOKENS, CHATML_PLAIN)
    # " It" is one token of this vocabulary, so a prompt that ends in a space cuts it.
    encoded = encode(example, tokenizer, "assistant", "tokenizer")
    assert isinstance(encoded, str)
    assert reason in encoded


def test_a_template_that_refuses_a_chat_makes_a_reason():
    encoded = encode(chat("be kind", "hello", "yes", first="system"), metaspace(MISTRAL), "assistant", "tokenizer")
    assert encoded == "the template refuses it: only user and assistant"


def test_a_tokenizer_without_a_template_is_told_which_to_name():
    with pytest.raises(DataError, match=r"no chat template\nName one: template: chatml \| llama3 \| alpaca"):
        encode(chat("a", "b"), byte_level(), "assistant", "tokenizer")


def test_a_template_that_never_ends_a_turn_is_refused_unless_everything_is_trained():
    tokenizer = byte_level(CHATML_TOKENS, ENDLESS)
    with pytest.raises(DataError, match="no token of its own that a model could learn to stop with"):
        encode(chat("a", "b"), tokenizer, "assistant", "tokenizer")
    assert isinstance(encode(chat("a", "b"), tokenizer, "all", "tokenizer"), Encoded)


def test_today_does_not_change_the_tokens():
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML_PLAIN
    tokenizer = byte_level(CHATML_TOKENS, template)
    assert templates.Renderer(tokenizer, template).render(chat("a", "b").messages).startswith("26 Jul 2024")


def test_a_batch_gives_what_its_rows_give_alone():
    tokenizer = byte_level(CHATML_TOKENS, CHATML_PLAIN)
    examples = [chat("What?", "four"), Text("The fox"), chat("a"), Completion("a b", " c"), chat("x", "y", "z", "é 🙂")]
    encoder = Encoder(tokenizer, "assistant")
    encoder.use_template("tokenizer")
    for together, example in zip(encoder.encode(examples), examples, strict=True):
        alone = encoder.encode([example])[0]
        if isinstance(alone, str):
            assert together == alone
        else:
            assert isinstance(together, Encoded)
            np.testing.assert_array_equal(together.tokens, alone.tokens)
            np.testing.assert_array_equal(together.trained, alone.trained)


@pytest.mark.parametrize("name", templates.NAMES)
def test_tokens_and_mask_equal_those_of_transformers_where_the_template_marks_the_answer(name):
    tokenizer = copy.deepcopy(metaspace())
    example = chat("What is two plus two?", "It is four.", "The fox?", "lazy dog")
    ours = encode(example, tokenizer, "assistant", name)
    theirs = tokenizer.apply_chat_template(example.messages, return_dict=True, return_assistant_tokens_mask=True)
    assert isinstance(ours, Encoded)
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.trained.astype(int).tolist() == theirs["assistant_masks"]


ENDINGS = {
    "hangul": " 됩니다",
    "one syllable": "가",
    "jamo": " 하\u11ab",
    "emoji": " fine 🙂",
    "family": " us 👨\u200d👩\u200d👧\u200d👦",
    "skin tone": " 👍🏽",
    "combining marks": " cafe\u0301 x\u0323\u0302",
    "cjk": "漢字",
    "rare cjk": " 𠮷",
    "spaces": " two  ",
}


@pytest.fixture(scope="module", params=["bytes", "builtin"])
def multibyte(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """Tokenizers that make several tokens of a character."""
    if request.param == "bytes":
        return tiny_models.tokenizer()
    folder: Path = builtin_folder("tiny-llama", tmp_path_factory.mktemp("builtin"))
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("said", ENDINGS.values(), ids=list(ENDINGS))
def test_a_completion_is_trained_to_the_last_byte_of_its_last_character(multibyte, said):
    for prompt in ("", "Is it?", "안녕", "🙂"):
        encoded = encode(Completion(prompt, said), multibyte, "assistant", None)
        assert trained_text(encoded, multibyte) == [said + multibyte.eos_token]


@pytest.mark.parametrize("said", ENDINGS.values(), ids=list(ENDINGS))
def test_an_answer_is_trained_to_the_last_byte_of_its_last_character(multibyte, said):
    plain = copy.deepcopy(multibyte)
    plain.chat_template = CHATML_PLAIN
    for tokenizer in (multibyte, plain):
        for turns in (1, 4):  # by prefixes, and by placeholders
            encoded = encode(chat(*["됩니까? 🙂", said] * turns), tokenizer, "assistant", "tokenizer")
            assert trained_text(encoded, tokenizer) == [said + "<|im_end|>"] * turns


def random_text(random_: random.Random) -> str:
    ranges = ((32, 127), (0xC0, 0x250), (0x300, 0x36F), (0x1100, 0x1200), (0x4E00, 0x9FFF), (0xAC00, 0xD7A4))
    ranges = (*ranges, (0x200B, 0x200E), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (32, 33), (9, 11))
    return "".join(chr(random_.randrange(*random_.choice(ranges))) for _ in range(random_.randrange(1, 9)))


def test_trained_tokens_are_those_of_the_completion_alone_wherever_the_prompts_are_too(multibyte):
    generator, compared = random.Random(0), 0
    examples = [Completion(random_text(generator), random_text(generator)) for _ in range(2000)]
    for example, encoded in zip(examples, Encoder(multibyte, "assistant").encode(examples), strict=True):
        asked, said, both = (
            multibyte(text, add_special_tokens=False)["input_ids"]
            for text in (example.prompt, example.completion, example.prompt + example.completion)
        )
        if asked + said == both:
            compared += 1
            assert isinstance(encoded, Encoded), (example, encoded)
            assert encoded.tokens[encoded.trained].tolist() == [*said, multibyte.eos_token_id], example
        elif isinstance(encoded, Encoded):  # cut elsewhere in the pair, but between the two all the same
            assert multibyte.decode(encoded.tokens[encoded.trained]) == example.completion + multibyte.eos_token
        else:
            assert "begins inside a token" in encoded
    assert compared > 1000


def altered(part: str, value: object) -> PreTrainedTokenizerFast:
    core = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    setattr(core, part, value)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>")


def test_white_space_that_trimmed_offsets_leave_out_is_trained_too():
    tokenizer = altered("post_processor", processors.ByteLevel(add_prefix_space=False, trim_offsets=True))
    for prompt, said in (("What?", " 가  "), ("What? ", " It is"), ("a", "  b")):
        encoded = encode(Completion(prompt, said), tokenizer, "assistant", None)
        assert trained_text(encoded, tokenizer) == [f"{said}<|endoftext|>"]
    assert "begins inside a token" in str(encode(Completion("What? ", "It is"), tokenizer, "assistant", None))


def test_an_answer_that_begins_with_the_mark_of_a_composed_character_begins_inside_a_token():
    tokenizer = altered("normalizer", normalizers.NFC())
    assert "begins inside a token" in str(encode(Completion("cafe", "\u0301 x"), tokenizer, "assistant", None))
    encoded = encode(Completion("a", " cafe\u0301"), tokenizer, "assistant", None)
    assert trained_text(encoded, tokenizer) == [" caf\u00e9<|endoftext|>"]


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("turns", [3, 6])
def test_turns_of_weight_zero_are_not_trained(marked, turns):
    tokenizer = copy.deepcopy(byte_level(CHATML_TOKENS, CHATML_PLAIN))
    example = chat(*[text for turn in range(turns) for text in ("ask", f"answer {turn}")])
    example = Conversation(example.messages, untrained=(1, 5))
    found = trained_text(encode(example, tokenizer, "assistant", "chatml" if marked else "tokenizer"), tokenizer)
    assert found == [f"answer {turn}<|im_end|>" for turn in range(turns) if turn not in (0, 2)]


def test_weights_that_leave_nothing_to_train_or_that_nothing_reads_make_a_reason():
    tokenizer = byte_level(CHATML_TOKENS, CHATML_PLAIN)
    example = Conversation(chat("ask", "answer").messages, untrained=(1,))
    assert encode(example, tokenizer, "assistant", "tokenizer") == "every assistant turn has weight 0"
    assert "loss_on: all" in str(encode(example, tokenizer, "all", "tokenizer"))
