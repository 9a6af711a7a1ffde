"""Text that can be shown, tokens that are drawn, and chat templates: the parts of generate that need no model."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from suture.core.errors import UserError
from suture.generate.prompts import Prompt
from suture.generate.text import UNFINISHED, TextStream
from suture.models.library_tokenizer import LibraryTokenizer
from suture.models.named import checkpoint_folder
from suture.models.tokenizer import SYSTEM, open_tokenizer
from suture.serve.request import GenerationRequest, Sampling
from suture.serve.sampling import Sampler, told

ALPHABET = "ab-\n é→漢🇨👩\u200d"
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bytes_decoded(ids) -> str:
    return bytes(ids).decode(errors="replace")


@given(text=st.text(ALPHABET, max_size=40), stops=st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3))
def test_a_stream_shows_whole_characters_up_to_the_first_stop_word(text, stops):
    """Tokens are single bytes here, so nearly every token ends inside a character."""
    stream, pieces = TextStream(bytes_decoded, stops), []
    for token in text.encode():
        pieces.append(stream.add(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert "".join(pieces) == stream.text == text[: min(ends)[1] if ends else None]
    assert stream.stopped == bool(ends)
    assert not any(UNFINISHED in piece for piece in pieces)


def test_text_is_shown_as_soon_as_it_is_certain():
    stream = TextStream(bytes_decoded, ["<end>"])
    assert [stream.add(byte) for byte in "aé<e!<en".encode()] == ["a", "", "é", "", "", "<e!", "", "", ""]
    assert stream.end() == "<en"
    assert stream.text == "aé<e!<en"


def test_a_character_that_never_becomes_whole_is_marked_at_the_end():
    stream = TextStream(bytes_decoded)
    assert [stream.add(byte) for byte in "a→".encode()[:-1]] == ["a", "", ""]
    assert stream.end() == UNFINISHED
    stream = TextStream(bytes_decoded)
    assert "".join([stream.add(byte) for byte in b"\xe2A"] + [stream.end()]) == UNFINISHED + "A"


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0, 9.0])  # the last pads the vocabulary of six


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}])
@pytest.mark.sample(3)
def test_draws_follow_the_distribution(sampling):
    """20,000 draws, each share within five standard deviations of what the definitions of top-k and top-p give."""
    sampling = {"temperature": 1.0, **sampling}
    expected = np.exp(LOGITS[:6].double().numpy() / sampling["temperature"])
    expected /= expected.sum()
    kept = np.ones(6, bool)
    if top_k := sampling.get("top_k"):
        kept[top_k:] = False  # the logits are in falling order
    if top_p := sampling.get("top_p"):
        among = np.where(kept, expected, 0) / expected[kept].sum()
        kept &= np.cumsum(among) - among < top_p  # the smallest set that reaches it
    expected = np.where(kept, expected, 0) / expected[kept].sum()
    count = 20_000
    request = asked(Sampling(seed=1, **sampling))
    sampler = Sampler(rows=500, vocab=6)
    for row in range(500):
        sampler.begin(row, request)
    single = [int(sampler.choose(LOGITS[None], 7, [place])) for place in range(500)]
    logits, places = LOGITS.repeat(500, 1), range(500, count)
    batched = [sampler.choose(logits, 0, places[start : start + 500]) for start in range(0, count - 500, 500)]
    shares = np.bincount([*single, *torch.cat(batched).tolist()], minlength=6) / count
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected * (1 - expected) / count)).all(), (shares, expected)


def asked(sampling: Sampling, prompt=(), answer=()) -> GenerationRequest:
    return GenerationRequest(prompt, 9, lambda token: False, lambda why: None, sampling, answer=list(answer))


def chosen(logits: torch.Tensor, *requests: GenerationRequest) -> list[int]:
    """What is chosen of logits [rows, vocab] once each request has its answer."""
    sampler = Sampler(len(requests), vocab=6)
    for row, request in enumerate(requests):
        sampler.begin(row, request)
        for token in request.answer:
            if sampler.counts is not None:
                sampler.counts[row, token] += 1
    return sampler.choose(logits, 0, [len(request.answer) for request in requests]).tolist()


def test_draws_depend_on_seed_and_sequence_only():
    def drawn(seed: int, index: int, beside: tuple[Sampling, ...] = ()) -> list[int]:
        requests = [asked(other) for other in (*beside, Sampling(temperature=1.0, seed=(seed, index)))]
        sampler = Sampler(len(requests), vocab=6)
        for row, request in enumerate(requests):
            sampler.begin(row, request)
        return [int(sampler.choose(LOGITS.repeat(len(requests), 1), 0, [place] * len(requests))[-1]) for place in range(40)]

    others = (
        Sampling(temperature=0.7, top_k=2),
        Sampling(),
        Sampling(temperature=2.0, top_p=0.5, min_p=0.1, presence_penalty=1.0),
    )
    assert drawn(0, 0) == drawn(0, 0) == drawn(0, 0, others)
    assert len({tuple(drawn(seed, index)) for seed in (0, 1) for index in (0, 1)}) == 4


def test_the_penalty_is_for_tokens_that_were_seen_however_often():
    penalty = Sampling(repetition_penalty=2.0)
    seen = [asked(penalty, [0, 0, 0, 5]), asked(penalty, [3]), asked(penalty, [0], [1]), asked(Sampling(), [0])]
    assert chosen(LOGITS.repeat(4, 1), *seen) == [1, 0, 0, 0]
    below = torch.tensor([[-1.0, -1.5, 0, 0, 0, 0, 0]]) - 5
    assert chosen(below, asked(penalty, [2, 3, 4, 5])) == [0]


@pytest.mark.parametrize(
    ("sampling", "answer", "expected"),
    [
        ({"presence_penalty": 0.6}, [0], 1),  # 2.0 - 0.6 < 1.5
        ({"presence_penalty": 0.4}, [0, 0, 0], 0),
        ({"frequency_penalty": 0.4}, [0], 0),
        ({"frequency_penalty": 0.4}, [0, 0], 1),
        ({"frequency_penalty": -1.0}, [2, 2], 2),
        ({"logit_bias": ((3, 3.0), (0, -1.0))}, [], 3),
        ({"logit_bias": ((6, 100.0),)}, [], 0),
        ({"temperature": 5.0, "min_p": 0.99}, [], 0),
        ({"temperature": 5.0, "top_k": 1}, [], 0),
    ],
)
def test_penalties_and_biases(sampling, answer, expected):
    """The prompt counts for neither presence nor frequency. An id that is no token is left out of the biases."""
    sampling["logit_bias"] = tuple((token, added) for token, added in sampling.get("logit_bias", ()) if token < 6)
    assert chosen(LOGITS[None], asked(Sampling(**sampling), [0, 0], answer)) == [expected]


def test_min_p_is_of_the_likeliest():
    sampling = Sampling(temperature=1.0, min_p=0.3)  # exp(-1) is kept, exp(-2) is not
    drawn = {chosen(LOGITS[None], asked(Sampling(temperature=1.0, min_p=0.3, seed=seed)))[0] for seed in range(200)}
    assert drawn == {0, 1, 2}
    assert sampling.min_p < np.exp(-1)


def test_logprobs_are_of_the_models_own_distribution():
    token = told(LOGITS, 3, 2, vocab=6)
    expected = LOGITS[:6].log_softmax(-1)
    assert token.id == 3
    assert token.logprob == pytest.approx(float(expected[3]))
    assert [(place, pytest.approx(float(value))) for place, value in enumerate(expected[:2])] == list(token.likeliest)
    assert told(LOGITS, 3, 0, vocab=6).likeliest == ()


@pytest.fixture
def checkpoint(tmp_path):
    """A folder with a byte-level tokenizer of transformers' and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    configure(tmp_path, TEMPLATE)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [259, 7]}))
    return tmp_path


