"""Check that the page lists every error class and every list of names in a report."""

from pathlib import Path

from reshard import errors

page: Path = globals()["PAGE"]
text = page.read_text()
classes = [name for name, kind in vars(errors).items() if isinstance(kind, type)]
assert [name for name in classes if f"`{name}`" not in text and f"errors.{name}`" not in text] == []
fields = ("missing_keys", "unexpected_keys", "cast", "dropped", "differing", "pickled")
assert [name for name in fields if f"| `{name}` |" not in text] == []
