"""The generated page of messages is the one in the tree."""

from tools.message_reference import PAGE, page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run ./tools/segue message-reference --write"