def configure(folder, template):
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if value}))


def test_a_checkpoints_own_chat_template(checkpoint):
    tokenizer = open_tokenizer(checkpoint)
    assert isinstance(tokenizer, LibraryTokenizer)
    ids = tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Où → ?"}])
    assert tokenizer.decode(ids) == "<|system|>Be brief.<|end|><|user|>Où → ?<|end|><|assistant|>"
    assert (tokenizer.size, ids[0], ids[-1]) == (260, 256, 258)
    assert tokenizer.stop_ids(chat=True) == {259, 7}
    assert tokenizer.decode_bytes(tokenizer.encode("Où")) == "Où".encode()
    stream = TextStream(tokenizer.decode)
    pieces = [stream.add(token) for token in tokenizer.encode("Où → 🇨🇳")]
    assert "".join(pieces) == "Où → 🇨🇳"
    assert not any(UNFINISHED in piece for piece in pieces)


def test_a_template_runs_in_a_sandbox(checkpoint):
    for template in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ raise_exception('no') }}"):
        configure(checkpoint, template)
        with pytest.raises(UserError, match=r"the chat template says: (access to attribute '__class__'|no)"):
            Prompt("--prompt", messages=[{"role": "user", "content": "a"}]).ids(open_tokenizer(checkpoint), None)


