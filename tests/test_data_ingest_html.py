"""HTML to text: against Beautiful Soup on the same pages, the guide's own page, encodings, and pages made to do harm."""

import re

import pytest
from bs4 import BeautifulSoup
from hypothesis import given, settings
from hypothesis import strategies as st

from tpu_tune.data.ingest import html as pages
from tpu_tune.data.ingest.blobs import BadSource
from tpu_tune.data.ingest.html import html_text, xhtml_text

GUIDE = """
<title>Example HTML Page</title>
<h1>Welcome to the Example Page</h1>
<p>This is a paragraph of text.</p>
<div class="content">
    <h2>Section 1</h2>
    <p>This is the first section.</p>
<div class="content">
    <h2>Section 2</h2>
    <p>This is the second section.</p>
"""
GUIDE_LINES = [
    "Example HTML Page", "Welcome to the Example Page", "This is a paragraph of text.", "Section 1",
    "This is the first section.", "Section 2", "This is the second section.",
]  # fmt: skip


def soup_letters(content):
    """What Beautiful Soup sees of a page without what is dropped; letters alone, since we add marks to lists and tables."""
    soup = BeautifulSoup(content, "lxml")
    for element in soup.find_all(list(pages._DROPPED)):
        element.decompose()
    for element in [*soup.find_all(attrs={"role": "navigation"}), *soup.find_all("a", class_="headerlink")]:
        if not element.decomposed:
            element.decompose()
    return letters(soup.get_text())


def letters(text):
    return re.sub(r"[\W\d_]", "", text)


def test_the_guides_page_gives_the_guides_lines():
    text = html_text(GUIDE.encode())
    assert [line for line in text.splitlines() if line] == GUIDE_LINES
    with_more = GUIDE + "<script>alert('no')</script><style>p {}</style><nav><a>Home</a></nav><template>x</template>"
    assert html_text(with_more.encode()) == text
    assert text.split("\n\n") == GUIDE_LINES  # each is a paragraph


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>a<b>b</b>  c\n d<br>e</p><p>f", "ab c d\ne\n\nf"),
        ("<ul><li>x<li><p>y</p><p>z</p><ol start=3><li>n<li>m</ol></ul>", "- x\n- y\n\nz\n  3. n\n  4. m"),
        ("<pre>\n  x = 1\n\n\ty &lt; 2\n</pre>", "  x = 1\n\n\ty < 2"),
        ("<table><caption>C</caption><tr><th>A<th>B</tr><tr><td><p>1</p><td></table>", "C\nA | B\n1 |"),
        (
            "<table><tr><td><h1>H</h1><p>p</p></td><td>side</td></tr></table>",
            "H\n\np\n\nside",
        ),  # a table that arranges a page
        ("<dl><dt>t<dd><p>d</p></dl>", "t\nd"),
        ("caf&eacute; &amp; &#x1F600; &nbsp;&unknown; &lt;", "café & 😀 \xa0&unknown; <"),
        ("<head><title>T</title><meta name=x content=y><style>s</style></head><body>b", "T\n\nb"),
        ("<h2>Head<a class='headerlink' href='#x'>¶</a></h2><div role='navigation'>next</div>text", "Head\n\ntext"),
        ("<svg><text>no</text></svg><noscript>no</noscript>yes", "yes"),
        ("", ""),
        ("<!-- only -->", ""),
        ("<html></html>", ""),
        ("<p>a<br><br>b", "a\n\nb"),
        ("</p></div></table></td></tr></li>x</ul></body></html>y<td>z</td><li>w", "x\n\ny\nz\n- w"),
    ],
)
def test_blocks(page, text):
    assert html_text(page.encode("utf-8")) == text


TAGS = (
    "p div span b ul ol li dl dt dd table tr td th caption pre br h1 h2 a nav script style template blockquote title "
    "select noscript section svg iframe textarea hr center font form tbody"
).split()
PIECES = st.one_of(
    st.sampled_from(TAGS).map("<{}>".format),
    st.sampled_from(TAGS).map("</{}>".format),
    st.sampled_from(
        ["one ", " two", "three\n", "&amp;", "é ", "<div role=navigation>", "<a class=headerlink>", "<!-- c -->"]
    ),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=40).map("".join))
