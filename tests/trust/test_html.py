"""HTML of strings that a stranger wrote: no markup of theirs has an effect, whatever place they stand in."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from hf_optim.trust.html import Html, breakable, element, join, preformatted, text, with_code

HOSTILE = [
    "<script>alert(1)</script>",
    "</title></style></script><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)',
    "' autofocus onfocus='alert(1)",
    "`</code><b>x</b>`",
    "<!-- --><!DOCTYPE x>]]>",
    "&lt;script&gt; &#60;b&#62; &",
    "\u202e\x00\x1b[31m\r\n<b>",
    "javascript:alert(1)",
    "${alert(1)} {{x}}",
]


class Seen(HTMLParser):
    """What a parser sees of a piece of HTML."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.data, self.other = "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.data += data

    def handle_comment(self, data):
        self.other.append(data)

    handle_decl = unknown_decl = handle_pi = handle_comment


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_string_is_text_in_an_element_and_in_an_attribute(hostile):
    seen = Seen(element("p", hostile, element("b", hostile, title=hostile), class_=hostile))
    assert [(tag, sorted(attributes)) for tag, attributes in seen.tags] == [("p", ["class"]), ("b", ["title"])]
    assert seen.other == []
    printable = "".join(mark if mark.isprintable() else "\ufffd" for mark in hostile.replace("\r\n", " "))
    assert seen.data == 2 * printable
    assert seen.tags[1][1]["title"] == printable


@pytest.mark.parametrize("hostile", HOSTILE)
def test_only_code_has_an_effect_in_notes(hostile):
    for source in (hostile, f"a `{hostile}` b", f"`` {hostile}"):
        seen = Seen(with_code(source))
        assert {tag for tag, _ in seen.tags} <= {"code"}
        assert all(not attributes for _, attributes in seen.tags)
        assert seen.other == []


def test_code_is_marked_and_lines_are_kept_where_they_count():
    assert with_code("see `a<b` and ``c`d``") == "see <code>a&lt;b</code> and <code>c`d</code>"
    assert preformatted("a: 1\n  b: <x>\n\x07") == "a: 1\n  b: &lt;x&gt;\n\ufffd"
    assert text(" a \n b ") == " a b "


@pytest.mark.parametrize(
    "link",
    [
        "javascript:alert(1)",
        "https://evil.example/",
        "//evil.example/x",
        "/etc/passwd",
        "../x",
        "a/../../x",
        'x" onclick="alert(1)',
        "data:text/html,x",
        "x?y",
        "",
        "a b",
    ],
)
def test_links_lead_beside_the_page(link):
    with pytest.raises(ValueError, match="does not lead to a place beside the page"):
        element("a", "x", href=link)
    with pytest.raises(ValueError, match="beside the page"):
        element("img", src=link)


def test_links_to_places_of_the_page_and_to_files_beside_it():
    assert element("a", "x", href="#card-1") == '<a href="#card-1">x</a>'
    assert element("a", "x", href="a%20b/README.md") == '<a href="a%20b/README.md">x</a>'


@pytest.mark.parametrize("name", ["onclick", "onLoad".lower(), "style", "a b", "x>"])
def test_attributes_that_a_policy_forbids_are_refused(name):
    with pytest.raises(ValueError, match="not an attribute"):
        element("p", **{name: "x"})
    with pytest.raises(ValueError, match="not the name of an element"):
        element("p><script")


def test_values_of_attributes_and_empty_elements():
    assert element("input", hidden=True, checked=False, title=None, data_v=0) == '<input hidden data-v="0">'
    assert join([Html("<b>x</b>"), "<i>"], "<") == "<b>x</b>&lt;&lt;i&gt;"


def test_a_name_may_break_after_an_underscore():
    assert breakable("<b>demo_model") == "&lt;b&gt;demo_<wbr>model"
