"""The tokenizer: nothing is lost, text never becomes control tokens, masks, streaming, training."""

import errno
import gzip
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.errors import UserError
from minimind.paths import ROOT, TOKENIZER_DIR
from minimind.tokenizer import CONTROL_TOKENS, TOKENIZER_FILES, StreamDecoder, Tokenizer
from minimind.tokenizer_training import TokenizerOptions, main, read_texts, train_tokenizer

SHARED = ROOT.parent / "shared" / "data"
MINIMIND2 = SHARED / "minimind2_tokenizer"
needs_shared = pytest.mark.skipif(not MINIMIND2.exists(), reason="needs the shared data directory")

# Control tokens whole, broken and glued, so that random text often comes near them.
any_text = st.text() | st.lists(
    st.sampled_from([*CONTROL_TOKENS, "<|im_", "end|>", "\n", " ", "你好", "7"])
).map("".join)

CONVERSATION = [
    {"role": "system", "content": "你是一个有用的助手。"},
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "<think>\n12 + 30 = 42\n</think>\n<answer>\n42\n</answer>"},
    {"role": "user", "content": "谢谢！"},
    {"role": "assistant", "content": "不客气。"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load()


@pytest.fixture(
    scope="module", params=[TOKENIZER_DIR, pytest.param(MINIMIND2, marks=needs_shared)], ids=["ours", "mm2"]
)
def either(request):
    """Our tokenizer and, where it is at hand, the published MiniMind2 one."""
    return Tokenizer.load(request.param)


def test_ids_and_size(either):
    assert (either.pad_id, either.bos_id, either.eos_id) == (0, 1, 2)
    assert either.vocab_size == len(either.token_bytes) == 6400
    assert either.token_bytes[:3] == [b"", b"", b""]
    assert all(either.token_bytes[3:])
    assert {bytes([byte]) for byte in range(256)} <= set(either.token_bytes)


def test_digits_are_split_one_by_one(tokenizer):
    assert [tokenizer.token_bytes[i] for i in tokenizer.encode("20260115")] == [
        b"%c" % d for d in b"20260115"
    ]
    assert not [
        token for token in tokenizer.token_bytes if len(token) > 1 and any(48 <= b < 58 for b in token)
    ]


@settings(max_examples=60)
@given(text=any_text)
def test_any_text_comes_back_and_never_holds_control_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & {0, 1, 2}
    assert tokenizer.encode_batch([text, text]) == [ids, ids]
    assert tokenizer.encode_document(text) == [1, *ids, 2]


def test_lone_surrogates_become_replacement_characters(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.encode_batch(["ok", "\ud83d\ude00"]) == [tokenizer.encode("ok"), tokenizer.encode("😀")]


def test_decode_shows_control_tokens_on_request(tokenizer):
    ids = tokenizer.encode_document("你好")
    assert tokenizer.decode(ids) == "你好"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>你好<|im_end|>"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("control", CONTROL_TOKENS)
def test_control_tokens_in_a_message_are_text(either, role, control):
    plain = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    hostile = [{**m, "content": f"x{control}y"} if m["role"] == role else m for m in plain]
    controls = [i for i in either.encode_chat(plain)[0] if i < 3]
    for ids, _ in (either.encode_chat(hostile), *either.encode_chat_batch([hostile])):
        assert [i for i in ids if i < 3] == controls
        assert f"x{control}y" in either.decode(ids)


def test_control_tokens_in_a_role_are_refused(tokenizer):
    with pytest.raises(UserError, match="not a plain word"):
        tokenizer.encode_chat([{"role": "user<|im_end|>", "content": "hi"}])


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("generate", [False, True])
def test_chat_equals_transformers(either, length, first, generate):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(either.path)
    messages = CONVERSATION[first : first + length]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
    assert either.render_chat(messages, generate) == rendered
    ids, mask = either.encode_chat(messages, generate)
    assert ids == theirs.encode(rendered, add_special_tokens=False)
    assert len(mask) == len(ids)


def test_transformers_reads_the_shipped_directory(tokenizer):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tokenizer.path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs)) == (1, 2, 0, 6400)
    text = "混合 mixed text，with 123 digits\n\n\tcode() {}  "
    assert theirs.encode(text, add_special_tokens=False) == tokenizer.encode(text)


def test_chatml(tokenizer):
    assert tokenizer.render_chat(CONVERSATION[3:], add_generation_prompt=True) == (
        "<|im_start|>user\n谢谢！<|im_end|>\n<|im_start|>assistant\n不客气。<|im_end|>\n<|im_start|>assistant\n"
    )


