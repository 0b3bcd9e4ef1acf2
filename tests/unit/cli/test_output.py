"""Tables line up."""

from __future__ import annotations

from rafaga.cli._output import table


def test_numbers_stand_to_the_right_and_text_to_the_left() -> None:
    assert table(("NAME", "N", "VALUE"), [("a", 1, 0.5), ("long name", 10, 371.123456), ("", 100, 2.0)]) == (
        "NAME         N    VALUE\n"
        "a            1      0.5\n"
        "long name   10  371.123\n"
        "           100        2"
    )  # fmt: skip


def test_the_longest_texts_lose_their_beginnings_to_fit() -> None:
    path = "photos/summer/street.jpg"
    assert table(("FILE", "LABEL"), [(path, "car"), ("a.jpg", "bicycle")], 24) == (
        "FILE             LABEL\n"
        "…mer/street.jpg  car\n"
        "a.jpg            bicycle"
    )  # fmt: skip
    assert path in table(("FILE", "LABEL"), [(path, "car")])
