"""A strict reader of report pages: balanced tags, unique ids, references that resolve, text by section."""

from html.parser import HTMLParser

VOID = {"meta", "rect", "path"}  # rect and path are written as <path/>


class Page(HTMLParser):
    """Parses a whole page; ``text`` is everything a reader sees, ``sections`` the text under each h2."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self._heading: str | None = None
        self.feed(html)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "h2":
            self._heading = ""

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "h2":
            assert self._heading
            self.sections[self._heading] = ""

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self.text += data
        if self._open and self._open[-1] == "h2":
            self._heading = (self._heading or "") + data
        elif self.sections:
            self.sections[list(self.sections)[-1]] += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def check(self) -> "Page":
        """What every page must be: self-contained, without scripts, every picture described, ids unique."""
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for tag, attributes in self.tags:
            assert tag not in ("script", "link", "img", "iframe", "object", "image", "use")
            assert not {"src", "href", "style", "xlink:href"} & set(attributes)
            assert not [name for name in attributes if name.startswith("on")]
            for reference in (attributes.get("aria-labelledby") or "").split():
                assert reference in ids
            if tag == "svg" and "aria-hidden" not in attributes:
                assert attributes["role"] == "img"
                assert attributes.get("aria-labelledby") or attributes.get("aria-label")
        return self
