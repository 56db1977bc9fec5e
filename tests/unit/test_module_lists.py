"""Each top folder's README lists its modules as they are."""

import pytest

from tools.module_lists import FOLDERS, ROOT, renewed


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_list_of_modules_is_up_to_date(folder: str) -> None:
    assert (ROOT / folder / "README.md").read_text() == renewed(folder), "run ./tools/segue module-lists --write"