def test_without_a_template_there_is_no_chat(checkpoint):
    configure(checkpoint, None)
    with pytest.raises(UserError, match="has no chat template; leave out --chat"):
        Prompt("--prompt", messages=[{"role": "user", "content": "a"}]).ids(open_tokenizer(checkpoint), None)


def test_code_of_a_tokenizer_is_not_run(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="holds no tokenizer that transformers can read") as raised:
        open_tokenizer(tmp_path)
    assert "\n" not in str(raised.value)


def test_chatml_is_what_the_original_writes():
    tokenizer = open_tokenizer(checkpoint_folder("tiny-qwen"))
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": " uno\n"},
        {"role": "user", "content": "two"},
    ]
    assert tokenizer.chat(messages) == tokenizer.chat_prompt("two", [("one", "uno")], SYSTEM)
    told = tokenizer.chat([{"role": "system", "content": "Be brief."}, *messages[:1]])
    assert told == tokenizer.chat_prompt("one", system="Be brief.")
    assert tokenizer.stop_ids(chat=True) == {tokenizer.im_start, tokenizer.im_end, tokenizer.end_of_text}
    assert tokenizer.stop_ids(chat=False) == {tokenizer.end_of_text}


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 5 seconds"),
        ("{{ 'a' * 10 ** 10 }}", "MB of memory"),
        ("{% for a in range(9999) %}{{ 'a' * 1000 }}{% endfor %}", "more than 4,194,304 characters"),
        ("{{ ((", "TemplateSyntaxError"),
        ("{{ messages.nothing.more }}", "UndefinedError"),
    ],
    ids=["loops", "grows", "long", "syntax", "undefined"],
)
@pytest.mark.seconds
def test_a_template_has_limits(checkpoint, template, says):
    configure(checkpoint, template)
    with pytest.raises(UserError, match="its chat template cannot be rendered") as error:
        open_tokenizer(checkpoint).chat([{"role": "user", "content": "a"}])
    assert says in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b'{"version": "1.0"}',
        b"\xff",
        b'{"model": ' * 50_000,
        b'{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}',
    ],
    ids=["empty", "no keys", "list", "no model", "no UTF-8", "deep", "negative id"],
)
def test_a_broken_tokenizer_is_one_line(checkpoint, content, capfd):
    (checkpoint / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        open_tokenizer(checkpoint).encode("a")
    assert "\n" not in str(error.value)
    assert capfd.readouterr().err == ""