def test_mask_covers_answers_and_the_end_token_that_closes_them(either):
    ids, mask = either.encode_chat(CONVERSATION)
    learned = either.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    assert learned == "".join(m["content"] + "<|im_end|>" for m in CONVERSATION if m["role"] == "assistant")
    assert sum(either.encode_chat(CONVERSATION[:2], add_generation_prompt=True)[1]) == 0


def test_templates_of_long_conversations_are_not_kept(tokenizer):
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 50
    tokenizer.encode_chat(messages[:2])
    kept = tokenizer._chat_pieces.cache_info().currsize
    ids, _ = tokenizer.encode_chat(messages)
    assert tokenizer._chat_pieces.cache_info().currsize == kept > 0
    assert ids == tokenizer.encode_chat(messages[:2])[0] * 50


def test_a_batch_of_chats_is_each_chat(either):
    conversations = [CONVERSATION, CONVERSATION[:3], CONVERSATION[1:]]
    assert either.encode_chat_batch(conversations) == [either.encode_chat(c) for c in conversations]
    assert either.encode_chat_batch([]) == []


def test_a_worker_gets_the_same_tokenizer(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode_chat(CONVERSATION) == tokenizer.encode_chat(CONVERSATION)


@settings(max_examples=50)
@given(ids=st.lists(st.integers(0, 6399)))
def test_stream_gives_the_text_of_any_ids(tokenizer, ids):
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_stream_never_gives_half_a_character(tokenizer):
    text = "鱻龘𠮷🦜 rare 字"
    stream = StreamDecoder(tokenizer)
    pieces = [
        stream.push(byte_id)
        for byte_id in map(tokenizer.token_bytes.index, [b"%c" % b for b in text.encode()])
    ]
    assert [piece for piece in pieces if piece] == list(text)
    assert stream.flush() == ""
    stream.push(tokenizer.token_bytes.index("鱻".encode()[:1]))
    assert stream.flush() == "\ufffd"
    assert stream.push(tokenizer.encode("a")[0]) == "a"


def characters_per_token(tokenizer: Tokenizer, name: str) -> float:
    texts = list(read_texts(SHARED / f"{name}.jsonl.gz"))
    return sum(map(len, texts)) / sum(map(len, tokenizer.encode_batch(texts)))


@needs_shared
@pytest.mark.parametrize("name", ["pretrain_val", "sft_mini_512", "dpo", "r1_mix_1024"])
def test_compresses_better_than_minimind2(tokenizer, name):
    assert characters_per_token(tokenizer, name) > characters_per_token(Tokenizer.load(MINIMIND2), name)


def broken_copy(directory: Path, **changes: str) -> Path:
    for name in TOKENIZER_FILES:
        (directory / name).write_text((TOKENIZER_DIR / name).read_text())
    for name, text in changes.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def test_user_errors_name_the_file_and_the_mend(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*tokenizer\.json.*give a directory"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a tokenizer"):
        Tokenizer.load(broken_copy(tmp_path, tokenizer__json="{}"))
    swapped = (TOKENIZER_DIR / "tokenizer.json").read_text().replace("<|im_start|>", "<s>")
    with pytest.raises(UserError, match="tokens 0, 1, 2 are"):
        Tokenizer.load(broken_copy(tmp_path, tokenizer__json=swapped))
    not_special = (
        (TOKENIZER_DIR / "tokenizer.json").read_text().replace('"special": true', '"special": false')
    )
    with pytest.raises(UserError, match="None, None, None"):
        Tokenizer.load(broken_copy(tmp_path, tokenizer__json=not_special))
    not_bytes = (TOKENIZER_DIR / "tokenizer.json").read_text().replace("Ġ", "▁")
    with pytest.raises(UserError, match="not byte-level"):
        Tokenizer.load(broken_copy(tmp_path, tokenizer__json=not_bytes))
    with pytest.raises(UserError, match="is not JSON"):
        Tokenizer.load(broken_copy(tmp_path, tokenizer_config__json="{"))
    broken = (
        "",
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{{ 1 / 0 }}",
        "{{ 1 + 'a' }}",
        "{{ 'a' * 10**18 }}",
    )
    for template in broken:
        with pytest.raises(UserError, match="chat"):
            Tokenizer.load(broken_copy(tmp_path, chat_template__jinja=template)).render_chat(CONVERSATION)


def test_fingerprint_follows_vocabulary_and_template(tokenizer, tmp_path):
    same = Tokenizer.load(broken_copy(tmp_path))
    other = Tokenizer.load(broken_copy(tmp_path, chat_template__jinja="{{ messages[0].content }}"))
    assert tokenizer.fingerprint == same.fingerprint != other.fingerprint


@pytest.fixture
def corpus(tmp_path):
    """One small file of each kind that training reads."""
    chat = [
        {"role": "user", "content": "今天天气怎么样？"},
        {"role": "assistant", "content": "今天天气很好。"},
    ]
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": "今天天气很好，the weather is fine. " * 9}) + "\n\n"
    )
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps({"conversations": chat}) + "\n")
    worse = [chat[0], {"role": "assistant", "content": "不知道。"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"chosen": chat, "rejected": worse}) + "\n")
    (tmp_path / "d.txt").write_text("plain words and more plain words\r\n", encoding="utf-8-sig")
    return tuple(tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl", "d.txt"))


def test_what_training_reads_of_each_kind_of_file(corpus):
    assert [text for path in corpus for text in read_texts(path)] == [
        "今天天气很好，the weather is fine. " * 9,
        "今天天气怎么样？\n今天天气很好。",
        "今天天气怎么样？\n今天天气很好。\n不知道。",
        "plain words and more plain words",
    ]


def test_train_command(corpus, tmp_path, capsys):
    main([*map(str, corpus), "--vocab_size", "300", "--out_dir", str(tmp_path / "out")])
    out = capsys.readouterr().out
    assert "300 entries" in out
    assert "characters per token" in out
    trained = Tokenizer.load(tmp_path / "out")
    assert trained.vocab_size == 300
    assert "天气".encode() in b"|".join(trained.token_bytes)
    assert trained.render_chat(CONVERSATION) == Tokenizer.load().render_chat(CONVERSATION)


def test_training_is_deterministic(corpus, tmp_path):
    once, again = (train_tokenizer(TokenizerOptions(corpus, 320, tmp_path / name)) for name in ("x", "y"))
    assert once.fingerprint == again.fingerprint


def test_training_reads_every_kth_record_of_a_large_file(tmp_path, monkeypatch):
    (tmp_path / "big.txt").write_text("".join(f"{'even' if i % 2 == 0 else 'wxyz'}\n" for i in range(1000)))
    trained = train_tokenizer(TokenizerOptions((tmp_path / "big.txt",), 262, tmp_path / "out", max_mb=0.0025))
    assert b"even" in trained.token_bytes
    assert b"wx" not in trained.token_bytes


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", b"", "no usable record"),
        ("a.txt", b"\n \n", "no usable record"),
        ("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', r"a\.jsonl:2: text: missing"),
        ("a.jsonl", b'{"txt": "b"}\n', "no field text, conversations or chosen"),
        ("a.jsonl", b'{"text": "a"}\nnot json\n', r"a\.jsonl:2: line: broken JSON.*\n.*--on_bad_record skip"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: text: expected `str`"),
        ("a.jsonl", b'{"text": "\xff"}\n', "no usable record"),
        ("a.txt", b"a\n\xff\n", r"a\.txt:2: line: byte 1 of the line \(0xff\) is not UTF-8"),
        ("a.txt", b"a" * (3 << 20), r"a\.txt:1: line: longer than 2 MiB"),
        ("a.txt.gz", gzip.compress(b"a\n" * 99, mtime=0)[:-9], "damaged gzip data"),
    ],
)
def test_training_errors(tmp_path, name, content, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message):
        train_tokenizer(TokenizerOptions((file,), 300, tmp_path / "out"))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_training_goes_on_without_bad_records(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": 1}\n{"text": "春天"}\n')
    (tmp_path / "b.txt").write_bytes(b"\xff\nwords\n")
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    main([*files, "--on_bad_record", "skip", "--vocab_size", "300", "--out_dir", str(tmp_path / "out")])
    assert f"2 bad records left out; the first: {files[0]}:1: text: expected" in capsys.readouterr().out
    assert Tokenizer.load(tmp_path / "out").vocab_size > 259


def test_a_tokenizer_that_cannot_be_written_leaves_the_one_before(corpus, tmp_path, monkeypatch):
    before = train_tokenizer(TokenizerOptions(corpus, 280, tmp_path / "out"))

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"could not write .*: No space left on device"):
        train_tokenizer(TokenizerOptions(corpus, 300, tmp_path / "out"))
    assert Tokenizer.load(tmp_path / "out").fingerprint == before.fingerprint
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_impossible_arguments_are_refused(corpus):
    with pytest.raises(UserError, match="259"):
        TokenizerOptions(corpus, 258)
    with pytest.raises(UserError, match="--max_mb 0"):
        TokenizerOptions(corpus, max_mb=0)
    with pytest.raises(UserError, match=r"--out_dir .*a\.jsonl cannot be written to"):
        train_tokenizer(TokenizerOptions(corpus, 300, corpus[0]))


def test_command_line_errors_are_one_sentence():
    command = [sys.executable, "-m", "minimind", "tokenizer", "missing.jsonl"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stderr.startswith("error: missing.jsonl: no such file")
    assert "Traceback" not in run.stderr


def test_import_is_light():
    code = "import minimind.tokenizer, sys; assert not {'torch', 'transformers', 'jinja2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
