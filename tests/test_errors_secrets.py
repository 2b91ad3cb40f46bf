"""Texts that leave the process hold no secrets."""

import io
import logging
import string
import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isim.errors import UserError, hide_secrets, without_secrets

SCHEMES = ["http", "https", "postgresql+psycopg2", "ssh", "s3"]
# What people put into passwords, quoted or not.
PASSWORDS = st.text(string.ascii_letters + string.digits + "@/:?#%&+=!~.", min_size=5, max_size=20)


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
    ],
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
    ],
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
)
def test_what_the_environment_hides_is_hidden_in_pieces_too(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    for text in ("nonnumeric port: 'hidd3n'", "no host hidd3n@pa", "at hidd3n%40pa%2Frt now"):
        assert "hidd3n" not in without_secrets(text)
        assert "hidd3n" not in str(UserError(text))


def test_the_shell_s_own_folder_is_no_secret(monkeypatch):
    monkeypatch.setenv("PWD", "/home/ann/mlflow")
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
