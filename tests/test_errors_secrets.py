"""Texts that leave the process hold no secrets."""

import io
import itertools
import logging
import string
import time
import traceback
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

import isim.stages as stage_modules
from isim import cli
from isim.errors import UserError, hide_secrets, reason, without_secrets
from isim.params import LABEL_SETS, Params

SCHEMES = ["http", "https", "postgresql+psycopg2", "ssh", "s3"]
# What people put into passwords, quoted or not.
PASSWORDS = st.text(string.ascii_letters + string.digits + "@/:?#%&+=!~.", min_size=5, max_size=20)

# Tables of secrets are numbered: pytest writes the names of tests into the environment, from where
# their secrets would be known.


@given(st.sampled_from(SCHEMES), st.sampled_from(["user", "me@home", ""]), PASSWORDS)
def test_no_password_of_an_address_is_shown(scheme, user, password):
    text = f"cannot reach '{scheme}://{user}:Zq9{password}Zq9@host:5000/a b': refused"
    shown = without_secrets(text)
    assert "Zq9" not in shown and "host:5000/a b': refused" in shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://h/db?password=s3cret@1&x=1", "postgresql://h/db?password=***&x=1"),
        ("http://h/?a=1&token=s3cret#top", "http://h/?a=1&token=***#top"),
        ("host=h password='s3 cret' user=u", "host=h password=*** user=u"),
        ("{'api_key': 's3cret', 'n': 1}", "{'api_key': ***, 'n': 1}"),
        ("https://s3cret@github.com/a/b.git", "https://***@github.com/a/b.git"),
        ("Authorization: Bearer s3cret.abc", "Authorization: Bearer ***"),
        ("AWS_SECRET_ACCESS_KEY=s3cret", "AWS_SECRET_ACCESS_KEY=***"),
        ("password: s3cret", "password: ***"),
        ("the API key: s3cret", "the API key: ***"),
        ("hf_token=s3cret accessToken='s3 cret'", "hf_token=*** accessToken=***"),
        ('{"hf_token": "s3cret", "n": 1}', '{"hf_token": ***, "n": 1}'),
        (r"{\"password\": \"s3cret\"}", r"{\"password\": ***}"),
        (r'password="s3\"cret" n=1', "password=*** n=1"),
        ("password='s3 cret, cut off\nnext line", "password=***\nnext line"),
        ("Server=h;UID=u;PWD=s3cret;x=1", "Server=h;UID=u;PWD=***;x=1"),
        ("http://h/?X-Amz-Signature=" + "0a" * 32, "http://h/?X-Amz-Signature=***"),
        ("http://user:s3 cret@h/x: refused", "http://***@h/x: refused"),
        ("{'Authorization': b'Basic czNjcmV0'}", "{'Authorization': b'Basic ***'}"),
        ("sent Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIi0", "sent Bearer ***"),
        ("https://s3cret@s3cret@github.com/a@b", "https://***@github.com/a@b"),
        ("a://u:s3cret@h,b://u:s3cret@h/x", "a://***@h/x"),
    ],
    ids=itertools.count(),
)
def test_secrets_are_known_by_the_words_before_them(text, shown):
    assert without_secrets(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "cannot read /home/a@b/x.png: no such file; run `isim prepare` again",
        "see https://mlflow.org:443/docs#a and models:/cam@current",
        "train_cam.threshold (2) must be below 1",
        "sqlite:////home/u@x/mlflow.db",
        "3 of 10 tokens, author=me, mask_values: {255: person}",
        "pass: 3 of 5, second pass=2, bypass: none",
        "class_token: 77, class_token=77, pad_token='[PAD]', token == other, token=None",
        "signature: bad, signature=(a, b), sig=0.5",
        "a bearer animals carry, basic internationalization, Basic DeepLabCam",
        "password=None, and PWD=/home/ann, credentials: of no account",
        "http://host:5000 is down, ask me@home",
        "https://host: cannot reach me@home",
    ],
    ids=itertools.count(),
)
def test_other_texts_stay_as_they_are(text):
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MLFLOW_TRACKING_URI", "http://me:hidd3n@pa/rt@host"),
        ("MLFLOW_TRACKING_PASSWORD", "hidd3n@pa/rt"),
        ("PGPASSWORD", "hidd3n"),
        ("HF_TOKEN", "hidd3n"),
    ],
    ids=itertools.count(),
)
def test_what_the_environment_hides_is_hidden_in_pieces_too(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    for text in ("nonnumeric port: 'hidd3n'", "no host hidd3n@pa", "at hidd3n%40pa%2Frt now"):
        assert "hidd3n" not in without_secrets(text)
        assert "hidd3n" not in str(UserError(text))


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("DOCKER_HOST", "ssh://isim@x", "isim: error: no such file; run `isim predict` again"),
        ("DOCKER_HOST", "ssh://ann@build", "photos/ann/train.csv"),
        ("ORIGIN", "ssh://git@github.com", "run `git init` at github.com"),
        ("ORIGIN", "https://ann@github.com/a/b:c@d", "images of ann; run `git init`"),
        ("ORIGIN", "https://isim-data@github.com/a", "data of isim-data"),
        ("DB_PASSWORD", "train/val:0.5", "data/train.csv of split val at 0.5"),
        ("DB_PASSWORD", "train_cam", "train_cam.threshold (2) must be below 1"),
        ("DB_PASSWORD", "cannot@predict", "cannot predict"),
        ("DB_PASSWORD", "abc", "abc"),
        ("STORE", "sqlite:///photos/ann:x/b@c", "photos/ann/x"),
    ],
    ids=itertools.count(),
)
def test_no_honest_word_is_taken_for_a_secret_of_the_environment(name, value, text, monkeypatch):
    monkeypatch.setenv(name, value)
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ORIGIN", "https://ghp0123456789@github.com/a", "no user 'ghp0123456789'"),
        ("DB_PASSWORD", "h1dd", "no account of h1dd"),
        ("MYSQL_PASS", "train/val:0.5", "tried 'train/val:0.5'"),
        ("STORE", "http://me:pa ss@host", "not a port: 'pa ss'"),
    ],
    ids=itertools.count(),
)
def test_a_secret_of_the_environment_is_hidden_elsewhere(name, value, text, monkeypatch):
    monkeypatch.setenv(name, value)
    assert "***" in without_secrets(text) and value not in without_secrets(text)