def test_any_page_has_the_words_that_beautiful_soup_finds(page):
    assert letters(html_text(page.encode("utf-8"))) == soup_letters(page)


def test_real_pages_have_the_words_that_beautiful_soup_finds(python_docs_dir):
    files = sorted(python_docs_dir.rglob("*.html"))
    assert len(files) == 530
    for path in files[::60]:
        content = path.read_bytes()
        assert letters(html_text(content)) == soup_letters(content), path


@pytest.mark.slow
def test_all_real_pages_have_the_words_that_beautiful_soup_finds(python_docs_dir):
    for path in sorted(python_docs_dir.rglob("*.html")):
        content = path.read_bytes()
        assert letters(html_text(content)) == soup_letters(content), path


def test_structure_of_a_real_page(python_docs_dir):
    text = html_text((python_docs_dir / "library" / "csv.html").read_bytes())
    assert text.startswith("csv — CSV File Reading and Writing — Python 3.11")
    assert ">>> import csv\n>>> with open('eggs.csv', newline='') as csvfile:\n...     spamreader" in text
    assert "¶" not in text and "Previous topic" not in text and "\n\n\n" not in text
    table = html_text((python_docs_dir / "library" / "string.html").read_bytes())
    assert "\nOption | Meaning\n'<' | Forces the field to be left-aligned" in table


@pytest.mark.parametrize(
    ("content", "given"),
    [
        ("<meta charset=shift_jis><p>日本語".encode("shift_jis"), ""),
        ('<meta http-equiv="Content-Type" content="text/html; charset=euc-jp"><p>日本語'.encode("euc-jp"), ""),
        ("<p>日本語".encode("utf-16"), ""),
        ("<p>日本語".encode("utf-8-sig"), ""),
        ("<p>日本語".encode("cp932"), "cp932"),
        ("<p>日本語".encode(), ""),
    ],
)
def test_encodings(content, given):
    assert html_text(content, given) == "日本語"


def test_an_encoding_that_nothing_declares_is_found():
    text = "Заголовок этой страницы написан по-русски, и никто не сказал, в какой кодировке она сохранена. " * 3
    assert html_text(f"<p>{text}".encode("cp1251")) == text.strip()
    assert html_text(b"<meta charset=iso-8859-1><p>\x93quoted\x94") == "“quoted”"  # as browsers read it


def test_a_page_that_is_not_what_it_declares():
    with pytest.raises(BadSource, match=r"^not valid UTF-8 \(line 2, byte 6; .*, which it declares$"):
        html_text(b"<meta charset=utf-8>\n<p>ab\xff")


def test_pages_made_to_do_harm():
    assert html_text(b"<div>" * 100_000 + b"deep") == "deep"
    assert html_text(b"<ul><li>" * 3_000 + b"deep").endswith("- deep")
    assert len(html_text(b"<p>" + b"x" * 12_000_000)) == 12_000_000
    assert html_text(b"<p>" + b"<td>" * 20_000 + b"x" + b"<tr>" * 20_000) == "x"


def test_xhtml_is_read_as_xml_and_its_entities_do_not_grow():
    page = (
        '<?xml version="1.0" encoding="utf-8"?>\n<!DOCTYPE html [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
        '<html xmlns="http://www.w3.org/1999/xhtml"><head><title/><script/></head><body><p>x&nbsp;&eacute; {}</p>'
        "<div/><p>y &amp; z</p></body></html>"
    )
    assert xhtml_text(page.replace("{}", "").encode()) == "x\xa0é\n\ny & z"  # <title/> swallows the page in HTML
    assert "ha" not in xhtml_text(page.replace("{}", "&b;").encode())
    assert xhtml_text(b"<p>not <b>well-formed") == "not well-formed"
