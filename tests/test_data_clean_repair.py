"""Unicode repair, and the masks of e-mail addresses and phone numbers, on what is one and what only looks like one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpu_tune.data.clean import CleanOptions, row_cleaner
from tpu_tune.data.clean.repair import fix_unicode, mask_emails, mask_phones


@pytest.mark.parametrize(
    "text, masked",
    [
        ("write to a.b+c@example.com.", "write to [EMAIL]."),
        ("<joe@ex-ample.co.uk>, JANE@EXAMPLE.ORG;x_1@mail.example.net", "<[EMAIL]>, [EMAIL];[EMAIL]"),
        ("'joe@example.com' and o'neil@example.ie", "'[EMAIL]' and [EMAIL]"),
        ("mailto:joe@example.com?subject=x", "mailto:[EMAIL]?subject=x"),
        ("müller@bücher.de, иван@почта.рф", "[EMAIL], [EMAIL]"),
        ("联系我joe@example.com谢谢", "联系我[EMAIL]谢谢"),
        ("joe@example.com: hi joe@example.com-", "[EMAIL]: hi [EMAIL]-"),
    ],
)
def test_emails(text, masked):
    assert mask_emails(text) == masked


@pytest.mark.parametrize(
    "text",
    [
        "logo@2x.png",
        "git@github.com:user/repo.git",
        "@user@mastodon.social",
        "react@18.2.0 and pkg@latest",
        "y = x@W.T + q@k.transpose(0, 1)",
        "@app.route('/')",
        "user@localhost, foo@bar..com, a@b.c",
        "joe at example dot com",
        "a @ b.com",
        "x" * 100 + "@example.com",
    ],
)
def test_what_is_no_email(text):
    assert mask_emails(text) == text


def test_no_text_makes_the_search_slow():
    """A quadratic search would never come back."""
    size = 300_000
    for text in (
        "a" * size,
        "a." * size,
        "a@" * size,
        "a@" + "b." * size,
        "a@" + "b" * size,
        "a@" + ("b" * 60 + "-") * 3000,
    ):
        assert mask_emails(text + "@") == text + "@"


@given(st.text("ab.@-_ +:com", max_size=40))
def test_masking_emails_twice_is_masking_once(text):
    once = mask_emails(text)
    assert mask_emails(once) == once
    if "@" not in text:
        assert once == text


@pytest.mark.parametrize(
    "text, masked",
    [
        ("Call (415) 555-2671 now", "Call [PHONE] now"),
        ("415-555-2671 or 212.736.5000", "[PHONE] or [PHONE]"),
        ("+44 20 7946 0958, +49 30 901820, +8613800138000", "[PHONE], [PHONE], [PHONE]"),
        ("tel:+1-212-736-5000", "tel:[PHONE]"),
        ("1-800-356-9377 ext. 12", "[PHONE]"),
        ("my phone: 4155552671.", "my phone: [PHONE]."),
    ],
)
def test_phones(text, masked):
    assert mask_phones(text, "US") == masked


@pytest.mark.parametrize(
    "text",
    [
        "2023-04-01 12:30:45, 01/02/2023, 20230401",
        "ISBN 978-0-306-40615-7, ISBN 0-306-40615-2, 9780306406157",
        "from 1999-2004 and 1995 2000 2005 2010",
        "2147483647 and id 4155552671",
        "192.168.100.200, version 1.22.333.4444",
        "3.14159265358979, 1,234,567,890, 6.02214076e23",
        "4111 1111 1111 1111",
        "doi 10.1000/182.212.736.5000",
        "0.2126 0.7152 0.0722",
        "020 7946 0958",  # of another country
    ],
)
def test_what_is_no_phone(text):
    assert mask_phones(text, "US") == text


def test_the_region_decides_about_numbers_without_a_country():
    assert mask_phones("020 7946 0958", "GB") == "[PHONE]"
    assert mask_phones("(415) 555-2671, +1 415 555 2671", "") == "(415) 555-2671, [PHONE]"


@pytest.mark.parametrize(
    "broken, fixed",
    [
        ("schÃ¶n", "schön"),
        ("â€œquotedâ€\x9d", "“quoted”"),
        ("cafe\u0301", "caf\u00e9"),
        ("\ud83d\ude00", "😀"),
        ("a\r\nb", "a\nb"),
        ("“curly” ！ &amp; <b>", "“curly” ！ &amp; <b>"),
        ("Ã la carte", "à la carte"),
    ],
)
def test_unicode(broken, fixed):
    assert fix_unicode(broken) == fixed


def test_all_texts_of_a_row_are_repaired_and_nothing_else():
    options = CleanOptions(fix_unicode=True, mask_email=True, mask_phone=True)
    row = {
        "messages": [
            {"role": "user", "content": "schÃ¶n joe@example.com"},
            {"role": "assistant", "content": "(415) 555-2671"},
        ],
        "author": "joe@example.com",
    }
    cleaned, hits = row_cleaner(options)(row)
    assert [message["content"] for message in cleaned["messages"]] == ["schön [EMAIL]", "[PHONE]"]
    assert cleaned["author"] == "joe@example.com" and row["messages"][1]["content"] == "(415) 555-2671"
    assert [(hit.rule, hit.effect) for hit in hits] == [
        ("unicode repaired", "changed"),
        ("e-mail masked", "changed"),
        ("phone masked", "changed"),
    ]
    assert all("joe@" not in hit.snippet and "2671" not in hit.snippet for hit in hits)
    same, hits = row_cleaner(options)(cleaned)
    assert same is cleaned and hits == []