def test_words_of_this_program_are_no_secrets(monkeypatch):
    stages = [file.stem for file in Path(stage_modules.__file__).parent.glob("[a-z]*.py")]
    commands = [command.name for command in cli.app.registered_commands]
    words = {*Params.model_fields, *stages, *LABEL_SETS, "cam", "isim"}
    assert len(words) > 15 and "predict" in commands
    for word in sorted(words | {word for name in commands for word in (name, *name.split("-"))}):
        monkeypatch.setenv("DB_PASSWORD", word)
        assert without_secrets(f"run {word} again") == f"run {word} again"


# Each grows with the square of its length if a search begins anew at every character, word, address
# or quote, and looks to the end each time.
LONG = {
    "word": "a",
    "dashes": "a-",
    "schemes": "a://",
    "ports": "x://a:b",
    "users": "x://a:b@",
    "blanks": "x://a:b ",
    "names": "password",
    "values": "password=",
    "quotes": 'password="',
    "escapes": 'password="\\"',
    "backslashes": "\\",
    "spaces": "token      ",
    "tokens": "token='",
    "headers": "authorization: basic ",
    "bearers": "bearer",
    "schemes of one word": "Bearer Bearer",
    "colons": ":",
    "ats": "@",
    "lines": "x\n",
    "secret": "hidd3n@pa",
}


@pytest.mark.parametrize("part", LONG.values(), ids=LONG)
@pytest.mark.parametrize("start", ["", "x://a:b", "password='"])
def test_a_megabyte_takes_moments_whatever_it_holds(part, start, monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "hidd3n@pa")

    def seconds(size):
        text = start + part * (size // len(part))
        begun = time.process_time()
        without_secrets(text)
        return time.process_time() - begun

    # The short one first: a search that is quadratic takes a minute for so little, and an hour for
    # a megabyte. The bounds are far above what any takes.
    assert seconds(1 << 16) < 5
    if not start:
        assert seconds(1 << 20) < 10


def test_an_address_of_the_environment_is_taken_apart_in_moments(monkeypatch):
    monkeypatch.setenv("STORE", "x://" + "a" * 100_000)
    monkeypatch.setenv("OTHER", "a://" * 25_000)
    begun = time.process_time()
    assert without_secrets("nothing") == "nothing"
    assert time.process_time() - begun < 5


def test_half_a_secret_is_not_shown_where_a_reason_is_cut(monkeypatch):
    monkeypatch.setenv("DB_PASSWORD", "hidd3n" * 40)
    assert "hidd3n" not in reason(ValueError("odd: " + "hidd3n" * 40))


def test_the_shell_s_own_folder_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/photos/ann/mlflow")
    assert without_secrets("cannot read mlflow.db of ann") == "cannot read mlflow.db of ann"


def test_a_stream_hides_secrets_whoever_writes():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    hide_secrets(stream)
    hide_secrets(stream)
    address = "http://me:hidd3n@host/x"
    print(address, file=stream)
    logger, handler = logging.getLogger("a library"), logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.warning("retrying %s", address)
    logger.removeHandler(handler)
    try:
        raise ValueError(address)
    except ValueError:
        traceback.print_exc(file=stream)
    text = stream.buffer.getvalue().decode()
    assert "hidd3n" not in text and text.count("http://***@host/x") == 3


def test_a_stream_writes_no_control_characters_but_line_ends_and_tabs():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="", write_through=True)
    hide_secrets(stream)
    print("a\x1b[31m\u202eb\x07\tc\r", file=stream)
    stream.seek(0)
    assert stream.read() == "a\\x1b[31m\\u202eb\\x07\tc\r\n"


def test_a_bar_may_go_up_to_those_above_it():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="", write_through=True)
    hide_secrets(stream)
    upper, lower = (tqdm(total=2, file=stream, disable=False) for _ in range(2))
    lower.close()
    upper.close()
    stream.seek(0)
    shown = stream.read()
    assert "\x1b[A" in shown and "\\x1b" not in shown
